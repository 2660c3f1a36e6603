// What the bindings of linear_scan have in common: results are allocated and arguments become those
// of the kernels, once they are checked.
#pragma once
#include "linear_scan/linear_scan.h"
#include "torch/check.h"

namespace recurra {

struct LinearScanCall {
  LinearScan args;
  Tensor h, h_last;

  LinearScanCall(const Tensor& a, const Tensor& b, const OptionalTensor& h0, bool log_a,
                 bool reverse, const Sequences& sequences)
      : h(empty_like(b)), h_last(empty(b, {sequences.count, b.size(2)}, state_dtype(dtype_of(b)))) {
    args.a = view<3>(a);
    args.b = view<3>(b);
    args.h0 = view<2>(h0);
    args.h = view<3>(h);
    args.h_last = view<2>(h_last);
    args.sequences = sequences;
    args.log_a = log_a;
    args.reverse = reverse;
  }
};

struct LinearScanStepCall {
  LinearScanStep args;
  Tensor out;

  LinearScanStepCall(const Tensor& h, const Tensor& a, const Tensor& b, bool log_a)
      : out(empty_like(b)) {
    args.h = view<2>(h);
    args.a = view<2>(a);
    args.b = view<2>(b);
    args.out = view<2>(out);
    args.log_a = log_a;
  }
};

// All but the partial sums, whose number differs.
struct LinearScanBackwardCall {
  LinearScanBackward args;
  Tensor da, db, dh0;

  LinearScanBackwardCall(const Tensor& a, const Tensor& h, const OptionalTensor& h0,
                         const OptionalTensor& dh, const OptionalTensor& dh_last, bool log_a,
                         bool reverse, const Sequences& sequences)
      : da(empty_like(a)),
        db(empty_like(h)),
        dh0(h0 ? empty_like(*h0)
               : empty(h, {sequences.count, h.size(2)}, state_dtype(dtype_of(h)))) {
    args.a = view<3>(a);
    args.h = view<3>(h);
    args.h0 = view<2>(h0);
    args.dh = view<3>(dh);
    args.dh_last = view<2>(dh_last);
    args.da = view<3>(da);
    args.db = view<3>(db);
    args.dh0 = view<2>(dh0);
    args.sequences = sequences;
    args.log_a = log_a;
    args.reverse = reverse;
  }
};

}  // namespace recurra
