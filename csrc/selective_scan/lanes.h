// What the forward and the backward of selective_scan share: states as rows of lanes, and how the
// arguments get there.
#pragma once
#include "math/complex.h"
#include "selective_scan/selective_scan.h"
#include "tile.h"

namespace recurra::RECURRA_ISA {

constexpr int64_t kWidth = Spans::kSpanBlocks * kLanes;  // channels of a span
// Apart by one vector more than a power of two, so that a column of a few arrays of rows does not
// crowd into an eighth of the first cache.
constexpr int64_t kRow = kWidth + kLanes;
constexpr int64_t kStates = kFewStates;  // states whose B and C are held at a time

constexpr int64_t kStreamFrom = 8 << 20;  // bytes of output that no cache should hold

// Real states whose products with C are summed before they join y; what is left over joins singly.
constexpr int kReadout = 8;

// Rows of a span: (kScanChunk, kWidth), kRow apart.
template <class T>
struct SpanRows {
  T x[kScanChunk * kRow] __attribute__((aligned(64)));
  RECURRA_INLINE T* at(int64_t t, int64_t lane) { return x + t * kRow + lane; }
};

// B or C of a chunk: kStates numbers a step, and their imaginary parts.
template <class T>
struct StateRows {
  T x[2][kScanChunk * kStates] __attribute__((aligned(64)));
};

// The number of a state, real or complex, for one vector of channels. In memory its parts are
// `apart` elements from each other.
template <class T>
struct Real {
  using State = Vec<T>;
  static constexpr int parts = 1;
  static constexpr T weight = T(1);
  static RECURRA_INLINE State load(const T* p, int64_t) { return State::load(p); }
  static RECURRA_INLINE void store(T* p, int64_t, State s) { s.store(p); }
  static RECURRA_INLINE State broadcast(const T* p, int64_t) { return State(*p); }
};

template <class T>
struct Cplx {
  using State = Complex<Vec<T>>;
  static constexpr int parts = 2;
  static constexpr T weight = T(2);
  static RECURRA_INLINE State load(const T* p, int64_t apart) {
    return {Vec<T>::load(p), Vec<T>::load(p + apart)};
  }
  static RECURRA_INLINE void store(T* p, int64_t apart, State s) {
    s.re.store(p);
    s.im.store(p + apart);
  }
  static RECURRA_INLINE State broadcast(const T* p, int64_t apart) {
    return {Vec<T>(*p), Vec<T>(p[apart])};
  }
};

// (state, channel) of a (.., D, N) view as a plane with states for steps.
RECURRA_INLINE Plane state_plane(const View<3>& v, int64_t n, int64_t channel) {
  if (!v) return {};
  return {v.at(n, channel, 0), v.dtype, v.step(2), v.step(1)};
}
RECURRA_INLINE Plane state_plane(const View<2>& v, int64_t channel) {
  if (!v) return {};
  return {v.at(channel, 0), v.dtype, v.step(1), v.step(0)};
}

template <class T>
void zero_rows(T* rows, int64_t count, int64_t lanes, int64_t stride) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < lanes; c += kLanes) Vec<T>(T(0)).store(rows + i * stride + c);
}

// The lanes that `channels` channels take up.
RECURRA_INLINE int64_t whole(int64_t channels) { return (channels + kLanes - 1) / kLanes * kLanes; }

// `count` states of a span into rows of lanes, `stride` apart; zeros for an absent plane.
template <class T>
void load_states(const Plane& p, int64_t count, int64_t channels, T* rows, int64_t stride) {
  if (!p) return zero_rows(rows, count, whole(channels), stride);
  const Tile<T> tile = load_tile<T>(p, count, channels, rows, stride);
  if (tile.data == rows) return;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < channels; c += kLanes)
      Vec<T>::load(tile.row(i) + c).store(rows + i * stride + c);
}

// A in lanes.
template <class T>
void load_A(const SelectiveScanInputs& in, T* rows) {
  const Spans& spans = in.spans;
  const int64_t padded = spans.padded(), states = in.states();
  for (int64_t span = 0; span < spans.count(); ++span) {
    T* to = rows + spans.lane(span);
    for (int i = 0; i < (in.complex ? 2 : 1); ++i)
      load_states<T>(state_plane(part(in.A, i), spans.first(span)), states, spans.channels(span),
                     to + i * states * padded, padded);
  }
}

// B or C of `steps` steps for the states from n0 on; rows of kStates.
template <class T>
void load_BC(const View<4>& v, const Sequence& s, int64_t t0, int64_t steps, int64_t group,
             int64_t n0, int64_t count, int parts, StateRows<T>& rows) {
  for (int i = 0; i < parts; ++i) {
    const View<4> p = part(v, i);
    if (!p) {
      zero_rows(rows.x[i], steps, kStates, kStates);
      continue;
    }
    const Plane plane{p.at(s.batch, s.begin + t0, group, n0), p.dtype, p.step(1), p.step(3)};
    const Tile<T> tile = load_tile<T>(plane, steps, count, rows.x[i], kStates);
    if (tile.data != rows.x[i])
      for (int64_t t = 0; t < steps; ++t) Vec<T>::load(tile.row(t)).store(rows.x[i] + t * kStates);
  }
}

// A parameter of the span's channels as one row; zeros where it is absent.
template <class T>
void load_channels(const View<1>& v, int64_t channel, int64_t channels, T* row) {
  if (!v) {
    for (int64_t c = 0; c < kWidth; ++c) row[c] = T(0);
    return;
  }
  const Plane p{v.at(channel), v.dtype, 0, v.step(0)};
  const Tile<T> tile = load_tile<T>(p, 1, channels, row, kWidth);
  if (tile.data != row)
    for (int64_t c = 0; c < channels; ++c) row[c] = tile.data[c];
}

// task(i) for every sequence and span.
template <class F>
void run_tasks(const SelectiveScan& args, const F& task) {
  const int64_t tasks = args.sequences.count * args.spans.count();
  // Threads cost more than they save below some tens of thousands of state updates.
  if (args.u.size[0] * args.u.size[1] * args.u.size[2] * args.states() < 1 << 15)
    for (int64_t i = 0; i < tasks; ++i) task(i);
  else
    parallel(tasks, task);
}

}  // namespace recurra::RECURRA_ISA
