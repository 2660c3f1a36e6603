#include "torch/causal_conv1d.h"

namespace recurra {
namespace {

using namespace causal_conv1d_ops;

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
  args.spans = spans.data();
  args.span_count = static_cast<int64_t>(spans.size());
  auto results = outputs(args, x, weight, bias, h0);
  causal_conv1d(args);
  return results;
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
  args.spans = spans.data();
  args.span_count = static_cast<int64_t>(spans.size());
  const Gradients g = gradients(args, dy, dh_last, x, weight, bias, h0);
  causal_conv1d_backward(args);
  return {g.dx, g.dweight, g.dbias, g.dh0};
}

Tensor causal_conv1d_step_cpu(Tensor h, Tensor x, Tensor weight, OptionalTensor bias,
                              Activation activation, OptionalTensor slots) {
  constexpr const char* op = "causal_conv1d_step";
  check_step(op, h, x, weight, bias, slots);
  CausalConv1dStep args;
  args.silu = is_silu(op, activation);
  std::vector<int64_t> storage;
  args.slots = slot_indices(op, x.size(0), h, slots, storage);
  Tensor out = step_output(args, h, x, weight, bias);
  causal_conv1d_step(args);
  return out;
}

}  // namespace
}  // namespace recurra

RECURRA_CPU_OPS(m) {
  m.impl("causal_conv1d", RECURRA_BOX(&recurra::causal_conv1d_cpu));
  m.impl("_causal_conv1d_backward", RECURRA_BOX(&recurra::causal_conv1d_backward_cpu));
  m.impl("causal_conv1d_step", RECURRA_BOX(&recurra::causal_conv1d_step_cpu));
}
