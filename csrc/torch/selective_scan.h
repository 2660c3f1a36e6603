// What the bindings of selective_scan have in common: the checks that the text of requirements
// cannot express, and how arguments become those of the kernels once they are checked.
#pragma once
#include "selective_scan/selective_scan.h"
#include "torch/check.h"

namespace recurra::selective_scan_op {

// The arguments of every direction; those of a step have no time.
struct Inputs {
  const Tensor &u, &delta, &A, &B, &C;
  const OptionalTensor &D, &z, &delta_bias;
  bool delta_softplus;
};

inline void check_groups(const char* op, const Tensor& u, const char* name, const Tensor& t) {
  if (t.dim() != u.dim() + 1) return;
  const int64_t channels = u.size(u.dim() - 1), groups = t.size(u.dim() - 1);
  if (groups < 1 || channels % groups != 0)
    fail(op, std::string("the number of groups G of ") + name + " must divide D = " +
                 std::to_string(channels) + ", got " + std::to_string(groups));
}

inline void check_rest(const char* op, const Inputs& in, const Tensor* state,
                       const char* state_name) {
  check_groups(op, in.u, "B", in.B);
  check_groups(op, in.u, "C", in.C);
  const bool complex = is_complex(dtype_of(in.A));
  if (!complex && is_complex(dtype_of(in.B))) fail(op, "B must be real where A is real");
  if (!complex && is_complex(dtype_of(in.C))) fail(op, "C must be real where A is real");
  if (state && is_complex(dtype_of(*state)) != complex)
    fail(op, std::string(state_name) + " must be " + (complex ? "complex" : "real") +
                 " where A is " + (complex ? "complex" : "real"));
}

inline void check_forward(const char* op, const Inputs& in, const OptionalTensor& h0,
                          const OptionalTensor& cu_seqlens) {
  check_layout(op, "u", in.u, "A", in.A, ", and likewise delta, z, B and C");
  check(op, {{"u", in.u},
             {"delta", in.delta},
             {"A", in.A},
             {"B", in.B},
             {"C", in.C},
             {"D", in.D},
             {"z", in.z},
             {"delta_bias", in.delta_bias},
             {"h0", h0},
             {"cu_seqlens", cu_seqlens}});
  check_rest(op, in, h0 ? &*h0 : nullptr, "h0");
}

inline void check_backward(const char* op, const Inputs& in, const OptionalTensor& dy,
                           const OptionalTensor& dh_last, const OptionalTensor& h0,
                           const OptionalTensor& cu_seqlens) {
  check(op, {{"u", in.u},
             {"delta", in.delta},
             {"A", in.A},
             {"B", in.B},
             {"C", in.C},
             {"D", in.D},
             {"z", in.z},
             {"delta_bias", in.delta_bias},
             {"dy", dy},
             {"dh_last", dh_last},
             {"h0", h0},
             {"cu_seqlens", cu_seqlens}});
  check_rest(op, in, dh_last ? &*dh_last : nullptr, "dh_last");
}

inline void check_step(const char* op, const Inputs& in, const Tensor& h,
                       const OptionalTensor& slots) {
  check(op, {{"h", h},
             {"u", in.u},
             {"delta", in.delta},
             {"A", in.A},
             {"B", in.B},
             {"C", in.C},
             {"D", in.D},
             {"z", in.z},
             {"delta_bias", in.delta_bias},
             {"slots", slots}});
  check_rest(op, in, &h, "h");
  check_written(op, h, slots, 2, {{"u", in.u}, {"delta", in.delta}},
                {{"A", in.A},
                 {"B", in.B},
                 {"C", in.C},
                 {"D", in.D},
                 {"z", in.z},
                 {"delta_bias", in.delta_bias}});
}

inline DType lane_state_dtype(const Inputs& in) {
  const DType real = state_dtype(dtype_of(in.u));
  return is_complex(dtype_of(in.A)) ? (real == DType::f64 ? DType::c128 : DType::c64) : real;
}

// (B, T, N) -> (B, T, 1, N)
inline View<4> grouped(const Tensor& t) {
  if (t.dim() == 4) return view<4>(t);
  const View<3> v = view<3>(t);
  return {v.data,
          v.dtype,
          {v.size[0], v.size[1], 1, v.size[2]},
          {v.stride[0], v.stride[1], 0, v.stride[2]}};
}

// (B, N) -> (B, 1, 1, N)
inline View<4> grouped_step(const Tensor& t) {
  if (t.dim() == 3) return one_step(view<3>(t));
  const View<2> v = view<2>(t);
  return {v.data, v.dtype, {v.size[0], 1, 1, v.size[1]}, {v.stride[0], 0, 0, v.stride[1]}};
}

inline int64_t groups_of(const Inputs& in) {
  const auto of = [&](const Tensor& t) {
    return t.dim() == in.u.dim() + 1 ? t.size(in.u.dim() - 1) : 1;
  };
  return of(in.B) > of(in.C) ? of(in.B) : of(in.C);
}

// All but the sequences.
inline void set_inputs(const Inputs& in, int64_t blocks_per_span, SelectiveScanInputs& args) {
  const bool step = in.u.dim() == 2;
  const auto activations = [&](const Tensor& t) {
    return step ? one_step(view<2>(t)) : view<3>(t);
  };
  args.spans = Spans(in.u.size(in.u.dim() - 1), groups_of(in), blocks_per_span);
  args.u = activations(in.u);
  args.delta = activations(in.delta);
  if (in.z) args.z = activations(*in.z);
  args.A = view<2>(in.A);
  args.B = step ? grouped_step(in.B) : grouped(in.B);
  args.C = step ? grouped_step(in.C) : grouped(in.C);
  args.D = view<1>(in.D);
  args.delta_bias = view<1>(in.delta_bias);
  args.delta_softplus = in.delta_softplus;
  args.complex = is_complex(dtype_of(in.A));
}

// The gradients, of which those of absent arguments are empty.
struct Gradients {
  Tensor du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dh0;

