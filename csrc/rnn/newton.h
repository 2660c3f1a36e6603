// Multiple shooting on the device, with the bits of newton.simd.cpp where time is cut as there. A
// thread runs one stretch of one channel; between two passes a warp moves the starts of a channel.
// Whether a channel has converged stays on the device: kernels of passes that nobody needs find
// nothing to do.
#pragma once
#include "rnn/converged.h"
#include "rnn/forward.h"

namespace recurra::cuda::rnn_detail {

template <class T>
struct Shooting : Forward<T> {
  T* values;  // (channels, newton_rows, rows)
  NewtonReport report;
  bool* done;  // (S, N)
  int64_t* taken_of;
  int64_t steps, warm_up;  // of a stretch; before its end, for the first starts
  int64_t rows;            // stretches of all sequences
  int64_t group;           // channels of one fate

  Shooting(const RnnNewton& args, const Indices& cu_seqlens, int64_t* taken)
      : Forward<T>(args, cu_seqlens, {}),
        values(static_cast<T*>(args.workspace)),
        report(args.report),
        done(args.done),
        taken_of(taken),
        steps(newton_blocks(args.chunk) * kRnnChunk),
        warm_up((args.warm_up + kRnnChunk - 1) / kRnnChunk * kRnnChunk),
        rows(newton_rows_on_device(args.sequences, static_cast<bool>(cu_seqlens), args.chunk)),
        group(newton_group(this->channels)) {}

  // As newton_stretches has it.
  RECURRA_FN int64_t stretches(int64_t length) const {
    return (length / kRnnChunk * kRnnChunk + steps - 1) / steps;
  }
  // Where sequence n has its first stretch.
  RECURRA_FN int64_t first_row(int64_t n) const {
    if (!this->cu_seqlens.data) return n * ((this->time + steps - 1) / steps);
    return this->cu_seqlens.clamped(n, 0, this->time) / steps + n;
  }
  // The sequence to which a row belongs, if it belongs to any.
  RECURRA_FN int64_t sequence_of(int64_t row) const {
    if (!this->cu_seqlens.data) return row / ((this->time + steps - 1) / steps);
    int64_t low = 0, high = this->sequences;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (first_row(middle) <= row ? low : high) = middle;
    }
    return low;
  }
  // Number i of a stretch of a channel: each state's start, end and size before the end, and the
  // entries of the product.
  RECURRA_FN T& value(int64_t c, int count, int i, int64_t row) const {
    return values[(c * count + i) * rows + row];
  }
};
template <int S>
struct Values {
  static constexpr int count = static_cast<int>(newton_rows(S));
  static constexpr int start = 0, end = S, size = 2 * S, product = 3 * S;
};

template <class T>
RECURRA_FN T zero_if_subnormal(T v) {
  if constexpr (sizeof(T) == 4)  // T(0x1p-1022) is an error to NVRTC where T is float
    return recurrent::absolute(v) < 0x1p-126f ? T(0) : v;
  else
    return recurrent::absolute(v) < 0x1p-1022 ? T(0) : v;
}
// Of what it was before, `part` counts still.
template <class T>
RECURRA_FN T size_of_late(T h, T before, T part) {
  const T now = recurrent::absolute(h), then = before * part;
  return now > then ? now : then;
}

template <class Cell, class T>
RECURRA_FN void step_with_product(const T* x, const T* h, const T* params, T* out,
                                  T (&product)[Sizes<Cell>::S][Sizes<Cell>::S]) {
  constexpr int G = Sizes<Cell>::G, S = Sizes<Cell>::S;
  constexpr unsigned D = ((1u << S) - 1) << G;
  const auto next = step_along<Cell, D>(x, h, params);
  T after[S][S];
  for_each_index<S>([&](auto s) RECURRA_LAMBDA {
    const auto state = get<s.value>(next);
    out[s] = value(state);
    for_each_index<S>([&](auto j) RECURRA_LAMBDA {
      T sum = T(0);
      for_each_index<S>([&](auto i) RECURRA_LAMBDA {
        if constexpr ((kDependsOn<Cell, D, s.value, T> >> (G + i.value)) & 1)
          sum = fma(tangent<G + i.value>(state), product[i][j], sum);
      });
      after[s][j] = sum;
    });
  });
  for_each_index<S * S>([&](auto i)
                            RECURRA_LAMBDA { product[i / S][i % S] = after[i / S][i % S]; });
}

