// Backwards: the states of a chunk are computed again from the one that was saved before it, and a
// thread walks back through them. A step is taken once more there, its elementary functions going
// to duals through a tape in registers: so the derivatives are those of the CPU. Parameters get a
// sum of each chunk, which a second kernel adds up in the order of the CPU.
#pragma once
#include "math/taped.h"
#include "rnn/chain.h"
#if defined(RECURRA_CELL)
#include "rnn/kept.h"
#endif

namespace recurra::cuda::rnn_detail {

template <class T>
struct Backward : Inputs<T> {
  Elements<4> dy, dx;
  Array<T, 3> dh_last, dh0;
  const T* saved;
  T* chunk_sums;  // (chunk rows, P, padded)
  bool all_states;

  Backward(const RnnBackward& args, const Indices& cu_seqlens, void* sums)
      : Inputs<T>(args, cu_seqlens),
        dy(args.dy),
        dx(args.dx),
        dh_last(args.dh_last),
        dh0(args.dh0),
        saved(static_cast<const T*>(args.saved)),
        chunk_sums(static_cast<T*>(sums)),
        all_states(args.dy.size[2] > 1) {}
};

// What a step keeps on a tape: of the library's own cells at most so much.
#if defined(RECURRA_CELL)
template <class Cell>
constexpr int kKept = count_kept<Cell>();
#else
template <class Cell>
constexpr int kKept = 16;
#endif

struct Discard {
  static constexpr bool replays = false;
  template <class T>
  RECURRA_FN void keep(T) {}
};
template <class T, int Most>
struct Recorder {
  static constexpr bool replays = false;
  T v[Most + 1];  // a step may keep nothing
  int count = 0;
  RECURRA_FN void keep(T x) {
#if defined(RECURRA_CUDA_EMULATOR)
    if (count == Most) emulator::fail("keeps more of a step than its tape has room for");
#endif
    v[count++] = x;
  }
};
template <class T>
struct Player {
  static constexpr bool replays = true;
  const T* v;
  int next = 0;
  RECURRA_FN T take() { return v[next++]; }
};

// A cell's arguments with a tape.
template <class Cell, class T, class Tape>
struct TapedArguments {
  static constexpr int G = Sizes<Cell>::G, S = Sizes<Cell>::S, P = Sizes<Cell>::P;
  using X = Taped<T, Tape>;
  X x[G + 1], h[S], p[P + 1];

