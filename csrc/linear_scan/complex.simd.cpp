// linear_scan of complex numbers, which stay in pairs as they lie in memory. Tasks, tiles and what
// is written past the caches as in linear_scan.simd.cpp: 24 bytes per complex64 element forward,
// 16 where the gate is constant over time, since its row then stays in the first cache.
#include "linear_scan/complex_tile.h"
#include "linear_scan/linear_scan.h"
#include "math/functions.h"
#include "partial_sums.h"

namespace recurra::RECURRA_ISA {
namespace {

constexpr int64_t kTile = 4096;            // numbers of a tile
constexpr int64_t kWidest = 512;           // channels of a row
constexpr int64_t kAhead = 16;             // rows by which parts of rows are prefetched
constexpr int kTogether = 4;               // steps that a gradient takes in registers
constexpr int64_t kStreamFrom = 8 << 20;   // bytes of output that no cache is asked to hold
constexpr int64_t kSerialBelow = 1 << 11;  // elements that threads would not make faster

template <class T>
using Buffer = T __attribute__((aligned(64)))[kTile];
template <class T>
using Row = T __attribute__((aligned(64)))[2 * kWidest];

struct Cut {
  int64_t channels, steps, blocks;  // channels and steps of a tile
};

Cut cut(const View<3>& lead, int64_t sequences, bool in_place) {
  const bool time_first = lead.step(2) != 1 && (lead.step(1) == 1 || lead.step(1) == -1);
  const int64_t least = time_first ? 16 : 32, channels = lead.size[2];
  int64_t width = in_place ? kWidest : time_first ? 32 : 128;
  while (width > least && sequences * ((channels + width - 1) / width) < 8) width /= 2;
  return {width, kTile / (2 * width), (channels + width - 1) / width};
}

// Whether rows are read and written where they lie.
bool in_place(const View<3>& v) { return v.step(2) == 1 && v.size[2] % kPairs == 0; }

bool streams(const View<3>& out) {
  return out.size[0] * out.size[1] * out.size[2] * item_size(out.dtype) >= kStreamFrom;
}

// e^x of pairs
template <class T>
Vec<T> exp_pairs(Vec<T> x) {
  const Vec<T> r = exp(evens(x));
  const SinCos<Vec<T>> turn = sincos(odds(x));
  return alternate(r * turn.cos, r * turn.sin);
}

// The gate of some steps: as it lies, or the exponential of its logarithm. One that is constant
// over time is a single row, made once.
template <class T>
class Gate {
 public:
  Gate(const Plane& p, bool log_a, int64_t channels, int64_t width)
      : plane_(p), log_a_(log_a), channels_(channels), width_(width) {
    if (p.stride_t == 0) constant_ = rows(0, 1);
  }
  Tile<T> at(int64_t t, int64_t steps) {
    return plane_.stride_t == 0 ? Tile<T>{constant_.data, 0} : rows(t, steps);
  }

 private:
  Tile<T> rows(int64_t t, int64_t steps) {
    const Tile<T> tile = load_pairs<T>(plane_.at(t, 0), steps, channels_, buffer_, width_);
    if (!log_a_) return tile;
    for (int64_t i = 0; i < steps; ++i)
      for (int64_t c = 0; c < 2 * channels_; c += kLanes)
        exp_pairs(Vec<T>::load(tile.row(i) + c)).store(buffer_ + i * width_ + c);
    return {buffer_, width_};
  }

