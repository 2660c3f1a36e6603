#include "softmax_scan/softmax_scan.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "torch/check.h"

namespace recurra {
namespace {

using Optional = const OptionalTensor&;

std::tuple<Tensor, Tensor, Tensor> forward(const char* op, bool save, const Tensor& s,
                                           const Tensor& v, Optional h0, Optional decay,
                                           Optional bonus, Optional cu_seqlens) {
  check(op, {{"s", s},
             {"v", v},
             {"h0", h0},
             {"decay", decay},
             {"bonus", bonus},
             {"cu_seqlens", cu_seqlens}});
  std::vector<int64_t> offsets;
  SoftmaxScan args;
  args.sequences = sequences(op, v.size(0), v.size(1), cu_seqlens, offsets);
  args.s = view<3>(s);
  args.v = view<3>(v);
  args.decay = view<1>(decay);
  args.bonus = view<1>(bonus);
  args.h0 = view<3>(h0);
  Tensor o = empty_like(v);
  Tensor h_last = empty(v, {args.sequences.count, 3, v.size(2)}, state_dtype(dtype_of(v)));
  Tensor saved = empty(v, {save ? args.sequences.chunk_rows(kSoftmaxChunk) : 0, 3, args.padded()},
                       state_dtype(dtype_of(v)));
  args.o = view<3>(o);
  args.h_last = view<3>(h_last);
  args.saved = save ? saved.data_ptr() : nullptr;
  softmax_scan(args);
  return {o, h_last, saved};
}

std::tuple<Tensor, Tensor> softmax_scan_cpu(Tensor s, Tensor v, OptionalTensor h0,
                                            OptionalTensor decay, OptionalTensor bonus,
                                            OptionalTensor cu_seqlens) {
  auto [o, h_last, saved] = forward("softmax_scan", false, s, v, h0, decay, bonus, cu_seqlens);
  return {o, h_last};
}

std::tuple<Tensor, Tensor, Tensor> softmax_scan_save_cpu(Tensor s, Tensor v, OptionalTensor h0,
                                                         OptionalTensor decay, OptionalTensor bonus,
                                                         OptionalTensor cu_seqlens) {
  return forward("_softmax_scan_save", true, s, v, h0, decay, bonus, cu_seqlens);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> softmax_scan_backward_cpu(
    OptionalTensor d_o, OptionalTensor dh_last, Tensor saved, Tensor s, Tensor v, OptionalTensor h0,
    OptionalTensor decay, OptionalTensor bonus, OptionalTensor cu_seqlens) {
  constexpr const char* op = "_softmax_scan_backward";
  check(op, {{"do", d_o},
             {"dh_last", dh_last},
             {"s", s},
             {"v", v},
             {"h0", h0},
             {"decay", decay},
             {"bonus", bonus},
             {"cu_seqlens", cu_seqlens}});
  std::vector<int64_t> offsets;
  SoftmaxScanBackward args;
  args.sequences = sequences(op, v.size(0), v.size(1), cu_seqlens, offsets);
  args.s = view<3>(s);
  args.v = view<3>(v);
  args.decay = view<1>(decay);
  args.bonus = view<1>(bonus);
  args.d_o = view<3>(d_o);
  args.dh_last = view<3>(dh_last);

  const int64_t count = args.sequences.count, channels = v.size(2), padded = args.padded();
  const DType compute = state_dtype(dtype_of(v));
  if (saved.dim() != 3 || saved.size(0) != args.sequences.chunk_rows(kSoftmaxChunk) ||
      saved.size(1) != 3 || saved.size(2) != padded || dtype_of(saved) != compute ||
      !saved.is_contiguous())
    fail(op, "saved must be what _softmax_scan_save returned");
  const OptionalTensor partial = partial_sums(s, v);
  // Sequences that add into the same sums are walked by one task, in order.
  const bool shared = partial && (cu_seqlens ? s.size(1) == 1 : s.size(0) == 1);
  args.parts = shared ? 1 : std::clamp<int64_t>(count, 1, 8);
  Tensor ds = empty_like(s), dv = empty_like(v);
  // The values of h0 are in `saved`; here it only says how its gradient lies.
  Tensor dh0 = h0 ? empty_like(*h0) : empty(v, {count, 3, channels}, compute);
  // Absent arguments have empty gradients.
  Tensor ddecay = decay ? empty_like(*decay) : empty(v, {0}, dtype_of(v));
  Tensor dbonus = bonus ? empty_like(*bonus) : empty(v, {0}, dtype_of(v));
  Tensor sums = zeros(v, {args.parts, 2, padded}, compute);
  args.saved = saved.data_ptr();
  args.ds = view<3>(ds);
  args.dv = view<3>(dv);
  args.dh0 = view<3>(dh0);
  args.ddecay = decay ? view<1>(ddecay) : View<1>();
  args.dbonus = bonus ? view<1>(dbonus) : View<1>();
  args.partial = view<3>(partial);
  args.sums = sums.data_ptr();
  softmax_scan_backward(args);
  return {ds, dv, dh0, ddecay, dbonus};
}

Tensor softmax_scan_step_cpu(Tensor h, Tensor s, Tensor v, OptionalTensor decay,
                             OptionalTensor bonus, OptionalTensor slots) {
  constexpr const char* op = "softmax_scan_step";
  check(op, {{"h", h}, {"s", s}, {"v", v}, {"decay", decay}, {"bonus", bonus}, {"slots", slots}});
  std::vector<int64_t> storage;
  SoftmaxScan args;
  args.slots = slot_indices(op, v.size(0), h, slots, storage);
  args.sequences = {v.size(0), 1, nullptr};
  args.s = one_step(view<2>(s));
  args.v = one_step(view<2>(v));
  args.decay = view<1>(decay);
  args.bonus = view<1>(bonus);
  args.h0 = args.h_last = view<3>(h);
  Tensor o = empty_like(v);
  args.o = one_step(view<2>(o));
  softmax_scan(args);
  return o;
}

}  // namespace
}  // namespace recurra

STABLE_TORCH_LIBRARY_IMPL(recurra, CPU, m) {
  m.impl("softmax_scan", TORCH_BOX(&recurra::softmax_scan_cpu));
  m.impl("_softmax_scan_save", TORCH_BOX(&recurra::softmax_scan_save_cpu));
  m.impl("_softmax_scan_backward", TORCH_BOX(&recurra::softmax_scan_backward_cpu));
  m.impl("softmax_scan_step", TORCH_BOX(&recurra::softmax_scan_step_cpu));
}
