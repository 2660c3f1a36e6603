// What the CUDA kernels of block_scan share. K threads, the next power of two from k on, have one
// block: thread i has number i of its state, and sees those of the others by shuffles.
#pragma once
#include "block_scan/block_scan.h"
#include "cuda/launch.h"
#include "cuda/split.h"
#include "cuda/storage.h"
#include "math/functions.h"

namespace recurra::cuda::block_scan_detail {

constexpr int kThreads = 128, kWarp = 32;

// Steps that are loaded at once, of a row of K numbers each or of one where matrices are constant.
template <int K, bool constant>
constexpr int kAhead = constant || K == 1 ? 8
                       : K <= 4           ? 4
                       : K == 8           ? 2
                                          : 1;

// The threads of the group of this one.
template <int K>
__device__ __forceinline__ unsigned group_mask() {
  return ((1u << K) - 1) << (threadIdx.x % kWarp / K * K);
}
// The numbers of all threads of a group, in order.
template <int K, class T>
__device__ __forceinline__ void exchange(unsigned mask, T value, T (&all)[K]) {
  if constexpr (K == 1)
    all[0] = value;
  else
    for_each_index<K>([&](auto i) { all[i] = __shfl_sync(mask, value, i, K); });
}

// How work is cut: a group for each block of each part of each sequence.
struct Cut {
  Integers cu_seqlens;
  int64_t sequences = 0, time = 0, blocks = 0;
  int64_t parts = 1;  // of a sequence
  int64_t width = 0;  // groups of a part; those past `blocks` only help to sum
  int k = 0;
  bool backwards = false;  // whether time is walked from the last step to the first

  Cut() = default;
  // `like`: b or h, (B, T, N, k).
  Cut(const Sequences& all, const Indices& offsets, const View<4>& like, int64_t parts,
      bool backwards)
      : cu_seqlens(offsets),
        sequences(all.count),
        time(all.time),
        blocks(like.size[2]),
        parts(parts),
        width(like.size[2]),
        k(static_cast<int>(like.size[3])),
        backwards(backwards) {}

  RECURRA_FN int64_t groups() const { return sequences * parts * width; }
};

// What a group walks: `steps` from `first` on, each `by` from the last.
struct Track {
  int64_t n, part, block;
  int64_t batch, first, by, steps;
  bool ends;  // it has the last step of the sequence, or is the first part of none
};
RECURRA_FN Track track_of(const Cut& cut, int64_t group) {
  Track w;
  const bool split = cut.parts > 1;
  const int64_t row = group / cut.width;
  w.block = group % cut.width;
  w.part = split ? row % cut.parts : 0;
  w.n = split ? row / cut.parts : row;
  const Extent e = extent(cut.cu_seqlens, w.n, cut.time);
  const int64_t length = e.end - e.begin;
  const Part own = split ? part_of(0, length, w.part, cut.parts) : Part{0, length};
  w.batch = e.batch;
  w.by = cut.backwards ? -1 : 1;
  w.steps = own.end - own.begin;
  w.ends = own.end == length && (w.steps > 0 || w.part == 0);
  w.first = w.steps == 0 ? 0 : cut.backwards ? e.end - 1 - own.begin : e.begin + own.begin;
  return w;
}

// Where a walk begins in an array: row or number i of its block.
template <class S, int N>
RECURRA_FN S* start_of(const Array<S, N>& a, const Track& w, int i) {
  return a.data + w.batch * a.step[0] + w.first * a.step[1] + w.block * a.step[2] + i * a.step[3];
}

template <class S, int K>
struct Row {
  static constexpr int kBytes = static_cast<int>(sizeof(S)) * K, kPack = kBytes < 16 ? kBytes : 16;
  static constexpr int kEach = kPack / static_cast<int>(sizeof(S));
  struct alignas(kPack) Pack {
    S x[kEach];
  };
  // k numbers, `step` apart; `packed`: K side by side and aligned.
  static RECURRA_FN void load(const S* from, int64_t step, int k, bool packed,
                              Compute<S> (&to)[K]) {
    if (packed) {
      for_each_index<K / kEach>([&](auto n) {
        const Pack pack = reinterpret_cast<const Pack*>(from)[n];
        for_each_index<kEach>([&](auto i) { to[n * kEach + i] = cuda::load(&pack.x[i]); });
      });
    } else {
      for_each_index<K>(
          [&](auto i) { to[i] = i < k ? cuda::load(from + i * step) : Compute<S>(0); });
    }
  }
  // Whether the rows of matrices may be read so.
  static bool packs(const View<5>& A) {
    if (A.size[4] != K || (K > 1 && A.step(4) != 1)) return false;
    int64_t all = reinterpret_cast<uintptr_t>(A.data) % kPack ? 1 : 0;
    for (int n = 0; n < 4; ++n) all |= A.step(n) % kEach;
    return all == 0;
  }
};

// f(Index<K>) with the least K of 1, 2, 4, 8 and 16 that is at least k.
template <class F>
void for_width(int64_t k, F f) {
  if (k <= 1) return f(Index<1>{});
  if (k <= 2) return f(Index<2>{});
  if (k <= 4) return f(Index<4>{});
  if (k <= 8) return f(Index<8>{});
  f(Index<16>{});
}

// What stands before each part: reduces the parts and combines them in order. `source`: b, or dh,
// which may be null; `first`: the state before the first part, or null; `gradient`: against the
// scan, with transposed matrices that are applied after the source is added.
void reduce_parts(const View<5>& A, const View<4>& source, const View<3>& first, const Cut& cut,
                  bool gradient, const BlockScanParts& parts, const Stream& stream);

}  // namespace recurra::cuda::block_scan_detail
