#include "causal_conv1d/causal_conv1d.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/check.h"

namespace recurra {
namespace {

using Activation = std::optional<std::string>;

bool is_silu(const char* op, const Activation& activation) {
  if (activation && *activation != "silu")
    fail(op, "activation must be None or \"silu\", got \"" + *activation + "\"");
  return activation.has_value();
}

std::tuple<Tensor, Tensor> causal_conv1d_cpu(Tensor x, Tensor weight, OptionalTensor bias,
                                             OptionalTensor h0, Activation activation,
                                             OptionalTensor cu_seqlens) {
  constexpr const char* op = "causal_conv1d";
  check_layout(op, "x", x, "weight", weight);
  check(op, {{"x", x}, {"weight", weight}, {"bias", bias}, {"h0", h0}, {"cu_seqlens", cu_seqlens}});
  CausalConv1d args;
  args.silu = is_silu(op, activation);
  std::vector<int64_t> offsets;
  args.sequences = sequences(op, x.size(0), x.size(1), cu_seqlens, offsets);
  const std::vector<ConvSpan> spans = conv_spans(args.sequences);
  Tensor y = empty_like(x);
  Tensor h_last =
      empty(x, {args.sequences.count, weight.size(1) - 1, x.size(2)}, state_dtype(dtype_of(x)));
  args.x = view<3>(x);
  args.weight = view<2>(weight);
  args.bias = view<1>(bias);
  args.h0 = view<3>(h0);
  args.y = view<3>(y);
  args.h_last = view<3>(h_last);
  args.spans = spans.data();
  args.span_count = static_cast<int64_t>(spans.size());
  causal_conv1d(args);
  return {y, h_last};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward_cpu(
    OptionalTensor dy, OptionalTensor dh_last, Tensor x, Tensor weight, OptionalTensor bias,
    OptionalTensor h0, Activation activation, OptionalTensor cu_seqlens) {
  constexpr const char* op = "_causal_conv1d_backward";
  check(op, {{"dy", dy},
             {"dh_last", dh_last},
             {"x", x},
             {"weight", weight},
             {"bias", bias},
             {"h0", h0},
             {"cu_seqlens", cu_seqlens}});
  CausalConv1dBackward args;
  args.silu = is_silu(op, activation);
  std::vector<int64_t> offsets;
  args.sequences = sequences(op, x.size(0), x.size(1), cu_seqlens, offsets);
  const std::vector<ConvSpan> spans = conv_spans(args.sequences);
  args.span_count = static_cast<int64_t>(spans.size());
  const int64_t channels = x.size(2), taps = weight.size(1);
  const DType dtype = dtype_of(x);
  Tensor dx = empty_like(x), dweight = empty_like(weight);
  Tensor dbias = bias ? empty_like(*bias) : empty(weight, {channels}, dtype_of(weight));
  Tensor dh0 = h0 ? empty_like(*h0)
                  : empty(x, {args.sequences.count, taps - 1, channels}, state_dtype(dtype));
  Tensor partial = empty(x, {args.span_count, taps + 1, channels}, state_dtype(dtype));
  args.dy = view<3>(dy);
  args.dh_last = view<3>(dh_last);
  args.x = view<3>(x);
  args.weight = view<2>(weight);
  args.bias = view<1>(bias);
  args.h0 = view<3>(h0);
  args.dx = view<3>(dx);
  args.dweight = view<2>(dweight);
  args.dbias = view<1>(dbias);
  args.dh0 = view<3>(dh0);
  args.partial = view<3>(partial);
  args.spans = spans.data();
  causal_conv1d_backward(args);
  return {dx, dweight, dbias, dh0};
}

Tensor causal_conv1d_step_cpu(Tensor h, Tensor x, Tensor weight, OptionalTensor bias,
                              Activation activation, OptionalTensor slots) {
  constexpr const char* op = "causal_conv1d_step";
  check(op, {{"h", h}, {"x", x}, {"weight", weight}, {"bias", bias}, {"slots", slots}});
  if (h.size(1) < weight.size(1) - 1)
    fail(op, "h must have shape (M, L, D) with L >= W-1 = " + std::to_string(weight.size(1) - 1) +
                 ", got " + shape_of(h));
  CausalConv1dStep args;
  args.silu = is_silu(op, activation);
  std::vector<int64_t> storage;
  args.slots = slot_indices(op, x.size(0), h, slots, storage);
  Tensor out = empty_like(x);
  args.h = view<3>(h);
  args.x = view<2>(x);
  args.weight = view<2>(weight);
  args.bias = view<1>(bias);
  args.out = view<2>(out);
  causal_conv1d_step(args);
  return out;
}

}  // namespace
}  // namespace recurra

STABLE_TORCH_LIBRARY_IMPL(recurra, CPU, m) {
  m.impl("causal_conv1d", TORCH_BOX(&recurra::causal_conv1d_cpu));
  m.impl("_causal_conv1d_backward", TORCH_BOX(&recurra::causal_conv1d_backward_cpu));
  m.impl("causal_conv1d_step", TORCH_BOX(&recurra::causal_conv1d_step_cpu));
}