  RECURRA_FN TapedArguments(const T* x1, const T* h1, const T* p1, Tape& tape) {
    for_each_index<G>([&](auto i) RECURRA_LAMBDA { x[i] = X(x1[i], &tape); });
    for_each_index<S>([&](auto i) RECURRA_LAMBDA { h[i] = X(h1[i], &tape); });
    for_each_index<P>([&](auto i) RECURRA_LAMBDA { p[i] = X(p1[i], &tape); });
  }
};
template <class Cell, class T, class Tape>
RECURRA_FN void taped_step(const T* x, const T* h, const T* p, T* out, Tape& tape) {
  const TapedArguments<Cell, T, Tape> on(x, h, p, tape);
  Taped<T, Tape> next[Sizes<Cell>::S];
  step<Cell>(on.x, on.h, on.p, next);
  for_each_index<Sizes<Cell>::S>([&](auto s) RECURRA_LAMBDA { out[s] = next[s].v; });
}

// Inputs, states, and parameters whose derivative is not that of the input they enter with.
template <class Cell>
RECURRA_CONSTANT_FN unsigned directions() {
  constexpr int first = Sizes<Cell>::G + Sizes<Cell>::S;
  unsigned mask = (1u << first) - 1;
  for (int p = 0; p < Sizes<Cell>::P; ++p)
    if (Cell::affine_params.find(p) < 0) mask |= 1u << (first + p);
  return mask;
}

// One step back: mu before to mu after, the sums of the parameters, and dx.
template <class Cell, class T>
RECURRA_FN void step_back(const T* x, const T* h, const T* params, T* mu, T* dparams, T* dx) {
  constexpr int G = Sizes<Cell>::G, S = Sizes<Cell>::S, P = Sizes<Cell>::P;
  Recorder<T, kKept<Cell>> recorder;
  T ignored[S];
  taped_step<Cell>(x, h, params, ignored, recorder);
  Player<T> tape{recorder.v};
  const TapedArguments<Cell, T, Player<T>> on(x, h, params, tape);
  const auto next = step_along<Cell, directions<Cell>()>(on.x, on.h, on.p);
  const auto along = [&](auto k) RECURRA_LAMBDA {
    constexpr int direction = decltype(k)::value;
    T sum = T(0);
    for_each_index<S>([&](auto s) RECURRA_LAMBDA {
      using State = decltype(get<s.value>(next));
      if constexpr (kHas<direction, State>)
        sum = fma(mu[s], tangent<direction>(get<s.value>(next)).v, sum);
    });
    return sum;
  };
  for_each_index<G>([&](auto g) RECURRA_LAMBDA { dx[g] = along(g); });
  for_each_index<P>([&](auto p) RECURRA_LAMBDA {
    constexpr int entry = Cell::affine_params.find(p.value);
    if constexpr (entry < 0) {
      dparams[p] = dparams[p] + along(Index<G + S + p.value>{});
    } else {
      constexpr Affine a = Cell::affine_params.entry[entry];
      if constexpr (a.state == kAlone)
        dparams[p] = dparams[p] + dx[a.input];
      else
        dparams[p] = fma(dx[a.input], h[a.state], dparams[p]);
    }
  });
  T before[S];
  for_each_index<S>([&](auto s) RECURRA_LAMBDA { before[s] = along(Index<G + s.value>{}); });
  for_each_index<S>([&](auto s) RECURRA_LAMBDA { mu[s] = before[s]; });
}

template <class T>
RECURRA_FN T flushed(T v) {
  if constexpr (sizeof(T) == 4)  // T(0x1p-1022) is an error to NVRTC where T is float
    return abs(v) < 0x1p-126f ? T(0) : v;
  else
    return abs(v) < 0x1p-1022 ? T(0) : v;
}

// Steps that are on their way.
template <class T>
constexpr int kBackAhead = sizeof(T) == 4 ? 4 : 2;

template <class Cell, class T>
__device__ __forceinline__ void walk_chains_back(const Backward<T>& p) {
  constexpr int G = Sizes<Cell>::G, S = Sizes<Cell>::S, P = Sizes<Cell>::P, A = kBackAhead<T>;
  RECURRA_SHARED(T, x_rows, A * G * kThreads);
  RECURRA_SHARED(T, dy_rows, A * S * kThreads);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < p.sequences * p.channels; task += threads) {
    const int64_t n = task / p.channels, c = task % p.channels;
    const Extent where = extent(p.cu_seqlens, n, p.time);
    const int64_t length = where.end - where.begin, first = length == 0 ? 0 : where.begin;
    const int64_t x_at = p.x.at(where.batch, first, 0, c), x_step = p.x.step[1];
    const int64_t dy_at = p.dy.at(where.batch, first, 0, c), dy_step = p.dy.step[1];
    const int64_t dx_at = p.dx.at(where.batch, first, 0, c), dx_step = p.dx.step[1];
    T params[P + 1], mu[S] = {};
    read_params<Cell>(p.params, c, params);
    if (p.dh_last.data)
      for_each_index<S>([&](auto s) RECURRA_LAMBDA { mu[s] = *p.dh_last.at(n, s, c); });
    T held[kRnnChunk * S];  // the state before each step
    Ahead<T, G, A> next;
    for (int64_t k = (length + kRnnChunk - 1) / kRnnChunk - 1; k >= 0; --k) {
      const int64_t t0 = k * kRnnChunk, row = p.chunk_row(n, where, k);
      const int steps = static_cast<int>(length - t0 < kRnnChunk ? length - t0 : kRnnChunk);
      T h[S];
      next.start(p.x, x_at + t0 * x_step, x_step, steps);
      for_each_index<S>([&](auto s)
                            RECURRA_LAMBDA { h[s] = p.saved[(row * S + s) * p.padded + c]; });
      for (int t = 0; t < steps; t += A) {
        next.finish(x_rows, p.x.dtype);
        next.start(p.x, x_at + (t0 + t + A) * x_step, x_step, steps - t - A);
#pragma unroll 1
        for (int i = 0; i < A && t + i < steps; ++i) {
          T x[G], out[S];
          for_each_index<G>(
              [&](auto g) RECURRA_LAMBDA { x[g] = x_rows[(i * G + g) * kThreads + threadIdx.x]; });
          const bool empty = p.reset.at(where.batch, first + t0 + t + i);
          for_each_index<S>([&](auto s) RECURRA_LAMBDA {
            if (empty) h[s] = T(0);
            held[(t + i) * S + s] = h[s];
          });
          Discard tape;
          taped_step<Cell>(x, h, params, out, tape);
          for_each_index<S>([&](auto s) RECURRA_LAMBDA { h[s] = out[s]; });
        }
      }

      T dparams[P + 1] = {};
      Ahead<T, 1, A> next_dy;
      Ahead<T, S, A> next_dys;
      // Steps last, last - 1, ...
      const auto start = [&](int last) RECURRA_LAMBDA {
        next.start(p.x, x_at + (t0 + last) * x_step, -x_step, last + 1);
        if (!p.dy.data) return;
        if (p.all_states)
          next_dys.start(p.dy, dy_at + (t0 + last) * dy_step, -dy_step, last + 1);
        else
          next_dy.start(p.dy, dy_at + (t0 + last) * dy_step, -dy_step, last + 1);
      };
      start(steps - 1);
      for (int last = steps - 1; last >= 0; last -= A) {
        next.finish(x_rows, p.x.dtype);
        if (p.dy.data)
          p.all_states ? next_dys.finish(dy_rows, p.dy.dtype) : next_dy.finish(dy_rows, p.dy.dtype);
        start(last - A);
#pragma unroll 1
        for (int i = 0; i < A && i <= last; ++i) {
          const int t = last - i;
          T x[G], dx[G];
          for_each_index<G>(
              [&](auto g) RECURRA_LAMBDA { x[g] = x_rows[(i * G + g) * kThreads + threadIdx.x]; });
          for_each_index<S>([&](auto s) RECURRA_LAMBDA {
            h[s] = held[t * S + s];
            if (p.dy.data && p.all_states)
              mu[s] = mu[s] + dy_rows[(i * S + s) * kThreads + threadIdx.x];
          });
          if (p.dy.data && !p.all_states)
            mu[Cell::output] = mu[Cell::output] + dy_rows[i * kThreads + threadIdx.x];
          step_back<Cell>(x, h, params, mu, dparams, dx);
          for_each_index<G>([&](auto g) RECURRA_LAMBDA {
            write(p.dx, dx_at + (t0 + t) * dx_step + g * p.dx.step[2], dx[g]);
          });
          if (p.reset.at(where.batch, first + t0 + t))
            for_each_index<S>([&](auto s) RECURRA_LAMBDA { mu[s] = T(0); });
        }
      }
      for_each_index<S>([&](auto s) RECURRA_LAMBDA { mu[s] = flushed(mu[s]); });
      for_each_index<P>(
          [&](auto i) RECURRA_LAMBDA { p.chunk_sums[(row * P + i) * p.padded + c] = dparams[i]; });
    }
    for_each_index<S>([&](auto s) RECURRA_LAMBDA { *p.dh0.at(n, s, c) = mu[s]; });
  }
}