// Every stretch from its start; or, warming up, the end of every stretch but the last from an empty
// state, for the first starts.
template <class Cell, class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 6 : 4)
    shoot(const Shooting<T> p, const bool warming) {
  constexpr int G = Sizes<Cell>::G, S = Sizes<Cell>::S, P = Sizes<Cell>::P;
  using V = Values<S>;
  RECURRA_SHARED(T, x_rows, kAhead * G * kThreads);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < p.rows * p.channels; task += threads) {
    const int64_t row = task / p.channels, c = task % p.channels, n = p.sequence_of(row);
    const Extent where = extent(p.cu_seqlens, n, p.time);
    const int64_t length = where.end - where.begin, count = p.stretches(length);
    const int64_t k = row - p.first_row(n);
    if (k < 0 || k >= count || count < 2) continue;
    if (warming ? k + 1 == count : p.done[n * p.channels + c]) continue;
    const int64_t whole = length / kRnnChunk * kRnnChunk, after = (k + 1) * p.steps;
    const int64_t end = after < whole ? after : whole;
    const int64_t skipped = warming && p.warm_up < p.steps ? p.steps - p.warm_up : 0;
    const int64_t begin = k * p.steps + skipped;
    T params[P + 1], h[S] = {}, size[S] = {}, product[S][S] = {};
    read_params<Cell>(p.params, c, params);
    if (!warming)
      for_each_index<S>([&](auto s) RECURRA_LAMBDA {
        h[s] = p.value(c, V::count, V::start + s, row);
        size[s] = size_of_late(h[s], T(0), T(0));
        product[s][s] = T(1);
      });
    const int64_t from = p.x.at(where.batch, where.begin, 0, c), from_step = p.x.step[1];
    const int64_t to = p.y.at(where.batch, where.begin, 0, c), to_step = p.y.step[1];
    Ahead<T, G, kAhead> next;
    ResetsAhead<kAhead> resets;
    next.start(p.x, from + begin * from_step, from_step, end - begin);
    resets.start(p.reset, where.batch, where.begin + begin, end - begin);
    bool carries = false;
    for (int64_t t0 = begin; t0 < end; t0 += kAhead) {
      next.finish(x_rows, p.x.dtype);
      const unsigned empty = resets.finish();
      const int64_t later = t0 + kAhead;
      next.start(p.x, from + later * from_step, from_step, end - later);
      resets.start(p.reset, where.batch, where.begin + later, end - later);
      if (!warming && t0 % kRnnChunk == 0) {
        // What has decayed to nothing stays so, and most cells forget in a small part of a stretch.
        carries = false;
        for_each_index<S * S>([&](auto i) RECURRA_LAMBDA {
          if (product[i / S][i % S] != T(0)) carries = true;
        });
        if (p.saved) {
          T* const at = p.saved + p.chunk_row(n, where, t0 / kRnnChunk) * S * p.padded + c;
          for_each_index<S>([&](auto s) RECURRA_LAMBDA { at[s * p.padded] = h[s]; });
        }
      }
#pragma unroll 1
      for (int i = 0; i < kAhead; ++i) {
        T x[G], out[S];
        for_each_index<G>(
            [&](auto g) RECURRA_LAMBDA { x[g] = x_rows[(i * G + g) * kThreads + threadIdx.x]; });
        if (empty >> i & 1) {
          for_each_index<S>([&](auto s) RECURRA_LAMBDA { h[s] = T(0); });
          for_each_index<S * S>([&](auto j) RECURRA_LAMBDA { product[j / S][j % S] = T(0); });
        }
        if (carries)
          step_with_product<Cell>(x, h, params, out, product);
        else
          step<Cell>(x, h, params, out);
        for_each_index<S>([&](auto s) RECURRA_LAMBDA { h[s] = out[s]; });
        if (!warming) put<Cell>(p, to + (t0 + i) * to_step, h);
      }
      if (later % kRnnChunk == 0) {
        for_each_index<S>([&](auto s)
                              RECURRA_LAMBDA { size[s] = size_of_late(h[s], size[s], T(0.5)); });
        for_each_index<S * S>([&](auto i) RECURRA_LAMBDA {
          product[i / S][i % S] = zero_if_subnormal(product[i / S][i % S]);
        });
      }
    }
    for_each_index<S>([&](auto s) RECURRA_LAMBDA { p.value(c, V::count, V::end + s, row) = h[s]; });
    if (warming) continue;
    for_each_index<S>([&](auto s)
                          RECURRA_LAMBDA { p.value(c, V::count, V::size + s, row) = size[s]; });
    for_each_index<S * S>([&](auto i) RECURRA_LAMBDA {
      p.value(c, V::count, V::product + i, row) = product[i / S][i % S];
    });
  }
}

constexpr unsigned kAllLanes = 0xffffffffu;

