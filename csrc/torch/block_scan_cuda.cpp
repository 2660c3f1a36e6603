#include "torch/block_scan.h"
#include "torch/device.h"

#include <tuple>

namespace recurra {
namespace {

std::tuple<Tensor, Tensor> block_scan_cuda(Tensor A, Tensor b, OptionalTensor h0, bool reverse,
                                           OptionalTensor cu_seqlens) {
  constexpr const char* op = "block_scan";
  blocks::check_forward(op, A, b, h0, cu_seqlens);
  auto out = blocks::forward(sequences_of(b, cu_seqlens), A, b, h0, reverse);
  cuda::block_scan(out.args, indices(op, "cu_seqlens", cu_seqlens), {}, stream_of(b));
  return {out.h, out.h_last};
}

std::tuple<Tensor, Tensor, Tensor> block_scan_backward_cuda(Tensor A, Tensor h, OptionalTensor h0,
                                                            OptionalTensor dh,
                                                            OptionalTensor dh_last, bool reverse,
                                                            OptionalTensor cu_seqlens) {
  constexpr const char* op = "_block_scan_backward";
  blocks::check_backward(op, A, h, h0, dh, dh_last, cu_seqlens);
  auto out = blocks::backward(sequences_of(h, cu_seqlens), A, h, h0, dh, dh_last, reverse);
  Tensor workspace =
      scratch(h, {cuda::block_scan_backward_scratch(out.args)}, state_dtype(dtype_of(h)));
  cuda::block_scan_backward(out.args, indices(op, "cu_seqlens", cu_seqlens), workspace.data_ptr(),
                            stream_of(h));
  return {out.dA, out.db, out.dh0};
}

Tensor block_scan_step_cuda(Tensor h, Tensor A, Tensor b, OptionalTensor slots) {
  blocks::check_step(h, A, b, slots);
  check_states(blocks::kStep, b.size(0), h, slots);
  BlockScan args;
  Tensor out = blocks::step(args, h, A, b);
  cuda::block_scan(args, {}, indices(blocks::kStep, "slots", slots), stream_of(b));
  return out;
}

}  // namespace
}  // namespace recurra

RECURRA_CUDA_OPS(m) {
  m.impl("block_scan", RECURRA_BOX(&recurra::block_scan_cuda));
  m.impl("_block_scan_backward", RECURRA_BOX(&recurra::block_scan_backward_cuda));
  m.impl("block_scan_step", RECURRA_BOX(&recurra::block_scan_step_cuda));
}
