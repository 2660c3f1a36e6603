// A task is one span of time by a block of channels, walked tile by tile. Each output element is
// the same chain of operations wherever it is computed, so a tile may hold its lanes along the
// channels or along time, whichever is contiguous in memory: nothing is transposed. What depends
// on an order, the sums over time of the parameter gradients, goes through sixteen running sums,
// step t of a sequence into sum t mod 16, joined by the tree of sum(Vec); so the lanes along time
// and the rows along time add up alike.
#include "causal_conv1d/causal_conv1d.h"

#include <new>

#include "math/functions.h"
#include "tile.h"

namespace recurra::RECURRA_ISA {
namespace {

constexpr int64_t kStreamFrom = 4 << 20;  // bytes of output that no cache is asked to hold

constexpr int kPhases = 4;    // steps that are summed together
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
Cut cut(const View<3>& x, const View<2>& weight, int64_t spans, bool backward) {
  Cut c;
  c.along_time = x.step(2) != 1 && x.step(1) == 1;
  c.taps = weight.size[1];
  c.channels = x.size[2];
  c.width = c.along_time ? 8 : backward ? 128 : 256;
  c.steps = c.along_time ? kConvSpan : backward ? 64 : 32;
  c.block = c.along_time ? 32 : c.width;
  const auto blocks = [&] { return (c.channels + c.block - 1) / c.block; };
  // Enough tasks to share out.
  while (c.block > (c.along_time ? c.width : 64) && spans * blocks() < 16) c.block /= 2;
  c.width = least(c.width, c.block);
  c.blocks = blocks();
  return c;
}

bool streams(const View<3>& out) {
  return out.size[0] * out.size[1] * out.size[2] * item_size(out.dtype) >= kStreamFrom;
}

Plane swapped(const Plane& p) { return {p.data, p.dtype, p.stride_c, p.stride_t}; }

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

// f(i, bias + sum_j w_j x_{i,j}) for each vector i. W = 0 stands for any number of taps.
template <class T, int W, class F>
RECURRA_INLINE void convolve(const T* x, int64_t step, int64_t tap, int64_t vectors,
                             const T* weights, int64_t weight_step, int64_t taps, Vec<T> bias,
                             const F& f) {
  if constexpr (W > 0) {
    Vec<T> w[W];
    for_each_index<W>([&](auto j) { w[j] = Vec<T>::load(weights + j * weight_step); });
    for (int64_t i = 0; i < vectors; ++i) {
      Vec<T> s = bias;
      for_each_index<W>(
          [&](auto j) RECURRA_LAMBDA { s = fma(w[j], Vec<T>::load(x + i * step + j * tap), s); });
      f(i, s);
    }
  } else {
    for (int64_t i = 0; i < vectors; ++i) {
      Vec<T> s = bias;
      for (int64_t j = 0; j < taps; ++j)
        s = fma(Vec<T>::load(weights + j * weight_step), Vec<T>::load(x + i * step + j * tap), s);
      f(i, s);
    }
  }
}

// sums[j] += sum_i ds_i x_{i,j} for each lane, and sums[W] += sum_i ds_i; only the first `tail`
// lanes of the last vector count.
template <class T, int W>
void correlate(const T* ds, int64_t ds_step, const T* x, int64_t step, int64_t tap, int64_t vectors,
               int tail, int64_t taps, T* sums, int64_t sum_step) {
  if (vectors == 0) return;
  const int64_t whole = tail == kLanes ? vectors : vectors - 1;
  if constexpr (W > 0) {
    Vec<T> s[W + 1];
    for_each_index<W + 1>([&](auto j) { s[j] = Vec<T>::load(sums + j * sum_step); });
    for (int64_t i = 0; i < whole; ++i) {
      const Vec<T> d = Vec<T>::load(ds + i * ds_step);
      for_each_index<W>([&](auto j) RECURRA_LAMBDA {
        s[j] = fma(d, Vec<T>::load(x + i * step + j * tap), s[j]);
      });
      s[W] = s[W] + d;
    }
    if (whole < vectors) {
      const Vec<T> d = Vec<T>::load(ds + whole * ds_step, tail);
      for_each_index<W>([&](auto j) RECURRA_LAMBDA {
        s[j] = fma(d, Vec<T>::load(x + whole * step + j * tap, tail), s[j]);
      });
      s[W] = s[W] + d;
    }
    for_each_index<W + 1>([&](auto j) { s[j].store(sums + j * sum_step); });
  } else {
    for (int64_t j = 0; j <= taps; ++j) {
      Vec<T> s = Vec<T>::load(sums + j * sum_step);
      for (int64_t i = 0; i < vectors; ++i) {
        const int lanes = i < whole ? kLanes : tail;
        const Vec<T> d = Vec<T>::load(ds + i * ds_step, lanes);
        s = j == taps ? s + d : fma(d, Vec<T>::load(x + i * step + j * tap, lanes), s);
      }
      s.store(sums + j * sum_step);
    }
  }
}

// The same for kPhases steps that follow one another, each with sums of its own, so that the rows
// that they share are read once.
template <class T, int W>
void correlate_rows(const T* ds, int64_t ds_row, const T* x, int64_t x_row, int64_t count, T* sums,
                    int64_t sum_step) {
  constexpr int kSums = kPhases * (W + 1);
  Vec<T> s[kSums];
  _Pragma("GCC unroll 32") for (int k = 0; k < kSums; ++k) s[k] = Vec<T>::load(sums + k * sum_step);
  for (int64_t i = 0; i < count; ++i, ds += kLanes * ds_row, x += kLanes * x_row) {
    Vec<T> inputs[W + kPhases - 1];
    _Pragma("GCC unroll 32") for (int j = 0; j < W + kPhases - 1; ++j) inputs[j] =
        Vec<T>::load(x + j * x_row);
    _Pragma("GCC unroll 32") for (int p = 0; p < kPhases; ++p) {
      const Vec<T> d = Vec<T>::load(ds + p * ds_row);
      Vec<T>* to = s + p * (W + 1);
      _Pragma("GCC unroll 32") for (int j = 0; j < W; ++j) to[j] = fma(d, inputs[p + j], to[j]);
      to[W] = to[W] + d;
    }
  }
  _Pragma("GCC unroll 32") for (int k = 0; k < kSums; ++k) s[k].store(sums + k * sum_step);
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

  // f(address in out, address in other, sum) for each vector of steps [from, to) of the
  // convolution of `in`, whose first tap for step t lies at t + lead.
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
          convolve<T, w.value>(x, step, in.t, least(group, vectors - first), weights, weight_step,
                               cut.taps, start, [&](int64_t i, Vec<T> s) RECURRA_LAMBDA {
                                 f(to_out + i * out_step, to_other + i * other_step, s);
                               });
        }
    });
  }

  RECURRA_INLINE Vec<T> lane_values(const T* row, int64_t line) const {
    return cut.along_time ? Vec<T>(row[line]) : Vec<T>::load(row + line * kLanes);
  }

  // Adds steps [0, steps) to the running sums: (W+1, 16 sums) for each channel along time,
  // otherwise (16 sums, W+1) rows of channels.
  void correlate_tile(const Grid<T>& ds, const Grid<T>& x, int64_t steps, T* sums) const {
    const int64_t taps = cut.taps, lead = 1 - taps;
    for_width(taps, [&](auto w) {
      if (cut.along_time) {
        const int tail = static_cast<int>(steps - (up16(steps) - kLanes));
        for (int64_t c = 0; c < nc; ++c)
          correlate<T, w.value>(ds.at(0, c), kLanes, x.at(lead, c), kLanes, 1, cut.vectors(steps),
                                tail, taps, sums + c * (taps + 1) * kLanes, kLanes);
        return;
      }
      const int64_t row = up16(cut.width);
      if constexpr (w.value > 0) {
        if (steps % kLanes == 0) {
          for (int64_t p = 0; p < kLanes; p += kPhases)
            for (int64_t c = 0; c < nc; c += kLanes)
              correlate_rows<T, w.value>(ds.at(p, c), ds.t, x.at(p + lead, c), x.t, steps / kLanes,
                                         sums + p * (taps + 1) * row + c, row);
          return;
        }
      }
      for (int64_t c = 0; c < nc; c += kLanes)
        for (int64_t p = 0; p < least(kLanes, steps); ++p)
          correlate<T, w.value>(ds.at(p, c), kLanes * ds.t, x.at(p + lead, c), kLanes * x.t, x.t,
                                (steps - p + kLanes - 1) / kLanes, kLanes, taps,
                                sums + p * (taps + 1) * row + c, row);
    });
  }

  int64_t sums_size() const { return (cut.taps + 1) * kLanes * up16(cut.width); }

  // Joins the sixteen sums into row u of the partial sums.
  void join(T* sums, const View<3>& partial, int64_t u, int64_t c0) const {
    const int64_t taps = cut.taps, row = up16(cut.width);
    for (int64_t j = 0; j <= taps; ++j) {
      T* to = reinterpret_cast<T*>(partial.at(u, j, c0));
      if (cut.along_time) {
        for (int64_t c = 0; c < nc; ++c)
          to[c] = sum(Vec<T>::load(sums + (c * (taps + 1) + j) * kLanes));
        continue;
      }
      for (int64_t c = 0; c < nc; c += kLanes) {
        Vec<T> v[kLanes];
        for (int p = 0; p < kLanes; ++p) v[p] = Vec<T>::load(sums + (p * (taps + 1) + j) * row + c);
        for (int half = kLanes / 2; half > 0; half /= 2)
          for (int p = 0; p < half; ++p) v[p] = v[p] + v[p + half];
        v[0].store(to + c, at_most_lanes(nc - c));
      }
    }
  }
};

