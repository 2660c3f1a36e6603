// What the CUDA kernels of softmax_scan share: the state of one channel, and how sequences are cut
// into the pieces that threads walk. The arithmetic is that of lanes.h.
#pragma once
#include "cuda/split.h"
#include "cuda/storage.h"
#include "math/functions.h"
#include "softmax_scan/softmax_scan.h"

namespace recurra::cuda::softmax_scan_detail {

constexpr int kThreads = 128;
constexpr int kAhead = 8;  // steps that are loaded at once; of a chunk there are four times as many
constexpr int kParts = 3;  // of a state: m, c, a

template <class T>
constexpr T kEmpty = T(-1e38);
template <class T>
constexpr T kLargestDecay = sizeof(T) == 4 ? T(1e30) : T(1e21);

template <class T>
struct State {
  T m, c, a;
};

// e^{x - q} and e^{y - q} for q = max(x, y).
template <class T>
struct Weights {
  T x, y;
};
template <class T>
RECURRA_FN Weights<T> weights(T x, T y, T small) {
  const bool above = y > x;
  return {above ? small : T(1), above ? T(1) : small};
}
template <class T>
RECURRA_FN Weights<T> weights(T x, T y) {
  return weights(x, y, exp_minus_abs(x - y));
}

// The state after a step, of which x = m - decay and the weights of x and s are known.
template <class T>
RECURRA_FN State<T> advance(const State<T>& h, T x, const Weights<T>& w, T s, T v) {
  return {x == x ? max(x, s) : x, fma(w.x, h.c, w.y), fma(w.x, h.a, w.y * v)};
}

// A parameter of either dtype, in the type of arithmetic; zero where there is none.
template <class S>
struct Parameter {
  const void* data = nullptr;
  int64_t step = 0;
  bool single = false;  // float

  Parameter() = default;
  explicit Parameter(const View<1>& v)
      : data(v.data), step(v.step(0)), single(v.dtype == DType::f32) {}
  RECURRA_FN Compute<S> at(int64_t c) const {
    using T = Compute<S>;
    if (!data) return T(0);
    return single ? static_cast<T>(static_cast<const float*>(data)[c * step])
                  : load(static_cast<const S*>(data) + c * step);
  }
};

template <class S>
struct Inputs {
  using T = Compute<S>;
  Array<S, 3> s, v;
  Parameter<S> decay, bonus;
  Integers cu_seqlens;
  int64_t sequences = 0, time = 0, channels = 0, padded = 0;
  int64_t parts = 1;  // of a sequence, in whole chunks
  int64_t width = 0;  // threads of a part of a sequence, one a channel; some may be left over

  Inputs() = default;
  Inputs(const SoftmaxScanInputs& args, const Indices& offsets, int64_t parts)
      : s(args.s),
        v(args.v),
        decay(args.decay),
        bonus(args.bonus),
        cu_seqlens(offsets),
        sequences(args.sequences.count),
        time(args.sequences.time),
        channels(args.v.size[2]),
        padded(args.padded()),
        parts(parts),
        width(channels) {}

  RECURRA_FN int64_t tasks() const { return sequences * parts * width; }
  RECURRA_FN T decay_at(int64_t c) const { return at_most(kLargestDecay<T>, decay.at(c)); }
  // The row of what is saved before chunk k of sequence n, as Sequences::chunk_row has it. Whatever
  // cu_seqlens are, it is one of chunk_rows().
  RECURRA_FN int64_t chunk_row(int64_t n, int64_t begin, int64_t k) const {
    const int64_t first = cu_seqlens.data ? begin / kSoftmaxChunk + n
                                          : n * ((time + kSoftmaxChunk - 1) / kSoftmaxChunk);
    return first + k;
  }
  // Where the numbers of a part of a sequence are in a scratch array of `count` for each channel.
  RECURRA_FN int64_t scratch(int64_t n, int64_t part, int64_t count, int64_t c) const {
    return (n * parts + part) * count * channels + c;
  }
};

// Parts of each sequence: by shape alone.
inline int64_t parts_of(const SoftmaxScanInputs& args) {
  return time_parts(args.sequences.count * args.v.size[2], args.sequences.time);
}

// What one thread walks: chunks [first, last) of one channel of one sequence.
struct Piece {
  int64_t n, part, c;
  int64_t batch, begin, length;  // the sequence
  int64_t first, last;
  bool ends;  // it has the last step of the sequence, or is the first part of none

  RECURRA_FN int64_t start() const { return first * kSoftmaxChunk; }
  RECURRA_FN int64_t end() const {
    const int64_t to = last * kSoftmaxChunk;
    return to < length ? to : length;
  }
  RECURRA_FN int64_t steps() const { return end() > start() ? end() - start() : 0; }
};
template <class S>
RECURRA_FN Piece piece(const Inputs<S>& in, int64_t n, int64_t part, int64_t c) {
  const Extent e = extent(in.cu_seqlens, n, in.time);
  const int64_t length = e.end - e.begin;
  const int64_t chunks = (length + kSoftmaxChunk - 1) / kSoftmaxChunk;
  const Part own = part_of(0, chunks, part, in.parts);
  const bool ends = own.end == chunks && (own.begin < own.end || part == 0);
  return {n, part, c, e.batch, e.begin, length, own.begin, own.end, ends};
}
template <class S>
RECURRA_FN Piece piece(const Inputs<S>& in, int64_t task) {
  const int64_t row = task / in.width;
  return piece(in, row / in.parts, row % in.parts, task % in.width);
}

// Up to kAhead numbers of a channel from step t on, of `steps` in all; zeros after these.
template <class S>
RECURRA_FN void load_steps(const S* from, int64_t step, int64_t t, int64_t steps,
                           Compute<S> (&to)[kAhead]) {
  for_each_index<kAhead>(
      [&](auto i) { to[i] = t + i < steps ? load(from + (t + i) * step) : Compute<S>(0); });
}

}  // namespace recurra::cuda::softmax_scan_detail