  Plane plane_;
  bool log_a_;
  int64_t channels_, width_;
  Tile<T> constant_{nullptr, 0};
  Buffer<T> buffer_;
};

// Rows that are written where they lie, or to a buffer and from there.
template <class T>
class Output {
 public:
  Output(const Plane& p, int64_t channels, int64_t width, bool stream)
      : plane_(p),
        channels_(channels),
        width_(width),
        stream_(stream),
        direct_(pairs_in_place<T>(p, channels)),
        past_(stream && direct_ && may_stream<T>(numbers<T>(p))) {}
  Tile<T> at(int64_t t) {
    return direct_ ? Tile<T>{reinterpret_cast<T*>(plane_.at(t, 0).data), 2 * plane_.stride_t}
                   : Tile<T>{buffer_, width_};
  }
  RECURRA_INLINE void put(T* to, Vec<T> v) const { past_ ? v.stream(to) : v.store(to); }
  void done(int64_t t, int64_t steps) const {
    if (!direct_) store_pairs<T>(plane_.at(t, 0), steps, channels_, buffer_, width_, stream_);
  }
  // Kept in the buffer alone.
  void keep() { direct_ = past_ = false; }
  const T* buffer() const { return buffer_; }

 private:
  Plane plane_;
  int64_t channels_, width_;
  bool stream_, direct_, past_;
  Buffer<T> buffer_;
};

template <class T>
void forward(const LinearScan& args) {
  const int64_t channels = args.b.size[2];
  const Cut shape = cut(args.b, args.sequences.count, in_place(args.b) && in_place(args.h));
  const int64_t width = 2 * shape.channels;
  const bool stream = streams(args.h);
  const bool serial = args.b.size[0] * args.b.size[1] * channels < kSerialBelow;
  parallel_unless(serial, args.sequences.count * shape.blocks, [&](int64_t task) {
    const int64_t n = task / shape.blocks, c0 = task % shape.blocks * shape.channels;
    const int64_t nc = channels - c0 < shape.channels ? channels - c0 : shape.channels;
    const Sequence s = args.sequences[n];
    const Plane a = plane(args.a, s, args.reverse, c0), b = plane(args.b, s, args.reverse, c0);
    Row<T> state;
    Buffer<T> buffer;
    Output<T> h(plane(args.h, s, args.reverse, c0), nc, width, stream);
    load_pair_row<T>(plane(args.h0, n, c0), nc, state, width);
    const int64_t length = s.length();
    if (length > 0) {
      Gate<T> gate(a, args.log_a, nc, width);
      const bool ahead = (nc < channels || b.stride_t < 0) && pairs_in_place<T>(b, nc);
      for (int64_t t0 = 0; t0 < length; t0 += shape.steps) {
        const int64_t steps = length - t0 < shape.steps ? length - t0 : shape.steps;
        const Tile<T> ta = gate.at(t0, steps);
        const Tile<T> tb = load_pairs<T>(b.at(t0, 0), steps, nc, buffer, width);
        const Tile<T> th = h.at(t0);
        for (int64_t t = 0; t < steps; ++t) {
          if (ahead && t0 + t + kAhead < length) {
            prefetch_row(a, t0 + t + kAhead, nc);
            prefetch_row(b, t0 + t + kAhead, nc);
          }
          for (int64_t c = 0; c < 2 * nc; c += kLanes) {
            const Vec<T> v = fma(factor(Vec<T>::load(ta.row(t) + c)), Vec<T>::load(state + c),
                                 Vec<T>::load(tb.row(t) + c));
            v.store(state + c);
            h.put(th.row(t) + c, v);
          }
        }
        h.done(t0, steps);
      }
    }
    store_pairs<T>(plane(args.h_last, n, c0), 1, nc, state, width, false);
    if (stream) fence();
  });
}

// As accumulate(): a sum over the channels takes those of sixteen pairs by the fixed tree.
template <class T>
void accumulate_pairs(const View<3>& a, const Plane& to, int64_t steps, int64_t channels,
                      const T* rows, int64_t width) {
  if (a.size[2] != 1) return accumulate<T>(a, numbers<T>(to), steps, 2 * channels, rows, width);
  const bool over_time = a.size[1] == 1;
  for (int64_t t = 0; t < steps; ++t) {
    T* at = reinterpret_cast<T*>(to.at(over_time ? 0 : t, 0).data);
    for (int64_t c = 0; c < 2 * channels; c += kLanes) {
      const Vec<T> v = Vec<T>::load(rows + t * width + c);
      at[c / (2 * kLanes) * 2] += sum(alternate(v, Vec<T>(T(0))));
      at[c / (2 * kLanes) * 2 + 1] += sum(alternate(Vec<T>(T(0)), v));
    }
  }
}

template <class T>
void backward(const LinearScanBackward& args) {
  const int64_t channels = args.h.size[2];
  const bool reduced = static_cast<bool>(args.partial);
  const bool over_time = reduced && args.a.size[1] == 1;
  const bool whole = (over_time || (!reduced && in_place(args.da))) && in_place(args.h) &&
                     in_place(args.db) && (!args.dh || in_place(args.dh));
  const bool stream = streams(args.db);
  const int64_t owned = args.owned();
  const Cut shape = cut(args.h, owned > 1 ? 1 : args.sequences.count, whole);
  const int64_t width = 2 * shape.channels;
  const int64_t tasks = args.sequences.count / owned * shape.blocks;
  const bool back = !args.reverse;  // the walk is against the scan
  const bool serial = args.h.size[0] * args.h.size[1] * channels < kSerialBelow;
  parallel_unless(serial, tasks, [&](int64_t task) {
    const int64_t c0 = task % shape.blocks * shape.channels;
    const int64_t nc = channels - c0 < shape.channels ? channels - c0 : shape.channels;
    Buffer<T> buffer_h, buffer_d;
    Row<T> carry, first, group;  // group: sums of kGroup steps of the gradient of a
    const T* before[kTogether];
    for (int64_t n = task / shape.blocks * owned, end = n + owned; n < end; ++n) {
      const Sequence s = args.sequences[n];
      const int64_t length = s.length();
      const Plane a = plane(args.a, s, back, c0), h = plane(args.h, s, back, c0),
                  dh = plane(args.dh, s, back, c0);
      Plane sums;
      if (reduced)
        sums = plane(args.partial, args.sums_of(n), back, 0)
                   .at(0, args.a.size[2] == 1 ? c0 / kLanes : c0);
      Output<T> da(plane(args.da, s, back, c0), nc, width, stream);
      Output<T> db(plane(args.db, s, back, c0), nc, width, stream);
      if (reduced) da.keep();
      load_pair_row<T>(plane(args.dh_last, n, c0), nc, carry, width);
      load_pair_row<T>(plane(args.h0, n, c0), nc, first, width);
      if (length > 0) {
        Gate<T> gate(a, args.log_a, nc, width);
        const bool ahead = nc < channels && pairs_in_place<T>(h, nc);
        for (int64_t t0 = 0; t0 < length; t0 += shape.steps) {
          const int64_t steps = length - t0 < shape.steps ? length - t0 : shape.steps;
          const bool last = t0 + steps == length;
          const Tile<T> ta = gate.at(t0, steps);
          // Row t of the previous states is the next one of the walk; the last is h0.
          const Tile<T> th =
              load_pairs<T>(h.at(t0 + 1, 0), last ? steps - 1 : steps, nc, buffer_h, width);
          Tile<T> td{nullptr, 0};
          if (dh) td = load_pairs<T>(dh.at(t0, 0), steps, nc, buffer_d, width);
          const Tile<T> to_a = da.at(t0), to_b = db.at(t0);
          for (int64_t t = 0, done; t < steps; t += done) {
            done = steps - t < kTogether ? 1 : kTogether;
            for (int64_t i = 0; i < done; ++i) {
              before[i] = last && t + i == steps - 1 ? first : th.row(t + i);
              if (!ahead || t0 + t + i + kAhead + 1 >= length) continue;
              prefetch_row(a, t0 + t + i + kAhead, nc);
              prefetch_row(h, t0 + t + i + kAhead + 1, nc);
              if (dh) prefetch_row(dh, t0 + t + i + kAhead, nc);
            }
            const bool begins = (t0 + t) % kGroup == 0;
            const auto walk = [&](auto count) RECURRA_LAMBDA {
              for (int64_t c = 0; c < 2 * nc; c += kLanes) {
                Vec<T> carried = Vec<T>::load(carry + c), total = Vec<T>::load(group + c);
                Factor<T> gate_t = conj_factor(Vec<T>::load(ta.row(t) + c));
#pragma GCC unroll 4
                for (int i = 0; i < count.value; ++i) {
                  if (i && ta.stride) gate_t = conj_factor(Vec<T>::load(ta.row(t + i) + c));
                  const Vec<T> g = dh ? Vec<T>::load(td.row(t + i) + c) + carried : carried;
                  carried = gate_t * g;
                  db.put(to_b.row(t + i) + c, g);
                  const Vec<T> d =
                      conj_factor(Vec<T>::load(before[i] + c)) * (args.log_a ? carried : g);
                  if (over_time)
                    total = i || !begins ? total + d : d;
                  else
                    da.put(to_a.row(t + i) + c, d);
                }
                carried.store(carry + c);
                if (over_time) total.store(group + c);
              }
            };
            done == 1 ? walk(Index<1>{}) : walk(Index<kTogether>{});
            if (over_time && ((t0 + t + done) % kGroup == 0 || t0 + t + done == length))
              accumulate_pairs<T>(args.a, sums, 1, nc, group, width);
          }
          db.done(t0, steps);
          if (!reduced)
            da.done(t0, steps);
          else if (!over_time)
            accumulate_pairs<T>(args.a, sums.at(t0, 0), steps, nc, da.buffer(), width);
        }
      }
      store_pairs<T>(plane(args.dh0, n, c0), 1, nc, carry, width, false);
    }
    if (stream) fence();
  });
  if (reduced) write_sums<T, 2>(args.partial, args.da);
}

template <class T>
void step(const LinearScanStep& args) {
  const int64_t rows = args.b.size[0], channels = args.b.size[1];
  const int64_t blocks = (channels + kWidest - 1) / kWidest, width = 2 * kWidest;
  parallel_unless(rows * channels < 1 << 15, rows * blocks, [&](int64_t task) {
    const int64_t n = task / blocks, c0 = task % blocks * kWidest;
    const int64_t nc = channels - c0 < kWidest ? channels - c0 : kWidest;
    Row<T> a, b, state;
    const int64_t slot = args.slots ? args.slots[n] : n;
    const Plane out = plane(args.out, n, c0);
    if (slot < 0) {
      load_row<T>({}, 2 * nc, state, width);
      return store_pairs<T>(out, 1, nc, state, width, false);
    }
    const Plane h = plane(args.h, slot, c0);
    load_pair_row<T>(h, nc, state, width);
    const Tile<T> ta = load_pairs<T>(plane(args.a, n, c0), 1, nc, a, width);
    const Tile<T> tb = load_pairs<T>(plane(args.b, n, c0), 1, nc, b, width);
    for (int64_t c = 0; c < 2 * nc; c += kLanes) {
      Vec<T> gate = Vec<T>::load(ta.data + c);
      if (args.log_a) gate = exp_pairs(gate);
      fma(factor(gate), Vec<T>::load(state + c), Vec<T>::load(tb.data + c)).store(state + c);
    }
    store_pairs<T>(h, 1, nc, state, width, false);
    store_pairs<T>(out, 1, nc, state, width, false);
  });
}

}  // namespace

void complex_scan(const LinearScan& args) {
  computes_in_double(args.b.dtype) ? forward<double>(args) : forward<float>(args);
}

void complex_scan_backward(const LinearScanBackward& args) {
  computes_in_double(args.h.dtype) ? backward<double>(args) : backward<float>(args);
}

void complex_scan_step(const LinearScanStep& args) {
  computes_in_double(args.b.dtype) ? step<double>(args) : step<float>(args);
}

}  // namespace recurra::RECURRA_ISA