  // The values of h0 are in `saved`; here it only says how its gradient lies.
  Gradients(const Inputs& in, const OptionalTensor& h0, int64_t sequences)
      : du(empty_like(in.u)),
        ddelta(empty_like(in.delta)),
        dA(empty_like(in.A)),
        dB(empty_like(in.B)),
        dC(empty_like(in.C)),
        dD(like(in, in.D)),
        dz(like(in, in.z)),
        ddelta_bias(like(in, in.delta_bias)),
        dh0(h0 ? empty_like(*h0)
               : empty(in.u, {sequences, in.u.size(2), in.A.size(1)}, lane_state_dtype(in))) {}

  void set(const Inputs& in, SelectiveScanBackward& args) const {
    args.du = view<3>(du);
    args.ddelta = view<3>(ddelta);
    args.dz = in.z ? view<3>(dz) : View<3>();
    args.dA = view<2>(dA);
    args.dB = grouped(dB);
    args.dC = grouped(dC);
    args.dD = in.D ? view<1>(dD) : View<1>();
    args.ddelta_bias = in.delta_bias ? view<1>(ddelta_bias) : View<1>();
    args.dh0 = view<3>(dh0);
  }

 private:
  static Tensor like(const Inputs& in, const OptionalTensor& t) {
    return t ? empty_like(*t) : empty(in.u, {0}, dtype_of(in.u));
  }
};

inline void check_saved(const char* op, const Tensor& saved, int64_t chunk_rows,
                        const SelectiveScanInputs& args) {
  if (saved.dim() != 3 || saved.size(0) != chunk_rows || saved.size(1) != args.rows() ||
      saved.size(2) != args.spans.padded() || dtype_of(saved) != state_dtype(args.u.dtype) ||
      !saved.is_contiguous())
    fail(op, "saved must be what _selective_scan_save returned");
}

}  // namespace recurra::selective_scan_op
