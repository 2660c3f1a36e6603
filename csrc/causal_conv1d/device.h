// What the CUDA kernels of causal_conv1d share: arguments, where steps and the inputs before a
// sequence lie, and any number of taps by the equations. Time is cut by its place in the row, since
// the values of cu_seqlens are on the device; whoever walks it finds the sequences on the way.
#pragma once
#include "causal_conv1d/causal_conv1d.h"
#include "cuda/launch.h"
#include "cuda/silu.h"
#include "cuda/storage.h"

namespace recurra::cuda::causal_conv1d_detail {

RECURRA_FN int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
RECURRA_FN int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// A sequence, found by the steps that it holds.
struct Cursor {
  int64_t n = 0;
  Extent s = {0, 0, 0};
  RECURRA_FN bool holds(int64_t t) const { return s.begin <= t && t < s.end; }
};

template <class S>
struct Given {
  using T = Compute<S>;
  Array<S, 3> x;
  Array<T, 3> h0;
  Parameters<S, 2> weight;
  Parameters<S, 1> bias;
  Integers cu_seqlens;
  int64_t sequences, rows, time, channels, taps;  // rows of the batch
  bool silu;

  template <class Args>
  Given(const Args& args, const Indices& offsets)
      : x(args.x),
        h0(args.h0),
        weight(args.weight),
        bias(args.bias),
        cu_seqlens(offsets),
        sequences(args.sequences.count),
        rows(args.x.size[0]),
        time(args.x.size[1]),
        channels(args.x.size[2]),
        taps(args.weight.size[1]),
        silu(args.silu) {}

  // The last sequence that begins at or before step t of a row.
  RECURRA_FN Cursor find(int64_t row, int64_t t) const {
    if (!cu_seqlens.data) return {row, {row, 0, time}};
    int64_t low = 0, high = sequences;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (cu_seqlens.at(middle) <= t ? low : high) = middle;
    }
    return {low, sequences > 0 ? extent(cu_seqlens, low, time) : Extent{0, 0, 0}};
  }
  // The same for a step that is not before the sequence.
  RECURRA_FN void advance(Cursor& at, int64_t t) const {
    if (!cu_seqlens.data) return;
    while (t >= at.s.end && at.n + 1 < sequences) at.s = extent(cu_seqlens, ++at.n, time);
  }

  // The input of step t of the row, at most taps - 1 before the sequence.
  RECURRA_FN T input(const Cursor& at, int64_t t, int64_t c) const {
    if (t >= at.s.begin) return load(x.at(at.s.batch, t, c));
    return h0.data ? *h0.at(at.n, taps - 1 + t - at.s.begin, c) : T(0);
  }
  RECURRA_FN T bias_of(int64_t c) const { return bias.data ? bias.at(c) : T(0); }
  // The argument of the activation, for any number of taps.
  RECURRA_FN T sum(const Cursor& at, int64_t t, int64_t c) const {
    T s = bias_of(c);
    for (int64_t j = 0; j < taps; ++j)
      s = fma(weight.at(c, j), input(at, t - (taps - 1) + j, c), s);
    return s;
  }
};

// f(Index<W>) for the numbers of taps that have kernels of their own, otherwise f(Index<0>).
template <class F>
void for_taps(int64_t taps, const F& f) {
  switch (taps) {
    case 2: return f(Index<2>{});
    case 3: return f(Index<3>{});
    case 4: return f(Index<4>{});
    default: return f(Index<0>{});
  }
}

// f of a pointer of the storage type.
template <class F>
void for_storage(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(static_cast<float*>(nullptr));
    case DType::f64: return f(static_cast<double*>(nullptr));
    case DType::bf16: return f(static_cast<BFloat16*>(nullptr));
    case DType::f16: return f(static_cast<Half*>(nullptr));
    default: throw std::runtime_error("causal_conv1d: no CUDA kernel for this dtype");
  }
}

}  // namespace recurra::cuda::causal_conv1d_detail
