// Blocks of four numbers that lie side by side in memory, as they do unless a caller has cut them
// out of something: a vector is four of them, or the matrix of one. So nothing need be turned into
// lanes of blocks and back, which takes longer than what is computed. The products and their order
// are those of blocks.h.
#pragma once
#include "block_scan/blocks.h"
#include "simd/fours.h"

namespace recurra::RECURRA_ISA::fours {

using blocks::Matrices;
using blocks::Vectors;

RECURRA_INLINE bool packed(const View<3>& v) { return !v || (v.step(2) == 1 && v.step(1) == 4); }
RECURRA_INLINE bool packed(const View<4>& v) { return !v || (v.step(3) == 1 && v.step(2) == 4); }
RECURRA_INLINE bool packed(const View<5>& v) {
  return v.size[3] == 4 && v.step(4) == 1 && v.step(3) == 4 && v.step(2) == 16;
}

// The numbers of a span of blocks at one step.
template <class T>
struct Row {
  char* data;
  DType dtype;
  bool past;  // written past the caches

  RECURRA_INLINE Row(const Vectors& v, int64_t first, bool stream = false)
      : Row(v.data, v.dtype, first * 4, stream) {}
  RECURRA_INLINE Row(const Matrices& m, int64_t first, bool stream = false)
      : Row(m.data, m.dtype, first * 16, stream) {}
  RECURRA_INLINE Row(char* from, DType type, int64_t offset, bool stream)
      : data(from ? from + offset * item_size(type) : nullptr),
        dtype(type),
        past(stream && type == kDType<T> && reinterpret_cast<uintptr_t>(data) % 64 == 0) {}
  RECURRA_INLINE Vec<T> load(int64_t at, int64_t count) const {
    return load_lanes<T>(data + at * item_size(dtype), dtype, at_most_lanes(count));
  }
  RECURRA_INLINE void store(int64_t at, Vec<T> v, int64_t count) const {
    char* const to = data + at * item_size(dtype);
    if (past && count >= kLanes) return v.stream(reinterpret_cast<T*>(to));
    store_lanes<T>(to, dtype, v, at_most_lanes(count));
  }
  RECURRA_INLINE void prefetch(int64_t at, int64_t size) const {
    const int64_t item = item_size(dtype);
    for (int64_t byte = 0; byte < size * item; byte += 64)
      RECURRA_ISA::prefetch<2>(data + at * item + byte);
  }
};

// The matrices of four blocks, zeros where there are fewer.
template <class T>
RECURRA_INLINE void load_matrices(const Row<T>& from, int64_t at, int64_t count, Vec<T> (&m)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    m[i] = 4 * i < count ? from.load(4 * at + 16 * i, kLanes) : Vec<T>(T(0));
}

// f(at, count) for each vector of a span, where count of its numbers are left: sixteen but at the
// end.
template <class F>
RECURRA_INLINE void for_vectors(int64_t numbers, F f) {
  int64_t at = 0;
  for (; at + kLanes <= numbers; at += kLanes) f(at, static_cast<int64_t>(kLanes));
  if (at < numbers) f(at, numbers - at);
}

template <class T>
RECURRA_INLINE void load_state(const Vectors& v, int64_t first, int64_t numbers, T* state) {
  for_vectors(numbers, [&](int64_t at, int64_t count) RECURRA_LAMBDA {
    (v ? Row<T>(v, first).load(at, count) : Vec<T>(T(0))).store(state + at);
  });
}
template <class T>
RECURRA_INLINE void store_state(const Vectors& v, int64_t first, int64_t numbers, const T* state) {
  if (!v) return;
  for_vectors(numbers, [&](int64_t at, int64_t count) RECURRA_LAMBDA {
    Row<T>(v, first).store(at, Vec<T>::load(state + at), count);
  });
}

// Matrices of each step alone.
RECURRA_INLINE bool served(const BlockScan& args) {
  return args.A.size[1] > 1 && args.b.size[2] >= 4 && packed(args.A) && packed(args.b) &&
         packed(args.h) && packed(args.h0) && packed(args.h_last);
}

// One sequence of `width` blocks from `first` on.
template <class T>
void walk(const BlockScan& args, const Sequence& seq, int64_t slot, int64_t first, int64_t width,
          bool stream) {
  const int64_t numbers = 4 * width;
  const Vectors b = blocks::vectors(args.b, seq, args.reverse);
  const Vectors h = blocks::vectors(args.h, seq, args.reverse);
  const Matrices A = blocks::matrices(args.A, seq, args.reverse);
  const int64_t ahead = blocks::steps_ahead(args.b.dtype, width, 16);
  T state[4 * blocks::kWidest] __attribute__((aligned(64)));
  load_state(blocks::vectors(args.h0, slot), first, numbers, state);
  for (int64_t t = 0; t < seq.length(); ++t) {
    const bool more = t + ahead < seq.length();
    const Row<T> matrices(A.at(t), first), inputs(b.at(t), first), to(h.at(t), first, stream);
    const Row<T> later(A.at(t + ahead), first), inputs_later(b.at(t + ahead), first);
    for_vectors(numbers, [&](int64_t at, int64_t count) RECURRA_LAMBDA {
      if (more) {
        later.prefetch(4 * at, 4 * count);
        inputs_later.prefetch(at, count);
      }
      Vec<T> column[4];
      load_matrices(matrices, at, count, column);
      columns_of_fours(column);
      const Vec<T> before = Vec<T>::load(state + at);
      Vec<T> sum = inputs.load(at, count);
      sum = fma(column[0], spread_in_fours<0>(before), sum);
      sum = fma(column[1], spread_in_fours<1>(before), sum);
      sum = fma(column[2], spread_in_fours<2>(before), sum);
      sum = fma(column[3], spread_in_fours<3>(before), sum);
      sum.store(state + at);
      to.store(at, sum, count);
    });
  }
  store_state(blocks::vectors(args.h_last, slot), first, numbers, state);
}

RECURRA_INLINE bool served(const BlockScanBackward& args) {
  return args.A.size[1] > 1 && args.h.size[2] >= 4 && !args.reduced() && packed(args.A) &&
         packed(args.dA) && packed(args.h) && packed(args.dh) && packed(args.db) &&
         packed(args.h0) && packed(args.dh_last) && packed(args.dh0);
}

template <class T>
void walk_back(const BlockScanBackward& args, int64_t n, int64_t first, int64_t width,
               bool stream) {
  const int64_t numbers = 4 * width;
  const Sequence seq = args.sequences[n];
  const int64_t steps = seq.length();
  const bool back = !args.reverse;
  const Vectors h = blocks::vectors(args.h, seq, back), dh = blocks::vectors(args.dh, seq, back),
                db = blocks::vectors(args.db, seq, back);
  const Matrices A = blocks::matrices(args.A, seq, back), dA = blocks::matrices(args.dA, seq, back);
  const int64_t ahead = blocks::steps_ahead(args.h.dtype, width, 16);
  T carried[4 * blocks::kWidest] __attribute__((aligned(64)));
  load_state(blocks::vectors(args.dh_last, n), first, numbers, carried);
  for (int64_t t = 0; t < steps; ++t) {
    const bool more = t + ahead + 1 < steps;
    // The state before a step is the next one of the walk; before the last comes h0.
    const Vectors before = t == steps - 1 ? blocks::vectors(args.h0, n) : h.at(t + 1);
    const Row<T> matrices(A.at(t), first), states(before, first), given(dh.at(t), first);
    const Row<T> to_b(db.at(t), first, stream), to_A(dA.at(t), first, stream);
    const Row<T> later(A.at(t + ahead), first), states_later(h.at(t + ahead + 1), first),
        given_later(dh.at(t + ahead), first);
    for_vectors(numbers, [&](int64_t at, int64_t count) RECURRA_LAMBDA {
      if (more) {
        later.prefetch(4 * at, 4 * count);
        states_later.prefetch(at, count);
        if (dh) given_later.prefetch(at, count);
      }
      Vec<T> g = Vec<T>::load(carried + at);
      if (dh) g = given.load(at, count) + g;
      to_b.store(at, g, count);
      const Vec<T> x = before ? states.load(at, count) : Vec<T>(T(0));
      to_A.store(4 * at, spread_four<0>(g) * repeat_four<0>(x), kLanes);
      if (count > 4) to_A.store(4 * at + 16, spread_four<1>(g) * repeat_four<1>(x), kLanes);
      if (count > 8) to_A.store(4 * at + 32, spread_four<2>(g) * repeat_four<2>(x), kLanes);
      if (count > 12) to_A.store(4 * at + 48, spread_four<3>(g) * repeat_four<3>(x), kLanes);
      Vec<T> row[4];
      load_matrices(matrices, at, count, row);
      rows_of_fours(row);
      Vec<T> sum = row[0] * spread_in_fours<0>(g);
      sum = fma(row[1], spread_in_fours<1>(g), sum);
      sum = fma(row[2], spread_in_fours<2>(g), sum);
      sum = fma(row[3], spread_in_fours<3>(g), sum);
      sum.store(carried + at);
    });
  }
  store_state(blocks::vectors(args.dh0, n), first, numbers, carried);
}

}  // namespace recurra::RECURRA_ISA::fours
