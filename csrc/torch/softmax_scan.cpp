#include "torch/softmax_scan.h"

#include <algorithm>
#include <tuple>

namespace recurra {
namespace {

using softmax::Optional;

softmax::Forward forward(const char* op, bool save, const Tensor& s, const Tensor& v, Optional h0,
                         Optional decay, Optional bonus, Optional cu_seqlens) {
  softmax::check_forward(op, s, v, h0, decay, bonus, cu_seqlens);
  std::vector<int64_t> offsets;
  const Sequences all = sequences(op, v.size(0), v.size(1), cu_seqlens, offsets);
  softmax::Forward out =
      softmax::forward(all, save ? all.chunk_rows(kSoftmaxChunk) : -1, s, v, h0, decay, bonus);
  softmax_scan(out.args);
  return out;
}

std::tuple<Tensor, Tensor> softmax_scan_cpu(Tensor s, Tensor v, OptionalTensor h0,
                                            OptionalTensor decay, OptionalTensor bonus,
                                            OptionalTensor cu_seqlens) {
  auto out = forward("softmax_scan", false, s, v, h0, decay, bonus, cu_seqlens);
  return {out.o, out.h_last};
}

std::tuple<Tensor, Tensor, Tensor> softmax_scan_save_cpu(Tensor s, Tensor v, OptionalTensor h0,
                                                         OptionalTensor decay, OptionalTensor bonus,
                                                         OptionalTensor cu_seqlens) {
  auto out = forward("_softmax_scan_save", true, s, v, h0, decay, bonus, cu_seqlens);
  return {out.o, out.h_last, out.saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> softmax_scan_backward_cpu(
    OptionalTensor d_o, OptionalTensor dh_last, Tensor saved, Tensor s, Tensor v, OptionalTensor h0,
    OptionalTensor decay, OptionalTensor bonus, OptionalTensor cu_seqlens) {
  constexpr const char* op = "_softmax_scan_backward";
  softmax::check_backward(op, d_o, dh_last, s, v, h0, decay, bonus, cu_seqlens);
  std::vector<int64_t> offsets;
  const Sequences all = sequences(op, v.size(0), v.size(1), cu_seqlens, offsets);
  softmax::Backward out = softmax::backward(op, all, all.chunk_rows(kSoftmaxChunk), d_o, dh_last,
                                            saved, s, v, h0, decay, bonus);
  SoftmaxScanBackward& args = out.args;
  const OptionalTensor partial = partial_sums(s, v);
  // Sequences that add into the same sums are walked by one task, in order.
  const bool shared = partial && (cu_seqlens ? s.size(1) == 1 : s.size(0) == 1);
  args.parts = shared ? 1 : std::clamp<int64_t>(all.count, 1, 8);
  Tensor sums = zeros(v, {args.parts, 2, args.padded()}, state_dtype(dtype_of(v)));
  args.partial = view<3>(partial);
  args.sums = sums.data_ptr();
  softmax_scan_backward(args);
  return {out.ds, out.dv, out.dh0, out.ddecay, out.dbonus};
}

Tensor softmax_scan_step_cpu(Tensor h, Tensor s, Tensor v, OptionalTensor decay,
                             OptionalTensor bonus, OptionalTensor slots) {
  softmax::check_step(h, s, v, decay, bonus, slots);
  std::vector<int64_t> storage;
  SoftmaxScan args;
  args.slots = slot_indices(softmax::kStep, v.size(0), h, slots, storage);
  Tensor o = softmax::step(args, h, s, v, decay, bonus);
  softmax_scan(args);
  return o;
}

}  // namespace
}  // namespace recurra

RECURRA_CPU_OPS(m) {
  m.impl("softmax_scan", RECURRA_BOX(&recurra::softmax_scan_cpu));
  m.impl("_softmax_scan_save", RECURRA_BOX(&recurra::softmax_scan_save_cpu));
  m.impl("_softmax_scan_backward", RECURRA_BOX(&recurra::softmax_scan_backward_cpu));
  m.impl("softmax_scan_step", RECURRA_BOX(&recurra::softmax_scan_step_cpu));
}
