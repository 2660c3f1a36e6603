#include "torch/block_scan.h"

#include <tuple>

namespace recurra {
namespace {

std::tuple<Tensor, Tensor> block_scan_cpu(Tensor A, Tensor b, OptionalTensor h0, bool reverse,
                                          OptionalTensor cu_seqlens) {
  constexpr const char* op = "block_scan";
  blocks::check_forward(op, A, b, h0, cu_seqlens);
  std::vector<int64_t> offsets;
  auto out =
      blocks::forward(sequences(op, b.size(0), b.size(1), cu_seqlens, offsets), A, b, h0, reverse);
  block_scan(out.args);
  return {out.h, out.h_last};
}

std::tuple<Tensor, Tensor, Tensor> block_scan_backward_cpu(Tensor A, Tensor h, OptionalTensor h0,
                                                           OptionalTensor dh,
                                                           OptionalTensor dh_last, bool reverse,
                                                           OptionalTensor cu_seqlens) {
  constexpr const char* op = "_block_scan_backward";
  blocks::check_backward(op, A, h, h0, dh, dh_last, cu_seqlens);
  std::vector<int64_t> offsets;
  auto out = blocks::backward(sequences(op, h.size(0), h.size(1), cu_seqlens, offsets), A, h, h0,
                              dh, dh_last, reverse);
  Tensor partial = zeros(A, {out.args.partial_size()}, state_dtype(dtype_of(h)));
  out.args.partial = partial.data_ptr();
  block_scan_backward(out.args);
  return {out.dA, out.db, out.dh0};
}

Tensor block_scan_step_cpu(Tensor h, Tensor A, Tensor b, OptionalTensor slots) {
  blocks::check_step(h, A, b, slots);
  std::vector<int64_t> storage;
  BlockScan args;
  args.slots = slot_indices(blocks::kStep, b.size(0), h, slots, storage);
  Tensor out = blocks::step(args, h, A, b);
  block_scan(args);
  return out;
}

}  // namespace
}  // namespace recurra

RECURRA_CPU_OPS(m) {
  m.impl("block_scan", RECURRA_BOX(&recurra::block_scan_cpu));
  m.impl("_block_scan_backward", RECURRA_BOX(&recurra::block_scan_backward_cpu));
  m.impl("block_scan_step", RECURRA_BOX(&recurra::block_scan_step_cpu));
}
