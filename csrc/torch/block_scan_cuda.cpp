#include "torch/block_scan.h"
#include "torch/device.h"

#include <tuple>

namespace recurra {
namespace {

// What the kernels need where they split time; x: b or h.
struct Parts {
  int64_t count;
  OptionalTensor products, states;

  Parts(const Tensor& x, const Sequences& s) {
    const int64_t steps = x.size(0) * x.size(1), blocks = x.size(2), k = x.size(3);
    count = cuda::block_scan_parts(s.count, steps, blocks, k, dtype_of(x));
    if (count == 1) return;
    products = scratch(x, {s.count, count, blocks, k, k}, DType::f64);
    states = scratch(x, {s.count, count, blocks, k}, DType::f64);
  }
  cuda::BlockScanParts views() const { return {view<5>(products), view<4>(states)}; }
};

std::tuple<Tensor, Tensor> block_scan_cuda(Tensor A, Tensor b, OptionalTensor h0, bool reverse,
                                           OptionalTensor cu_seqlens) {
  constexpr const char* op = "block_scan";
  blocks::check_forward(op, A, b, h0, cu_seqlens);
  const Sequences s = sequences_of(b, cu_seqlens);
  auto out = blocks::forward(s, A, b, h0, reverse);
  const Parts parts(b, s);
  cuda::block_scan(out.args, indices(op, "cu_seqlens", cu_seqlens), {}, parts.views(),
                   stream_of(b));
  return {out.h, out.h_last};
}

std::tuple<Tensor, Tensor, Tensor> block_scan_backward_cuda(Tensor A, Tensor h, OptionalTensor h0,
                                                            OptionalTensor dh,
                                                            OptionalTensor dh_last, bool reverse,
                                                            OptionalTensor cu_seqlens) {
  constexpr const char* op = "_block_scan_backward";
  blocks::check_backward(op, A, h, h0, dh, dh_last, cu_seqlens);
  const Sequences s = sequences_of(h, cu_seqlens);
  auto out = blocks::backward(s, A, h, h0, dh, dh_last, reverse);
  const Parts parts(h, s);
  Tensor workspace = scratch(h, {cuda::block_scan_backward_scratch(out.args, parts.count)},
                             state_dtype(dtype_of(h)));
  cuda::block_scan_backward(out.args, indices(op, "cu_seqlens", cu_seqlens), workspace.data_ptr(),
                            parts.views(), stream_of(h));
  return {out.dA, out.db, out.dh0};
}

Tensor block_scan_step_cuda(Tensor h, Tensor A, Tensor b, OptionalTensor slots) {
  blocks::check_step(h, A, b, slots);
  check_states(blocks::kStep, b.size(0), h, slots);
  BlockScan args;
  Tensor out = blocks::step(args, h, A, b);
  cuda::block_scan(args, {}, indices(blocks::kStep, "slots", slots), {}, stream_of(b));
  return out;
}

}  // namespace
}  // namespace recurra

RECURRA_CUDA_OPS(m) {
  m.impl("block_scan", RECURRA_BOX(&recurra::block_scan_cuda));
  m.impl("_block_scan_backward", RECURRA_BOX(&recurra::block_scan_backward_cuda));
  m.impl("block_scan_step", RECURRA_BOX(&recurra::block_scan_step_cuda));
}
