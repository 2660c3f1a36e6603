// What the host does around launches: errors are told once, and devices stay as they were.
#define RECURRA_CUDA_EMULATOR
#include <cstring>
#include <stdexcept>
#include <string>

#include "check.h"
#include "cuda/launch.h"

namespace {

using recurra::cuda::DeviceGuard;
using recurra::cuda::emulator::Runtime;
using recurra::cuda::emulator::runtime;

__global__ void nothing(int* ran) { ++*ran; }

void errors() {
  runtime = Runtime();
  const char* said = "nothing";
  runtime.next = cudaErrorMemoryAllocation;
  int device = 0;
  std::string text;
  try {
    recurra::cuda::check(cudaGetDevice(&device), "cudaGetDevice");
  } catch (const std::runtime_error& error) {
    text = error.what();
  }
  CHECK(text == "recurra: cudaGetDevice: an error", "%s", text.c_str());
  const auto told = [](cudaError_t error) {
    try {
      recurra::cuda::check(error, "a call");
    } catch (const std::runtime_error& said) {
      return std::string(said.what());
    }
    return std::string();
  };
  text = told(cudaErrorNoKernelImageForDevice);
  CHECK(text.find("architectures that its compiler does not name and that GPU is 750: install") !=
            text.npos,
        "%s", text.c_str());
  text = told(cudaErrorInsufficientDriver);
  CHECK(text.find("driver is older than the CUDA of this build") != text.npos, "%s", text.c_str());
  int ran = 0;
  try {
    RECURRA_LAUNCH(nothing, 1, 1, recurra::cuda::Stream{}, &ran);
  } catch (const std::runtime_error& error) {
    said = "the error of another call";
  }
  CHECK(ran == 1 && std::strcmp(said, "nothing") == 0, "a launch failed by %s", said);
}

void devices() {
  runtime = Runtime();
  {
    const DeviceGuard guard(1);
  }
  CHECK(!runtime.context && !runtime.contexts[0], "a context was made of the device before");
  // The runtime still says 1, where a launch alone would leave its context behind.
  int ran = 0;
  RECURRA_LAUNCH(nothing, 1, 1, (recurra::cuda::Stream{1, nullptr}), &ran);
  CHECK(!runtime.context, "a context stays in a thread that had none");
  cudaSetDevice(0);
  const void* const before = runtime.context;
  {
    const DeviceGuard guard(2);
    int device = 0;
    cudaGetDevice(&device);
    CHECK(device == 2, "%d", device);
    const DeviceGuard same(2);
  }
  CHECK(runtime.context == before, "the context before does not come back");
}

}  // namespace

int main() {
  errors();
  devices();
  return failures != 0;
}
