// What forward, backward and step of causal_conv1d share: how the work is cut, and tiles.
//
// A task is one span of time by a block of channels, walked tile by tile. Each output element is
// the same chain of operations wherever it is computed, so a tile may hold its lanes along the
// channels or along time, whichever is contiguous in memory: nothing is transposed. What depends
// on an order, the sums over time of the parameter gradients, goes through sixteen running sums,
// step t of a sequence into sum t mod 16, joined by the tree of sum(Vec); so the lanes along time
// and the rows along time add up alike.
#pragma once
#include <new>

#include "causal_conv1d/causal_conv1d.h"
#include "math/batch.h"
#include "math/functions.h"
#include "tile.h"

namespace recurra::RECURRA_ISA::conv {

constexpr int64_t kStreamFrom = 4 << 20;  // bytes of output that no cache is asked to hold

constexpr int kBatch = 4;     // vectors whose SiLU is computed together
constexpr int64_t kRows = 8;  // steps by which lines along channels advance together

constexpr int64_t up16(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(static_cast<T*>(operator new(size * sizeof(T), std::align_val_t(64)))),
        next_(data_) {}
  ~Scratch() { operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* take(int64_t size) {
    T* p = next_;
    next_ += up16(size);
    return p;
  }

 private:
  T *data_, *next_;
};

// Where the element of time t (may be negative) and channel c lies.
template <class T>
struct Grid {
  T* origin;
  int64_t t, c;
  RECURRA_INLINE T* at(int64_t time, int64_t channel) const {
    return origin + time * t + channel * c;
  }
};

// How the work is cut and how tiles lie in memory. A line is what one vector runs along: sixteen
// channels, step by step, or one channel, sixteen steps at a time.
struct Cut {
  bool along_time;
  int64_t taps;      // W
  int64_t channels;  // D
  int64_t width;     // channels of a tile
  int64_t steps;     // of a tile, without the W-1 on either side
  int64_t block;     // channels of a task
  int64_t blocks;

  int64_t before() const { return along_time ? up16(taps - 1) : taps - 1; }
  int64_t row() const {
    return along_time ? before() + steps + up16(taps - 1) + kLanes : up16(width);
  }
  int64_t size() const { return along_time ? width * row() : (steps + 2 * (taps - 1)) * row(); }
  int64_t lines(int64_t nc) const { return along_time ? nc : up16(nc) / kLanes; }
  int64_t vectors(int64_t nt) const { return along_time ? up16(nt) / kLanes : nt; }

  template <class T>
  Grid<T> grid(T* data) const {
    return along_time ? Grid<T>{data + before(), 1, row()}
                      : Grid<T>{data + before() * row(), row(), 1};
  }
  template <class T>
  int64_t line_step(const Grid<T>& g) const {
    return along_time ? g.c : kLanes;
  }
  template <class T>
  int64_t vector_step(const Grid<T>& g) const {
    return along_time ? kLanes : g.t;
  }
};

// Long runs of memory first; the backward, which holds more and sums over time, in taller tiles.
inline Cut cut(const View<3>& x, const View<2>& weight, int64_t spans, bool backward) {
  Cut c;
  c.along_time = x.step(2) != 1 && x.step(1) == 1;
  c.taps = weight.size[1];
  c.channels = x.size[2];
  c.width = c.along_time ? 8 : backward ? 64 : 256;
  c.steps = c.along_time ? kConvSpan : backward ? 64 : 32;
  c.block = c.along_time ? 32 : c.width;
  const auto blocks = [&] { return (c.channels + c.block - 1) / c.block; };
  // Enough tasks to share out.
  while (c.block > (c.along_time ? c.width : 64) && spans * blocks() < 16) c.block /= 2;
  c.width = least(c.width, c.block);
  c.blocks = blocks();
  return c;
}

inline bool streams(const View<3>& out) {
  return out.size[0] * out.size[1] * out.size[2] * item_size(out.dtype) >= kStreamFrom;
}

RECURRA_INLINE Plane swapped(const Plane& p) { return {p.data, p.dtype, p.stride_c, p.stride_t}; }

// The parameters of a tile's channels in the compute type.
template <class T>
struct Parameters {
  Tile<T> weight;  // row j is w_j
  Tile<T> bias;
};
template <class T>
Parameters<T> load_parameters(const View<2>& weight, const View<1>& bias, int64_t c0, int64_t nc,
                              T* weight_buffer, T* bias_buffer, int64_t width) {
  const Plane w = {weight.at(c0, 0), weight.dtype, weight.step(1), weight.step(0)};
  const Tile<T> tw = load_tile<T>(w, weight.size[1], nc, weight_buffer, width);
  if (bias) {
    const Plane b = {bias.at(c0), bias.dtype, 0, bias.step(0)};
    return {tw, load_tile<T>(b, 1, nc, bias_buffer, width)};
  }
  for (int64_t c = 0; c < width; ++c) bias_buffer[c] = T(0);
  return {tw, {bias_buffer, width}};
}

// M vectors that lie `step` apart.
template <class T, int M>
RECURRA_INLINE void store(const Batch<Vec<T>, M>& values, T* p, int64_t step, bool past) {
  for_each_index<M>([&](auto k) RECURRA_LAMBDA {
    past ? values.v[k].stream(p + k * step) : values.v[k].store(p + k * step);
  });
}
template <class T, int M>
RECURRA_INLINE void load(Batch<Vec<T>, M>& values, const T* p, int64_t step) {
  for_each_index<M>([&](auto k) RECURRA_LAMBDA { values.v[k] = Vec<T>::load(p + k * step); });
}

// f(i, s) with s_k = bias + sum_j w_j x_{i+k,j} for each batch s of vectors, kBatch or, at the end,
// one. W = 0 stands for any number of taps.
template <class T, int W, class F>
RECURRA_INLINE void convolve(const T* x, int64_t step, int64_t tap, int64_t vectors,
                             const T* weights, int64_t weight_step, int64_t taps, Vec<T> bias,
                             const F& f) {
  Vec<T> w[W > 0 ? W : 1];
  for_each_index<W>([&](auto j) { w[j] = Vec<T>::load(weights + j * weight_step); });
  const auto sum = [&](const T* from) RECURRA_LAMBDA {
    Vec<T> s = bias;
    if constexpr (W > 0)
      for_each_index<W>([&](auto j)
                            RECURRA_LAMBDA { s = fma(w[j], Vec<T>::load(from + j * tap), s); });
    else
      for (int64_t j = 0; j < taps; ++j)
        s = fma(Vec<T>::load(weights + j * weight_step), Vec<T>::load(from + j * tap), s);
    return s;
  };
  const auto batch = [&](int64_t i, auto m) RECURRA_LAMBDA {
    constexpr int M = m.value;
    Batch<Vec<T>, M> s;
    if (W > 0 && tap == step) {  // the sums share their inputs
      Vec<T> inputs[W + M];
      const T* from = x + i * step;
      for_each_index<W + M - 1>([&](auto k) RECURRA_LAMBDA {
        inputs[k] = Vec<T>::load(from);
        from += step;
      });
      for_each_index<M>([&](auto k) RECURRA_LAMBDA {
        s.v[k] = bias;
        for_each_index<W>([&](auto j)
                              RECURRA_LAMBDA { s.v[k] = fma(w[j], inputs[k + j], s.v[k]); });
      });
    } else {
      for_each_index<M>([&](auto k) RECURRA_LAMBDA { s.v[k] = sum(x + (i + k) * step); });
    }
    f(i, s);
  };
  int64_t i = 0;
  for (; i + kBatch <= vectors; i += kBatch) batch(i, Index<kBatch>{});
  for (; i < vectors; ++i) batch(i, Index<1>{});
}

// f(Index<W>) for the widths that have a kernel of their own, otherwise f(Index<0>).
template <class F>
RECURRA_INLINE void for_width(int64_t taps, const F& f) {
  switch (taps) {
    case 2: return f(Index<2>{});
    case 3: return f(Index<3>{});
    case 4: return f(Index<4>{});
    default: return f(Index<0>{});
  }
}

// One task's view of its block of channels.
template <class T>
struct Tiles {
  const Cut& cut;
  int64_t nc;       // channels of this tile
  T* weight_lanes;  // (W, 16): the weights of a line

  // Steps [from, to) of a plane that starts at the tile's first step, in place or in `buffer`.
  Grid<T> load(const Plane& p, int64_t from, int64_t to, const Grid<T>& buffer) const {
    if (cut.along_time) {
      const Tile<T> tile =
          load_tile<T>(swapped(p.at(from, 0)), nc, to - from, buffer.at(from, 0), buffer.c);
      return {tile.data - from, 1, tile.stride};
    }
    const Tile<T> tile = load_tile<T>(p.at(from, 0), to - from, nc, buffer.at(from, 0), buffer.t);
    return {tile.data - from * tile.stride, tile.stride, 1};
  }

  void load_into(const Plane& p, int64_t from, int64_t to, const Grid<T>& buffer) const {
    if (!p) return fill(from, to, buffer);
    const Grid<T> g = load(p, from, to, buffer);
    if (g.origin == buffer.origin) return;
    if (cut.along_time) {
      for (int64_t c = 0; c < nc; ++c)
        __builtin_memcpy(buffer.at(from, c), g.at(from, c), (to - from) * sizeof(T));
    } else {
      for (int64_t t = from; t < to; ++t)
        __builtin_memcpy(buffer.at(t, 0), g.at(t, 0), nc * sizeof(T));
    }
  }

  void fill(int64_t from, int64_t to, const Grid<T>& buffer) const {
    const int64_t lanes = cut.along_time ? nc : up16(nc);
    for (int64_t t = from; t < to; ++t)
      for (int64_t c = 0; c < lanes; ++c) *buffer.at(t, c) = T(0);
  }

  // The inputs from W-1 before the tile's first step t0 up to `to` after it; those before the
  // sequence come from h0.
  Grid<T> load_inputs(const Plane& x, const Plane& h0, int64_t t0, int64_t to,
                      const Grid<T>& buffer) const {
    const int64_t from = 1 - cut.taps, first = most(from, -t0);
    const Plane here = x.at(t0, 0);
    // Along time whole vectors are read, beyond what lies in place.
    if (first == from && !cut.along_time) return load(here, from, to, buffer);
    if (from < first) load_into(h0 ? h0.at(t0 + cut.taps - 1, 0) : h0, from, first, buffer);
    if (first < to) load_into(here, first, to, buffer);
    return buffer;
  }

  // Where steps from the first one on are computed: in place where they lie in whole vectors.
  Grid<T> target(const Plane& p, const Grid<T>& buffer) const {
    if (cut.along_time || !rows_in_place<T>(p, nc)) return buffer;
    return {reinterpret_cast<T*>(p.data), p.stride_t, 1};
  }

  // Whether a target in place, and not the buffer, may be written past the caches.
  bool on_lines(const Grid<T>& to, const Grid<T>& buffer) const {
    return to.origin != buffer.origin &&
           (reinterpret_cast<uintptr_t>(to.origin) | static_cast<uintptr_t>(to.t) * sizeof(T)) %
                   64 ==
               0;
  }

  void store(const Plane& p, int64_t from, int64_t to, const Grid<T>& g, bool stream) const {
    if (!p || to <= from || p.at(from, 0).data == reinterpret_cast<char*>(g.at(from, 0))) return;
    if (cut.along_time)
      store_tile<T>(swapped(p.at(from, 0)), nc, to - from, g.at(from, 0), g.c, stream);
    else
      store_tile<T>(p.at(from, 0), to - from, nc, g.at(from, 0), g.t, stream);
  }

  // f(batch of sums, address in out, in other) for the vectors of steps [from, to) of the
  // convolution of `in`, whose first tap for step t lies at t + lead. The vectors of a batch lie
  // vector_step apart.
  template <class F>
  void convolve_tile(const Grid<T>& in, int64_t lead, int64_t from, int64_t to,
                     const Tile<T>& weight, bool flip, const T* bias, const Grid<T>& out,
                     const Grid<T>& other, const F& f) const {
    const int64_t vectors = cut.vectors(to - from), lines = cut.lines(nc);
    // Lines along channels advance together, some steps at a time, so that memory is walked as it
    // lies.
    const int64_t group = cut.along_time ? vectors : kRows;
    const int64_t step = cut.vector_step(in), out_step = cut.vector_step(out),
                  other_step = cut.vector_step(other);
    for_width(cut.taps, [&](auto w) {
      for (int64_t first = 0; first < vectors; first += group)
        for (int64_t line = 0; line < lines; ++line) {
          const T* weights = weight.row(flip ? cut.taps - 1 : 0) + line * kLanes;
          int64_t weight_step = flip ? -weight.stride : weight.stride;
          Vec<T> start = bias ? lane_values(bias, line) : Vec<T>(T(0));
          if (cut.along_time) {
            for (int64_t j = 0; j < cut.taps; ++j)
              Vec<T>(weight.row(flip ? cut.taps - 1 - j : j)[line])
                  .store(weight_lanes + j * kLanes);
            weights = weight_lanes;
            weight_step = kLanes;
          }
          const T* x = in.at(from + lead, 0) + line * cut.line_step(in) + first * step;
          T* to_out = out.at(from, 0) + line * cut.line_step(out) + first * out_step;
          const T* to_other = other.at(from, 0) + line * cut.line_step(other) + first * other_step;
          // Another operand comes from memory, as then do the inputs: ask for both, of the next
          // rows.
          if (!cut.along_time && other.origin != out.origin)
            for (int64_t row = kRows; row < 2 * kRows; ++row) {
              prefetch<1>(x + (row + cut.taps - 1) * step);
              prefetch<1>(to_other + row * other_step);
            }
          convolve<T, w.value>(x, step, in.t, least(group, vectors - first), weights, weight_step,
                               cut.taps, start, [&](int64_t i, const auto& s) RECURRA_LAMBDA {
                                 f(s, to_out + i * out_step, to_other + i * other_step);
                               });
        }
    });
  }

  RECURRA_INLINE Vec<T> lane_values(const T* row, int64_t line) const {
    return cut.along_time ? Vec<T>(row[line]) : Vec<T>::load(row + line * kLanes);
  }
};

}  // namespace recurra::RECURRA_ISA::conv
