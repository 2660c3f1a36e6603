// What the bindings of block_scan have in common: checks, results and the arguments of kernels.
#pragma once
#include "block_scan/block_scan.h"
#include "torch/check.h"

namespace recurra::blocks {

using Optional = const OptionalTensor&;

struct Forward {
  BlockScan args;
  Tensor h, h_last;
};

inline void check_forward(const char* op, const Tensor& A, const Tensor& b, Optional h0,
                          Optional cu_seqlens) {
  check(op, {{"A", A}, {"b", b}, {"h0", h0}, {"cu_seqlens", cu_seqlens}});
}

inline Forward forward(const Sequences& sequences, const Tensor& A, const Tensor& b, Optional h0,
                       bool reverse) {
  Tensor h = empty_like(b);
  Tensor h_last = empty(b, {sequences.count, b.size(2), b.size(3)}, state_dtype(dtype_of(b)));
  BlockScan args;
  args.sequences = sequences;
  args.A = view<5>(A);
  args.b = view<4>(b);
  args.h0 = view<3>(h0);
  args.h = view<4>(h);
  args.h_last = view<3>(h_last);
  args.reverse = reverse;
  return {args, h, h_last};
}

struct Backward {
  BlockScanBackward args;
  Tensor dA, db, dh0;
};

inline void check_backward(const char* op, const Tensor& A, const Tensor& h, Optional h0,
                           Optional dh, Optional dh_last, Optional cu_seqlens) {
  check(op, {{"A", A},
             {"h", h},
             {"h0", h0},
             {"dh", dh},
             {"dh_last", dh_last},
             {"cu_seqlens", cu_seqlens}});
}

inline Backward backward(const Sequences& sequences, const Tensor& A, const Tensor& h, Optional h0,
                         Optional dh, Optional dh_last, bool reverse) {
  Tensor dA = empty_like(A), db = empty_like(h);
  Tensor dh0 = h0 ? empty_like(*h0)
                  : empty(h, {sequences.count, h.size(2), h.size(3)}, state_dtype(dtype_of(h)));
  BlockScanBackward args;
  args.sequences = sequences;
  args.A = view<5>(A);
  args.h = view<4>(h);
  args.h0 = view<3>(h0);
  args.dh = view<4>(dh);
  args.dh_last = view<3>(dh_last);
  args.dA = view<5>(dA);
  args.db = view<4>(db);
  args.dh0 = view<3>(dh0);
  args.reverse = reverse;
  return {args, dA, db, dh0};
}

inline constexpr const char* kStep = "block_scan_step";

inline void check_step(const Tensor& h, const Tensor& A, const Tensor& b, Optional slots) {
  check(kStep, {{"h", h}, {"A", A}, {"b", b}, {"slots", slots}});
  check_written(kStep, h, slots, -1, {{"b", b}}, {{"A", A}});
}

// A step, all of it but its slots; what it returns is the h of args.
inline Tensor step(BlockScan& args, const Tensor& h, const Tensor& A, const Tensor& b) {
  args.sequences = {b.size(0), 1, nullptr};
  args.A = one_step(view<4>(A));
  args.b = one_step(view<3>(b));
  args.h0 = args.h_last = view<3>(h);
  Tensor out = empty_like(b);
  args.h = one_step(view<3>(out));
  return out;
}

}  // namespace recurra::blocks
