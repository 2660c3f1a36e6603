// How CUDA sources start kernels. Everything goes through RECURRA_LAUNCH, so that the same sources
// also compile as plain C++, with tests/cpp/cuda_emulator.h in the place of the CUDA runtime, and
// their logic is tested where there is no GPU.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/stream.h"

#if defined(RECURRA_CUDA_EMULATOR)
#include "cuda_emulator.h"
#else
#include <cuda_runtime.h>
#endif

namespace recurra::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("recurra: ") + what + ": " + cudaGetErrorString(error));
}

// Makes a device the current one of this thread, as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

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
#define RECURRA_LAUNCH(KERNEL, BLOCKS, THREADS, STREAM, ...)          \
  do {                                                                \
    const ::recurra::cuda::DeviceGuard guard((STREAM).device);        \
    RECURRA_START(KERNEL, BLOCKS, THREADS, STREAM, __VA_ARGS__);      \
    ::recurra::cuda::check(cudaGetLastError(), "launch of " #KERNEL); \
  } while (false)
