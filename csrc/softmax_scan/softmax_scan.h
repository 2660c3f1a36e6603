// softmax_scan: the softmax-weighted mean of all values so far, for every channel, where the weight
// of a step may fall with its age. Feng et al. 2024, "Attention as an RNN" (Aaren); with `decay`
// and `bonus` Peng et al. 2023, "RWKV" (WKV of RWKV-4). The state is the running maximum m of the
// log weights, the normaliser c and the weighted sum a, both relative to e^m:
//   x_t = m_{t-1} - decay,  m_t = max(x_t, s_t),  f_t = e^{x_t - m_t},  g_t = e^{s_t - m_t}
//   c_t = f_t c_{t-1} + g_t,  a_t = f_t a_{t-1} + g_t v_t
//   o_t = a_t / c_t,  or, with a bonus, from the state before this step
//   o_t = (p a_{t-1} + r v_t) / (p c_{t-1} + r)
//     with q = max(m_{t-1}, s_t + bonus), p = e^{m_{t-1} - q}, r = e^{s_t + bonus - q}
// and 0 where the denominator is 0, as it is before the first score above -infinity. Of f and g,
// and of p and r, one is 1: one exponential gives both. Only the ratio of p and r matters, which is
// that of f e^decay and g e^bonus, both powers over the larger, so that no product is above 1. The
// products are taken for them, unless one is below 1e-24, where f or g may have lost digits, or a
// power is below 1e-10, where both may be so small that the terms of a tiny output lose theirs.
// m is at least -1e38, which stands for -infinity and can be subtracted; it is that of the empty
// state (-1e38, 0, 0). A decay may be negative: m then grows with time, all else is the same.
//
// Backward, with M, C, A the cotangents of the state after step t and y_t = do_t / c_t: what
// depends on a state by its outputs alone does not change when m grows by d and c and a shrink by
// e^d, so M - C c - A a is 0. What is left of it came in as a cotangent of h_last and belongs to
// whatever set the maximum: E_t = M_t - C_t c_t - A_t a_t goes to s_t where s_t > x_t, on to
// E_{t-1} where x_t > s_t, half to each where they are equal. So
//   C_t += -y_t o_t,  A_t += y_t
//   ds_t = g_t (C_t + v_t A_t) + E's part,  dv_t = g_t A_t
//   C_{t-1} = f_t C_t,  A_{t-1} = f_t A_t,  M_{t-1} = C_{t-1} c_{t-1} + A_{t-1} a_{t-1} + E_{t-1}
//   ddecay -= M_{t-1}
// and, with a bonus, instead of the first line, with P and R being p and r over p c_{t-1} + r
//   C_{t-1} += -P do_t o_t,  A_{t-1} += P do_t,  dv_t += R do_t
//   ds_t += R do_t (v_t - o_t),  dbonus += R do_t (v_t - o_t)
#pragma once
#include "cuda/indices.h"
#include "cuda/stream.h"
#include "simd/isa.h"
#include "view.h"

namespace recurra {

// Steps between two saved states; a task holds this many at a time.
constexpr int64_t kSoftmaxChunk = 32;

// What forward and backward are both given.
struct SoftmaxScanInputs {
  View<3> s, v;  // (B, T, D); any dimension of s may be 1
  View<1> decay, bonus;
  Sequences sequences;

  int64_t padded() const { return (v.size[2] + 15) / 16 * 16; }
};

// States are (S, 3, D): m, c, a.
struct SoftmaxScan : SoftmaxScanInputs {
  View<3> h0, h_last;
  View<3> o;              // (B, T, D)
  void* saved = nullptr;  // (chunk rows, 3, padded) in the compute type, the state before each
                          // chunk; or null
  const int64_t* slots = nullptr;  // state of each sequence; negative: skip and return zeros
};

struct SoftmaxScanBackward : SoftmaxScanInputs {
  View<3> d_o, dh_last;
  const void* saved = nullptr;
  View<3> ds, dv, dh0;
  View<1> ddecay, dbonus;
  View<3> partial;  // for a broadcast s: see partial_sums.h
  // Sequences are walked in `parts` runs, each with sums of its own.
  int64_t parts = 1;
  void* sums = nullptr;  // (parts, 2, padded) in the compute type, zeros: ddecay, dbonus
};

}  // namespace recurra

RECURRA_KERNEL(softmax_scan, SoftmaxScan)
RECURRA_KERNEL(softmax_scan_backward, SoftmaxScanBackward)

namespace recurra::cuda {
// On the device: neither sequences nor slots are in the arguments but in cu_seqlens and slots
// there, null views for none. `scratch`: that many numbers of the compute type, null for none.
int64_t softmax_scan_scratch(const SoftmaxScan& args);
void softmax_scan(const SoftmaxScan& args, const Indices& cu_seqlens, const Indices& slots,
                  void* scratch, const Stream& stream);
// The same; `partial`, `parts` and `sums` of the arguments are of the CPU alone.
int64_t softmax_scan_backward_scratch(const SoftmaxScanBackward& args);
void softmax_scan_backward(const SoftmaxScanBackward& args, const Indices& cu_seqlens,
                           void* scratch, const Stream& stream);
}  // namespace recurra::cuda
