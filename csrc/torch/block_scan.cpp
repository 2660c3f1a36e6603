#include "block_scan/block_scan.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/check.h"

namespace recurra {
namespace {

std::tuple<Tensor, Tensor> block_scan_cpu(Tensor A, Tensor b, OptionalTensor h0, bool reverse,
                                          OptionalTensor cu_seqlens) {
  constexpr const char* op = "block_scan";
  check(op, {{"A", A}, {"b", b}, {"h0", h0}, {"cu_seqlens", cu_seqlens}});
  std::vector<int64_t> offsets;
  BlockScan args;
  args.sequences = sequences(op, b.size(0), b.size(1), cu_seqlens, offsets);
  Tensor h = empty_like(b);
  Tensor h_last = empty(b, {args.sequences.count, b.size(2), b.size(3)}, state_dtype(dtype_of(b)));
  args.A = view<5>(A);
  args.b = view<4>(b);
  args.h0 = view<3>(h0);
  args.h = view<4>(h);
  args.h_last = view<3>(h_last);
  args.reverse = reverse;
  block_scan(args);
  return {h, h_last};
}

std::tuple<Tensor, Tensor, Tensor> block_scan_backward_cpu(Tensor A, Tensor h, OptionalTensor h0,
                                                           OptionalTensor dh,
                                                           OptionalTensor dh_last, bool reverse,
                                                           OptionalTensor cu_seqlens) {
  constexpr const char* op = "_block_scan_backward";
  check(op, {{"A", A},
             {"h", h},
             {"h0", h0},
             {"dh", dh},
             {"dh_last", dh_last},
             {"cu_seqlens", cu_seqlens}});
  std::vector<int64_t> offsets;
  BlockScanBackward args;
  args.sequences = sequences(op, h.size(0), h.size(1), cu_seqlens, offsets);
  const DType compute = state_dtype(dtype_of(h));
  Tensor dA = empty_like(A), db = empty_like(h);
  Tensor dh0 =
      h0 ? empty_like(*h0) : empty(h, {args.sequences.count, h.size(2), h.size(3)}, compute);
  args.A = view<5>(A);
  args.h = view<4>(h);
  args.h0 = view<3>(h0);
  args.dh = view<4>(dh);
  args.dh_last = view<3>(dh_last);
  args.dA = view<5>(dA);
  args.db = view<4>(db);
  args.dh0 = view<3>(dh0);
  args.reverse = reverse;
  Tensor partial = zeros(A, {args.partial_size()}, compute);
  args.partial = partial.data_ptr();
  block_scan_backward(args);
  return {dA, db, dh0};
}

Tensor block_scan_step_cpu(Tensor h, Tensor A, Tensor b, OptionalTensor slots) {
  constexpr const char* op = "block_scan_step";
  check(op, {{"h", h}, {"A", A}, {"b", b}, {"slots", slots}});
  std::vector<int64_t> storage;
  BlockScan args;
  args.slots = slot_indices(op, b.size(0), h, slots, storage);
  args.sequences = {b.size(0), 1, nullptr};
  args.A = one_step(view<4>(A));
  args.b = one_step(view<3>(b));
  args.h0 = args.h_last = view<3>(h);
  Tensor out = empty_like(b);
  args.h = one_step(view<3>(out));
  block_scan(args);
  return out;
}

}  // namespace
}  // namespace recurra

STABLE_TORCH_LIBRARY_IMPL(recurra, CPU, m) {
  m.impl("block_scan", TORCH_BOX(&recurra::block_scan_cpu));
  m.impl("_block_scan_backward", TORCH_BOX(&recurra::block_scan_backward_cpu));
  m.impl("block_scan_step", TORCH_BOX(&recurra::block_scan_step_cpu));
}
