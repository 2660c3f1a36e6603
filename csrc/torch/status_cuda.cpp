#include "cuda/wait.h"
#include "torch/device.h"

namespace recurra {
namespace {

// A line for each argument.
std::string device_status_cuda(Tensor on) {
  const cuda::Stream stream = stream_of(on);
  if (cuda::is_captured(stream))
    fail("check_status", "cannot wait for the device while a CUDA graph is captured");
  std::string out;
  for (const std::string& argument : cuda::take_status(stream)) out += argument + "\n";
  return out;
}

bool has_code_cuda(int64_t device) { return cuda::has_code(static_cast<int>(device)); }

}  // namespace
}  // namespace recurra

STABLE_TORCH_LIBRARY_IMPL(recurra, CompositeExplicitAutograd, m) {
  m.impl("_has_cuda_code", TORCH_BOX(&recurra::has_code_cuda));
}
RECURRA_CUDA_OPS(m) { m.impl("_device_status", RECURRA_BOX(&recurra::device_status_cuda)); }
