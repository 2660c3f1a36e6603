#include "torch/selective_scan.h"

#include <tuple>

namespace recurra::selective_scan_op {
namespace {

// Rows that are whole in one task at a time; fewer channels a task where there are few of them.
int64_t blocks_per_span(int64_t channels, int64_t sequences) {
  int64_t blocks = Spans::kSpanBlocks;
  while (blocks > 1 && sequences * (channels / (blocks * Spans::kLanes)) < 8) blocks /= 2;
  return blocks;
}

std::tuple<Tensor, Tensor, Tensor> forward(const char* op, bool save, const Inputs& in,
                                           const OptionalTensor& h0,
                                           const OptionalTensor& cu_seqlens) {
  check_forward(op, in, h0, cu_seqlens);
  const Tensor& u = in.u;
  std::vector<int64_t> offsets;
  SelectiveScan args;
  args.sequences = sequences(op, u.size(0), u.size(1), cu_seqlens, offsets);
  set_inputs(in, blocks_per_span(u.size(2), args.sequences.count), args);
  args.h0 = view<3>(h0);

  const int64_t count = args.sequences.count, padded = args.spans.padded();
  const DType compute = state_dtype(dtype_of(u));
  Tensor y = empty_like(u);
  Tensor h_last = empty(u, {count, u.size(2), args.states()}, lane_state_dtype(in));
  Tensor saved = save ? empty(u, {args.chunk_rows(), args.rows(), padded}, compute)
                      : scratch(u, {0, args.rows(), padded}, compute);
  Tensor lanes_A = scratch(u, {args.rows(), padded}, compute);
  const int64_t held = args.states() <= kFewStates ? 0 : count;
  Tensor state = scratch(u, {held, args.rows(), padded}, compute);
  args.y = view<3>(y);
  args.h_last = view<3>(h_last);
  args.saved = save ? saved.data_ptr() : nullptr;
  args.lanes_A = lanes_A.data_ptr();
  args.state = held ? state.data_ptr() : nullptr;
  selective_scan(args);
  return {y, h_last, saved};
}

std::tuple<Tensor, Tensor> selective_scan_cpu(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                                              OptionalTensor D, OptionalTensor z,
                                              OptionalTensor delta_bias, bool delta_softplus,
                                              OptionalTensor h0, OptionalTensor cu_seqlens) {
  auto [y, h_last, saved] =
      forward("selective_scan", false, {u, delta, A, B, C, D, z, delta_bias, delta_softplus}, h0,
              cu_seqlens);
  return {y, h_last};
}

std::tuple<Tensor, Tensor, Tensor> selective_scan_save_cpu(
    Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
    OptionalTensor delta_bias, bool delta_softplus, OptionalTensor h0, OptionalTensor cu_seqlens) {
  return forward("_selective_scan_save", true,
                 {u, delta, A, B, C, D, z, delta_bias, delta_softplus}, h0, cu_seqlens);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
selective_scan_backward_cpu(OptionalTensor dy, OptionalTensor dh_last, Tensor saved, Tensor u,
                            Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D,
                            OptionalTensor z, OptionalTensor delta_bias, bool delta_softplus,
                            OptionalTensor h0, OptionalTensor cu_seqlens) {
  constexpr const char* op = "_selective_scan_backward";
  const Inputs in{u, delta, A, B, C, D, z, delta_bias, delta_softplus};
  check_backward(op, in, dy, dh_last, h0, cu_seqlens);
  std::vector<int64_t> offsets;
  SelectiveScanBackward args;
  args.sequences = sequences(op, u.size(0), u.size(1), cu_seqlens, offsets);
  set_inputs(in, blocks_per_span(u.size(2), args.sequences.count), args);
  args.dy = view<3>(dy);
  args.dh_last = view<3>(dh_last);
  check_saved(op, saved, args.chunk_rows(), args);

  const int64_t count = args.sequences.count, padded = args.spans.padded(), rows = args.rows();
  const DType compute = state_dtype(dtype_of(u));
  args.parts = count < 8 ? (count > 0 ? count : 1) : 8;
  const Gradients out(in, h0, count);
  Tensor lanes_A = scratch(u, {rows, padded}, compute);
  Tensor carry = scratch(u, {args.parts, rows, padded}, compute);
  Tensor sum_A = zeros(u, {args.parts, rows, padded}, compute);
  Tensor sum_D = zeros(u, {args.parts, 2, padded}, compute);
  Tensor sum_BC = scratch(u, {2, args.spans.count(), u.size(0) * u.size(1), rows}, compute);
  out.set(in, args);
  args.saved = saved.data_ptr();
  args.lanes_A = lanes_A.data_ptr();
  args.carry = carry.data_ptr();
  args.sum_A = sum_A.data_ptr();
  args.sum_D = sum_D.data_ptr();
  args.sum_BC = sum_BC.data_ptr();
  selective_scan_backward(args);
  return {out.du, out.ddelta, out.dA, out.dB, out.dC, out.dD, out.dz, out.ddelta_bias, out.dh0};
}

Tensor selective_scan_step_cpu(Tensor h, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                               OptionalTensor D, OptionalTensor z, OptionalTensor delta_bias,
                               bool delta_softplus, OptionalTensor slots) {
  constexpr const char* op = "selective_scan_step";
  const Inputs in{u, delta, A, B, C, D, z, delta_bias, delta_softplus};
  check_step(op, in, h, slots);
  std::vector<int64_t> storage;
  SelectiveScan args;
  args.slots = slot_indices(op, u.size(0), h, slots, storage);
  args.sequences = {u.size(0), 1, nullptr};
  set_inputs(in, Spans::kSpanBlocks, args);
  args.h0 = args.h_last = view<3>(h);
  Tensor y = empty_like(u);
  const int64_t rows = args.rows(), padded = args.spans.padded();
  const int64_t held = args.states() <= kFewStates ? 0 : u.size(0);
  Tensor lanes_A = scratch(u, {rows, padded}, state_dtype(dtype_of(u)));
  Tensor state = scratch(u, {held, rows, padded}, state_dtype(dtype_of(u)));
  args.y = one_step(view<2>(y));
  args.lanes_A = lanes_A.data_ptr();
  args.state = held ? state.data_ptr() : nullptr;
  selective_scan_step(args);
  return y;
}

}  // namespace
}  // namespace recurra::selective_scan_op

RECURRA_CPU_OPS(m) {
  namespace op = recurra::selective_scan_op;
  m.impl("selective_scan", RECURRA_BOX(&op::selective_scan_cpu));
  m.impl("_selective_scan_save", RECURRA_BOX(&op::selective_scan_save_cpu));
  m.impl("_selective_scan_backward", RECURRA_BOX(&op::selective_scan_backward_cpu));
  m.impl("selective_scan_step", RECURRA_BOX(&op::selective_scan_step_cpu));
}
