// What the CUDA kernels of softmax_scan share: their inputs as threads read them, and how sequences
// are cut into the pieces that threads walk.
#pragma once
#include "cuda/split.h"
#include "cuda/storage.h"
#include "softmax_scan/softmax_scan.h"
#include "softmax_scan/step.h"

namespace recurra::cuda::softmax_scan_detail {

using namespace softmax;

constexpr int kThreads = 128;
constexpr int kAhead = 8;  // steps that are loaded at once; of a chunk there are four times as many

template <class S>
struct Inputs {
  using T = Compute<S>;
  Array<S, 3> s, v;
  Parameters<S, 1> decay, bonus;
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
  // Zero where there is none.
  RECURRA_FN T decay_at(int64_t c) const { return decay.data ? limited_decay(decay.at(c)) : T(0); }
  RECURRA_FN T bonus_at(int64_t c) const { return bonus.data ? bonus.at(c) : T(0); }
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
  const int64_t sequences = args.sequences.count, steps = args.v.size[0] * args.v.size[1];
  return time_parts(sequences * args.v.size[2], sequences, steps);
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
