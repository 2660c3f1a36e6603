#include "linear_scan/linear_scan.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/check.h"

namespace recurra {
namespace {

std::tuple<Tensor, Tensor> linear_scan_cpu(Tensor a, Tensor b, OptionalTensor h0, bool log_a,
                                           bool reverse, OptionalTensor cu_seqlens) {
  constexpr const char* op = "linear_scan";
  check(op, {{"a", a}, {"b", b}, {"h0", h0}, {"cu_seqlens", cu_seqlens}});
  std::vector<int64_t> offsets;
  LinearScan args;
  args.sequences = sequences(op, b.size(0), b.size(1), cu_seqlens, offsets);
  Tensor h = empty_like(b);
  Tensor h_last = empty(b, {args.sequences.count, b.size(2)}, state_dtype(dtype_of(b)));
  args.a = view<3>(a);
  args.b = view<3>(b);
  args.h0 = view<2>(h0);
  args.h = view<3>(h);
  args.h_last = view<2>(h_last);
  args.log_a = log_a;
  args.reverse = reverse;
  is_complex(args.b.dtype) ? complex_scan(args) : linear_scan(args);
  return {h, h_last};
}

std::tuple<Tensor, Tensor, Tensor> linear_scan_backward_cpu(Tensor a, Tensor h, OptionalTensor h0,
                                                            OptionalTensor dh,
                                                            OptionalTensor dh_last, bool log_a,
                                                            bool reverse,
                                                            OptionalTensor cu_seqlens) {
  constexpr const char* op = "_linear_scan_backward";
  check(op, {{"a", a},
             {"h", h},
             {"h0", h0},
             {"dh", dh},
             {"dh_last", dh_last},
             {"cu_seqlens", cu_seqlens}});
  std::vector<int64_t> offsets;
  LinearScanBackward args;
  args.sequences = sequences(op, h.size(0), h.size(1), cu_seqlens, offsets);
  Tensor da = empty_like(a), db = empty_like(h);
  Tensor dh0 =
      h0 ? empty_like(*h0) : empty(h, {args.sequences.count, h.size(2)}, state_dtype(dtype_of(h)));
  args.a = view<3>(a);
  const int64_t apart = args.constant() ? args.sequences.count : a.size(0);
  const OptionalTensor partial = partial_sums(a, h, apart);
  args.h = view<3>(h);
  args.h0 = view<2>(h0);
  args.dh = view<3>(dh);
  args.dh_last = view<2>(dh_last);
  args.da = view<3>(da);
  args.db = view<3>(db);
  args.dh0 = view<2>(dh0);
  args.partial = view<3>(partial);
  args.log_a = log_a;
  args.reverse = reverse;
  is_complex(args.h.dtype) ? complex_scan_backward(args) : linear_scan_backward(args);
  return {da, db, dh0};
}

Tensor linear_scan_step_cpu(Tensor h, Tensor a, Tensor b, bool log_a, OptionalTensor slots) {
  constexpr const char* op = "linear_scan_step";
  check(op, {{"h", h}, {"a", a}, {"b", b}, {"slots", slots}});
  std::vector<int64_t> storage;
  LinearScanStep args;
  args.slots = slot_indices(op, b.size(0), h, slots, storage);
  Tensor out = empty_like(b);
  args.h = view<2>(h);
  args.a = view<2>(a);
  args.b = view<2>(b);
  args.out = view<2>(out);
  args.log_a = log_a;
  is_complex(args.b.dtype) ? complex_scan_step(args) : linear_scan_step(args);
  return out;
}

}  // namespace
}  // namespace recurra

STABLE_TORCH_LIBRARY_IMPL(recurra, CPU, m) {
  m.impl("linear_scan", TORCH_BOX(&recurra::linear_scan_cpu));
  m.impl("_linear_scan_backward", TORCH_BOX(&recurra::linear_scan_backward_cpu));
  m.impl("linear_scan_step", TORCH_BOX(&recurra::linear_scan_step_cpu));
}
