// A task is some rows of weights, a block sixteen of them, for every row of x. A few rows of
// weights are walked side by side while the rows that follow are asked for: from memory this is as
// fast as reading. Neither the rows side by side, of weights or of x, nor the tasks change a bit.
#include "linear_step/linear_step.h"

#include "tile.h"

namespace recurra::RECURRA_ISA {
namespace {

constexpr int64_t kBlock = kLanes;          // rows of weights whose outputs are stored together
constexpr int64_t kMost = 8;                // rows of x for which a block reads its weights once
constexpr int64_t kColumns = 256;           // columns of a tile of weights that lie otherwise
constexpr int64_t kTaskRows = 8;            // a task has a multiple of these rows
constexpr int64_t kTasks = 16;              // and a call about so many tasks,
constexpr int64_t kSmallest = 32 << 10;     // but none with fewer bytes of weights
constexpr int64_t kLargest = 1 << 20;       // or more
constexpr int64_t kSerialBelow = 96 << 10;  // products that threads would not make faster

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of weights side by side with Q rows of x: their sums take half of the registers, of which
// there are 32 where one holds sixteen floats.
template <class T, int Q>
constexpr int rows_beside() {
  constexpr int registers = Vec<float>::K == 1 ? 32 : 16;
  constexpr int rows = registers / 2 / Vec<T>::K / Q;
  return rows > 8 ? 8 : rows > 1 ? rows : 1;
}

template <class T>
using Sums = T __attribute__((aligned(64)))[kMost][kBlock][kLanes];

// Rows of weights as they are stored, `stride` bytes from one to the next. `follow`: how many more
// come after these `count`.
struct Rows {
  const char* data;
  int64_t stride, count, follow;
};

// Adds the products of some columns of the weights with `batch` rows of x, Q of these at once, to
// the sums, or starts the sums with them; x has pointers for a multiple of Q rows.
template <class T, DType S, int Q>
void add_products(const Rows& weights, const T* const* x, int64_t batch, int64_t columns,
                  bool start, Sums<T>& sums) {
  constexpr int R = rows_beside<T, Q>();
  constexpr int64_t item = item_size(S);
  const int64_t whole = columns / kLanes * kLanes;
  const int rest = static_cast<int>(columns - whole);
  for (int64_t n = 0; n < weights.count; n += R) {
    const int64_t last = weights.count - 1 - n;
    // Past the last row that row again.
    const char* w[R];
    for (int r = 0; r < R; ++r) w[r] = weights.data + (n + least(r, last)) * weights.stride;
    const int64_t ahead = R <= last + weights.follow ? R * weights.stride : 0;
    for (int64_t b = 0; b < batch; b += Q) {
      const T* const* xb = x + b;
      Vec<T> v[R][Q];
      for_each_index<R>([&](auto r) RECURRA_LAMBDA {
        for_each_index<Q>([&](auto q) RECURRA_LAMBDA {
          v[r][q] = start ? Vec<T>(T(0)) : Vec<T>::load(sums[b + q][n + least(r, last)]);
        });
      });
      for (int64_t k = 0; k < whole; k += kLanes) {
        Vec<T> m[R];
        for_each_index<R>([&](auto r) RECURRA_LAMBDA {
          prefetch<2>(w[r] + k * item + ahead);
          m[r] = load_stored<T, S>(w[r] + k * item);
        });
        for_each_index<Q>([&](auto q) RECURRA_LAMBDA {
          const Vec<T> xq = Vec<T>::load(xb[q] + k);
          for_each_index<R>([&](auto r) RECURRA_LAMBDA { v[r][q] = fma(m[r], xq, v[r][q]); });
        });
      }
      if (rest > 0)
        for_each_index<R>([&](auto r) RECURRA_LAMBDA {
          const Vec<T> m = load_lanes<T>(w[r] + whole * item, S, rest);
          for_each_index<Q>([&](auto q) RECURRA_LAMBDA {
            v[r][q] = fma(m, Vec<T>::load(xb[q] + whole), v[r][q]);
          });
        });
      for_each_index<R>([&](auto r) RECURRA_LAMBDA {
        if (r <= last)
          for_each_index<Q>([&](auto q) RECURRA_LAMBDA { v[r][q].store(sums[b + q][n + r]); });
      });
    }
  }
}

// The lanes of `count` sums added, as sum() adds them, for all rows at once.
template <class T>
RECURRA_INLINE Vec<T> added(const T (&sums)[kBlock][kLanes], int64_t count) {
  Vec<T> v[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) v[i] = i < count ? Vec<T>::load(sums[i]) : Vec<T>(T(0));
  transpose(v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] = v[i] + v[i + half];
  return v[0];
}

RECURRA_INLINE Plane plane_of(const View<2>& v) {
  return {static_cast<char*>(v.data), v.dtype, v.step(0), v.step(1)};
}

// The outputs of `count` rows of weights from n on, `follow` more coming in this task, and of
// `batch` rows of x from b on. The weights are read in place, or as tiles of T where not.
template <class T, DType S>
void block(const LinearStep& args, const Tile<T>& rows, int64_t n, int64_t count, int64_t follow,
           int64_t b, int64_t batch, T* tile) {
  const int64_t columns = args.x.size[1];
  const Plane weights = plane_of(args.weight).at(n, 0);
  const T* x[kMost];
  Sums<T> sums;
  int64_t k = 0;
  do {
    const int64_t some = tile ? least(kColumns, columns - k) : columns;
    for (int64_t i = 0; i < kMost; ++i) x[i] = rows.row(b + least(i, batch - 1)) + k;
    Rows w{weights.data, weights.stride_t * item_size(S), count, follow};
    if (tile) {
      const Tile<T> t = load_tile<T>(weights.at(0, k), count, some, tile, kColumns);
      const int64_t stride = t.stride * static_cast<int64_t>(sizeof(T));
      w = {reinterpret_cast<const char*>(t.data), stride, count, 0};
    }
    if (batch == 1)
      add_products<T, S, 1>(w, x, batch, some, k == 0, sums);
    else if (batch == 2)
      add_products<T, S, 2>(w, x, batch, some, k == 0, sums);
    else
      add_products<T, S, 4>(w, x, batch, some, k == 0, sums);
    k += some;
  } while (k < columns);
  T bias[kLanes], y[kMost][kLanes];
  Vec<T> shift(T(0));
  if (args.bias) {
    const Plane p{args.bias.at(n), args.bias.dtype, 0, args.bias.step(0)};
    shift = Vec<T>::load(load_tile<T>(p, 1, count, bias, kLanes).data);
  }
  for (int64_t i = 0; i < batch; ++i) {
    const Vec<T> v = added(sums[i], count);
    (args.bias ? v + shift : v).store(y[i]);
  }
  store_tile<T>(plane_of(args.y).at(b, n), batch, count, y[0], kLanes, false);
}

template <class T, DType S>
void task(const LinearStep& args, const Tile<T>& rows, int64_t begin, int64_t end, T* tile) {
  const int64_t batch = args.x.size[0];
  for (int64_t n = begin; n < end; n += kBlock) {
    const int64_t count = least(kBlock, end - n);
    for (int64_t b = 0; b < batch; b += kMost)
      block<T, S>(args, rows, n, count, end - n - count, b, least(kMost, batch - b), tile);
  }
}

// x as whole vectors of T.
template <class T>
Tile<T> rows_of_x(const LinearStep& args) {
  const Plane x = plane_of(args.x);
  if (!args.copies_x()) return {reinterpret_cast<T*>(x.data), x.stride_t};
  const Tile<T> rows{static_cast<T*>(args.copy.data), args.copy.stride[0]};
  const int64_t batch = args.x.size[0], columns = args.x.size[1];
  parallel_unless(batch * columns < kSerialBelow, (batch + kLanes - 1) / kLanes, [&](int64_t i) {
    const int64_t b = i * kLanes;
    load_tile<T>(x.at(b, 0), least(kLanes, batch - b), columns, rows.row(b), rows.stride);
  });
  return rows;
}

template <class T>
void linear(const LinearStep& args) {
  const int64_t batch = args.x.size[0], columns = args.x.size[1], N = args.weight.size[0];
  const Tile<T> rows = rows_of_x<T>(args);
  const bool in_place = is_storage<T>(args.weight.dtype) && args.weight.step(1) == 1;
  const int64_t row = columns > 0 ? columns * item_size(args.weight.dtype) : 1;
  int64_t bytes = N * row / kTasks;
  bytes = bytes < kSmallest ? kSmallest : least(bytes, kLargest);
  const int64_t each = (bytes / row / kTaskRows + (bytes / row < kTaskRows)) * kTaskRows;
  parallel_unless(batch * N * columns < kSerialBelow, (N + each - 1) / each, [&](int64_t i) {
    const int64_t begin = i * each, end = least(begin + each, N);
    if (!in_place) {
      T tile[kBlock * kColumns] __attribute__((aligned(64)));
      return task<T, kDType<T>>(args, rows, begin, end, tile);
    }
    for_storage<T>(args.weight.dtype, [&](auto dtype) RECURRA_LAMBDA {
      task<T, DType(dtype.value)>(args, rows, begin, end, nullptr);
    });
  });
}

}  // namespace

void linear_step(const LinearStep& args) {
  computes_in_double(args.x.dtype) ? linear<double>(args) : linear<float>(args);
}

}  // namespace recurra::RECURRA_ISA
