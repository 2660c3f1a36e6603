#include <tuple>

#include "torch/device.h"
#include "torch/linear_scan.h"

namespace recurra {
namespace {

// What the kernels need where they split time.
struct Parts {
  int64_t count;
  OptionalTensor products, states;

  Parts(const Tensor& x, const Sequences& s) {
    const DType dtype = dtype_of(x);
    count = cuda::linear_scan_parts(s.count, x.size(0) * x.size(1), x.size(2), dtype);
    if (count == 1) return;
    products =
        scratch(x, {s.count, count, x.size(2)}, is_complex(dtype) ? DType::c128 : DType::f64);
    states = scratch(x, {s.count, count, x.size(2)}, state_dtype(dtype));
  }
  cuda::ScanParts views() const { return {view<3>(products), view<3>(states)}; }
};

std::tuple<Tensor, Tensor> linear_scan_cuda(Tensor a, Tensor b, OptionalTensor h0, bool log_a,
                                            bool reverse, OptionalTensor cu_seqlens) {
  constexpr const char* op = "linear_scan";
  check(op, {{"a", a}, {"b", b}, {"h0", h0}, {"cu_seqlens", cu_seqlens}});
  const Sequences s = sequences_of(b, cu_seqlens);
  const LinearScanCall call(a, b, h0, log_a, reverse, s);
  const Parts parts(b, s);
  cuda::linear_scan(call.args, indices(op, "cu_seqlens", cu_seqlens), parts.views(), stream_of(b));
  return {call.h, call.h_last};
}

std::tuple<Tensor, Tensor, Tensor> linear_scan_backward_cuda(Tensor a, Tensor h, OptionalTensor h0,
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
  const Sequences s = sequences_of(h, cu_seqlens);
  LinearScanBackwardCall call(a, h, h0, dh, dh_last, log_a, reverse, s);
  const Parts parts(h, s);
  const OptionalTensor partial = partial_sums(a, h, cuda::linear_scan_sums(call.args, parts.count));
  call.args.partial = view<3>(partial);
  cuda::linear_scan_backward(call.args, indices(op, "cu_seqlens", cu_seqlens), parts.views(),
                             stream_of(h));
  return {call.da, call.db, call.dh0};
}

Tensor linear_scan_step_cuda(Tensor h, Tensor a, Tensor b, bool log_a, OptionalTensor slots) {
  constexpr const char* op = "linear_scan_step";
  check(op, {{"h", h}, {"a", a}, {"b", b}, {"slots", slots}});
  check_written(op, h, slots, -1, {{"a", a}, {"b", b}}, {});
  check_states(op, b.size(0), h, slots);
  const LinearScanStepCall call(h, a, b, log_a);
  cuda::linear_scan_step(call.args, indices(op, "slots", slots), stream_of(b));
  return call.out;
}

}  // namespace
}  // namespace recurra

RECURRA_CUDA_OPS(m) {
  m.impl("linear_scan", RECURRA_BOX(&recurra::linear_scan_cuda));
  m.impl("_linear_scan_backward", RECURRA_BOX(&recurra::linear_scan_backward_cuda));
  m.impl("linear_scan_step", RECURRA_BOX(&recurra::linear_scan_step_cuda));
}