template <class T>
void forward(const CausalConv1d& args) {
  const Cut shape = cut(args.x, args.weight, args.span_count, false);
  const bool stream = streams(args.y);
  const int64_t W = shape.taps, row = up16(shape.width);
  parallel(args.span_count * shape.blocks, [&](int64_t task) {
    const ConvSpan& span = args.spans[task / shape.blocks];
    const int64_t begin = task % shape.blocks * shape.block;
    Scratch<T> scratch(2 * up16(shape.size()) + W * (row + kLanes) + row);
    const Grid<T> in = shape.grid(scratch.take(shape.size())),
                  out = shape.grid(scratch.take(shape.size()));
    T *weight_buffer = scratch.take(W * row), *bias_buffer = scratch.take(row),
      *lanes = scratch.take(W * kLanes);
    for (int64_t c0 = begin; c0 < least(begin + shape.block, shape.channels); c0 += shape.width) {
      const Tiles<T> tiles{shape, least(shape.width, shape.channels - c0), lanes};
      const Parameters<T> p =
          load_parameters<T>(args.weight, args.bias, c0, tiles.nc, weight_buffer, bias_buffer, row);
      for (int64_t n = span.first; n < span.last; ++n) {
        const Sequence s = args.sequences[n], state = {n, 0, W - 1};
        const bool part = span.last - span.first == 1;
        const int64_t end = part ? span.end : s.length();
        const Plane x = plane(args.x, s, false, c0), y = plane(args.y, s, false, c0),
                    h0 = plane(args.h0, state, false, c0);
        int64_t t0 = part ? span.begin : 0;
        do {
          const int64_t steps = least(shape.steps, end - t0);
          const Grid<T> inputs = tiles.load_inputs(x, h0, t0, steps, in);
          const Grid<T> to = tiles.target(y.at(t0, 0), out);
          const bool past = stream && tiles.on_lines(to, out);
          tiles.convolve_tile(inputs, 1 - W, 0, steps, p.weight, false, p.bias.data, to, to,
                              [&](T* at, const T*, Vec<T> v) RECURRA_LAMBDA {
                                if (args.silu) v = silu(v);
                                past ? v.stream(at) : v.store(at);
                              });
          tiles.store(y.at(t0, 0), 0, steps, to, stream);
          t0 += steps;
          if (t0 == s.length())
            tiles.store(plane(args.h_last, state, false, c0).at(W - 1 - steps, 0), steps - W + 1,
                        steps, inputs, false);
        } while (t0 < end);
      }
    }
    if (stream) fence();
  });
}

