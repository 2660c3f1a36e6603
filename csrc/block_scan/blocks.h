// What the forward and the backward of block_scan share: sixteen blocks as lanes, a vector for each
// of their k numbers or k k entries, and the product of the two.
#pragma once
#include "block_scan/block_scan.h"
#include "tile.h"

namespace recurra::RECURRA_ISA::blocks {

constexpr int64_t kHeld = 8192;           // entries of the matrices of a span, at most
constexpr int64_t kWidest = 512;          // blocks of a span, at most
constexpr int64_t kStreamFrom = 8 << 20;  // bytes of output that no cache should hold
constexpr int64_t kSerialBelow = 1 << 14;
constexpr int64_t kAhead = 1 << 14;  // bytes by which units are prefetched

// Sixteen lanes more than a span where its last ones are left over. Of k k entries or k numbers: of
// 8192 / k^2 blocks or of 512.
constexpr int64_t kSpanMatrices = kHeld + 16 * 16 * kLanes;
constexpr int64_t kSpanVectors = 2048 + 16 * kLanes;
constexpr int64_t kSpanUnits = kWidest / kLanes + 2;
// Of a unit, whose `apart` blocks have at most sixteen numbers together.
constexpr int64_t kUnitMatrices = 16 * 16 * kLanes;
constexpr int64_t kUnitVectors = 16 * kLanes;

template <class T, int64_t size>
struct Rows {
  T x[size] __attribute__((aligned(64)));
};

// Blocks that are loaded at once: group g has blocks first + g + apart * lane for its lanes. Apart,
// because the blocks [first + apart * lane, ... + apart) then are one run of memory a lane, long
// enough to be read as vectors and transposed.
struct Unit {
  int64_t first, apart;
  int64_t lanes;
  int64_t row;  // of its first group among those of the span
};

template <class F>
RECURRA_INLINE void for_units(int64_t first, int64_t count, int64_t apart, F f) {
  for (int64_t row = 0; count > 0;) {
    int64_t lanes = count / apart < kLanes ? count / apart : kLanes;
    if (lanes == 0) lanes = count, apart = 1;
    f(Unit{first, apart, lanes, row});
    row += apart;
    first += lanes * apart;
    count -= lanes * apart;
  }
}

// Blocks of a group are apart where their numbers lie side by side and there are enough of them.
RECURRA_INLINE int64_t apart_of(const View<4>& v) {
  const int64_t blocks = v.size[2], k = v.size[3];
  if (v.step(3) != 1 || v.step(2) != k) return 1;
  const int64_t full = (blocks + kLanes - 1) / kLanes, most = kLanes / k;
  return full < 1 ? 1 : full < most ? full : most;
}

// How blocks are cut: spans whose matrices the second cache holds, and enough tasks. Where each
// block has its whole sequence to itself in memory, few at a time, so that a line is still there
// when its other steps are wanted.
struct Cut {
  int64_t width, spans;
};
RECURRA_INLINE Cut cut(const View<4>& v, int64_t apart, int64_t runs) {
  const int64_t blocks = v.size[2], k = v.size[3], unit = kLanes * apart, most = kHeld / (k * k);
  if (v.step(2) > v.step(1) && v.step(1) > 0) return {unit, (blocks + unit - 1) / unit};
  int64_t width = (most < kWidest ? most : kWidest) / unit * unit;
  const auto spans = [&] { return (blocks + width - 1) / width; };
  while (width > unit && width * k * k > 256 && runs * spans() < 8)
    width = (width / 2 + unit - 1) / unit * unit;
  return {width, spans()};
}

// The blocks' vectors along a walk, or those of one state.
struct Vectors {
  char* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride_t = 0, stride_n = 0, stride_e = 0;