template <class Cell, class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 8 : 6) walk_back(const Backward<T> p) {
  walk_chains_back<Cell>(p);
}

// The sums of the chunks in the order of the CPU: by runs of sequences, in each sequence the last
// chunk first, those of `together` sequences beside one another; then over the runs.
constexpr int kColumns = 16, kInFlight = 8, kMostParts = static_cast<int>(kRnnMostParts);

template <class T>
struct ParameterSums : Inputs<T> {
  const T* chunk_sums;
  Elements<2> dparams;
  int64_t count, parts, together;
};
template <class T>
__device__ __forceinline__ void add_chunk_sums(const ParameterSums<T>& p) {
  RECURRA_SHARED(T, sums, kColumns * kMostParts);
  const int64_t groups = (p.channels + kColumns - 1) / kColumns;
  const int part = threadIdx.x / kColumns;
  for (int64_t task = blockIdx.x; task < p.count * groups; task += gridDim.x) {
    const int64_t i = task / groups, c = task % groups * kColumns + threadIdx.x % kColumns;
    T sum = T(0);
    if (part < p.parts && c < p.channels) {
      const int64_t last = (part + 1) * p.sequences / p.parts;
      for (int64_t n = part * p.sequences / p.parts; n < last; n += p.together) {
        const Extent where = extent(p.cu_seqlens, n, p.time);
        const int64_t beside = last - n < p.together ? last - n : p.together;
        const int64_t chunks = (where.end - where.begin + kRnnChunk - 1) / kRnnChunk;
        int64_t k = chunks - 1, m = 0;
        while (k >= 0) {
          T read[kInFlight];
          int got = 0;
#pragma unroll
          for (int j = 0; j < kInFlight; ++j) {
            if (k < 0) continue;
            read[j] = p.chunk_sums[(p.chunk_row(n + m, where, k) * p.count + i) * p.padded + c];
            got = j + 1;
            if (++m == beside) m = 0, --k;
          }
#pragma unroll
          for (int j = 0; j < kInFlight; ++j)
            if (j < got) sum = sum + read[j];
        }
      }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (part == 0 && c < p.channels) {
      for (int other = 1; other < p.parts; ++other)
        sum = sum + sums[other * kColumns + threadIdx.x];
      write_param(p.dparams, p.dparams.at(i, c), sum);
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kColumns* kMostParts) add_sums(const ParameterSums<T> p) {
  add_chunk_sums(p);
}

template <class T>
void run_backward(const RnnBackward& args, const Indices& cu_seqlens, void* chunk_sums,
                  const Stream& stream) {
  const Backward<T> p(args, cu_seqlens, chunk_sums);
  const int64_t tasks = p.sequences * p.channels;
  if (tasks > 0)
    with_cell_at(
        args.cell,
        [&](auto cell) {
          const auto rnn_backward = walk_back<decltype(cell), T>;
          RECURRA_LAUNCH(rnn_backward, blocks_for(tasks, kThreads), kThreads, stream, p);
        },
        Cells{});
  const ParameterSums<T> sums{p,
                              p.chunk_sums,
                              Elements<2>(args.dparams),
                              args.params.size[0],
                              args.parts,
                              cu_seqlens ? 1 : args.together()};
  const int64_t groups = (p.channels + kColumns - 1) / kColumns, blocks = sums.count * groups;
  if (blocks == 0) return;
  const auto rnn_add_sums = add_sums<T>;
  RECURRA_LAUNCH(rnn_add_sums, blocks_for(blocks, 1), kColumns * kMostParts, stream, sums);
}

}  // namespace recurra::cuda::rnn_detail
