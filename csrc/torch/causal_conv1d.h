// What the ops of causal_conv1d check and allocate on either device.
#pragma once
#include "causal_conv1d/causal_conv1d.h"

#include <tuple>

#include "torch/check.h"

namespace recurra::causal_conv1d_ops {

using Activation = std::optional<std::string>;

inline bool is_silu(const char* op, const Activation& activation) {
  if (activation && *activation != "silu")
    fail(op, "activation must be None or \"silu\", got \"" + *activation + "\"");
  return activation.has_value();
}

// As the other functions here, given a checked call and `args` with what the device alone knows:
// the sequences, and of the CPU the spans.
inline std::tuple<Tensor, Tensor> outputs(CausalConv1d& args, const Tensor& x, const Tensor& weight,
                                          const OptionalTensor& bias, const OptionalTensor& h0) {
  Tensor y = empty_like(x);
  Tensor h_last =
      empty(x, {args.sequences.count, weight.size(1) - 1, x.size(2)}, state_dtype(dtype_of(x)));
  args.x = view<3>(x);
  args.weight = view<2>(weight);
  args.bias = view<1>(bias);
  args.h0 = view<3>(h0);
  args.y = view<3>(y);
  args.h_last = view<3>(h_last);
  return {y, h_last};
}

struct Gradients {
  Tensor dx, dweight, dbias, dh0;
  Tensor partial;
};
inline Gradients gradients(CausalConv1dBackward& args, const OptionalTensor& dy,
                           const OptionalTensor& dh_last, const Tensor& x, const Tensor& weight,
                           const OptionalTensor& bias, const OptionalTensor& h0) {
  const int64_t channels = x.size(2), taps = weight.size(1);
  const DType state = state_dtype(dtype_of(x));
  Gradients g{empty_like(x), empty_like(weight),
              bias ? empty_like(*bias) : empty(weight, {channels}, dtype_of(weight)),
              h0 ? empty_like(*h0) : empty(x, {args.sequences.count, taps - 1, channels}, state),
              scratch(x, {args.span_count, taps + 1, channels}, state)};
  args.dy = view<3>(dy);
  args.dh_last = view<3>(dh_last);
  args.x = view<3>(x);
  args.weight = view<2>(weight);
  args.bias = view<1>(bias);
  args.h0 = view<3>(h0);
  args.dx = view<3>(g.dx);
  args.dweight = view<2>(g.dweight);
  args.dbias = view<1>(g.dbias);
  args.dh0 = view<3>(g.dh0);
  args.partial = view<3>(g.partial);
  return g;
}

inline void check_step(const char* op, const Tensor& h, const Tensor& x, const Tensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& slots) {
  check(op, {{"h", h}, {"x", x}, {"weight", weight}, {"bias", bias}, {"slots", slots}});
  if (h.size(1) < weight.size(1) - 1)
    fail(op, "h must have shape (M, L, D) with L >= W-1 = " + std::to_string(weight.size(1) - 1) +
                 ", got " + shape_of(h));
  check_written(op, h, slots, 1, {{"x", x}}, {{"weight", weight}, {"bias", bias}});
}
inline Tensor step_output(CausalConv1dStep& args, const Tensor& h, const Tensor& x,
                          const Tensor& weight, const OptionalTensor& bias) {
  Tensor out = empty_like(x);
  args.h = view<3>(h);
  args.x = view<2>(x);
  args.weight = view<2>(weight);
  args.bias = view<1>(bias);
  args.out = view<2>(out);
  return out;
}

}  // namespace recurra::causal_conv1d_ops
