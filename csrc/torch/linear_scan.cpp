#include "torch/linear_scan.h"

#include <tuple>

namespace recurra {
namespace {

std::tuple<Tensor, Tensor> linear_scan_cpu(Tensor a, Tensor b, OptionalTensor h0, bool log_a,
                                           bool reverse, OptionalTensor cu_seqlens) {
  constexpr const char* op = "linear_scan";
  check(op, {{"a", a}, {"b", b}, {"h0", h0}, {"cu_seqlens", cu_seqlens}});
  std::vector<int64_t> offsets;
  const Sequences s = sequences(op, b.size(0), b.size(1), cu_seqlens, offsets);
  LinearScanCall call(a, b, h0, log_a, reverse, s);
  is_complex(call.args.b.dtype) ? complex_scan(call.args) : linear_scan(call.args);
  return {call.h, call.h_last};
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
  const Sequences s = sequences(op, h.size(0), h.size(1), cu_seqlens, offsets);
  LinearScanBackwardCall call(a, h, h0, dh, dh_last, log_a, reverse, s);
  LinearScanBackward& args = call.args;
  const OptionalTensor partial = partial_sums(a, h, args.constant() ? s.count : a.size(0));
  args.partial = view<3>(partial);
  is_complex(args.h.dtype) ? complex_scan_backward(args) : linear_scan_backward(args);
  return {call.da, call.db, call.dh0};
}

Tensor linear_scan_step_cpu(Tensor h, Tensor a, Tensor b, bool log_a, OptionalTensor slots) {
  constexpr const char* op = "linear_scan_step";
  check(op, {{"h", h}, {"a", a}, {"b", b}, {"slots", slots}});
  check_written(op, h, slots, -1, {{"a", a}, {"b", b}}, {});
  std::vector<int64_t> storage;
  const int64_t* indices = slot_indices(op, b.size(0), h, slots, storage);
  LinearScanStepCall call(h, a, b, log_a);
  call.args.slots = indices;
  is_complex(call.args.b.dtype) ? complex_scan_step(call.args) : linear_scan_step(call.args);
  return call.out;
}

}  // namespace
}  // namespace recurra

RECURRA_CPU_OPS(m) {
  m.impl("linear_scan", RECURRA_BOX(&recurra::linear_scan_cpu));
  m.impl("_linear_scan_backward", RECURRA_BOX(&recurra::linear_scan_backward_cpu));
  m.impl("linear_scan_step", RECURRA_BOX(&recurra::linear_scan_step_cpu));
}
