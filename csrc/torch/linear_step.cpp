#include "linear_step/linear_step.h"

#include "torch/check.h"

namespace recurra {
namespace {

Tensor linear_step_cpu(Tensor x, Tensor weight, OptionalTensor bias) {
  check("_linear_step", {{"x", x}, {"weight", weight}, {"bias", bias}});
  LinearStep args;
  args.x = view<2>(x);
  args.weight = view<2>(weight);
  args.bias = view<1>(bias);
  Tensor y = empty(x, {x.size(0), weight.size(0)}, args.x.dtype);
  args.y = view<2>(y);
  OptionalTensor copy;
  if (args.copies_x())
    copy = scratch(x, {x.size(0), (x.size(1) + 15) / 16 * 16}, state_dtype(args.x.dtype));
  args.copy = view<2>(copy);
  linear_step(args);
  return y;
}

}  // namespace
}  // namespace recurra

RECURRA_CPU_OPS(m) { m.impl("_linear_step", RECURRA_BOX(&recurra::linear_step_cpu)); }
