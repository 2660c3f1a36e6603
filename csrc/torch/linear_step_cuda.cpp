#include "linear_step/linear_step.h"

#include "torch/check.h"
#include "torch/device.h"

namespace recurra {
namespace {

Tensor linear_step_cuda(Tensor x, Tensor weight, OptionalTensor bias) {
  check("_linear_step", {{"x", x}, {"weight", weight}, {"bias", bias}});
  LinearStep args;
  args.x = view<2>(x);
  args.weight = view<2>(weight);
  args.bias = view<1>(bias);
  Tensor y = empty(x, {x.size(0), weight.size(0)}, args.x.dtype);
  args.y = view<2>(y);
  cuda::linear_step(args, stream_of(x));
  return y;
}

}  // namespace
}  // namespace recurra

RECURRA_CUDA_OPS(m) { m.impl("_linear_step", RECURRA_BOX(&recurra::linear_step_cuda)); }
