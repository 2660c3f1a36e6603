#include "selective_scan/selective_scan.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/check.h"

namespace recurra {
namespace {

using Optional = const OptionalTensor&;

// Rows that are whole in one task at a time; fewer channels a task where there are few of them.
int64_t blocks_per_span(int64_t channels, int64_t sequences) {
  int64_t blocks = Spans::kSpanBlocks;
  while (blocks > 1 && sequences * (channels / (blocks * Spans::kLanes)) < 8) blocks /= 2;
  return blocks;
}

// What the text of requirements cannot say.
void check_complex(const char* op, const Tensor& A, const Tensor& B, const Tensor& C,
                   const Tensor* h0, const char* state_name) {
  const bool complex = is_complex(dtype_of(A));
  if (!complex && is_complex(dtype_of(B))) fail(op, "B must be real where A is real");
  if (!complex && is_complex(dtype_of(C))) fail(op, "C must be real where A is real");
  if (h0 && is_complex(dtype_of(*h0)) != complex)
    fail(op, std::string(state_name) + " must be " + (complex ? "complex" : "real") +
                 " where A is " + (complex ? "complex" : "real"));
}

void check_groups(const char* op, int64_t channels, const char* name, const Tensor& t, int64_t dim,
                  int64_t full) {
  if (t.dim() != full) return;
  const int64_t groups = t.size(dim);
  if (groups < 1 || channels % groups != 0)
    fail(op, std::string("the number of groups G of ") + name + " must divide D = " +
                 std::to_string(channels) + ", got " + std::to_string(groups));
}

DType lane_state_dtype(const Tensor& u, const Tensor& A) {
  const DType real = state_dtype(dtype_of(u));
  return is_complex(dtype_of(A)) ? (real == DType::f64 ? DType::c128 : DType::c64) : real;
}

// (B, T, N) -> (B, T, 1, N)
View<4> grouped(const Tensor& t) {
  if (t.dim() == 4) return view<4>(t);
  const View<3> v = view<3>(t);
  return {v.data,
          v.dtype,
          {v.size[0], v.size[1], 1, v.size[2]},
          {v.stride[0], v.stride[1], 0, v.stride[2]}};
}

// (B, N) -> (B, 1, 1, N)
View<4> grouped_step(const Tensor& t) {
  const View<2> v = view<2>(t);
  return {v.data, v.dtype, {v.size[0], 1, 1, v.size[1]}, {v.stride[0], 0, 0, v.stride[1]}};
}

int64_t span_groups(const Tensor& B, const Tensor& C, int64_t dim) {
  const int64_t of_B = B.dim() == dim + 2 ? B.size(dim) : 1;
  const int64_t of_C = C.dim() == dim + 2 ? C.size(dim) : 1;
  return of_B > of_C ? of_B : of_C;
}

std::tuple<Tensor, Tensor, Tensor> forward(const char* op, bool save, const Tensor& u,
                                           const Tensor& delta, const Tensor& A, const Tensor& B,
                                           const Tensor& C, Optional D, Optional z,
                                           Optional delta_bias, bool delta_softplus, Optional h0,
                                           Optional cu_seqlens) {
  check_layout(op, "u", u, "A", A, ", and likewise delta, z, B and C");
  check(op, {{"u", u},
             {"delta", delta},
             {"A", A},
             {"B", B},
             {"C", C},
             {"D", D},
             {"z", z},
             {"delta_bias", delta_bias},
             {"h0", h0},
             {"cu_seqlens", cu_seqlens}});
  check_groups(op, u.size(2), "B", B, 2, 4);
  check_groups(op, u.size(2), "C", C, 2, 4);
  check_complex(op, A, B, C, h0 ? &*h0 : nullptr, "h0");
  std::vector<int64_t> offsets;
  SelectiveScan args;
  args.sequences = sequences(op, u.size(0), u.size(1), cu_seqlens, offsets);
  args.spans =
      Spans(u.size(2), span_groups(B, C, 2), blocks_per_span(u.size(2), args.sequences.count));
  args.u = view<3>(u);
  args.delta = view<3>(delta);
  args.z = view<3>(z);
  args.A = view<2>(A);
  args.B = grouped(B);
  args.C = grouped(C);
  args.D = view<1>(D);
  args.delta_bias = view<1>(delta_bias);
  args.delta_softplus = delta_softplus;
  args.complex = is_complex(dtype_of(A));
  args.h0 = view<3>(h0);

  const int64_t count = args.sequences.count, padded = args.spans.padded();
  Tensor y = empty_like(u);
  Tensor h_last = empty(u, {count, u.size(2), A.size(1)}, lane_state_dtype(u, A));
  Tensor saved =
      empty(u, {save ? args.chunk_rows() : 0, args.rows(), padded}, state_dtype(dtype_of(u)));
  Tensor lanes_A = empty(u, {args.rows(), padded}, state_dtype(dtype_of(u)));
  const int64_t scratch = args.states() <= kFewStates ? 0 : count;
  Tensor state = empty(u, {scratch, args.rows(), padded}, state_dtype(dtype_of(u)));
  args.y = view<3>(y);
  args.h_last = view<3>(h_last);
  args.saved = save ? saved.data_ptr() : nullptr;
  args.lanes_A = lanes_A.data_ptr();
  args.state = scratch ? state.data_ptr() : nullptr;
  selective_scan(args);
  return {y, h_last, saved};
}

std::tuple<Tensor, Tensor> selective_scan_cpu(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                                              OptionalTensor D, OptionalTensor z,
                                              OptionalTensor delta_bias, bool delta_softplus,
                                              OptionalTensor h0, OptionalTensor cu_seqlens) {
  auto [y, h_last, saved] = forward("selective_scan", false, u, delta, A, B, C, D, z, delta_bias,
                                    delta_softplus, h0, cu_seqlens);
  return {y, h_last};
}

std::tuple<Tensor, Tensor, Tensor> selective_scan_save_cpu(
    Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
    OptionalTensor delta_bias, bool delta_softplus, OptionalTensor h0, OptionalTensor cu_seqlens) {
  return forward("_selective_scan_save", true, u, delta, A, B, C, D, z, delta_bias, delta_softplus,
                 h0, cu_seqlens);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
selective_scan_backward_cpu(OptionalTensor dy, OptionalTensor dh_last, Tensor saved, Tensor u,
                            Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D,
                            OptionalTensor z, OptionalTensor delta_bias, bool delta_softplus,
                            OptionalTensor h0, OptionalTensor cu_seqlens) {
  constexpr const char* op = "_selective_scan_backward";
  check(op, {{"u", u},
             {"delta", delta},
             {"A", A},
             {"B", B},
             {"C", C},
             {"D", D},
             {"z", z},
             {"delta_bias", delta_bias},
             {"dy", dy},
             {"dh_last", dh_last},
             {"h0", h0},
             {"cu_seqlens", cu_seqlens}});
  check_groups(op, u.size(2), "B", B, 2, 4);
  check_groups(op, u.size(2), "C", C, 2, 4);
  check_complex(op, A, B, C, dh_last ? &*dh_last : nullptr, "dh_last");
  std::vector<int64_t> offsets;
  SelectiveScanBackward args;
  args.sequences = sequences(op, u.size(0), u.size(1), cu_seqlens, offsets);
  args.spans =
      Spans(u.size(2), span_groups(B, C, 2), blocks_per_span(u.size(2), args.sequences.count));
  args.u = view<3>(u);
  args.delta = view<3>(delta);
  args.z = view<3>(z);
  args.A = view<2>(A);
  args.B = grouped(B);
  args.C = grouped(C);
  args.D = view<1>(D);
  args.delta_bias = view<1>(delta_bias);
  args.delta_softplus = delta_softplus;
  args.complex = is_complex(dtype_of(A));
  args.dy = view<3>(dy);
  args.dh_last = view<3>(dh_last);

  const int64_t count = args.sequences.count, padded = args.spans.padded(), rows = args.rows();
  const DType compute = state_dtype(dtype_of(u));
  if (saved.dim() != 3 || saved.size(0) != args.chunk_rows() || saved.size(1) != rows ||
      saved.size(2) != padded || dtype_of(saved) != compute || !saved.is_contiguous())
    fail(op, "saved must be what _selective_scan_save returned");
  args.parts = count < 8 ? (count > 0 ? count : 1) : 8;
  Tensor du = empty_like(u), ddelta = empty_like(delta), dA = empty_like(A), dB = empty_like(B),
         dC = empty_like(C);
  // Absent arguments have empty gradients.
  Tensor dz = z ? empty_like(*z) : empty(u, {0}, dtype_of(u));
  Tensor dD = D ? empty_like(*D) : empty(u, {0}, dtype_of(u));
  Tensor dbias = delta_bias ? empty_like(*delta_bias) : empty(u, {0}, dtype_of(u));
  // The values of h0 are in `saved`; here it only says how its gradient lies.
  Tensor dh0 =
      h0 ? empty_like(*h0) : empty(u, {count, u.size(2), A.size(1)}, lane_state_dtype(u, A));
  Tensor lanes_A = empty(u, {rows, padded}, compute);
  Tensor carry = empty(u, {args.parts, rows, padded}, compute);
  Tensor sum_A = zeros(u, {args.parts, rows, padded}, compute);
  Tensor sum_D = zeros(u, {args.parts, 2, padded}, compute);
  Tensor sum_BC = empty(u, {2, args.spans.count(), u.size(0) * u.size(1), rows}, compute);
  args.saved = saved.data_ptr();
  args.du = view<3>(du);
  args.ddelta = view<3>(ddelta);
  args.dz = z ? view<3>(dz) : View<3>();
  args.dA = view<2>(dA);
  args.dB = grouped(dB);
  args.dC = grouped(dC);
  args.dD = D ? view<1>(dD) : View<1>();
  args.ddelta_bias = delta_bias ? view<1>(dbias) : View<1>();
  args.dh0 = view<3>(dh0);
  args.lanes_A = lanes_A.data_ptr();
  args.carry = carry.data_ptr();
  args.sum_A = sum_A.data_ptr();
  args.sum_D = sum_D.data_ptr();
  args.sum_BC = sum_BC.data_ptr();
  selective_scan_backward(args);
  return {du, ddelta, dA, dB, dC, dD, dz, dbias, dh0};
}

Tensor selective_scan_step_cpu(Tensor h, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                               OptionalTensor D, OptionalTensor z, OptionalTensor delta_bias,
                               bool delta_softplus, OptionalTensor slots) {
  constexpr const char* op = "selective_scan_step";
  check(op, {{"h", h},
             {"u", u},
             {"delta", delta},
             {"A", A},
             {"B", B},
             {"C", C},
             {"D", D},
             {"z", z},
             {"delta_bias", delta_bias},
             {"slots", slots}});
  check_groups(op, u.size(1), "B", B, 1, 3);
  check_groups(op, u.size(1), "C", C, 1, 3);
  check_complex(op, A, B, C, &h, "h");
  std::vector<int64_t> storage;
  SelectiveScan args;
  args.slots = slot_indices(op, u.size(0), h, slots, storage);
  args.sequences = {u.size(0), 1, nullptr};
  args.spans = Spans(u.size(1), span_groups(B, C, 1), Spans::kSpanBlocks);
  args.u = one_step(view<2>(u));
  args.delta = one_step(view<2>(delta));
  if (z) args.z = one_step(view<2>(*z));
  args.A = view<2>(A);
  args.B = B.dim() == 3 ? one_step(view<3>(B)) : grouped_step(B);
  args.C = C.dim() == 3 ? one_step(view<3>(C)) : grouped_step(C);
  args.D = view<1>(D);
  args.delta_bias = view<1>(delta_bias);
  args.delta_softplus = delta_softplus;
  args.complex = is_complex(dtype_of(A));
  args.h0 = args.h_last = view<3>(h);
  Tensor y = empty_like(u);
  const int64_t rows = args.rows(), padded = args.spans.padded();
  const int64_t scratch = args.states() <= kFewStates ? 0 : u.size(0);
  Tensor lanes_A = empty(u, {rows, padded}, state_dtype(dtype_of(u)));
  Tensor state = empty(u, {scratch, rows, padded}, state_dtype(dtype_of(u)));
  args.y = one_step(view<2>(y));
  args.lanes_A = lanes_A.data_ptr();
  args.state = scratch ? state.data_ptr() : nullptr;
  selective_scan_step(args);
  return y;
}

}  // namespace
}  // namespace recurra

STABLE_TORCH_LIBRARY_IMPL(recurra, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&recurra::selective_scan_cpu));
  m.impl("_selective_scan_save", TORCH_BOX(&recurra::selective_scan_save_cpu));
  m.impl("_selective_scan_backward", TORCH_BOX(&recurra::selective_scan_backward_cpu));
  m.impl("selective_scan_step", TORCH_BOX(&recurra::selective_scan_step_cpu));
}
