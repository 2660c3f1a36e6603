// One kernel for each way in which x lies in memory. Along channels a thread takes a few channels
// that follow one another and walks a run of time with the last inputs in registers, reading the
// next steps while it computes these; along time neighbouring threads take neighbouring steps. Any
// other number of taps reads its inputs again for each step. Every output is one chain of
// operations wherever it is computed, so nothing of this changes a bit. The last inputs of the
// sequences are tasks after those of the outputs.
#include "causal_conv1d/device.h"
#include "cuda/split.h"

namespace recurra::cuda {
namespace causal_conv1d_detail {

constexpr int kThreads = 128;
constexpr int kAhead = 4;
constexpr int64_t kLongestRun = 64, kShortestRun = 8;  // steps of a thread along channels
constexpr int kTiles = 2;                              // packs of steps of a thread along time

template <class S>
struct Forward {
  Given<S> given;
  Array<S, 3> y;
  Array<Compute<S>, 3> h_last;
  int64_t run = 0, runs = 0;    // steps of a task along time, and tasks
  int64_t groups = 0;           // tasks along channels
  int64_t tasks = 0, last = 0;  // for outputs, for the last inputs
  bool packed = false;          // along time: all is aligned
  bool time_near = false;       // steps are neighbours, not channels

  Forward(const CausalConv1d& args, const Indices& cu_seqlens)
      : given(args, cu_seqlens), y(args.y), h_last(args.h_last) {}
};

// One of the last inputs.
template <class S>
__device__ void last_input(const Forward<S>& p, int64_t task) {
  const Given<S>& g = p.given;
  const int64_t c = task % g.channels, rest = task / g.channels, before = g.taps - 1;
  Cursor at;
  at.n = rest / before;
  at.s = extent(g.cu_seqlens, at.n, g.time);
  const int64_t j = rest % before;
  *p.h_last.at(at.n, j, c) = g.input(at, at.s.end - before + j, c);
}

template <class T, int V>
__device__ __forceinline__ void activate(bool silu, T (&s)[V]) {
  if (!silu) return;
  ValueSlope<T> out[V];
  silu_slopes(s, out);
#pragma unroll
  for (int v = 0; v < V; ++v) s[v] = out[v].value;
}

template <class S>
__device__ void write_output(const Forward<S>& p, const Cursor& at, int64_t t, int64_t c) {
  Compute<S> s[1] = {p.given.sum(at, t, c)};
  activate(p.given.silu, s);
  store(p.y.at(at.s.batch, t, c), s[0]);
}

// Steps [t, t + count) of one sequence for V channels from c on.
template <class S, int W, int V>
__device__ __forceinline__ void walk(const Forward<S>& p, const Cursor& at, int64_t t, int count,
                                     int64_t c, const Compute<S> (&w)[W][V],
                                     const Compute<S> (&bias)[V]) {
  using T = Compute<S>;
  using Pack = Packed<S, V>;
  const Given<S>& g = p.given;
  T in[W - 1 + kAhead][V];
#pragma unroll
  for (int j = 0; j + 1 < W; ++j) {
    const int64_t from = t - (W - 1) + j;
    if (from >= at.s.begin) {
      const Pack x = *reinterpret_cast<const Pack*>(g.x.at(at.s.batch, from, c));
#pragma unroll
      for (int v = 0; v < V; ++v) in[j][v] = x.get(v);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) in[j][v] = g.input(at, from, c + v);
    }
  }
  const S* from = g.x.at(at.s.batch, t, c);
  S* to = p.y.at(at.s.batch, t, c);
  const int64_t step_x = g.x.step[1], step_y = p.y.step[1];
  // Steps of which the first W - 1 inputs and these follow one another in `in`.
  const auto steps = [&](auto some, const Pack* x) {
#pragma unroll
    for (int i = 0; i < some.value; ++i, to += step_y) {
      T s[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        in[W - 1 + i][v] = x[i].get(v);
        s[v] = bias[v];
#pragma unroll
        for (int j = 0; j < W; ++j) s[v] = fma(w[j][v], in[i + j][v], s[v]);
      }
      activate(g.silu, s);
      Pack y;
#pragma unroll
      for (int v = 0; v < V; ++v) y.set(v, s[v]);
      *reinterpret_cast<Pack*>(to) = y;
    }
#pragma unroll
    for (int j = 0; j + 1 < W; ++j)
#pragma unroll
      for (int v = 0; v < V; ++v) in[j][v] = in[some.value + j][v];
  };
  Pack next[kAhead] = {};
  const auto read = [&](auto some, Pack* x) {
#pragma unroll
    for (int i = 0; i < some.value; ++i, from += step_x)
      x[i] = *reinterpret_cast<const Pack*>(from);
  };
  if (count >= kAhead) read(Index<kAhead>{}, next);
  for (; count >= kAhead; count -= kAhead) {
    Pack x[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) x[i] = next[i];
    if (count >= 2 * kAhead) read(Index<kAhead>{}, next);
    steps(Index<kAhead>{}, x);
  }
#pragma unroll 1
  for (; count > 0; --count) {
    Pack x[1];
    read(Index<1>{}, x);
    steps(Index<1>{}, x);
  }
}

template <class S, int W, int V>
__global__ void __launch_bounds__(kThreads, 4) along_channels(const Forward<S> p) {
  using T = Compute<S>;
  const Given<S>& g = p.given;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < p.tasks + p.last; task += threads) {
    if (task >= p.tasks) {
      last_input(p, task - p.tasks);
      continue;
    }
    const int64_t c = task % p.groups * V, rest = task / p.groups;
    int64_t t = rest % p.runs * p.run;
    const int64_t end = least(g.time, t + p.run);
    T w[W][V], bias[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      bias[v] = g.bias_of(c + v);
#pragma unroll
      for (int j = 0; j < W; ++j) w[j][v] = g.weight.at(c + v, j);
    }
    Cursor at = g.find(rest / p.runs, t);
    while (t < end) {
      g.advance(at, t);
      if (!at.holds(t)) {  // in no sequence: not where cu_seqlens is as it must be
        ++t;
        continue;
      }
      const int64_t stop = least(at.s.end, end);
      walk<S, W, V>(p, at, t, static_cast<int>(stop - t), c, w, bias);
      t = stop;
    }
  }
}

