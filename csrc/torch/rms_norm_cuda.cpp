#include "torch/device.h"
#include "torch/rms_norm.h"

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

RECURRA_CUDA_OPS(m) {
  m.impl("_rms_norm", RECURRA_BOX(&recurra::rms_norm_cuda));
  m.impl("_rms_norm_backward", RECURRA_BOX(&recurra::rms_norm_backward_cuda));
}
