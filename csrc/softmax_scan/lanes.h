// What the forward and the backward of softmax_scan share on the CPU: how channels are cut, rows of
// what is read and written, and the states and parameters of channels in lanes.
#pragma once
#include "softmax_scan/softmax_scan.h"
#include "softmax_scan/step.h"
#include "tile.h"

namespace recurra::RECURRA_ISA::softmax {

// Channels of a row: 2 KiB where rows lie in memory as they are worked on, 1 KiB in a tile.
template <class T>
constexpr int64_t kWidest = 2048 / sizeof(T);
template <class T>
constexpr int64_t kTiled = 1024 / sizeof(T);
// One vector more than a power of two, so that columns do not crowd into a part of the first cache.
template <class T>
constexpr int64_t kRow = kTiled<T> + kLanes;
constexpr int64_t kAhead = 16;            // rows by which rows are prefetched
constexpr int64_t kStreamFrom = 8 << 20;  // bytes of output that no cache should hold

template <class T>
struct TileRows {
  T x[kSoftmaxChunk * kRow<T>] __attribute__((aligned(64)));
};
template <class T>
struct Row {
  T x[kWidest<T>] __attribute__((aligned(64)));
};

// How channels are cut: wide rows where nothing needs a tile, enough tasks in any case, and into
// spans of like width.
struct Cut {
  int64_t width, spans;
};
template <class T>
RECURRA_INLINE Cut cut(const View<3>& lead, bool in_place, int64_t runs) {
  const bool time_first = lead.step(2) != 1 && (lead.step(1) == 1 || lead.step(1) == -1);
  int64_t width = in_place ? kWidest<T> : time_first ? kTiled<T> / 2 : kTiled<T>;
  const auto spans = [&] { return (lead.size[2] + width - 1) / width; };
  while (width > (time_first ? kLanes : 64) && runs * spans() < 8) width /= 2;
  if (spans() > 1) width = (lead.size[2] + spans() * kLanes - 1) / (spans() * kLanes) * kLanes;
  return {width, spans()};
}

// Whether rows of a dtype that is computed in T lie in memory as they are worked on.
template <class T>
RECURRA_INLINE bool is_rows(const View<3>& v) {
  return !v || (is_storage<T>(v.dtype) && v.step(2) == 1 && v.size[2] % kLanes == 0);
}

// Steps of a span as they are stored.
struct Rows {
  char* data = nullptr;
  int64_t stride = 0;  // bytes between rows
  RECURRA_INLINE char* row(int64_t t) const { return data + t * stride; }
};

// Rows in memory, or a tile of T.
template <class T>
Rows read_rows(const Plane& p, bool in_place, int64_t t0, int64_t steps, int64_t channels,
               TileRows<T>& rows) {
  if (!p) return {};
  if (in_place) return {p.at(t0, 0).data, p.stride_t * item_size(p.dtype)};
  const Tile<T> tile = load_tile<T>(p.at(t0, 0), steps, channels, rows.x, kRow<T>);
  return {reinterpret_cast<char*>(tile.data), tile.stride * static_cast<int64_t>(sizeof(T))};
}
template <class T>
Rows write_rows(const Plane& p, bool in_place, int64_t t0, TileRows<T>& rows) {
  if (in_place) return {p.at(t0, 0).data, p.stride_t * item_size(p.dtype)};
  return {reinterpret_cast<char*>(rows.x), kRow<T> * static_cast<int64_t>(sizeof(T))};
}

// Brings the lines of sixteen channels closer.
template <DType S>
RECURRA_INLINE void prefetch_lanes(const char* channels) {
  for (int64_t at = 0; at < kLanes * item_size(S); at += 64) prefetch<2>(channels + at);
}

// The states of a span.
template <class T>
struct States {
  Row<T> part[kParts];
  RECURRA_INLINE State<Vec<T>> at(int64_t c) const {
    return {Vec<T>::load(part[0].x + c), Vec<T>::load(part[1].x + c), Vec<T>::load(part[2].x + c)};
  }
  RECURRA_INLINE void put(int64_t c, const State<Vec<T>>& h) {
    h.m.store(part[0].x + c);
    h.c.store(part[1].x + c);
    h.a.store(part[2].x + c);
  }
};

// The part i of the states of sequence n as one row.
RECURRA_INLINE Plane state_plane(const View<3>& v, int64_t n, int i, int64_t channel) {
  if (!v) return {};
  return {v.at(n, i, channel), v.dtype, 0, v.step(2)};
}

// The parameters of a span's channels, zeros where they are absent, and what outputs take of them.
template <class T>
struct Parameters {
  Row<T> decay, bonus, factors[2];
  // Of each sixteen channels, whether the weights of some always take exponentials of their own.
  bool exact[kWidest<T> / kLanes];

  Parameters(const SoftmaxScanInputs& args, int64_t channel, int64_t channels) {
    load(args.decay, channel, channels, decay);
    load(args.bonus, channel, channels, bonus);
    for (int64_t c = 0; c < channels; c += kLanes) {
      const Vec<T> slower = limited_decay(Vec<T>::load(decay.x + c));
      slower.store(decay.x + c);
      const Weights<Vec<T>> f = output_factors(slower, Vec<T>::load(bonus.x + c));
      f.x.store(factors[0].x + c);
      f.y.store(factors[1].x + c);
      exact[c / kLanes] = any(f.x == T(0));
    }
  }
  RECURRA_INLINE Weights<Vec<T>> factors_at(int64_t c) const {
    return {Vec<T>::load(factors[0].x + c), Vec<T>::load(factors[1].x + c)};
  }

 private:
  static void load(const View<1>& v, int64_t channel, int64_t channels, Row<T>& row) {
    Plane p;
    if (v) p = {v.at(channel), v.dtype, 0, v.step(0)};
    load_row(p, channels, row.x, kWidest<T>);
  }
};

}  // namespace recurra::RECURRA_ISA::softmax
