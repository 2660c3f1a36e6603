// What the bindings of softmax_scan have in common: checks, results and the arguments of kernels.
#pragma once
#include "softmax_scan/softmax_scan.h"
#include "torch/check.h"

namespace recurra::softmax {

using Optional = const OptionalTensor&;

struct Forward {
  SoftmaxScan args;
  Tensor o, h_last, saved;
};

inline void check_forward(const char* op, const Tensor& s, const Tensor& v, Optional h0,
                          Optional decay, Optional bonus, Optional cu_seqlens) {
  check(op, {{"s", s},
             {"v", v},
             {"h0", h0},
             {"decay", decay},
             {"bonus", bonus},
             {"cu_seqlens", cu_seqlens}});
}

inline void set_inputs(SoftmaxScanInputs& args, const Tensor& s, const Tensor& v, Optional decay,
                       Optional bonus) {
  args.s = view<3>(s);
  args.v = view<3>(v);
  args.decay = view<1>(decay);
  args.bonus = view<1>(bonus);
}

// `chunk_rows`: of what is saved; negative where nothing is.
inline Forward forward(const Sequences& sequences, int64_t chunk_rows, const Tensor& s,
                       const Tensor& v, Optional h0, Optional decay, Optional bonus) {
  const DType compute = state_dtype(dtype_of(v));
  SoftmaxScan args;
  args.sequences = sequences;
  set_inputs(args, s, v, decay, bonus);
  args.h0 = view<3>(h0);
  Tensor o = empty_like(v), h_last = empty(v, {sequences.count, 3, v.size(2)}, compute);
  Tensor saved = chunk_rows < 0 ? scratch(v, {0, 3, args.padded()}, compute)
                                : empty(v, {chunk_rows, 3, args.padded()}, compute);
  args.o = view<3>(o);
  args.h_last = view<3>(h_last);
  args.saved = chunk_rows > 0 ? saved.data_ptr() : nullptr;
  return {args, o, h_last, saved};
}

struct Backward {
  SoftmaxScanBackward args;
  Tensor ds, dv, dh0, ddecay, dbonus;
};

inline void check_backward(const char* op, Optional d_o, Optional dh_last, const Tensor& s,
                           const Tensor& v, Optional h0, Optional decay, Optional bonus,
                           Optional cu_seqlens) {
  check(op, {{"do", d_o},
             {"dh_last", dh_last},
             {"s", s},
             {"v", v},
             {"h0", h0},
             {"decay", decay},
             {"bonus", bonus},
             {"cu_seqlens", cu_seqlens}});
}

inline Backward backward(const char* op, const Sequences& sequences, int64_t chunk_rows,
                         Optional d_o, Optional dh_last, const Tensor& saved, const Tensor& s,
                         const Tensor& v, Optional h0, Optional decay, Optional bonus) {
  const DType compute = state_dtype(dtype_of(v));
  SoftmaxScanBackward args;
  args.sequences = sequences;
  set_inputs(args, s, v, decay, bonus);
  args.d_o = view<3>(d_o);
  args.dh_last = view<3>(dh_last);
  if (saved.dim() != 3 || saved.size(0) != chunk_rows || saved.size(1) != 3 ||
      saved.size(2) != args.padded() || dtype_of(saved) != compute || !saved.is_contiguous() ||
      saved.is_cpu() != v.is_cpu())
    fail(op, "saved must be what _softmax_scan_save returned");
  Tensor ds = empty_like(s), dv = empty_like(v);
  // The values of h0 are in `saved`; here it only says how its gradient lies.
  Tensor dh0 = h0 ? empty_like(*h0) : empty(v, {sequences.count, 3, v.size(2)}, compute);
  // Absent arguments have empty gradients.
  Tensor ddecay = decay ? empty_like(*decay) : empty(v, {0}, dtype_of(v));
  Tensor dbonus = bonus ? empty_like(*bonus) : empty(v, {0}, dtype_of(v));
  args.saved = saved.data_ptr();
  args.ds = view<3>(ds);
  args.dv = view<3>(dv);
  args.dh0 = view<3>(dh0);
  args.ddecay = decay ? view<1>(ddecay) : View<1>();
  args.dbonus = bonus ? view<1>(dbonus) : View<1>();
  return {args, ds, dv, dh0, ddecay, dbonus};
}

inline constexpr const char* kStep = "softmax_scan_step";

inline void check_step(const Tensor& h, const Tensor& s, const Tensor& v, Optional decay,
                       Optional bonus, Optional slots) {
  check(kStep,
        {{"h", h}, {"s", s}, {"v", v}, {"decay", decay}, {"bonus", bonus}, {"slots", slots}});
  check_written(kStep, h, slots, 1, {{"s", s}, {"v", v}}, {{"decay", decay}, {"bonus", bonus}});
}

// A step, all of it but its slots; o, which it returns, is in args.
inline Tensor step(SoftmaxScan& args, const Tensor& h, const Tensor& s, const Tensor& v,
                   Optional decay, Optional bonus) {
  args.sequences = {v.size(0), 1, nullptr};
  args.s = one_step(view<2>(s));
  args.v = one_step(view<2>(v));
  args.decay = view<1>(decay);
  args.bonus = view<1>(bonus);
  args.h0 = args.h_last = view<3>(h);
  Tensor o = empty_like(v);
  args.o = one_step(view<2>(o));
  return o;
}

}  // namespace recurra::softmax
