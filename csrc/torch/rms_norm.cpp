#include "torch/rms_norm.h"

namespace recurra {
namespace {

using namespace rms_norm_ops;

std::tuple<Tensor, Tensor> rms_norm_cpu(Tensor x, Tensor weight, double eps) {
  const Forward call(x, weight, eps);
  rms_norm(call.args);
  return {call.y, call.rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward_cpu(Tensor dy, Tensor x, Tensor weight, Tensor rstd) {
  const Backward call(dy, x, weight, rstd);
  rms_norm_backward(call.args);
  return {call.dx, call.dweight};
}

}  // namespace
}  // namespace recurra

RECURRA_CPU_OPS(m) {
  m.impl("_rms_norm", RECURRA_BOX(&recurra::rms_norm_cpu));
  m.impl("_rms_norm_backward", RECURRA_BOX(&recurra::rms_norm_backward_cpu));
}
