// Blocks whose steps follow each other in memory, either each number's or whole blocks: sixteen
// steps of sixteen blocks are turned into lanes at once, since single steps would use a line of
// memory for less than it has. The products and their order are those of blocks.h.
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

// Whether the steps of each number are neighbours, or those of each block.
RECURRA_INLINE bool served(const View<4>& v) {
  return v.step(1) == 1 || (v.step(1) == v.size[3] && v.step(3) == 1 && v.size[2] > 1);
}
RECURRA_INLINE bool served(const View<5>& v) {
  const int64_t k = v.size[3];
  return v.step(1) == 1 ||
         (v.step(1) == k * k && v.step(3) == k && v.step(4) == 1 && v.size[2] > 1);
}

// The numbers of the blocks of a unit from an offset on as a plane, along whose time they lie
// `apart`.
template <class V>
RECURRA_INLINE Plane along(const V& v, const Unit& u, int64_t offset, int64_t apart) {
  return {v.data + (u.first * v.stride_n + offset) * item_size(v.dtype), v.dtype, apart,
          v.stride_n};
}
// f(plane, rows, first, apart) for planes that together are the steps of a unit: the rows of one
// are the numbers first, first + apart, ... of those steps.
template <class F>
RECURRA_INLINE void for_planes(const Vectors& v, const Unit& u, int64_t steps, int64_t k, F f) {
  if (v.stride_t == k && v.stride_e == 1) return f(along(v, u, 0, 1), steps * k, 0, 1);
  for (int64_t i = 0; i < k; ++i) f(along(v, u, i * v.stride_e, v.stride_t), steps, i, k);
}
template <class F>
RECURRA_INLINE void for_planes(const Matrices& m, const Unit& u, int64_t steps, int64_t k, F f) {
  if (m.stride_t == k * k && m.stride_i == k && m.stride_j == 1)
    return f(along(m, u, 0, 1), steps * k * k, 0, 1);
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j)
      f(along(m, u, i * m.stride_i + j * m.stride_j, m.stride_t), steps, i * k + j, k * k);
}

// The vectors, or the entries of the matrices, of `steps` steps of a unit as rows of lanes.
template <class T, class V>
RECURRA_INLINE void load(const V& v, const Unit& u, int64_t steps, int64_t k, T* rows) {
  for_planes(v, u, steps, k,
             [&](const Plane& p, int64_t count, int64_t first, int64_t apart) RECURRA_LAMBDA {
               T* const to = rows + first * kLanes;
               const Tile<T> tile = load_tile<T>(p, count, u.lanes, to, apart * kLanes);
               if (tile.data == to) return;
               for (int64_t t = 0; t < count; ++t)
                 Vec<T>::load(tile.row(t)).store(to + t * apart * kLanes);
             });
}
template <class T, class V>
RECURRA_INLINE void store(const V& v, const Unit& u, int64_t steps, int64_t k, const T* rows,
                          bool stream) {
  for_planes(v, u, steps, k,
             [&](const Plane& p, int64_t count, int64_t first, int64_t apart) RECURRA_LAMBDA {
               store_tile<T>(p, count, u.lanes, rows + first * kLanes, apart * kLanes, stream);
             });
}

template <class T>
RECURRA_INLINE Entries<T> matrices_at(int64_t t, int64_t k, T* rows) {
  return {rows + t * k * k * kLanes, 0, k * kLanes, kLanes};
}
template <class T>
RECURRA_INLINE T* vectors_at(int64_t t, int64_t k, T* rows) {
  return rows + t * k * kLanes;
}

// f(from, steps) for the steps of a sequence, sixteen at a time, and each(t) for those of one such
// part, in the order in which they are walked.
template <class F>
RECURRA_INLINE void for_parts(int64_t length, bool backwards, F f) {
  for (int64_t done = 0; done < length; done += kSteps) {
    const int64_t steps = length - done < kSteps ? length - done : kSteps;
    f(backwards ? length - done - steps : done, steps);
  }
}
template <class F>
RECURRA_INLINE void for_steps(int64_t steps, bool backwards, F each) {
  for (int64_t i = 0; i < steps; ++i) each(backwards ? steps - 1 - i : i);
}

// Matrices of each step alone.
RECURRA_INLINE bool served(const BlockScan& args) {
  return args.A.size[1] > 1 && args.b.size[3] <= kMost && served(args.A) && served(args.b);
}

