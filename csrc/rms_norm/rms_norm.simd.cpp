// A task is a chunk of rows, walked by groups of a few that fit the first cache, so that what comes
// after the sums of a row reads it again for nothing. Rows whose channels are contiguous are read
// and written as they are stored, others as tiles. Neither groups nor tiles change a bit.
#include "rms_norm/rms_norm.h"

#include "tile.h"

namespace recurra::RECURRA_ISA {
namespace {

constexpr int64_t kGroup = kLanes;          // rows of a group, at most
constexpr int64_t kGroupBytes = 16 << 10;   // and bytes of one array, unless it is one row
constexpr int64_t kColumns = 256;           // channels of a tile
constexpr int kSums = 4;                    // vectors of sums of a row
constexpr int64_t kSerialBelow = 24 << 10;  // numbers that threads would not make faster

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows as they are stored, `stride` bytes apart.
struct Rows {
  char* data;
  int64_t stride;
  RECURRA_INLINE char* at(int64_t row, int64_t offset) const {
    return data + row * stride + offset;
  }
};

template <class T, DType S>
RECURRA_INLINE Vec<T> load_some(const char* p, int n) {
  return n == kLanes ? load_stored<T, S>(p) : load_lanes<T>(p, S, n);
}
template <class T, DType S>
RECURRA_INLINE void store_some(char* p, Vec<T> v, int n) {
  n == kLanes ? store_stored<T, S>(p, v, false) : store_lanes<T>(p, S, v, n);
}

// The sums of the rows of a group.
template <class T>
struct RowSums {
  T x[kGroup][kSums][kLanes] __attribute__((aligned(64)));

  RECURRA_INLINE void clear(int64_t rows) {
    for (int64_t r = 0; r < rows; ++r)
      for_each_index<kSums>([&](auto j) RECURRA_LAMBDA { Vec<T>(T(0)).store(x[r][j]); });
  }

  // Adds f(channel, lanes, sum) for every vector of `columns` channels, which follow a multiple of
  // 64, to the sums of a row.
  template <class F>
  RECURRA_INLINE void add(int64_t row, int64_t columns, const F& f) {
    Vec<T> v[kSums];
    for_each_index<kSums>([&](auto j) RECURRA_LAMBDA { v[j] = Vec<T>::load(x[row][j]); });
    int64_t c = 0;
    for (; c + kSums * kLanes <= columns; c += kSums * kLanes)
      for_each_index<kSums>([&](auto j) RECURRA_LAMBDA { v[j] = f(c + j * kLanes, kLanes, v[j]); });
    for_each_index<kSums>([&](auto j) RECURRA_LAMBDA {
      const int64_t at = c + j * kLanes;
      if (at < columns) v[j] = f(at, at_most_lanes(columns - at), v[j]);
    });
    for_each_index<kSums>([&](auto j) RECURRA_LAMBDA { v[j].store(x[row][j]); });
  }