// What a walk of a warp along the boundaries of a channel finds, the same in every lane.
template <class T>
struct Walk {
  T mismatch = T(0);
  bool near = true;
};
// d along the boundaries, by which it moves the starts: nobody reads those of a channel that has
// converged. Each lane holds those of one stretch of 32, and all take part in every step of the
// recurrence.
template <int S, class T>
RECURRA_FN Walk<T> move_along(const Shooting<T>& p, int64_t c, int64_t first, int64_t count,
                              const T (&largest)[S], int lane) {
  using recurrent::absolute;
  using V = Values<S>;
  Walk<T> found;
  T d[S] = {};
  for (int64_t base = 0; base + 1 < count; base += 32) {
    const int64_t k = base + lane, left = count - 1 - base;
    const bool in = k + 1 < count;
    T end[S] = {}, gap[S] = {}, size[S] = {}, product[S * S] = {}, moved[S] = {};
    if (in) {
      for (int s = 0; s < S; ++s) {
        end[s] = p.value(c, V::count, V::end + s, first + k);
        gap[s] = end[s] - p.value(c, V::count, V::start + s, first + k + 1);
        size[s] = p.value(c, V::count, V::size + s, first + k);
      }
      for (int i = 0; i < S * S; ++i) product[i] = p.value(c, V::count, V::product + i, first + k);
    }
    for (int j = 0; j < 32 && j < left; ++j) {
      T next[S];
      bool usable = true;
      for (int s = 0; s < S; ++s) {
        next[s] = T(0);
        for (int i = 0; i < S; ++i) next[s] += __shfl_sync(kAllLanes, product[s * S + i], j) * d[i];
        // A linear step that leaves the range of the states says nothing.
        usable = usable && absolute(next[s]) <= 2 * largest[s];
      }
      for (int s = 0; s < S; ++s) {
        const T off = __shfl_sync(kAllLanes, gap[s], j),
                of_late = __shfl_sync(kAllLanes, size[s], j);
        const T step = usable ? next[s] : T(0);
        if (absolute(off) > found.mismatch) found.mismatch = absolute(off);
        d[s] = off + step;
        found.near = found.near && usable && absolute(d[s]) <= recurrent::kConverged<T> * of_late;
        if (lane == j) moved[s] = end[s] + step;
      }
    }
    if (in)
      for (int s = 0; s < S; ++s) p.value(c, V::count, V::start + s, first + k + 1) = moved[s];
  }
  return found;
}

// Moves the starts of each channel by Newton's step; before the first pass, where they come from.
template <int S, class T>
__global__ void __launch_bounds__(kThreads, 7) move_starts(const Shooting<T> p, const int pass) {
  using V = Values<S>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  int64_t task = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  for (; task < p.sequences * p.channels; task += warps) {
    const int64_t n = task / p.channels, c = task % p.channels, first = p.first_row(n);
    const Extent where = extent(p.cu_seqlens, n, p.time);
    const int64_t count = p.stretches(where.end - where.begin);
    if (pass == 0) {
      if (lane == 0) {
        p.report.passes[task] = 0;
        p.report.mismatch[task] = 0;
        p.report.converged[task] = p.done[task] = count < 2;
      }
      for (int64_t k = lane; k < count; k += 32)
        for (int s = 0; s < S; ++s) {
          T start = T(0);
          if (k > 0)
            start = p.value(c, V::count, V::end + s, first + k - 1);
          else if (p.h0.data)
            start = *p.h0.at(n, s, c);
          p.value(c, V::count, V::start + s, first + k) = start;
        }
      continue;
    }
    const bool settled = p.done[task];
    __syncwarp();
    if (settled) continue;
    T largest[S] = {};
    bool finite = true;
    for (int64_t k = lane; k < count; k += 32)
      for (int s = 0; s < S; ++s) {
        const T size = recurrent::absolute(p.value(c, V::count, V::end + s, first + k));
        finite = finite && recurrent::is_finite(size);
        if (size > largest[s]) largest[s] = size;
      }
    finite = __all_sync(kAllLanes, finite) != 0;
    for (int s = 0; s < S; ++s)
      for (int by = 16; by > 0; by /= 2) {
        const T other = __shfl_xor_sync(kAllLanes, largest[s], by);
        if (other > largest[s]) largest[s] = other;
      }
    Walk<T> found;
    if (finite) found = move_along<S>(p, c, first, count, largest, lane);
    const bool converged = finite && (found.near || found.mismatch == T(0));
    if (lane != 0) continue;
    p.report.passes[task] = pass;
    p.report.mismatch[task] =
        finite ? static_cast<double>(found.mismatch) : static_cast<double>(__builtin_nan(""));
    p.report.converged[task] = converged;
    p.done[task] = converged || !finite;
  }
}

