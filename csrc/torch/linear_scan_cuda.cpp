#include <torch/csrc/stable/library.h>

#include <tuple>

#include "linear_scan/linear_scan.h"
#include "torch/check.h"

namespace recurra {
namespace {

std::tuple<Tensor, Tensor> linear_scan_cuda(Tensor a, Tensor b, OptionalTensor h0, bool log_a,
                                            bool reverse, OptionalTensor cu_seqlens) {
  check("linear_scan", {{"a", a}, {"b", b}, {"h0", h0}, {"cu_seqlens", cu_seqlens}});
  if (is_complex(dtype_of(b))) fail("linear_scan", "b must be real on a CUDA device, got complex");
  LinearScan args;
  // The kernel reads cu_seqlens itself: their values are on the device.
  args.sequences = {cu_seqlens ? cu_seqlens->size(0) - 1 : b.size(0), b.size(1), nullptr};
  Tensor h = empty_like(b);
  Tensor h_last = empty(b, {args.sequences.count, b.size(2)}, state_dtype(dtype_of(b)));
  args.a = view<3>(a);
  args.b = view<3>(b);
  args.h0 = view<2>(h0);
  args.h = view<3>(h);
  args.h_last = view<2>(h_last);
  args.log_a = log_a;
  args.reverse = reverse;
  cuda::linear_scan(args, view<1>(cu_seqlens), cuda::current_stream(b.get_device_index()));
  return {h, h_last};
}

}  // namespace
}  // namespace recurra

STABLE_TORCH_LIBRARY_IMPL(recurra, CUDA, m) {
  m.impl("linear_scan", TORCH_BOX(&recurra::linear_scan_cuda));
}
