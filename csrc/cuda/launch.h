// How CUDA sources start kernels. Everything goes through RECURRA_LAUNCH, so that the same sources
// also compile as plain C++, with tests/cpp/cuda_emulator.h in the place of the CUDA runtime, and
// their logic is tested where there is no GPU. Under NVRTC there is nothing to start them with:
// recurra.jit does that.
#pragma once
#include "cuda/context.h"
#include "cuda/stream.h"
#include "integers.h"

#if !defined(__CUDACC_RTC__)
#include <stdexcept>
#include <string>

#if defined(RECURRA_CUDA_EMULATOR)
#include "cuda_emulator.h"
#else
#include <cuda_runtime.h>
#endif

namespace recurra::cuda {

// Whether an error says that this build cannot run on a GPU or under its driver.
inline bool is_other_build(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
         error == cudaErrorUnsupportedPtxVersion || error == cudaErrorInsufficientDriver;
}

// What this build has code for: by nvcc, 900 for sm_90.
#define RECURRA_TEXT_OF(...) #__VA_ARGS__
#define RECURRA_TEXT(...) RECURRA_TEXT_OF(__VA_ARGS__)
#if defined(__CUDA_ARCH_LIST__)
#define RECURRA_ARCHITECTURES RECURRA_TEXT(__CUDA_ARCH_LIST__)
#else
#define RECURRA_ARCHITECTURES "that its compiler does not name"
#endif

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch, which asks for it, would be blamed as well
  std::string text = std::string("recurra: ") + what + ": " + cudaGetErrorString(error);
  if (error == cudaErrorInsufficientDriver || error == cudaErrorUnsupportedPtxVersion) {
    text +=
        "; the NVIDIA driver is older than the CUDA of this build: update it, or build with an "
        "older nvcc";
  } else if (is_other_build(error)) {
    text += "; this build has code for architectures " RECURRA_ARCHITECTURES;
    int device = 0, major = 0, minor = 0;
    if (cudaGetDevice(&device) == cudaSuccess &&
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess)
      text += " and that GPU is " + std::to_string(100 * major + 10 * minor);
    text +=
        ": install a wheel, or build for it with "
        "-C cmake.define.RECURRA_CUDA_ARCHITECTURES=native";
  }
  throw std::runtime_error(text);
}

// Makes a device the current one of this thread, as long as it lives. Then the context is again
// what it was, and none where there was none: cudaSetDevice would make one, of hundreds of
// megabytes.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    int current = 0;
    check(cudaGetDevice(&current), "cudaGetDevice");
    before_ = current_context();
    if (before_ && current == device) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) set_current_context(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  void* before_ = nullptr;
  bool changed_ = false;
};

}  // namespace recurra::cuda
#endif

namespace recurra::cuda {

// Blocks for `items` threads; the kernel walks the rest of a very large number in a loop.
inline unsigned blocks_for(int64_t items, int64_t threads) {
  const int64_t blocks = (items + threads - 1) / threads;
  return static_cast<unsigned>(blocks < INT32_MAX ? blocks : INT32_MAX);
}

}  // namespace recurra::cuda

// RECURRA_LAUNCH(kernel, blocks, threads, stream, arguments...), with `kernel` a plain name.
#if defined(RECURRA_CUDA_EMULATOR)
#define RECURRA_START(KERNEL, BLOCKS, THREADS, STREAM, ...) \
  ::recurra::cuda::emulate(KERNEL, BLOCKS, THREADS, __VA_ARGS__)
#else
#define RECURRA_START(KERNEL, BLOCKS, THREADS, STREAM, ...) \
  KERNEL<<<BLOCKS, THREADS, 0, static_cast<cudaStream_t>((STREAM).handle)>>>(__VA_ARGS__)
#endif
#if defined(__CUDACC_RTC__)
#define RECURRA_LAUNCH(KERNEL, BLOCKS, THREADS, STREAM, ...) static_cast<void>(KERNEL)
#else
#define RECURRA_LAUNCH(KERNEL, BLOCKS, THREADS, STREAM, ...)          \
  do {                                                                \
    const ::recurra::cuda::DeviceGuard guard((STREAM).device);        \
    RECURRA_START(KERNEL, BLOCKS, THREADS, STREAM, __VA_ARGS__);      \
    ::recurra::cuda::check(cudaGetLastError(), "launch of " #KERNEL); \
  } while (false)
#endif
