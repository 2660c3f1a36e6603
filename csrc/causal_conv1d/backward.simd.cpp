#include "causal_conv1d/tiles.h"

namespace recurra::RECURRA_ISA {
namespace {

using namespace conv;

constexpr int kPhases = 4;  // steps that are summed together

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

// Adds steps [0, steps) of a tile to the running sums: (W+1, 16 sums) for each channel along time,
// otherwise (16 sums, W+1) rows of channels.
template <class T>
void correlate_tile(const Tiles<T>& tiles, const Grid<T>& ds, const Grid<T>& x, int64_t steps,
                    T* sums) {
  const Cut& cut = tiles.cut;
  const int64_t taps = cut.taps, lead = 1 - taps, nc = tiles.nc;
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

// Joins the sixteen sums into row u of the partial sums.
template <class T>
void join(const Tiles<T>& tiles, T* sums, const View<3>& partial, int64_t u, int64_t c0) {
  const int64_t taps = tiles.cut.taps, row = up16(tiles.cut.width);
  for (int64_t j = 0; j <= taps; ++j) {
    T* to = reinterpret_cast<T*>(partial.at(u, j, c0));
    if (tiles.cut.along_time) {
      for (int64_t c = 0; c < tiles.nc; ++c)
        to[c] = sum(Vec<T>::load(sums + (c * (taps + 1) + j) * kLanes));
      continue;
    }
    for (int64_t c = 0; c < tiles.nc; c += kLanes) {
      Vec<T> v[kLanes];
      for (int p = 0; p < kLanes; ++p) v[p] = Vec<T>::load(sums + (p * (taps + 1) + j) * row + c);
      for (int half = kLanes / 2; half > 0; half /= 2)
        for (int p = 0; p < half; ++p) v[p] = v[p] + v[p + half];
      v[0].store(to + c, at_most_lanes(tiles.nc - c));
    }
  }
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
      for (int64_t i = 0; i < (W + 1) * kLanes * row; i += kLanes) Vec<T>(T(0)).store(sums + i);
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
              const int64_t from = shape.vector_step(given), to = shape.vector_step(ds);
              tiles.convolve_tile(inputs, 1 - W, 0, ahead, p.weight, false, p.bias.data, ds, given,
                                  [=](const auto& v, T* at, const T* gradient) RECURRA_LAMBDA {
                                    auto s = silu_slope(v).slope, d = s;
                                    conv::load(d, gradient, from);
                                    conv::store(d * s, at, to, false);
                                  });
            } else {
              tiles.load_into(dy.at(t0, 0), 0, ahead, ds);
            }
            tiles.fill(ahead, steps + W - 1, ds);
            tiles.convolve_tile(ds, 0, 0, steps, p.weight, true, nullptr, to, to,
                                [&, step = shape.vector_step(to)](const auto& v, T* at, const T*)
                                    RECURRA_LAMBDA { conv::store(v, at, step, past); });
            correlate_tile<T>(tiles, ds, inputs, steps, sums);
          } else {
            tiles.fill(0, steps, to);
            tiles.fill(0, steps + W - 1, ds);
          }
          add_last(t0, 0, steps, to);
          tiles.store(dx.at(t0, 0), 0, steps, to, stream);
          if (t0 == 0) {
            tiles.fill(1 - W, 0, ds);
            tiles.convolve_tile(ds, 0, 1 - W, 0, p.weight, true, nullptr, out, out,
                                [step = shape.vector_step(out)](const auto& v, T* at, const T*)
                                    RECURRA_LAMBDA { conv::store(v, at, step, false); });
            add_last(0, 1 - W, 0, out);
            tiles.store(plane(args.dh0, state, false, c0).at(W - 1, 0), 1 - W, 0, out, false);
          }
          t0 += steps;
        } while (t0 < end);
      }
      join<T>(tiles, sums, args.partial, u, c0);
    }
    if (stream) fence();
  });
  finish<T>(args);
}

}  // namespace

void causal_conv1d_backward(const CausalConv1dBackward& args) {
  computes_in_double(args.x.dtype) ? backward<double>(args) : backward<float>(args);
}

}  // namespace recurra::RECURRA_ISA