  explicit operator bool() const { return data != nullptr; }
  RECURRA_INLINE Vectors at(int64_t t) const {
    return {data + t * stride_t * item_size(dtype), dtype, stride_t, stride_n, stride_e};
  }
};

RECURRA_INLINE Vectors vectors(const View<4>& v, const Sequence& s, bool backwards) {
  if (!v) return {};
  const int64_t first = backwards ? s.end - 1 : s.begin;
  return {v.at(s.batch, first, 0, 0), v.dtype, backwards ? -v.step(1) : v.step(1), v.step(2),
          v.step(3)};
}
RECURRA_INLINE Vectors vectors(const View<3>& v, int64_t n) {
  if (!v) return {};
  return {v.at(n, 0, 0), v.dtype, 0, v.step(1), v.step(2)};
}

struct Matrices {
  char* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride_t = 0, stride_n = 0, stride_i = 0, stride_j = 0;

  RECURRA_INLINE Matrices at(int64_t t) const {
    return {data + t * stride_t * item_size(dtype), dtype, stride_t, stride_n, stride_i, stride_j};
  }
  // The transposed matrices.
  RECURRA_INLINE Matrices turned() const {
    return {data, dtype, stride_t, stride_n, stride_j, stride_i};
  }
  // Whether the entries of all blocks of a unit are one row of numbers.
  RECURRA_INLINE bool by_rows(int64_t k, int64_t apart) const {
    return stride_i == k * stride_j && (apart == 1 || stride_n == k * k * stride_j);
  }
  // Whether they are if read by columns.
  RECURRA_INLINE bool is_turned(int64_t k, int64_t apart) const {
    return !by_rows(k, apart) && turned().by_rows(k, apart);
  }
};

RECURRA_INLINE Matrices matrices(const View<5>& v, const Sequence& s, bool backwards) {
  if (!v) return {};
  const int64_t first = backwards ? s.end - 1 : s.begin;
  return {v.at(s.batch, first, 0, 0, 0),
          v.dtype,
          backwards ? -v.step(1) : v.step(1),
          v.step(2),
          v.step(3),
          v.step(4)};
}

// `count` numbers of each block from an offset in numbers, as a plane whose time they are.
RECURRA_INLINE Plane numbers(char* data, DType dtype, int64_t offset, int64_t between,
                             int64_t stride_n, const Unit& u) {
  return {data + (u.first * stride_n + offset) * item_size(dtype), dtype, between,
          u.apart * stride_n};
}

// Steps of a span that are about kAhead bytes, for `size` numbers a block.
RECURRA_INLINE int64_t steps_ahead(DType dtype, int64_t width, int64_t size) {
  const int64_t steps = kAhead / (width * size * item_size(dtype));
  return steps < 1 ? 1 : steps > 16 ? 16 : steps;
}

// Asks for `size` numbers of each block, where those of one are side by side, for the g-th part of
// the blocks of a unit: in the order of memory, which lanes that lie apart hide from the machine,
// and a few lines at a time, so that they come while it computes.
RECURRA_INLINE void prefetch(const char* data, DType dtype, int64_t stride_n, int64_t size,
                             const Unit& u, int64_t g) {
  const int64_t item = item_size(dtype);
  const char* block = data + (u.first + g * u.lanes) * stride_n * item;
  if (stride_n == size) {
    for (int64_t at = 0; at < u.lanes * size * item; at += 64) RECURRA_ISA::prefetch<2>(block + at);
    return;
  }
  for (int64_t n = 0; n < u.lanes; ++n, block += stride_n * item)
    for (int64_t at = 0; at < size * item; at += 64) RECURRA_ISA::prefetch<2>(block + at);
}
RECURRA_INLINE void prefetch(const Vectors& v, const Unit& u, int64_t k, int64_t g) {
  if (v.stride_e == 1) prefetch(v.data, v.dtype, v.stride_n, k, u, g);
}
RECURRA_INLINE void prefetch(const Matrices& m, const Unit& u, int64_t k, int64_t g) {
  if (m.by_rows(k, 1) ? m.stride_j == 1 : m.is_turned(k, 1) && m.stride_i == 1)
    prefetch(m.data, m.dtype, m.stride_n, k * k, u, g);
}

// The vectors of a unit, group by group.
template <class T>
RECURRA_INLINE Tile<T> load(const Vectors& v, const Unit& u, int64_t k, T* buffer) {
  if (u.apart == 1 || v.stride_n == k * v.stride_e)
    return load_tile<T>(numbers(v.data, v.dtype, 0, v.stride_e, v.stride_n, u), u.apart * k,
                        u.lanes, buffer, kLanes);
  for (int64_t g = 0; g < u.apart; ++g)
    load_tile<T>(numbers(v.data, v.dtype, g * v.stride_n, v.stride_e, v.stride_n, u), k, u.lanes,
                 buffer + g * k * kLanes, kLanes);
  return {buffer, kLanes};
}

template <class T>
RECURRA_INLINE void store(const Vectors& v, const Unit& u, int64_t k, const T* rows, bool stream) {
  if (!v) return;
  if (u.apart == 1 || v.stride_n == k * v.stride_e)
    return store_tile<T>(numbers(v.data, v.dtype, 0, v.stride_e, v.stride_n, u), u.apart * k,
                         u.lanes, rows, kLanes, stream);
  for (int64_t g = 0; g < u.apart; ++g)
    store_tile<T>(numbers(v.data, v.dtype, g * v.stride_n, v.stride_e, v.stride_n, u), k, u.lanes,
                  rows + g * k * kLanes, kLanes, stream);
}

// The same copied to rows that stay; zeros where there are none.
template <class T>
RECURRA_INLINE void load_state(const Vectors& v, const Unit& u, int64_t k, T* rows) {
  const int64_t count = u.apart * k;
  if (!v) {
    for (int64_t i = 0; i < count; ++i) Vec<T>(T(0)).store(rows + i * kLanes);
    return;
  }
  const Tile<T> tile = load<T>(v, u, k, rows);
  if (tile.data != rows)
    for (int64_t i = 0; i < count; ++i) Vec<T>::load(tile.row(i)).store(rows + i * kLanes);
}

// The entries of the matrices of a unit as vectors.
template <class T>
struct Entries {
  T* data = nullptr;
  int64_t group = 0, i = 0, j = 0;  // numbers between groups, rows and columns