// The parameter gradients: the sums of the spans, in order.
template <class T>
void finish(const CausalConv1dBackward& args) {
  const int64_t taps = args.weight.size[1], channels = args.x.size[2];
  parallel((channels + 63) / 64, [&](int64_t task) {
    for (int64_t c = task * 64; c < least(channels, task * 64 + 64); c += kLanes) {
      const int lanes = at_most_lanes(channels - c);
      for (int64_t j = 0; j <= taps; ++j) {
        Vec<T> total(T(0));
        for (int64_t u = 0; u < args.span_count; ++u)
          total = total + Vec<T>::load(reinterpret_cast<T*>(args.partial.at(u, j, c)), lanes);
        T values[kLanes];
        total.store(values);
        const Plane to =
            j < taps ? Plane{args.dweight.at(c, j), args.dweight.dtype, 0, args.dweight.step(0)}
                     : Plane{args.dbias.at(c), args.dbias.dtype, 0, args.dbias.step(0)};
        store_tile<T>(to, 1, lanes, values, kLanes, false);
      }
    }
  });
}

template <class T>
void backward(const CausalConv1dBackward& args) {
  const Cut shape = cut(args.x, args.weight, args.span_count, true);
  const bool stream = streams(args.dx);
  const int64_t W = shape.taps, row = up16(shape.width);
  parallel(args.span_count * shape.blocks, [&](int64_t task) {
    const int64_t u = task / shape.blocks;
    const ConvSpan& span = args.spans[u];
    const int64_t begin = task % shape.blocks * shape.block;
    Scratch<T> scratch(4 * up16(shape.size()) + (W + 1) * kLanes * row + W * (row + kLanes) + row);
    const Grid<T> in = shape.grid(scratch.take(shape.size())),
                  out = shape.grid(scratch.take(shape.size())),
                  ds = shape.grid(scratch.take(shape.size())),
                  buffer = shape.grid(scratch.take(shape.size()));
    T *weight_buffer = scratch.take(W * row), *bias_buffer = scratch.take(row),
      *lanes = scratch.take(W * kLanes), *sums = scratch.take((W + 1) * kLanes * row);
    for (int64_t c0 = begin; c0 < least(begin + shape.block, shape.channels); c0 += shape.width) {
      const Tiles<T> tiles{shape, least(shape.width, shape.channels - c0), lanes};
      const Parameters<T> p =
          load_parameters<T>(args.weight, args.bias, c0, tiles.nc, weight_buffer, bias_buffer, row);
      for (int64_t i = 0; i < tiles.sums_size(); i += kLanes) Vec<T>(T(0)).store(sums + i);
      for (int64_t n = span.first; n < span.last; ++n) {
        const Sequence s = args.sequences[n], state = {n, 0, W - 1};
        const bool part = span.last - span.first == 1;
        const int64_t length = s.length(), end = part ? span.end : length;
        const Plane x = plane(args.x, s, false, c0), dy = plane(args.dy, s, false, c0),
                    dx = plane(args.dx, s, false, c0), h0 = plane(args.h0, state, false, c0),
                    dh_last = plane(args.dh_last, state, false, c0);
        // Adds dh_last to steps [from, to) of the gradient, as far as they are its inputs.
        const auto add_last = [&](int64_t t0, int64_t from, int64_t to, const Grid<T>& sum) {
          from = most(from, length - W + 1 - t0);
          if (!dh_last || from >= to) return;
          const Grid<T> last = tiles.load(dh_last.at(t0 - (length - W + 1), 0), from, to, buffer);
          for (int64_t t = from; t < to; ++t)
            for (int64_t c = 0; c < tiles.nc; ++c) *sum.at(t, c) += *last.at(t, c);
        };
        int64_t t0 = part ? span.begin : 0;
        do {
          const int64_t steps = least(shape.steps, end - t0);
          // dx reaches W-1 steps ahead.
          const int64_t ahead = least(steps + W - 1, length - t0);
          const Grid<T> to = tiles.target(dx.at(t0, 0), out);
          const bool past = stream && tiles.on_lines(to, out);
          if (dy && ahead > 0) {
            const Grid<T> inputs = tiles.load_inputs(x, h0, t0, ahead, in);
            if (args.silu) {
              const Grid<T> given = tiles.load(dy.at(t0, 0), 0, ahead, buffer);
              tiles.convolve_tile(inputs, 1 - W, 0, ahead, p.weight, false, p.bias.data, ds, given,
                                  [](T* to, const T* from, Vec<T> v) RECURRA_LAMBDA {
                                    (Vec<T>::load(from) * silu_slope(v).slope).store(to);
                                  });
            } else {
              tiles.load_into(dy.at(t0, 0), 0, ahead, ds);
            }
            tiles.fill(ahead, steps + W - 1, ds);
            tiles.convolve_tile(ds, 0, 0, steps, p.weight, true, nullptr, to, to,
                                [&](T* at, const T*, Vec<T> v)
                                    RECURRA_LAMBDA { past ? v.stream(at) : v.store(at); });
            tiles.correlate_tile(ds, inputs, steps, sums);
          } else {
            tiles.fill(0, steps, to);
            tiles.fill(0, steps + W - 1, ds);
          }
          add_last(t0, 0, steps, to);
          tiles.store(dx.at(t0, 0), 0, steps, to, stream);
          if (t0 == 0) {
            tiles.fill(1 - W, 0, ds);
            tiles.convolve_tile(ds, 0, 1 - W, 0, p.weight, true, nullptr, out, out,
                                [](T* at, const T*, Vec<T> v) RECURRA_LAMBDA { v.store(at); });
            add_last(0, 1 - W, 0, out);
            tiles.store(plane(args.dh0, state, false, c0).at(W - 1, 0), 1 - W, 0, out, false);
          }
          t0 += steps;
        } while (t0 < end);
      }
      tiles.join(sums, args.partial, u, c0);
    }
    if (stream) fence();
  });
  finish<T>(args);
}

