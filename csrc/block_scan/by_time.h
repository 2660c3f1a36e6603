// Blocks whose time lies side by side in memory: sixteen steps of sixteen blocks are turned into
// lanes at once, since single steps would take a line of memory for each of their numbers. The
// products and their order are those of blocks.h.
#pragma once
#include "block_scan/blocks.h"

namespace recurra::RECURRA_ISA::by_time {

using blocks::Entries;
using blocks::Matrices;
using blocks::Unit;
using blocks::Vectors;

constexpr int64_t kSteps = 16;  // as many as have a line of memory
constexpr int64_t kMost = 8;    // numbers of a block: more would fill the second cache with steps

// `size` numbers of lanes for each step.
template <class T, int64_t size>
using Steps = blocks::Rows<T, kSteps * size * kLanes>;
template <class T>
using StepVectors = Steps<T, kMost>;
template <class T>
using StepMatrices = Steps<T, kMost * kMost>;

RECURRA_INLINE bool lies(const View<4>& v) { return v.step(1) == 1 || v.step(1) == -1; }
RECURRA_INLINE bool lies(const View<5>& v) { return v.step(1) == 1 || v.step(1) == -1; }

// The number i of the vectors of a unit, or the entry (i, j) of its matrices, along time.
RECURRA_INLINE Plane along(const Vectors& v, const Unit& u, int64_t i) {
  return {v.data + (u.first * v.stride_n + i * v.stride_e) * item_size(v.dtype), v.dtype,
          v.stride_t, v.stride_n};
}
RECURRA_INLINE Plane along(const Matrices& m, const Unit& u, int64_t i, int64_t j) {
  const int64_t from = u.first * m.stride_n + i * m.stride_i + j * m.stride_j;
  return {m.data + from * item_size(m.dtype), m.dtype, m.stride_t, m.stride_n};
}

template <class T>
RECURRA_INLINE void load(const Plane& p, int64_t steps, int64_t lanes, T* rows, int64_t width) {
  const Tile<T> tile = load_tile<T>(p, steps, lanes, rows, width);
  if (tile.data != rows)
    for (int64_t t = 0; t < steps; ++t) Vec<T>::load(tile.row(t)).store(rows + t * width);
}
template <class T>
RECURRA_INLINE void load(const Vectors& v, const Unit& u, int64_t steps, int64_t k, T* rows) {
  for (int64_t i = 0; i < k; ++i)
    load(along(v, u, i), steps, u.lanes, rows + i * kLanes, k * kLanes);
}
template <class T>
RECURRA_INLINE void load(const Matrices& m, const Unit& u, int64_t steps, int64_t k, T* rows) {
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j)
      load(along(m, u, i, j), steps, u.lanes, rows + (i * k + j) * kLanes, k * k * kLanes);
}
template <class T>
RECURRA_INLINE void store(const Vectors& v, const Unit& u, int64_t steps, int64_t k, const T* rows,
                          bool stream) {
  for (int64_t i = 0; i < k; ++i)
    store_tile<T>(along(v, u, i), steps, u.lanes, rows + i * kLanes, k * kLanes, stream);
}
template <class T>
RECURRA_INLINE void store(const Matrices& m, const Unit& u, int64_t steps, int64_t k, const T* rows,
                          bool stream) {
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j)
      store_tile<T>(along(m, u, i, j), steps, u.lanes, rows + (i * k + j) * kLanes, k * k * kLanes,
                    stream);
}

template <class T>
RECURRA_INLINE Entries<T> matrices_at(int64_t t, int64_t k, T* rows) {
  return {rows + t * k * k * kLanes, 0, k * kLanes, kLanes};
}
template <class T>
RECURRA_INLINE T* vectors_at(int64_t t, int64_t k, T* rows) {
  return rows + t * k * kLanes;
}

// f(t0, steps) for the steps of a sequence, sixteen at a time.
template <class F>
RECURRA_INLINE void for_steps(int64_t length, F f) {
  for (int64_t t0 = 0; t0 < length; t0 += kSteps)
    f(t0, length - t0 < kSteps ? length - t0 : kSteps);
}