  RECURRA_INLINE Entries at(int64_t g) const { return {data + g * group, group, i, j}; }
  RECURRA_INLINE Entries turned() const { return {data, group, j, i}; }
  RECURRA_INLINE T* at(int64_t row, int64_t column) const { return data + row * i + column * j; }
};

// Where store() wants the entries of a unit in a buffer.
template <class T>
RECURRA_INLINE Entries<T> entries(const Matrices& m, const Unit& u, int64_t k, T* buffer) {
  const Entries<T> rows{buffer, k * k * kLanes, k * kLanes, kLanes};
  return m.is_turned(k, u.apart) ? rows.turned() : rows;
}

template <class T>
RECURRA_INLINE Entries<T> load(const Matrices& m, const Unit& u, int64_t k, T* buffer) {
  const bool turned = m.is_turned(k, u.apart);
  if (turned || m.by_rows(k, u.apart)) {
    const int64_t between = turned ? m.stride_i : m.stride_j;
    const Tile<T> tile = load_tile<T>(numbers(m.data, m.dtype, 0, between, m.stride_n, u),
                                      u.apart * k * k, u.lanes, buffer, kLanes);
    const Entries<T> rows{tile.data, k * k * tile.stride, k * tile.stride, tile.stride};
    return turned ? rows.turned() : rows;
  }
  for (int64_t row = 0; row < u.apart * k; ++row) {
    T* const to = buffer + row * k * kLanes;
    const int64_t offset = row / k * m.stride_n + row % k * m.stride_i;
    const Tile<T> tile = load_tile<T>(numbers(m.data, m.dtype, offset, m.stride_j, m.stride_n, u),
                                      k, u.lanes, to, kLanes);
    if (tile.data != to)
      for (int64_t j = 0; j < k; ++j) Vec<T>::load(tile.row(j)).store(to + j * kLanes);
  }
  return {buffer, k * k * kLanes, k * kLanes, kLanes};
}

// Whether the groups of a unit are loaded one by one, each while the one before it is used: where a
// matrix has enough entries side by side to be transposed on its own.
RECURRA_INLINE bool by_group(const Matrices& m, const Unit& u, int64_t k) {
  return k >= 4 && u.apart > 1 && m.by_rows(k, u.apart);
}
template <class T>
RECURRA_INLINE Entries<T> load_group(const Matrices& m, const Unit& u, int64_t k, int64_t g,
                                     T* buffer) {
  load_tile<T>(numbers(m.data, m.dtype, g * m.stride_n, m.stride_j, m.stride_n, u), k * k, u.lanes,
               buffer, kLanes);
  return {buffer, 0, k * kLanes, kLanes};
}

// Writes entries that lie as entries() says.
template <class T>
RECURRA_INLINE void store(const Matrices& m, const Unit& u, int64_t k, const T* rows, bool stream) {
  const bool turned = m.is_turned(k, u.apart);
  if (turned || m.by_rows(k, u.apart)) {
    const int64_t between = turned ? m.stride_i : m.stride_j;
    return store_tile<T>(numbers(m.data, m.dtype, 0, between, m.stride_n, u), u.apart * k * k,
                         u.lanes, rows, kLanes, stream);
  }
  for (int64_t row = 0; row < u.apart * k; ++row)
    store_tile<T>(numbers(m.data, m.dtype, row / k * m.stride_n + row % k * m.stride_i, m.stride_j,
                          m.stride_n, u),
                  k, u.lanes, rows + row * k * kLanes, kLanes, stream);
}

// out = start + A x for `count` rows from row i; without `start` the first product starts a sum.
template <int count, class T>
RECURRA_INLINE void multiply_rows(const Entries<T>& A, int64_t i, int64_t k, const T* x,
                                  const Tile<T>* start, T* out) {
  Vec<T> sums[count];
  const Vec<T> first = Vec<T>::load(x);
#pragma GCC unroll 4
  for (int r = 0; r < count; ++r) {
    const Vec<T> a = Vec<T>::load(A.at(i + r, 0));
    sums[r] = start ? fma(a, first, Vec<T>::load(start->row(i + r))) : a * first;
  }
  for (int64_t j = 1; j < k; ++j) {
    const Vec<T> v = Vec<T>::load(x + j * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < count; ++r) sums[r] = fma(Vec<T>::load(A.at(i + r, j)), v, sums[r]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < count; ++r) sums[r].store(out + (i + r) * kLanes);
}

// One group: x and out are k rows of lanes and not the same.
template <class T>
RECURRA_INLINE void multiply(const Entries<T>& A, int64_t k, const T* x, const Tile<T>* start,
                             T* out) {
  int64_t i = 0;
  for (; i + 4 <= k; i += 4) multiply_rows<4>(A, i, k, x, start, out);
  if (i + 2 <= k) multiply_rows<2>(A, i, k, x, start, out), i += 2;
  if (i < k) multiply_rows<1>(A, i, k, x, start, out);
}

// g h^T of one group into entries, or added to them.
template <class T>
RECURRA_INLINE void outer(const Entries<T>& to, int64_t k, const T* g, const Tile<T>& h, bool add) {
  for (int64_t i = 0; i < k; ++i) {
    const Vec<T> v = Vec<T>::load(g + i * kLanes);
    for (int64_t j = 0; j < k; ++j) {
      const Vec<T> x = Vec<T>::load(h.row(j));
      T* const at = to.at(i, j);
      (add ? fma(v, x, Vec<T>::load(at)) : v * x).store(at);
    }
  }
}

}  // namespace recurra::RECURRA_ISA::blocks
