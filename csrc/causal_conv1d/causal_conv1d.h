// causal_conv1d: y_t = act(bias + sum_{j<W} w_j x_{t-W+1+j}) for each channel, act the identity or
// SiLU; h0 holds the inputs before the first one and h_last the last W-1 inputs.
//
// Backward, for the cotangents dy of y and dh_last of the last inputs, with s the argument of act
// and ds_t = dy_t act'(s_t):
//   dx_t = sum_j w_j ds_{t+W-1-j}, and for the last W-1 inputs dh_last
//   dw_j = sum_t ds_t x_{t-W+1+j},  dbias = sum_t ds_t,  dh0 = the formula of dx for t < 0
#pragma once
#include <vector>

#include "cuda/indices.h"
#include "cuda/stream.h"
#include "simd/isa.h"
#include "view.h"

namespace recurra {

// Work that no cut by threads or layout changes: some steps of one sequence, or a few short
// sequences as a whole. Parameter gradients are summed within a span first.
struct ConvSpan {
  int64_t first, last;  // sequences [first, last)
  int64_t begin, end;   // steps, where it is one sequence
};

constexpr int64_t kConvSpan = 512;  // steps; a multiple of every tile

inline std::vector<ConvSpan> conv_spans(const Sequences& sequences) {
  std::vector<ConvSpan> spans;
  int64_t gathered = 0;  // steps of the short sequences that the last span holds
  for (int64_t n = 0; n < sequences.count; ++n) {
    const int64_t length = sequences[n].length();
    // An empty sequence is work too: its state moves on.
    const int64_t weight = length ? length : 1;
    if (gathered && gathered + weight <= kConvSpan) {
      spans.back().last = n + 1;
      gathered += weight;
      continue;
    }
    int64_t begin = 0;
    do {
      const int64_t end = length - begin < kConvSpan ? length : begin + kConvSpan;
      spans.push_back({n, n + 1, begin, end});
      begin = end;
    } while (begin < length);
    gathered = weight < kConvSpan ? weight : 0;
  }
  return spans;
}

struct CausalConv1d {
  View<3> x, y;        // (B, T, D)
  View<3> h0, h_last;  // (S, W-1, D)
  View<2> weight;      // (D, W)
  View<1> bias;
  Sequences sequences;
  const ConvSpan* spans = nullptr;
  int64_t span_count = 0;
  bool silu = false;
};

struct CausalConv1dBackward {
  View<3> dy, x, dx;
  View<3> dh_last, h0, dh0;
  View<2> weight, dweight;
  View<1> bias, dbias;
  View<3> partial;  // (spans, W+1, D) in the compute type: the sums of each span, bias last
  Sequences sequences;
  const ConvSpan* spans = nullptr;
  int64_t span_count = 0;
  bool silu = false;
};

struct CausalConv1dStep {
  View<3> h;       // (slots, L, D), L >= W-1: the last inputs, oldest first
  View<2> x, out;  // (B, D)
  View<2> weight;
  View<1> bias;
  const int64_t* slots = nullptr;  // state of each row; negative: skip and return zeros
  bool silu = false;
};

}  // namespace recurra

RECURRA_KERNEL(causal_conv1d, CausalConv1d)
RECURRA_KERNEL(causal_conv1d_backward, CausalConv1dBackward)
RECURRA_KERNEL(causal_conv1d_step, CausalConv1dStep)

namespace recurra::cuda {
// On the device: cu_seqlens and slots are there, null views for none, and there are no spans.
void causal_conv1d(const CausalConv1d& args, const Indices& cu_seqlens, const Stream& stream);
void causal_conv1d_step(const CausalConv1dStep& args, const Indices& slots, const Stream& stream);
void causal_conv1d_backward(const CausalConv1dBackward& args, const Indices& cu_seqlens,
                            const Stream& stream);
// Their number there, by shape alone, which `partial` has room for.
int64_t causal_conv1d_spans(int64_t batch, int64_t time, bool cu_seqlens);
}  // namespace recurra::cuda