// Along time a warp takes `run` steps of a channel, a thread kTiles times V of them.
template <class S>
constexpr int kSteps = sizeof(S) == 2 ? 8 : 4;

template <class S, int W>
__global__ void __launch_bounds__(kThreads) along_time(const Forward<S> p) {
  using T = Compute<S>;
  constexpr int V = kSteps<S>;
  using Pack = Packed<S, V>;
  const Given<S>& g = p.given;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < p.tasks + p.last; task += threads) {
    if (task >= p.tasks) {
      last_input(p, task - p.tasks);
      continue;
    }
    const int64_t warp = task / 32, lane = task % 32, rest = warp / p.runs;
    const int64_t row = rest / g.channels, c = rest % g.channels;
    const int64_t begin = warp % p.runs * p.run + lane * V;
    T w[W];
#pragma unroll
    for (int j = 0; j < W; ++j) w[j] = g.weight.at(c, j);
    const T bias = g.bias_of(c);
    const S* const x = g.x.at(row, 0, c);
    S* const y = p.y.at(row, 0, c);
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      const int64_t t = begin + k * 32 * V;
      if (t >= g.time) break;
      Cursor at = g.find(row, t);
      g.advance(at, t);
      if (t - V < at.s.begin || t + V > at.s.end) {  // not all in one sequence
        for (int64_t i = t; i < least(t + V, g.time); ++i) {
          g.advance(at, i);
          if (at.holds(i)) write_output(p, at, i, c);
        }
        continue;
      }
      T in[2 * V];
      if (p.packed) {
        const Pack before = *reinterpret_cast<const Pack*>(x + t - V);
        const Pack here = *reinterpret_cast<const Pack*>(x + t);
#pragma unroll
        for (int i = 0; i < V; ++i) in[i] = before.get(i), in[V + i] = here.get(i);
      } else {
#pragma unroll
        for (int i = V - (W - 1); i < 2 * V; ++i) in[i] = load(x + t - V + i);
      }
      T s[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        s[i] = bias;
#pragma unroll
        for (int j = 0; j < W; ++j) s[i] = fma(w[j], in[V + i - (W - 1) + j], s[i]);
      }
      activate(g.silu, s);
      if (p.packed) {
        Pack out;
#pragma unroll
        for (int i = 0; i < V; ++i) out.set(i, s[i]);
        *reinterpret_cast<Pack*>(y + t) = out;
      } else {
#pragma unroll
        for (int i = 0; i < V; ++i) store(y + t + i, s[i]);
      }
    }
  }
}

