#include "cuda/memory.h"

#include "cuda/launch.h"

namespace recurra::cuda {

void fill_zero(void* to, size_t bytes, const Stream& stream) {
  const DeviceGuard guard(stream.device);
  check(cudaMemsetAsync(to, 0, bytes, static_cast<cudaStream_t>(stream.handle)), "cudaMemsetAsync");
}

}  // namespace recurra::cuda
