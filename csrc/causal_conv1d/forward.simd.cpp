#include "causal_conv1d/tiles.h"

namespace recurra::RECURRA_ISA {
namespace {

using namespace conv;

// Steps whose inputs all lie in x, read and written as they are stored. Whole vectors of channels,
// step by step with the inputs of the last steps in registers; kRows steps of each vector in turn,
// so that memory is walked as it lies.
template <class T, DType S, int W>
void along_channels(const Plane& x, const Plane& y, int64_t steps, int64_t channels,
                    const Parameters<T>& p, bool with_silu, bool past) {
  const int64_t item = item_size(S), x_row = x.stride_t * item, y_row = y.stride_t * item;
  for (int64_t t0 = 0; t0 < steps; t0 += kRows)
    for (int64_t c = 0; c < channels; c += kLanes) {
      const char* from = x.data + t0 * x_row + c * item;
      char* to = y.data + t0 * y_row + c * item;
      const Vec<T> bias = Vec<T>::load(p.bias.data + c);
      Vec<T> w[W], inputs[W];
      for_each_index<W>([&](auto j) RECURRA_LAMBDA {
        w[j] = Vec<T>::load(p.weight.row(j) + c);
        if constexpr (j + 1 < W) inputs[j] = load_stored<T, S>(from + (j + 1 - W) * x_row);
      });
      const auto next = [&] RECURRA_LAMBDA {
        inputs[W - 1] = load_stored<T, S>(from);
        // The same place of the next rows: no machine foresees so many short runs.
        prefetch<1>(from + kRows * x_row);
        from += x_row;
        Vec<T> s = bias;
        for_each_index<W>([&](auto j) RECURRA_LAMBDA { s = fma(w[j], inputs[j], s); });
        for_each_index<W - 1>([&](auto j) RECURRA_LAMBDA { inputs[j] = inputs[j + 1]; });
        return s;
      };
      const int64_t rows = least(kRows, steps - t0);
      int64_t t = 0;
      for (; t + kBatch <= rows; t += kBatch) {
        Batch<Vec<T>, kBatch> s;
        for_each_index<kBatch>([&](auto i) RECURRA_LAMBDA { s.v[i] = next(); });
        if (with_silu) s = silu(s);
        for_each_index<kBatch>([&](auto i) RECURRA_LAMBDA {
          store_stored<T, S>(to, s.v[i], past);
          to += y_row;
        });
      }
      for (; t < rows; ++t, to += y_row) {
        Vec<T> s = next();
        if (with_silu) s = silu(s);
        store_stored<T, S>(to, s, past);
      }
    }
}

// The same for channels along whose steps memory runs.
template <class T, DType S, int W>
void along_time(const Plane& x, const Plane& y, int64_t steps, int64_t channels,
                const Parameters<T>& p, bool with_silu, bool past) {
  const int64_t item = item_size(S);
  for (int64_t c = 0; c < channels; ++c) {
    const char* from = x.data + (c * x.stride_c + 1 - W) * item;
    char* to = y.data + c * y.stride_c * item;
    const Vec<T> bias(p.bias.data[c]);
    Vec<T> w[W];
    for_each_index<W>([&](auto j) RECURRA_LAMBDA { w[j] = Vec<T>(p.weight.row(j)[c]); });
    // Sixteen steps from t on, of inputs that load(address) gives.
    const auto sums = [&](int64_t t, auto load) RECURRA_LAMBDA {
      Vec<T> s = bias;
      for_each_index<W>([&](auto j)
                            RECURRA_LAMBDA { s = fma(w[j], load(from + (t + j) * item), s); });
      return s;
    };
    const auto whole = [](const char* q) RECURRA_LAMBDA { return load_stored<T, S>(q); };
    int64_t t = 0;
    for (; t + kBatch * kLanes <= steps; t += kBatch * kLanes) {
      Batch<Vec<T>, kBatch> s;
      for_each_index<kBatch>([&](auto i) RECURRA_LAMBDA { s.v[i] = sums(t + i * kLanes, whole); });
      if (with_silu) s = silu(s);
      for_each_index<kBatch>([&](auto i) RECURRA_LAMBDA {
        store_stored<T, S>(to + (t + i * kLanes) * item, s.v[i], past);
      });
    }
    for (; t < steps; t += kLanes) {
      const int n = at_most_lanes(steps - t);
      Vec<T> s = sums(t, [&](const char* q) RECURRA_LAMBDA { return load_lanes<T>(q, S, n); });
      if (with_silu) s = silu(s);
      store_lanes<T>(to + t * item, S, s, n);
    }
  }
}

// Whether along_channels or along_time can run on whole planes like these.
template <class T>
bool runs_as_stored(const Cut& cut, const Plane& x, const Plane& y, int64_t channels) {
  if (cut.taps > 4 || !is_storage<T>(x.dtype)) return false;
  if (cut.along_time) return y.stride_t == 1;
  return x.stride_c == 1 && y.stride_c == 1 && channels % kLanes == 0;
}

template <class T>
void run_as_stored(const Cut& cut, const Plane& x, const Plane& y, int64_t steps, int64_t channels,
                   const Parameters<T>& p, bool with_silu, bool stream) {
  const int64_t across = (cut.along_time ? y.stride_c : y.stride_t) * item_size(y.dtype);
  const bool past =
      stream && ((reinterpret_cast<uintptr_t>(y.data) | static_cast<uintptr_t>(across)) % 64 == 0);
  for_width(cut.taps, [&](auto w) {
    if constexpr (w.value > 0)
      for_storage<T>(x.dtype, [&](auto dtype) {
        constexpr DType S = DType(dtype.value);
        if (cut.along_time)
          along_time<T, S, w.value>(x, y, steps, channels, p, with_silu, past);
        else
          along_channels<T, S, w.value>(x, y, steps, channels, p, with_silu, past);
      });
  });
}

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
        const bool as_stored = runs_as_stored<T>(shape, x, y, tiles.nc);
        for (int64_t t0 = part ? span.begin : 0; t0 < end;) {
          if (as_stored && t0 >= W - 1) {
            run_as_stored<T>(shape, x.at(t0, 0), y.at(t0, 0), end - t0, tiles.nc, p, args.silu,
                             stream);
            break;
          }
          const int64_t steps = least(as_stored ? kLanes : shape.steps, end - t0);
          const Grid<T> inputs = tiles.load_inputs(x, h0, t0, steps, in);
          const Grid<T> to = tiles.target(y.at(t0, 0), out);
          const bool past = stream && tiles.on_lines(to, out);
          const int64_t step = shape.vector_step(to);
          tiles.convolve_tile(inputs, 1 - W, 0, steps, p.weight, false, p.bias.data, to, to,
                              [&](const auto& v, T* at, const T*) RECURRA_LAMBDA {
                                conv::store(args.silu ? silu(v) : v, at, step, past);
                              });
          tiles.store(y.at(t0, 0), 0, steps, to, stream);
          t0 += steps;
        }
        if (end == s.length())
          tiles.store(plane(args.h_last, state, false, c0).at(W - 1, 0), 1 - W, 0,
                      tiles.load_inputs(x, h0, end, 0, in), false);
      }
    }
    if (stream) fence();
  });
}

}  // namespace

void causal_conv1d(const CausalConv1d& args) {
  computes_in_double(args.x.dtype) ? forward<double>(args) : forward<float>(args);
}

}  // namespace recurra::RECURRA_ISA
