// A thread walks one channel of one sample, forwards for the states before every step, then
// backwards with a row of cotangents for each state of the end: Jacobians and elementary functions
// are there once for all rows, what the backward of rnn leaves to each. Sums and roundings are
// those of K of its runs, to the bit.
#include "cells/all.h"
#include "cells/jacobian.h"
#include "cuda/launch.h"
#include "cuda/storage.h"
#include "math/taped.h"
#include "rnn/rnn.h"
#include "rtrl/rtrl.h"

namespace recurra::cuda {
namespace rtrl_detail {

constexpr int kChunkThreads = 128;
constexpr int kMostKept = 16;  // elementary functions of a step
// Steps that are read before they are needed.
template <class T>
constexpr int kStepsAhead = sizeof(T) == 4 ? 4 : 2;

template <class T>
struct Chunk {
  const T *x, *h0;
  const void* params;
  const uint8_t* reset;
  T *states, *decay, *factors, *direct;
  int64_t x_step[4], params_step[2], h0_step[3], reset_step[2];
  int64_t batch, time, channels;
  bool float_params;
};

// What the elementary functions of a step come to, written first and then read.
template <class T>
struct Recorder {
  static constexpr bool replays = false;
  T* next;
  RECURRA_FN void keep(T v) { *next++ = v; }
};
template <class T>
struct Player {
  static constexpr bool replays = true;
  const T* next;
  RECURRA_FN T take() { return *next++; }
};
template <class T, class Tape, int N>
RECURRA_FN void on_tape(const T (&from)[N], Tape& tape, Taped<T, Tape> (&to)[N]) {
  for_each_index<N>([&](auto i) { to[i] = {from[i], &tape}; });
}

// The directions that the backward needs: parameters that enter with an input have its derivative.
template <class Cell>
constexpr RECURRA_FN unsigned directions() {
  constexpr int first = kInputs<Cell> + kStates<Cell>;
  unsigned mask = (1u << first) - 1;
  for (int p = 0; p < kParams<Cell>; ++p)
    if (Cell::affine_params.find(p) < 0) mask |= 1u << (first + p);
  return mask;
}

// Steps of one thread, each read some steps before its turn; arrays are one longer than needed,
// for a cell without.
template <class Cell, class T>
struct Ahead {
  static constexpr int G = kInputs<Cell>, S = kStates<Cell>, count = kStepsAhead<T>;
  const T *x, *states;
  const uint8_t* reset;
  int64_t x_step, x_apart, state_apart, reset_step, time;
  T xs[count][G + 1] = {}, hs[count][S] = {};
  bool resets[count] = {};

