#include "cuda/wait.h"

#include "cuda/launch.h"

namespace recurra::cuda {

bool is_captured(const Stream& stream) {
  const DeviceGuard guard(stream.device);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream.handle), &status),
        "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

void read_back(void* to, const void* from, size_t bytes, const Stream& stream) {
  const DeviceGuard guard(stream.device);
  const cudaStream_t on = static_cast<cudaStream_t>(stream.handle);
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, on), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(on), "cudaStreamSynchronize");
}

void wait_for_device(int device) {
  const DeviceGuard guard(device);
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

}  // namespace recurra::cuda
