#include <tuple>

#include "torch/device.h"
#include "torch/softmax_scan.h"

namespace recurra {
namespace {

using softmax::Optional;

int64_t chunk_rows(const Sequences& all, Optional cu_seqlens) {
  return cu_seqlens ? all.time / kSoftmaxChunk + all.count : all.chunk_rows(kSoftmaxChunk);
}

softmax::Forward forward(const char* op, bool save, const Tensor& s, const Tensor& v, Optional h0,
                         Optional decay, Optional bonus, Optional cu_seqlens) {
  softmax::check_forward(op, s, v, h0, decay, bonus, cu_seqlens);
  const Sequences all = sequences_of(v, cu_seqlens);
  softmax::Forward out =
      softmax::forward(all, save ? chunk_rows(all, cu_seqlens) : -1, s, v, h0, decay, bonus);
  Tensor workspace = scratch(v, {cuda::softmax_scan_scratch(out.args)}, state_dtype(dtype_of(v)));
  cuda::softmax_scan(out.args, indices(op, "cu_seqlens", cu_seqlens), {}, workspace.data_ptr(),
                     stream_of(v));
  return out;
}

std::tuple<Tensor, Tensor> softmax_scan_cuda(Tensor s, Tensor v, OptionalTensor h0,
                                             OptionalTensor decay, OptionalTensor bonus,
                                             OptionalTensor cu_seqlens) {
  auto out = forward("softmax_scan", false, s, v, h0, decay, bonus, cu_seqlens);
  return {out.o, out.h_last};
}

std::tuple<Tensor, Tensor, Tensor> softmax_scan_save_cuda(Tensor s, Tensor v, OptionalTensor h0,
                                                          OptionalTensor decay,
                                                          OptionalTensor bonus,
                                                          OptionalTensor cu_seqlens) {
  auto out = forward("_softmax_scan_save", true, s, v, h0, decay, bonus, cu_seqlens);
  return {out.o, out.h_last, out.saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> softmax_scan_backward_cuda(
    OptionalTensor d_o, OptionalTensor dh_last, Tensor saved, Tensor s, Tensor v, OptionalTensor h0,
    OptionalTensor decay, OptionalTensor bonus, OptionalTensor cu_seqlens) {
  constexpr const char* op = "_softmax_scan_backward";
  softmax::check_backward(op, d_o, dh_last, s, v, h0, decay, bonus, cu_seqlens);
  const Sequences all = sequences_of(v, cu_seqlens);
  softmax::Backward out = softmax::backward(op, all, chunk_rows(all, cu_seqlens), d_o, dh_last,
                                            saved, s, v, h0, decay, bonus);
  Tensor workspace =
      scratch(v, {cuda::softmax_scan_backward_scratch(out.args)}, state_dtype(dtype_of(v)));
  cuda::softmax_scan_backward(out.args, indices(op, "cu_seqlens", cu_seqlens), workspace.data_ptr(),
                              stream_of(v));
  return {out.ds, out.dv, out.dh0, out.ddecay, out.dbonus};
}

Tensor softmax_scan_step_cuda(Tensor h, Tensor s, Tensor v, OptionalTensor decay,
                              OptionalTensor bonus, OptionalTensor slots) {
  softmax::check_step(h, s, v, decay, bonus, slots);
  check_states(softmax::kStep, v.size(0), h, slots);
  SoftmaxScan args;
  Tensor o = softmax::step(args, h, s, v, decay, bonus);
  cuda::softmax_scan(args, {}, indices(softmax::kStep, "slots", slots), nullptr, stream_of(v));
  return o;
}

}  // namespace
}  // namespace recurra

RECURRA_CUDA_OPS(m) {
  m.impl("softmax_scan", RECURRA_BOX(&recurra::softmax_scan_cuda));
  m.impl("_softmax_scan_save", RECURRA_BOX(&recurra::softmax_scan_save_cuda));
  m.impl("_softmax_scan_backward", RECURRA_BOX(&recurra::softmax_scan_backward_cuda));
  m.impl("softmax_scan_step", RECURRA_BOX(&recurra::softmax_scan_step_cuda));
}
