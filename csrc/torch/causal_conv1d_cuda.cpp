#include "torch/causal_conv1d.h"
#include "torch/device.h"

namespace recurra {
namespace {

using namespace causal_conv1d_ops;

std::tuple<Tensor, Tensor> causal_conv1d_cuda(Tensor x, Tensor weight, OptionalTensor bias,
                                              OptionalTensor h0, Activation activation,
                                              OptionalTensor cu_seqlens) {
  constexpr const char* op = "causal_conv1d";
  check_layout(op, "x", x, "weight", weight);
  check(op, {{"x", x}, {"weight", weight}, {"bias", bias}, {"h0", h0}, {"cu_seqlens", cu_seqlens}});
  CausalConv1d args;
  args.silu = is_silu(op, activation);
  args.sequences = sequences_of(x, cu_seqlens);
  auto results = outputs(args, x, weight, bias, h0);
  cuda::causal_conv1d(args, indices(op, "cu_seqlens", cu_seqlens), stream_of(x));
  return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward_cuda(
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
  args.sequences = sequences_of(x, cu_seqlens);
  args.span_count = cuda::causal_conv1d_spans(x.size(0), x.size(1), cu_seqlens.has_value());
  const Gradients g = gradients(args, dy, dh_last, x, weight, bias, h0);
  cuda::causal_conv1d_backward(args, indices(op, "cu_seqlens", cu_seqlens), stream_of(x));
  return {g.dx, g.dweight, g.dbias, g.dh0};
}

Tensor causal_conv1d_step_cuda(Tensor h, Tensor x, Tensor weight, OptionalTensor bias,
                               Activation activation, OptionalTensor slots) {
  constexpr const char* op = "causal_conv1d_step";
  check_step(op, h, x, weight, bias, slots);
  check_states(op, x.size(0), h, slots);
  CausalConv1dStep args;
  args.silu = is_silu(op, activation);
  Tensor out = step_output(args, h, x, weight, bias);
  cuda::causal_conv1d_step(args, indices(op, "slots", slots), stream_of(x));
  return out;
}

}  // namespace
}  // namespace recurra

RECURRA_CUDA_OPS(m) {
  m.impl("causal_conv1d", RECURRA_BOX(&recurra::causal_conv1d_cuda));
  m.impl("_causal_conv1d_backward", RECURRA_BOX(&recurra::causal_conv1d_backward_cuda));
  m.impl("causal_conv1d_step", RECURRA_BOX(&recurra::causal_conv1d_step_cuda));
}