// Any number of taps: a thread an output.
template <class S>
__global__ void __launch_bounds__(kThreads) any_taps(const Forward<S> p) {
  const Given<S>& g = p.given;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < p.tasks + p.last; task += threads) {
    if (task >= p.tasks) {
      last_input(p, task - p.tasks);
      continue;
    }
    const int64_t near = p.time_near ? g.time : g.channels, far = p.time_near ? g.channels : g.time;
    const int64_t i = task % near, rest = task / near, k = rest % far;
    const int64_t t = p.time_near ? i : k, c = p.time_near ? k : i;
    Cursor at = g.find(rest / far, t);
    g.advance(at, t);
    if (at.holds(t)) write_output(p, at, t, c);
  }
}

template <class S, int W, int V>
void launch_along_channels(Forward<S> p, const Stream& stream) {
  const Given<S>& g = p.given;
  p.groups = g.channels / V;
  p.run = kLongestRun;
  while (p.run > kShortestRun && g.rows * g.time / p.run * p.groups < kThreadsToFill) p.run /= 2;
  p.runs = (g.time + p.run - 1) / p.run;
  p.tasks = g.rows * p.runs * p.groups;
  const auto causal_conv1d_along_channels = along_channels<S, W, V>;
  RECURRA_LAUNCH(causal_conv1d_along_channels, blocks_for(p.tasks + p.last, kThreads), kThreads,
                 stream, p);
}

template <class S>
void launch(const CausalConv1d& args, const Indices& cu_seqlens, const Stream& stream) {
  constexpr int V = sizeof(S) == 8 ? 2 : 4;
  Forward<S> p(args, cu_seqlens);
  const Given<S>& g = p.given;
  p.last = g.sequences * (g.taps - 1) * g.channels;
  p.tasks = g.rows * g.time * g.channels;
  if (p.tasks + p.last == 0) return;
  p.time_near = args.x.step(1) == 1 && args.x.step(2) != 1;
  for_taps(g.taps, [&](auto taps) {
    constexpr int W = taps.value;
    if constexpr (W > 0) {
      if (p.time_near && args.y.step(1) == 1) {
        using Pack = Packed<S, kSteps<S>>;
        p.run = 32 * kTiles * kSteps<S>;
        p.runs = (g.time + p.run - 1) / p.run;
        p.tasks = g.rows * g.channels * p.runs * 32;
        p.packed = aligned<Pack>(args.x, 1) && aligned<Pack>(args.y, 1);
        const auto causal_conv1d_along_time = along_time<S, W>;
        RECURRA_LAUNCH(causal_conv1d_along_time, blocks_for(p.tasks + p.last, kThreads), kThreads,
                       stream, p);
      } else if (g.channels % V == 0 && aligned<Packed<S, V>>(args.x) &&
                 aligned<Packed<S, V>>(args.y)) {
        launch_along_channels<S, W, V>(p, stream);
      } else {
        launch_along_channels<S, W, 1>(p, stream);
      }
    } else {
      const auto causal_conv1d_any_taps = any_taps<S>;
      RECURRA_LAUNCH(causal_conv1d_any_taps, blocks_for(p.tasks + p.last, kThreads), kThreads,
                     stream, p);
    }
  });
}

}  // namespace causal_conv1d_detail
using namespace causal_conv1d_detail;

void causal_conv1d(const CausalConv1d& args, const Indices& cu_seqlens, const Stream& stream) {
  for_storage(args.x.dtype, [&](auto* storage) {
    launch<std::remove_pointer_t<decltype(storage)>>(args, cu_seqlens, stream);
  });
}

}  // namespace recurra::cuda