template <class T>
void step(const CausalConv1dStep& args) {
  constexpr int64_t kWidth = 128, kRows = 16;
  const int64_t rows = args.x.size[0], channels = args.x.size[1], W = args.weight.size[1];
  const int64_t blocks = (channels + kWidth - 1) / kWidth, groups = (rows + kRows - 1) / kRows;
  const auto one = [&](int64_t task) {
    const int64_t c0 = task % blocks * kWidth, nc = least(kWidth, channels - c0);
    Scratch<T> scratch((2 * W + 2) * kWidth);
    T *weight_buffer = scratch.take(W * kWidth), *bias_buffer = scratch.take(kWidth),
      *inputs = scratch.take(W * kWidth), *out = scratch.take(kWidth);
    const Parameters<T> p =
        load_parameters<T>(args.weight, args.bias, c0, nc, weight_buffer, bias_buffer, kWidth);
    const auto load_rows = [&](const Plane& from, int64_t count, T* to) {
      const Tile<T> tile = load_tile<T>(from, count, nc, to, kWidth);
      if (tile.data == to) return;
      for (int64_t j = 0; j < count; ++j)
        __builtin_memcpy(to + j * kWidth, tile.row(j), nc * sizeof(T));
    };
    for (int64_t n = task / blocks * kRows; n < least(rows, (task / blocks + 1) * kRows); ++n) {
      const int64_t slot = args.slots ? args.slots[n] : n;
      if (slot < 0) {
        for (int64_t c = 0; c < kWidth; ++c) out[c] = T(0);
      } else {
        const Plane h = plane(args.h, {slot, 0, W - 1}, false, c0);
        load_rows(h, W - 1, inputs);
        load_rows(plane(args.x, n, c0), 1, inputs + (W - 1) * kWidth);
        for (int64_t c = 0; c < nc; c += kLanes) {
          Vec<T> v = Vec<T>::load(p.bias.data + c);
          for (int64_t j = 0; j < W; ++j)
            v = fma(Vec<T>::load(p.weight.row(j) + c), Vec<T>::load(inputs + j * kWidth + c), v);
          if (args.silu) v = silu(v);
          v.store(out + c);
        }
        store_tile<T>(h, W - 1, nc, inputs + kWidth, kWidth, false);
      }
      store_tile<T>(plane(args.out, n, c0), 1, nc, out, kWidth, false);
    }
  };
  // Threads cost more than they save below some tens of thousands of elements.
  if (rows * channels < 1 << 16)
    for (int64_t task = 0; task < groups * blocks; ++task) one(task);
  else
    parallel(groups * blocks, one);
}

}  // namespace

void causal_conv1d(const CausalConv1d& args) {
  computes_in_double(args.x.dtype) ? forward<double>(args) : forward<float>(args);
}

void causal_conv1d_backward(const CausalConv1dBackward& args) {
  computes_in_double(args.x.dtype) ? backward<double>(args) : backward<float>(args);
}

void causal_conv1d_step(const CausalConv1dStep& args) {
  computes_in_double(args.x.dtype) ? step<double>(args) : step<float>(args);
}

}  // namespace recurra::RECURRA_ISA
