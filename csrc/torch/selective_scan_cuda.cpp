#include <tuple>

#include "torch/device.h"
#include "torch/selective_scan.h"

namespace recurra::selective_scan_op {
namespace {

// What the kernels need where they split time.
struct Parts {
  OptionalTensor sums, states;
  cuda::SelectiveScanParts views;

  Parts(const Inputs& in, const SelectiveScanInputs& args) {
    views.count = cuda::selective_scan_parts(args);
    if (views.count == 1) return;
    const int64_t rows = args.sequences.count * views.count, channels = in.u.size(2);
    sums = scratch(in.u, {rows, channels}, DType::f64);
    states = scratch(in.u, {rows, channels, args.states()}, lane_state_dtype(in));
    views.sums = view<2>(sums);
    views.states = view<3>(states);
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(const char* op, bool save, const Inputs& in,
                                           const OptionalTensor& h0,
                                           const OptionalTensor& cu_seqlens) {
  check_forward(op, in, h0, cu_seqlens);
  const Tensor& u = in.u;
  SelectiveScan args;
  args.sequences = sequences_of(u, cu_seqlens);
  set_inputs(in, 1, args);
  args.h0 = view<3>(h0);
  const DType compute = state_dtype(dtype_of(u));
  const int64_t chunks = save ? cuda::saved_rows(args.sequences, cu_seqlens.has_value()) : 0;
  Tensor y = empty_like(u);
  Tensor h_last = empty(u, {args.sequences.count, u.size(2), args.states()}, lane_state_dtype(in));
  Tensor saved = save ? empty(u, {chunks, args.rows(), args.spans.padded()}, compute)
                      : scratch(u, {0, args.rows(), args.spans.padded()}, compute);
  args.y = view<3>(y);
  args.h_last = view<3>(h_last);
  args.saved = save ? saved.data_ptr() : nullptr;
  const Parts parts(in, args);
  cuda::selective_scan(args, indices(op, "cu_seqlens", cu_seqlens), parts.views, stream_of(u));
  return {y, h_last, saved};
}

std::tuple<Tensor, Tensor> selective_scan_cuda(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                                               OptionalTensor D, OptionalTensor z,
                                               OptionalTensor delta_bias, bool delta_softplus,
                                               OptionalTensor h0, OptionalTensor cu_seqlens) {
  auto [y, h_last, saved] =
      forward("selective_scan", false, {u, delta, A, B, C, D, z, delta_bias, delta_softplus}, h0,
              cu_seqlens);
  return {y, h_last};
}

std::tuple<Tensor, Tensor, Tensor> selective_scan_save_cuda(
    Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
    OptionalTensor delta_bias, bool delta_softplus, OptionalTensor h0, OptionalTensor cu_seqlens) {
  return forward("_selective_scan_save", true,
                 {u, delta, A, B, C, D, z, delta_bias, delta_softplus}, h0, cu_seqlens);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
selective_scan_backward_cuda(OptionalTensor dy, OptionalTensor dh_last, Tensor saved, Tensor u,
                             Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D,
                             OptionalTensor z, OptionalTensor delta_bias, bool delta_softplus,
                             OptionalTensor h0, OptionalTensor cu_seqlens) {
  constexpr const char* op = "_selective_scan_backward";
  const Inputs in{u, delta, A, B, C, D, z, delta_bias, delta_softplus};
  check_backward(op, in, dy, dh_last, h0, cu_seqlens);
  const DType compute = state_dtype(dtype_of(u));
  SelectiveScanBackward args;
  args.sequences = sequences_of(u, cu_seqlens);
  const int64_t width = cuda::backward_channels(dtype_of(u), is_complex(dtype_of(A)));
  set_inputs(in, width / Spans::kLanes, args);
  args.dy = view<3>(dy);
  args.dh_last = view<3>(dh_last);
  check_saved(op, saved, cuda::saved_rows(args.sequences, cu_seqlens.has_value()), args);
  const int64_t count = args.sequences.count, rows = args.rows();
  const Gradients out(in, h0, count);
  const Parts parts(in, args);
  Tensor sum_A = scratch(u, {count * parts.views.count, rows, u.size(2)}, compute);
  Tensor sum_D = scratch(u, {2, count * parts.views.count, u.size(2)}, compute);
  Tensor sum_BC = scratch(u, {2, args.spans.count(), u.size(0) * u.size(1), rows}, compute);
  out.set(in, args);
  args.saved = saved.data_ptr();
  args.sum_A = sum_A.data_ptr();
  args.sum_D = sum_D.data_ptr();
  args.sum_BC = sum_BC.data_ptr();
  cuda::selective_scan_backward(args, indices(op, "cu_seqlens", cu_seqlens), parts.views,
                                stream_of(u));
  return {out.du, out.ddelta, out.dA, out.dB, out.dC, out.dD, out.dz, out.ddelta_bias, out.dh0};
}

Tensor selective_scan_step_cuda(Tensor h, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                                OptionalTensor D, OptionalTensor z, OptionalTensor delta_bias,
                                bool delta_softplus, OptionalTensor slots) {
  constexpr const char* op = "selective_scan_step";
  const Inputs in{u, delta, A, B, C, D, z, delta_bias, delta_softplus};
  check_step(op, in, h, slots);
  check_states(op, u.size(0), h, slots);
  SelectiveScan args;
  args.sequences = {u.size(0), 1, nullptr};
  set_inputs(in, 1, args);
  args.h0 = args.h_last = view<3>(h);
  Tensor y = empty_like(u);
  args.y = one_step(view<2>(y));
  cuda::selective_scan_step(args, indices(op, "slots", slots), stream_of(u));
  return y;
}

}  // namespace
}  // namespace recurra::selective_scan_op

RECURRA_CUDA_OPS(m) {
  namespace op = recurra::selective_scan_op;
  m.impl("selective_scan", RECURRA_BOX(&op::selective_scan_cuda));
  m.impl("_selective_scan_save", RECURRA_BOX(&op::selective_scan_save_cuda));
  m.impl("_selective_scan_backward", RECURRA_BOX(&op::selective_scan_backward_cuda));
  m.impl("selective_scan_step", RECURRA_BOX(&op::selective_scan_step_cuda));
}