  // Step t into place i; without `whole` no states.
  template <bool whole>
  __device__ __forceinline__ void read(int i, int64_t t) {
    if (t < 0 || t >= time) return;
#pragma unroll
    for (int g = 0; g < G; ++g) xs[i][g] = x[t * x_step + g * x_apart];
    if constexpr (whole)
#pragma unroll
      for (int s = 0; s < S; ++s) hs[i][s] = states[(t * S + s) * state_apart];
    resets[i] = reset && reset[t * reset_step];
  }
  template <bool whole>
  __device__ __forceinline__ void begin(int64_t t, int by) {
#pragma unroll
    for (int i = 0; i < count; ++i) read<whole>(i, t + i * by);
  }
  // From the step at place 0, which is t, on to the next one.
  template <bool whole>
  __device__ __forceinline__ void advance(int64_t t, int by) {
#pragma unroll
    for (int i = 0; i + 1 < count; ++i) {
#pragma unroll
      for (int g = 0; g < G; ++g) xs[i][g] = xs[i + 1][g];
      if constexpr (whole)
#pragma unroll
        for (int s = 0; s < S; ++s) hs[i][s] = hs[i + 1][s];
      resets[i] = resets[i + 1];
    }
    read<whole>(count - 1, t + count * by);
  }
};

template <class Cell, class T>
__global__ void __launch_bounds__(kChunkThreads) chunk_of(const Chunk<T> p) {
  constexpr int G = kInputs<Cell>, S = kStates<Cell>, P = kParams<Cell>;
  constexpr T least = sizeof(T) == 4 ? T(0x1p-126) : T(0x1p-1022);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < p.batch * p.channels; task += threads) {
    const int64_t b = task / p.channels, n = task % p.channels;
    T params[P + 1] = {};
    for_each_index<P>([&](auto i) {
      const int64_t at = i * p.params_step[0] + n * p.params_step[1];
      params[i] = p.float_params ? T(static_cast<const float*>(p.params)[at])
                                 : static_cast<const T*>(p.params)[at];
    });
    T* const states = p.states + b * p.time * S * p.channels + n;
    Ahead<Cell, T> ahead;
    ahead.x = p.x + b * p.x_step[0] + n * p.x_step[3];
    ahead.states = states;
    ahead.reset = p.reset ? p.reset + b * p.reset_step[0] : nullptr;
    ahead.x_step = p.x_step[1];
    ahead.x_apart = p.x_step[2];
    ahead.state_apart = p.channels;
    ahead.reset_step = p.reset_step[1];
    ahead.time = p.time;

    T h[S];
#pragma unroll
    for (int s = 0; s < S; ++s)
      h[s] = p.h0 ? p.h0[b * p.h0_step[0] + s * p.h0_step[1] + n * p.h0_step[2]] : T(0);
    ahead.template begin<false>(0, 1);
#pragma unroll 1
    for (int64_t t = 0; t < p.time; ++t) {
#pragma unroll
      for (int s = 0; s < S; ++s) {
        if (ahead.resets[0]) h[s] = T(0);
        states[(t * S + s) * p.channels] = h[s];
      }
      T next[S];
      step<Cell>(ahead.xs[0], h, params, next);
#pragma unroll
      for (int s = 0; s < S; ++s) h[s] = next[s];
      ahead.template advance<false>(t, 1);
    }

    // Of state k of the end: mu[k] to the states before step t, sums[k] of the steps since the
    // last multiple of the steps that rnn saves at, and direct[k], to the parameters.
    T mu[S][S], sums[S][P + 1] = {}, direct[S][P + 1] = {};
#pragma unroll
    for (int k = 0; k < S; ++k)
#pragma unroll
      for (int s = 0; s < S; ++s) mu[k][s] = T(k == s);
    ahead.template begin<true>(p.time - 1, -1);
#pragma unroll 1
    for (int64_t t = p.time - 1; t >= 0; --t) {
      T tape[kMostKept];
      const auto& x = ahead.xs[0];
      const auto& before = ahead.hs[0];
      {
        Recorder<T> recorder{tape};
        using X = Taped<T, Recorder<T>>;
        X xs[G + 1], hs[S], ps[P + 1], next[S];
        on_tape(x, recorder, xs);
        on_tape(before, recorder, hs);
        on_tape(params, recorder, ps);
        step<Cell>(xs, hs, ps, next);
      }
      Player<T> player{tape};
      using X = Taped<T, Player<T>>;
      X xs[G + 1], hs[S], ps[P + 1];
      on_tape(x, player, xs);
      on_tape(before, player, hs);
      on_tape(params, player, ps);
      const auto next = step_along<Cell, directions<Cell>()>(xs, hs, ps);
      for_each_index<S>([&](auto k) {
        // mu[k]' J along a direction.
        const auto along = [&](auto direction) {
          T sum = T(0);
          for_each_index<S>([&](auto s) {
            using State = decltype(get<s.value>(next));
            if constexpr (kHas<direction.value, State>)
              sum = fma(mu[k][s], tangent<direction.value>(get<s.value>(next)).v, sum);
          });
          return sum;
        };
        T dx[G + 1];
        for_each_index<G>([&](auto g) {
          dx[g] = along(g);
          p.factors[(((k * p.batch + b) * p.time + t) * G + g) * p.channels + n] = dx[g];
        });
        for_each_index<P>([&](auto i) {
          T& sum = sums[k][i];
          constexpr int entry = Cell::affine_params.find(i.value);
          if constexpr (entry < 0) {
            sum = sum + along(Index<G + S + i.value>{});
          } else {
            constexpr Affine a = Cell::affine_params.entry[entry];
            if constexpr (a.state == kAlone)
              sum = sum + dx[a.input];
            else
              sum = fma(dx[a.input], before[a.state], sum);
          }
        });
        T moved[S];
        for_each_index<S>([&](auto s) { moved[s] = along(Index<G + s.value>{}); });
#pragma unroll
        for (int s = 0; s < S; ++s) mu[k][s] = ahead.resets[0] ? T(0) : moved[s];
      });
      if (t % kRnnChunk == 0) {
#pragma unroll
        for (int k = 0; k < S; ++k) {
#pragma unroll
          for (int i = 0; i < P; ++i) {
            direct[k][i] = direct[k][i] + sums[k][i];
            sums[k][i] = T(0);
          }
#pragma unroll
          for (int s = 0; s < S; ++s)
            if (abs(mu[k][s]) < least) mu[k][s] = T(0);
        }
      }
      ahead.template advance<true>(t, -1);
    }
#pragma unroll
    for (int k = 0; k < S; ++k) {
#pragma unroll
      for (int s = 0; s < S; ++s) p.decay[((k * p.batch + b) * S + s) * p.channels + n] = mu[k][s];
#pragma unroll
      for (int i = 0; i < P; ++i)
        p.direct[((k * p.batch + b) * P + i) * p.channels + n] = direct[k][i];
    }
  }
}

template <class T>
void launch_derivatives(const RtrlDerivatives& args, const Stream& stream) {
  Chunk<T> p;
  p.x = static_cast<const T*>(args.x.data);
  p.h0 = static_cast<const T*>(args.h0.data);
  p.params = args.params.data;
  p.reset = static_cast<const uint8_t*>(args.reset.data);
  p.states = static_cast<T*>(args.states);
  p.decay = static_cast<T*>(args.decay.data);
  p.factors = static_cast<T*>(args.factors.data);
  p.direct = static_cast<T*>(args.direct.data);
  for (int i = 0; i < 4; ++i) p.x_step[i] = args.x.step(i);
  for (int i = 0; i < 2; ++i) p.params_step[i] = args.params.step(i);
  for (int i = 0; i < 3; ++i) p.h0_step[i] = args.h0.step(i);
  for (int i = 0; i < 2; ++i) p.reset_step[i] = args.reset.step(i);
  p.batch = args.x.size[0];
  p.time = args.x.size[1];
  p.channels = args.x.size[3];
  p.float_params = args.params.dtype == DType::f32;
  const int64_t tasks = p.batch * p.channels;
  if (tasks == 0) return;
  int index = 0;
  for_each_cell([&](auto cell) {
    if (index++ != args.cell) return;
    const auto rtrl_chunk = chunk_of<decltype(cell), T>;
    RECURRA_LAUNCH(rtrl_chunk, blocks_for(tasks, kChunkThreads), kChunkThreads, stream, p);
  });
}

}  // namespace rtrl_detail

void rtrl_derivatives(const RtrlDerivatives& args, const Stream& stream) {
  args.x.dtype == DType::f64 ? rtrl_detail::launch_derivatives<double>(args, stream)
                             : rtrl_detail::launch_derivatives<float>(args, stream);
}

}  // namespace recurra::cuda
