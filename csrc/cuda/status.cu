#include "cuda/status.h"

#include <mutex>
#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/wait.h"

namespace recurra::cuda {

constexpr const char* kStatusOps[] = {"linear_scan",    "block_scan",   "causal_conv1d",
                                      "selective_scan", "softmax_scan", "rnn"};
constexpr const char* kStatusArguments[] = {"cu_seqlens", "slots"};
constexpr int kStatusCount = 12, kMostDevices = 64;

// What loads code is refused otherwise while any stream is captured.
template <class F>
static cudaError_t while_captured(const F& load) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  const cudaError_t error = load();
  check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  return error;
}

// Zero when the library is loaded, so that nothing needs to be allocated or written by a call,
// which may be captured into a graph. Behind the marks is room for what take_status took of them.
__device__ uint32_t status_words[2 * kStatusCount];

// Reads and clears at once: of a mark that a kernel makes meanwhile it either takes it or leaves
// it.
__global__ void __launch_bounds__(32) take_words(uint32_t* words) {
  const unsigned i = threadIdx.x;
  if (i < kStatusCount) words[kStatusCount + i] = atomicExch(words + i, 0u);
}

bool has_code(int device) {
  int current = 0;
  if (cudaGetDevice(&current) == cudaErrorInsufficientDriver) {
    cudaGetLastError();
    return false;
  }
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  const auto load = [&] { return cudaFuncGetAttributes(&attributes, take_words); };
  const cudaError_t error = while_captured(load);
  if (!is_other_build(error)) {
    check(error, "cudaFuncGetAttributes");  // such as memory that is full says nothing of the code
    return true;
  }
  cudaGetLastError();  // or the next launch would be blamed
  return false;
}

static uint32_t* words_of(int device) {
  static std::mutex mutex;
  static uint32_t* words[kMostDevices] = {};
  if (device < 0 || device >= kMostDevices)
    throw std::runtime_error("recurra: no CUDA device has number " + std::to_string(device));
  const std::lock_guard lock(mutex);
  if (words[device]) return words[device];
  const DeviceGuard guard(device);
  void* at = nullptr;
  check(while_captured([&] { return cudaGetSymbolAddress(&at, status_words); }),
        "cudaGetSymbolAddress");
  return words[device] = static_cast<uint32_t*>(at);
}

uint32_t* status_word(const char* op, const char* argument, int device) {
  const std::string name = op[0] == '_' ? op + 1 : op;
  for (int i = 0; i < kStatusCount; ++i)
    if (name.starts_with(kStatusOps[i / 2]) && argument == std::string(kStatusArguments[i % 2]))
      return words_of(device) + i;
  throw std::runtime_error("recurra: no status of " + std::string(argument) + " of " + name);
}

std::vector<std::string> take_status(const Stream& stream) {
  uint32_t* const words = words_of(stream.device);
  static std::mutex one_at_a_time;  // there is room for what one call takes
  const std::lock_guard lock(one_at_a_time);
  wait_for_device(stream.device);
  RECURRA_LAUNCH(take_words, 1, 32, stream, words);
  uint32_t found[kStatusCount];
  read_back(found, words + kStatusCount, sizeof found, stream);
  std::vector<std::string> out;
  for (int i = 0; i < kStatusCount; ++i)
    if (found[i])
      out.push_back(std::string(kStatusArguments[i % 2]) + " of " + kStatusOps[i / 2] +
                    (i % 2 ? "_step" : ""));
  return out;
}

}  // namespace recurra::cuda
