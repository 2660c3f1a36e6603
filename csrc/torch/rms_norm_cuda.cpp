#include "torch/device.h"
#include "torch/rms_norm.h"

#include <torch/csrc/stable/library.h>

namespace recurra {
namespace {

using namespace rms_norm_ops;

std::tuple<Tensor, Tensor> rms_norm_cuda(Tensor x, Tensor weight, double eps) {
  const Forward call(x, weight, eps);
  cuda::rms_norm(call.args, stream_of(x));
  return {call.y, call.rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward_cuda(Tensor dy, Tensor x, Tensor weight, Tensor rstd) {
  const Backward call(dy, x, weight, rstd);
  cuda::rms_norm_backward(call.args, stream_of(x));
  return {call.dx, call.dweight};
}

}  // namespace
}  // namespace recurra

STABLE_TORCH_LIBRARY_IMPL(recurra, CUDA, m) {
  m.impl("_rms_norm", TORCH_BOX(&recurra::rms_norm_cuda));
  m.impl("_rms_norm_backward", TORCH_BOX(&recurra::rms_norm_backward_cuda));
}