  // Lane i: the mean of row i.
  RECURRA_INLINE Vec<T> means(int64_t rows, int64_t channels) const {
    T total[kGroup] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const auto& v = x[r];
      total[r] = sum((Vec<T>::load(v[0]) + Vec<T>::load(v[2])) +
                     (Vec<T>::load(v[1]) + Vec<T>::load(v[3])));
    }
    return Vec<T>::load(total) / static_cast<T>(channels);
  }
};

// f(channel, lanes) for every vector of `columns` channels.
template <class F>
RECURRA_INLINE void for_vectors(int64_t columns, const F& f) {
  const int64_t whole = columns / kLanes * kLanes;
  for (int64_t c = 0; c < whole; c += kLanes) f(c, kLanes);
  if (whole < columns) f(whole, static_cast<int>(columns - whole));
}

template <int N>
bool channels_follow(const View<N>& v) {
  return v.size[N - 1] == 1 || v.stride[N - 1] == 1;
}

// Whether all rows are as far apart as those of one batch entry, and then the same as one entry.
template <int N>
bool one_batch(const View<N>& v) {
  return v.size[0] <= 1 || v.size[1] == 1 || v.stride[0] == v.size[1] * v.stride[1];
}
template <int N>
void join_batch(View<N>& v) {
  if (v.size[1] == 1) v.stride[1] = v.stride[0];
  v.size[1] *= v.size[0];
  v.size[0] = 1;
}
template <int... N>
void join_batches(View<N>&... views) {
  if ((one_batch(views) && ...)) (join_batch(views), ...);
}

// f(b, t, count) for groups of rows of one batch entry that make up the rows [first, last).
template <class F>
RECURRA_INLINE void for_groups(int64_t first, int64_t last, int64_t time, int64_t group,
                               const F& f) {
  for (int64_t row = first; row < last;) {
    const int64_t t = row % time, count = least(least(group, time - t), last - row);
    f(row / time, t, count);
    row += count;
  }
}

RECURRA_INLINE Plane rows_of(const View<3>& v, int64_t b, int64_t t) {
  return {v.at(b, t, 0), v.dtype, v.step(1), v.step(2)};
}

// The channels from c on of `count` rows: in place, or in the tile where there is one.
template <class T>
RECURRA_INLINE Rows rows_at(const Plane& p, int64_t c, int64_t count, int64_t columns, T* tile) {
  const int64_t item = item_size(p.dtype);
  if (!tile) return {p.data + c * item, p.stride_t * item};
  const Tile<T> t = load_tile<T>(p.at(0, c), count, columns, tile, kColumns);
  return {reinterpret_cast<char*>(t.data), t.stride * static_cast<int64_t>(sizeof(T))};
}

// `columns` weights from c on as whole vectors.
template <class T>
RECURRA_INLINE const T* weights_at(const View<1>& v, int64_t c, int64_t columns, T* buffer) {
  const Plane p{v.at(c), v.dtype, 0, v.step(0)};
  return load_tile<T>(p, 1, columns, buffer, kColumns).data;
}

// Where rows are tiles: one for each array.
template <class T, int Arrays>
struct Tiles {
  T x[Arrays][kGroup * kColumns] __attribute__((aligned(64)));
};

RECURRA_INLINE int64_t group_of(const View<3>& x, bool tiled) {
  const int64_t fit = x.size[2] > 0 ? kGroupBytes / (x.size[2] * item_size(x.dtype)) : kGroup;
  return tiled ? kGroup : fit < 1 ? 1 : least(fit, kGroup);
}

template <class T, DType S>
void normalise(const RmsNorm& args, int64_t first, int64_t last, Tiles<T, 2>* tiles) {
  constexpr int64_t item = item_size(S);
  const int64_t D = args.x.size[2], wide = tiles ? kColumns : D;
  T* const in = tiles ? tiles->x[0] : nullptr;
  T* const out = tiles ? tiles->x[1] : nullptr;
  RowSums<T> sums;
  T weights[kColumns] __attribute__((aligned(64))), rstd[kGroup];
  for_groups(first, last, args.x.size[1], group_of(args.x, tiles),
             [&](int64_t b, int64_t t, int64_t count) {
               const Plane xs = rows_of(args.x, b, t), ys = rows_of(args.y, b, t);
               sums.clear(count);
               for (int64_t c = 0; c < D; c += wide) {
                 const int64_t some = least(wide, D - c);
                 const Rows x = rows_at<T>(xs, c, count, some, in);
                 for (int64_t r = 0; r < count; ++r)
                   sums.add(r, some, [&](int64_t k, int n, Vec<T> sum) RECURRA_LAMBDA {
                     const Vec<T> v = load_some<T, S>(x.at(r, k * item), n);
                     return fma(v, v, sum);
                   });
               }
               (T(1) / sqrt(sums.means(count, D) + static_cast<T>(args.eps))).store(rstd);
               for (int64_t r = 0; r < count; ++r)
                 *reinterpret_cast<T*>(args.rstd.at(b, t + r)) = rstd[r];
               for (int64_t c = 0; c < D; c += kColumns) {
                 const int64_t some = least(kColumns, D - c);
                 const T* const w = weights_at(args.weight, c, some, weights);
                 const Rows x = rows_at<T>(xs, c, count, some, in);
                 const Rows y = tiles ? Rows{reinterpret_cast<char*>(out), kColumns * item}
                                      : rows_at<T>(ys, c, count, some, nullptr);
                 for (int64_t r = 0; r < count; ++r) {
                   const Vec<T> scale(rstd[r]);
                   for (int64_t k = 0; k < some; k += kLanes) {
                     const int n = at_most_lanes(some - k);
                     const Vec<T> v = load_some<T, S>(x.at(r, k * item), n) * scale;
                     store_some<T, S>(y.at(r, k * item), v * Vec<T>::load(w + k), n);
                   }
                 }
                 if (tiles) store_tile<T>(ys.at(0, c), count, some, out, kColumns, false);
               }
             });
}

template <class T, DType S>
void differentiate(const RmsNormBackward& args, int64_t first, int64_t last, T* dweight,
                   Tiles<T, 3>* tiles) {
  constexpr int64_t item = item_size(S);
  const int64_t D = args.x.size[2];
  T* const in = tiles ? tiles->x[0] : nullptr;
  T* const from = tiles ? tiles->x[1] : nullptr;
  T* const out = tiles ? tiles->x[2] : nullptr;
  RowSums<T> sums;
  T weights[kColumns] __attribute__((aligned(64))), rstd[kGroup], minus_mean[kGroup];
  for (int64_t c = 0; c < D; c += kLanes) Vec<T>(T(0)).store(dweight + c);
  for_groups(first, last, args.x.size[1], group_of(args.x, tiles),
             [&](int64_t b, int64_t t, int64_t count) {
               const Plane xs = rows_of(args.x, b, t), dys = rows_of(args.dy, b, t),
                           dxs = rows_of(args.dx, b, t);
               for (int64_t r = 0; r < count; ++r)
                 rstd[r] = *reinterpret_cast<const T*>(args.rstd.at(b, t + r));
               sums.clear(count);
               for (int64_t c = 0; c < D; c += kColumns) {
                 const int64_t some = least(kColumns, D - c);
                 const T* const w = weights_at(args.weight, c, some, weights);
                 const Rows x = rows_at<T>(xs, c, count, some, in),
                            dy = rows_at<T>(dys, c, count, some, from);
                 for (int64_t r = 0; r < count; ++r) {
                   const Vec<T> scale(rstd[r]);
                   sums.add(r, some, [&](int64_t k, int n, Vec<T> sum) RECURRA_LAMBDA {
                     const Vec<T> g = load_some<T, S>(dy.at(r, k * item), n) * Vec<T>::load(w + k);
                     return fma(g, load_some<T, S>(x.at(r, k * item), n) * scale, sum);
                   });
                 }
               }
               (-sums.means(count, D)).store(minus_mean);
               for (int64_t c = 0; c < D; c += kColumns) {
                 const int64_t some = least(kColumns, D - c);
                 const T* const w = weights_at(args.weight, c, some, weights);
                 const Rows x = rows_at<T>(xs, c, count, some, in),
                            dy = rows_at<T>(dys, c, count, some, from);
                 const Rows dx = tiles ? Rows{reinterpret_cast<char*>(out), kColumns * item}
                                       : rows_at<T>(dxs, c, count, some, nullptr);
                 for (int64_t k = 0; k < some; k += kLanes) {
                   const int n = at_most_lanes(some - k);
                   const Vec<T> weight = Vec<T>::load(w + k);
                   Vec<T> total = Vec<T>::load(dweight + c + k);
                   for (int64_t r = 0; r < count; ++r) {
                     const Vec<T> scale(rstd[r]), d = load_some<T, S>(dy.at(r, k * item), n);
                     const Vec<T> v = load_some<T, S>(x.at(r, k * item), n) * scale;
                     total = fma(d, v, total);
                     store_some<T, S>(dx.at(r, k * item), fma(v, minus_mean[r], d * weight) * scale,
                                      n);
                   }
                   total.store(dweight + c + k);
                 }
                 if (tiles) store_tile<T>(dxs.at(0, c), count, some, out, kColumns, false);
               }
             });
}

// Calls f(Index<S>, tiles) for rows in place, S as they are stored, or with tiles, S then that of
// T.
template <class T, int Arrays, class F>
RECURRA_INLINE void in_place_or_tiled(DType dtype, bool in_place, const F& f) {
  if (!in_place) {
    Tiles<T, Arrays> tiles;
    return f(Index<static_cast<int>(kDType<T>)>{}, &tiles);
  }
  for_storage<T>(dtype, [&](auto stored)
                            RECURRA_LAMBDA { f(stored, static_cast<Tiles<T, Arrays>*>(nullptr)); });
}

template <class T>
void forward(RmsNorm args) {
  const NormChunks chunks = args.chunks();
  const int64_t rows = chunks.rows, each = chunks.each;
  join_batches(args.x, args.y, args.rstd);
  const bool in_place = channels_follow(args.x) && channels_follow(args.y);
  parallel_unless(rows * args.x.size[2] < kSerialBelow, chunks.count(), [&](int64_t i) {
    in_place_or_tiled<T, 2>(args.x.dtype, in_place, [&](auto stored, Tiles<T, 2>* tiles) {
      normalise<T, DType(stored.value)>(args, i * each, least(rows, (i + 1) * each), tiles);
    });
  });
}

template <class T>
void backward(RmsNormBackward args) {
  const NormChunks chunks = args.chunks();
  const int64_t rows = chunks.rows, each = chunks.each, D = args.x.size[2];
  const int64_t padded = args.padded();
  T* const sums = static_cast<T*>(args.sums);
  join_batches(args.dy, args.x, args.rstd, args.dx);
  const bool in_place =
      channels_follow(args.dy) && channels_follow(args.x) && channels_follow(args.dx);
  parallel_unless(rows * D < kSerialBelow, chunks.count(), [&](int64_t i) {
    in_place_or_tiled<T, 3>(args.x.dtype, in_place, [&](auto stored, Tiles<T, 3>* tiles) {
      differentiate<T, DType(stored.value)>(args, i * each, least(rows, (i + 1) * each),
                                            sums + i * padded, tiles);
    });
  });
  parallel_unless(chunks.count() * D < kSerialBelow, (D + kColumns - 1) / kColumns, [&](int64_t i) {
    T values[kColumns] __attribute__((aligned(64)));
    const int64_t begin = i * kColumns, some = least(kColumns, D - begin);
    for (int64_t c = 0; c < some; c += kLanes) {
      Vec<T> total(T(0));
      for (int64_t chunk = 0; chunk < chunks.count(); ++chunk)
        total = total + Vec<T>::load(sums + chunk * padded + begin + c);
      total.store(values + c);
    }
    const Plane to{args.dweight.at(begin), args.dweight.dtype, 0, args.dweight.step(0)};
    store_tile<T>(to, 1, some, values, kColumns, false);
  });
}

}  // namespace

void rms_norm(const RmsNorm& args) {
  computes_in_double(args.x.dtype) ? forward<double>(args) : forward<float>(args);
}

void rms_norm_backward(const RmsNormBackward& args) {
  computes_in_double(args.x.dtype) ? backward<double>(args) : backward<float>(args);
}

}  // namespace recurra::RECURRA_ISA