// One sequence of `width` blocks from `first` on.
template <class T>
void walk(const BlockScan& args, const Sequence& seq, int64_t slot, int64_t first, int64_t width,
          bool stream) {
  const int64_t k = args.b.size[3];
  const Vectors b = blocks::vectors(args.b, seq, false), h = blocks::vectors(args.h, seq, false);
  const Matrices A = blocks::matrices(args.A, seq, false);
  StepMatrices<T> gates;
  StepVectors<T> inputs, states;
  blocks::Rows<T, kMost * kLanes> carried;
  blocks::for_units(first, width, 1, [&](const Unit& u) {
    load_state(blocks::vectors(args.h0, slot), u, k, carried.x);
    for_parts(seq.length(), args.reverse, [&](int64_t from, int64_t steps) {
      load(A.at(from), u, steps, k, gates.x);
      load(b.at(from), u, steps, k, inputs.x);
      const T* x = carried.x;
      for_steps(steps, args.reverse, [&](int64_t t) RECURRA_LAMBDA {
        const Tile<T> start{vectors_at(t, k, inputs.x), kLanes};
        T* const out = vectors_at(t, k, states.x);
        multiply(matrices_at(t, k, gates.x), k, x, &start, out);
        x = out;
      });
      store(h.at(from), u, steps, k, states.x, stream);
      for (int64_t i = 0; i < k * kLanes; i += kLanes) Vec<T>::load(x + i).store(carried.x + i);
    });
    store(blocks::vectors(args.h_last, slot), u, k, carried.x, false);
  });
}

RECURRA_INLINE bool served(const BlockScanBackward& args) {
  return args.A.size[1] > 1 && args.h.size[3] <= kMost && !args.reduced() && served(args.A) &&
         served(args.h);
}

template <class T>
void walk_back(const BlockScanBackward& args, int64_t n, int64_t first, int64_t width,
               bool stream) {
  const int64_t k = args.h.size[3];
  const Sequence seq = args.sequences[n];
  const bool back = !args.reverse;  // the walk is against the scan
  const Vectors h = blocks::vectors(args.h, seq, false), dh = blocks::vectors(args.dh, seq, false),
                db = blocks::vectors(args.db, seq, false);
  const Matrices A = blocks::matrices(args.A, seq, false),
                 dA = blocks::matrices(args.dA, seq, false);
  StepMatrices<T> gates, products;
  StepVectors<T> states, cotangents;
  blocks::Rows<T, kMost * kLanes> carried;
  blocks::for_units(first, width, 1, [&](const Unit& u) {
    load_state(blocks::vectors(args.dh_last, n), u, k, carried.x);
    for_parts(seq.length(), back, [&](int64_t from, int64_t steps) {
      // The states before these steps, of which h0 is that of the scan's first one.
      const bool begins = back ? from == 0 : from + steps == seq.length();
      const int64_t others = begins ? steps - 1 : steps, row = back && begins ? 1 : 0;
      if (others > 0)
        load(h.at(from + row + (back ? -1 : 1)), u, others, k, vectors_at(row, k, states.x));
      if (begins)
        load_state(blocks::vectors(args.h0, n), u, k,
                   vectors_at(back ? 0 : steps - 1, k, states.x));
      load(A.at(from), u, steps, k, gates.x);
      if (dh) load(dh.at(from), u, steps, k, cotangents.x);
      for_steps(steps, back, [&](int64_t t) RECURRA_LAMBDA {
        T* const g = vectors_at(t, k, cotangents.x);
        for (int64_t i = 0; i < k * kLanes; i += kLanes) {
          const Vec<T> passed = Vec<T>::load(carried.x + i);
          (dh ? Vec<T>::load(g + i) + passed : passed).store(g + i);
        }
        outer(matrices_at(t, k, products.x), k, g, {vectors_at(t, k, states.x), kLanes}, false);
        multiply<T>(matrices_at(t, k, gates.x).turned(), k, g, nullptr, carried.x);
      });
      store(db.at(from), u, steps, k, cotangents.x, stream);
      store(dA.at(from), u, steps, k, products.x, stream);
    });
    store(blocks::vectors(args.dh0, n), u, k, carried.x, false);
  });
}

}  // namespace recurra::RECURRA_ISA::by_time