// Matrices of each step alone.
RECURRA_INLINE bool served(const BlockScan& args) {
  return args.A.size[1] > 1 && args.b.size[3] <= kMost && lies(args.A) && lies(args.b);
}

// One sequence of `width` blocks from `first` on.
template <class T>
void walk(const BlockScan& args, const Sequence& seq, int64_t slot, int64_t first, int64_t width,
          bool stream) {
  const int64_t k = args.b.size[3];
  const Vectors b = blocks::vectors(args.b, seq, args.reverse),
                h = blocks::vectors(args.h, seq, args.reverse);
  const Matrices A = blocks::matrices(args.A, seq, args.reverse);
  StepMatrices<T> gates;
  StepVectors<T> inputs, states;
  blocks::Rows<T, kMost * kLanes> carried;
  blocks::for_units(first, width, 1, [&](const Unit& u) {
    load_state(blocks::vectors(args.h0, slot), u, k, carried.x);
    for_steps(seq.length(), [&](int64_t t0, int64_t steps) {
      load(A.at(t0), u, steps, k, gates.x);
      load(b.at(t0), u, steps, k, inputs.x);
      const T* x = carried.x;
      for (int64_t t = 0; t < steps; ++t) {
        const Tile<T> start{vectors_at(t, k, inputs.x), kLanes};
        T* const out = vectors_at(t, k, states.x);
        multiply(matrices_at(t, k, gates.x), k, x, &start, out);
        x = out;
      }
      store(h.at(t0), u, steps, k, states.x, stream);
      for (int64_t i = 0; i < k * kLanes; i += kLanes) Vec<T>::load(x + i).store(carried.x + i);
    });
    store(blocks::vectors(args.h_last, slot), u, k, carried.x, false);
  });
}

RECURRA_INLINE bool served(const BlockScanBackward& args) {
  return args.A.size[1] > 1 && args.h.size[3] <= kMost && !args.reduced() && lies(args.A) &&
         lies(args.h);
}

template <class T>
void walk_back(const BlockScanBackward& args, int64_t n, int64_t first, int64_t width,
               bool stream) {
  const int64_t k = args.h.size[3];
  const Sequence seq = args.sequences[n];
  const bool back = !args.reverse;
  const Vectors h = blocks::vectors(args.h, seq, back), dh = blocks::vectors(args.dh, seq, back),
                db = blocks::vectors(args.db, seq, back);
  const Matrices A = blocks::matrices(args.A, seq, back), dA = blocks::matrices(args.dA, seq, back);
  StepMatrices<T> gates, products;
  StepVectors<T> states, cotangents;
  blocks::Rows<T, kMost * kLanes> carried;
  blocks::for_units(first, width, 1, [&](const Unit& u) {
    load_state(blocks::vectors(args.dh_last, n), u, k, carried.x);
    for_steps(seq.length(), [&](int64_t t0, int64_t steps) {
      // The state before a step is the next one of the walk; before the last comes h0.
      const bool last = t0 + steps == seq.length();
      load(h.at(t0 + 1), u, last ? steps - 1 : steps, k, states.x);
      if (last) load_state(blocks::vectors(args.h0, n), u, k, vectors_at(steps - 1, k, states.x));
      load(A.at(t0), u, steps, k, gates.x);
      if (dh) load(dh.at(t0), u, steps, k, cotangents.x);
      for (int64_t t = 0; t < steps; ++t) {
        T* const g = vectors_at(t, k, cotangents.x);
        for (int64_t i = 0; i < k * kLanes; i += kLanes) {
          const Vec<T> passed = Vec<T>::load(carried.x + i);
          (dh ? Vec<T>::load(g + i) + passed : passed).store(g + i);
        }
        outer(matrices_at(t, k, products.x), k, g, {vectors_at(t, k, states.x), kLanes}, false);
        multiply<T>(matrices_at(t, k, gates.x).turned(), k, g, nullptr, carried.x);
      }
      store(db.at(t0), u, steps, k, cotangents.x, stream);
      store(dA.at(t0), u, steps, k, products.x, stream);
    });
    store(blocks::vectors(args.dh0, n), u, k, carried.x, false);
  });
}

}  // namespace recurra::RECURRA_ISA::by_time