// From where each chain goes on sequentially: behind its last whole chunk, or from its beginning
// where one of its group has not converged.
template <int S, class T>
__global__ void __launch_bounds__(kThreads) go_on(const Shooting<T> p) {
  using V = Values<S>;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < p.sequences * p.channels; task += threads) {
    const int64_t n = task / p.channels, c = task % p.channels, begin = c / p.group * p.group;
    const int64_t end = begin + p.group < p.channels ? begin + p.group : p.channels;
    const Extent where = extent(p.cu_seqlens, n, p.time);
    const int64_t length = where.end - where.begin, count = p.stretches(length);
    bool good = count > 1;
    for (int64_t i = begin; i < end; ++i) good = good && p.report.converged[n * p.channels + i];
    p.taken_of[task] = good ? length / kRnnChunk * kRnnChunk : 0;
    for (int s = 0; s < S; ++s) {
      T h = T(0);
      if (good)
        h = p.value(c, V::count, V::end + s, p.first_row(n) + count - 1);
      else if (p.h0.data)
        h = *p.h0.at(n, s, c);
      *p.h_last.at(n, s, c) = h;
    }
  }
}

constexpr int kSummary = 256;

// One block over all chains.
template <class T>
__global__ void __launch_bounds__(kSummary)
    summarise(const Shooting<T> p, const int states, const Summary<T> to) {
  RECURRA_SHARED(int32_t, passes, kSummary);
  RECURRA_SHARED(int32_t, failures, kSummary);
  RECURRA_SHARED(T, mismatch, kSummary);
  const int self = static_cast<int>(threadIdx.x);
  int32_t most = 0, failed = 0;
  T largest = T(0);
  const auto take = [](T& into, T m) {
    if (into == into && !(m <= into)) into = m;
  };
  for (int64_t i = self; i < p.sequences * p.channels; i += kSummary) {
    T off = static_cast<T>(p.report.mismatch[i]);
    if (p.taken_of[i] > 0)
      for (int s = 0; s < states; ++s) {
        const T h = *p.h_last.at(i / p.channels, s, i % p.channels);
        if (!recurrent::is_finite(h)) off = h - h;
      }
    take(largest, off);
    most = p.report.passes[i] > most ? p.report.passes[i] : most;
    failed += p.report.converged[i] ? 0 : 1;
  }
  passes[self] = most;
  failures[self] = failed;
  mismatch[self] = largest;
  __syncthreads();
  if (self != 0) return;
  for (int i = 1; i < kSummary; ++i) {
    most = passes[i] > most ? static_cast<int32_t>(passes[i]) : most;
    failed += failures[i];
    take(largest, mismatch[i]);
  }
  *to.passes = most;
  *to.mismatch = largest;
  *to.failures = failed;
}

template <class T>
void run_newton(const RnnNewton& args, const Indices& cu_seqlens, int64_t* taken,
                const NewtonSummary& to, const Stream& stream) {
  const Shooting<T> p(args, cu_seqlens, taken);
  const int64_t chains = p.sequences * p.channels;
  if (chains == 0) return;
  // After as many passes as there are stretches all starts are exact.
  const int64_t stretches = (p.time + p.steps - 1) / p.steps;
  const int passes = static_cast<int>(args.max_passes < stretches ? args.max_passes : stretches);
  with_cell_at(
      args.cell,
      [&](auto cell) {
        constexpr int S = Sizes<decltype(cell)>::S;
        const auto rnn_shoot = shoot<decltype(cell), T>;
        const auto rnn_move_starts = move_starts<S, T>;
        const auto rnn_go_on = go_on<S, T>;
        const unsigned warps = blocks_for(chains, kThreads / 32);
        for (int pass = 0; pass <= passes; ++pass) {
          if (p.rows > 0)
            RECURRA_LAUNCH(rnn_shoot, blocks_for(p.rows * p.channels, kThreads), kThreads, stream,
                           p, pass == 0);
          RECURRA_LAUNCH(rnn_move_starts, warps, kThreads, stream, p, pass);
        }
        RECURRA_LAUNCH(rnn_go_on, blocks_for(chains, kThreads), kThreads, stream, p);
      },
      Cells{});
  rest(args, cu_seqlens, {}, taken, {}, stream);
  const auto rnn_summarise = summarise<T>;
  RECURRA_LAUNCH(rnn_summarise, 1, kSummary, stream, p, static_cast<int>(args.h_last.size[1]),
                 Summary<T>(to));
}

}  // namespace recurra::cuda::rnn_detail
