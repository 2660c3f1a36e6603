// A block takes a span of time for 32 channels, sixteen steps at a time: sixteen phases of 32
// threads, each with the sums of the parameter gradients over the steps t mod 16 of its phase,
// which is the order of the CPU. The argument of the activation is computed again and its gradients
// ds are shared, so that dx, which reaches W - 1 steps ahead, follows the sums W - 1 steps behind.
// Whatever else the number of taps is, every thread computes all the ds that it needs.
#include "causal_conv1d/device.h"
#include "cuda/shared.h"

namespace recurra::cuda {
namespace causal_conv1d_detail {

constexpr int kPhases = 16, kChannels = 32;
constexpr int kThreadsOfSpan = kPhases * kChannels;
constexpr int kRing = 2 * kPhases;     // steps in shared memory
constexpr int kPitch = kChannels + 1;  // so that neither steps nor channels meet in a bank
constexpr int kTilesAhead = 4;         // by which memory is read before it is needed
constexpr int kFinishThreads = 128;

// Spans by shape alone: steps of one row or, without cu_seqlens, several short rows, as the CPU's.
struct Spans {
  int64_t rows, time, each, per_row, count;  // rows of a span, spans of a row

  RECURRA_FN Spans(int64_t rows, int64_t time, bool offsets) : rows(rows), time(time) {
    const int64_t weight = time > 0 ? time : 1;
    each = offsets || weight > kConvSpan ? 1 : kConvSpan / weight;
    per_row = offsets ? (time + kConvSpan - 1) / kConvSpan : (weight + kConvSpan - 1) / kConvSpan;
    count = (rows + each - 1) / each * per_row;
  }
};

template <class S>
struct Backward {
  using T = Compute<S>;
  Given<S> given;
  Array<S, 3> dy, dx;
  Array<T, 3> dh_last, dh0;
  Parameters<S, 2> dweight;
  Parameters<S, 1> dbias;
  Array<T, 3> partial;
  Spans spans;
  bool time_near;

  Backward(const CausalConv1dBackward& args, const Indices& cu_seqlens)
      : given(args, cu_seqlens),
        dy(args.dy),
        dx(args.dx),
        dh_last(args.dh_last),
        dh0(args.dh0),
        dweight(args.dweight),
        dbias(args.dbias),
        partial(args.partial),
        spans(args.x.size[0], args.x.size[1], static_cast<bool>(cu_seqlens)),
        time_near(args.x.step(1) == 1 && args.x.step(2) != 1) {}

  // The gradient of s, the argument of the activation, in step t of a row.
  RECURRA_FN T of_sum(int64_t row, int64_t t, int64_t c, T s) const {
    return of_sum(load(dy.at(row, t, c)), s);
  }
  RECURRA_FN T of_sum(T gradient, T s) const { return given.silu ? gradient * slope(s) : gradient; }
  RECURRA_FN T slope(T s) const {
    if constexpr (kIsFloat<T>)
      if (silu_is_near(s)) return silu_slope_near(s).slope;
    return silu_slope_anywhere(s).slope;
  }
  // The same with s computed for it; zero outside of the sequence.
  RECURRA_FN T gradient(const Cursor& at, int64_t t, int64_t c) const {
    if (!dy.data || !at.holds(t)) return T(0);
    return of_sum(at.s.batch, t, c, given.silu ? given.sum(at, t, c) : T(0));
  }
  // The gradient of the input of step t, which may be before the sequence, through the outputs.
  RECURRA_FN T of_input(const Cursor& at, int64_t t, int64_t c) const {
    T s(0);
    for (int64_t j = 0; j < given.taps; ++j)
      s = fma(given.weight.at(c, given.taps - 1 - j), gradient(at, t + j, c), s);
    return s;
  }
  // What reaches that input as one of the last.
  RECURRA_FN T with_last(const Cursor& at, int64_t t, int64_t c, T s) const {
    const int64_t j = t - (at.s.end - (given.taps - 1));
    return dh_last.data && j >= 0 ? s + *dh_last.at(at.n, j, c) : s;
  }
};

// Which channel and which phase of a span a thread of a block has: neighbours are so in memory too.
template <class S>
__device__ int channel_of_thread(const Backward<S>& p) {
  return p.time_near ? threadIdx.x / kPhases : threadIdx.x % kChannels;
}
template <class S>
__device__ int phase_of_thread(const Backward<S>& p) {
  return p.time_near ? threadIdx.x % kPhases : threadIdx.x / kChannels;
}

// f(row, begin, end) for what a span is made of.
template <class F>
__device__ __forceinline__ void for_rows(const Spans& spans, int64_t u, const F& f) {
  const int64_t first = u / spans.per_row * spans.each;
  const int64_t begin = u % spans.per_row * kConvSpan;
  for (int64_t row = first; row < least(spans.rows, first + spans.each); ++row)
    f(row, begin, least(spans.time, begin + kConvSpan));
}

// The sixteen sums of a channel that lie `step` apart, as sum() adds them.
template <class Sums>
__device__ auto joined(const Sums& sums, int from, int step) {
  auto at = [&](int i) { return sums[from + i * step] + sums[from + (i + 8) * step]; };
  return ((at(0) + at(4)) + (at(2) + at(6))) + ((at(1) + at(5)) + (at(3) + at(7)));
}

template <class S, int W>
__global__ void __launch_bounds__(kThreadsOfSpan) spans(const Backward<S> p) {
  using T = Compute<S>;
  RECURRA_SHARED(T, inputs, kRing * kPitch);
  RECURRA_SHARED(T, gradients, kRing * kPitch);
  RECURRA_SHARED(T, sums_of_all, (W + 1) * kPhases * kPitch);
  RECURRA_SHARED(int64_t, sequence, kRing);  // of a step, and where it ends; -1 for none
  RECURRA_SHARED(int64_t, end_of, kRing);
  const Given<S>& g = p.given;
  const int64_t groups = (g.channels + kChannels - 1) / kChannels;
  const int lane = channel_of_thread(p), phase = phase_of_thread(p);
  for (int64_t block = blockIdx.x; block < p.spans.count * groups; block += gridDim.x) {
    const int64_t u = block / groups, c = block % groups * kChannels + lane;
    const bool mine = c < g.channels;
    T w[W] = {}, bias(0), sums[W + 1] = {};
    if (mine) {
      bias = g.bias_of(c);
#pragma unroll
      for (int j = 0; j < W; ++j) w[j] = g.weight.at(c, j);
    }
    for_rows(p.spans, u, [&](int64_t row, int64_t begin, int64_t end) {
      const S* const x = g.x.at(row, 0, mine ? c : 0);
      const S* const dy = p.dy.data ? p.dy.at(row, 0, mine ? c : 0) : nullptr;
      const int64_t step_x = g.x.step[1], step_dy = p.dy.step[1];
      const auto place = [&](int64_t t) { return static_cast<int>((t - begin) & (kRing - 1)); };
      const auto in_row = [&](int64_t t) { return mine && t < g.time && t < end + W - 1; };
      // The inputs of the last steps before the span.
      if (phase >= kPhases - (W - 1)) {
        const int64_t t = begin - kPhases + phase;
        inputs[place(t) * kPitch + lane] = mine && t >= 0 ? load(x + t * step_x) : T(0);
      }
      S next_x[kTilesAhead] = {}, next_dy[kTilesAhead] = {};
#pragma unroll
      for (int i = 0; i < kTilesAhead; ++i) {
        const int64_t t = begin + i * kPhases + phase;
        if (in_row(t)) next_x[i] = x[t * step_x];
        if (in_row(t) && dy) next_dy[i] = dy[t * step_dy];
      }
      Cursor at = g.find(row, least(begin + phase, most(0, g.time - 1)));
      for (int64_t base = begin; base < end + W - 1; base += kPhases) {
        const int64_t t = base + phase, later = t + kTilesAhead * kPhases;
        const T value = load(&next_x[0]), dy_now = load(&next_dy[0]);
#pragma unroll
        for (int i = 0; i + 1 < kTilesAhead; ++i)
          next_x[i] = next_x[i + 1], next_dy[i] = next_dy[i + 1];
        if (in_row(later)) next_x[kTilesAhead - 1] = x[later * step_x];
        if (in_row(later) && dy) next_dy[kTilesAhead - 1] = dy[later * step_dy];
        inputs[place(t) * kPitch + lane] = value;
        __syncthreads();

        T ds(0);
        // Steps behind the end have no sequence: not to walk all that are empty there to see it.
        g.advance(at, least(t, g.time - 1));
        const bool held = at.holds(t) && t < end + W - 1;
        if (mine && held && dy) {
          T in[W];
          T s = bias;
#pragma unroll
          for (int j = 0; j < W; ++j) {
            const int64_t from = t - (W - 1) + j;
            in[j] = j == W - 1           ? value
                    : from >= at.s.begin ? static_cast<T>(inputs[place(from) * kPitch + lane])
                                         : g.input(at, from, c);
            s = fma(w[j], in[j], s);
          }
          ds = p.of_sum(dy_now, s);
          if (t < end) {
#pragma unroll
            for (int j = 0; j < W; ++j) sums[j] = fma(ds, in[j], sums[j]);
            sums[W] = sums[W] + ds;
          }
        }
        gradients[place(t) * kPitch + lane] = ds;
        if (lane == 0) {
          sequence[place(t)] = held ? at.n : -1;
          end_of[place(t)] = at.s.end;
        }
        __syncthreads();

        const int64_t behind = t - (W - 1);
        if (mine && begin <= behind && behind < end) {
          Cursor its;
          its.n = sequence[place(behind)];
          its.s.end = end_of[place(behind)];
          T s(0);
#pragma unroll
          for (int j = 0; j < W; ++j) {
            const T d = behind + j < its.s.end
                            ? static_cast<T>(gradients[place(behind + j) * kPitch + lane])
                            : T(0);
            s = fma(w[W - 1 - j], d, s);
          }
          if (!dy) s = T(0);
          if (its.n >= 0) store(p.dx.at(row, behind, c), p.with_last(its, behind, c, s));
        }
      }
    });
#pragma unroll
    for (int j = 0; j <= W; ++j) sums_of_all[(j * kPhases + phase) * kPitch + lane] = sums[j];
    __syncthreads();
    if (mine && phase <= W)
      *p.partial.at(u, phase, c) = joined(sums_of_all, phase * kPhases * kPitch + lane, kPitch);
  }
}

// The same for any number of taps: the sums alone.
template <class S>
__global__ void __launch_bounds__(kThreadsOfSpan) spans_of_any_taps(const Backward<S> p) {
  using T = Compute<S>;
  RECURRA_SHARED(T, sums_of_all, kPhases * kPitch);
  const Given<S>& g = p.given;
  const int64_t groups = (g.channels + kChannels - 1) / kChannels;
  const int lane = channel_of_thread(p), phase = phase_of_thread(p);
  const int64_t tasks = p.spans.count * (g.taps + 1) * groups;
  for (int64_t block = blockIdx.x; block < tasks; block += gridDim.x) {
    const int64_t c = block % groups * kChannels + lane, rest = block / groups;
    const int64_t j = rest % (g.taps + 1), u = rest / (g.taps + 1);
    T sum(0);
    if (c < g.channels && p.dy.data)
      for_rows(p.spans, u, [&](int64_t row, int64_t begin, int64_t end) {
        Cursor at = g.find(row, begin);
        for (int64_t t = begin + phase; t < end; t += kPhases) {
          g.advance(at, t);
          if (!at.holds(t)) continue;
          const T ds = p.gradient(at, t, c);
          sum = j < g.taps ? fma(ds, g.input(at, t - (g.taps - 1) + j, c), sum) : sum + ds;
        }
      });
    __syncthreads();
    sums_of_all[phase * kPitch + lane] = sum;
    __syncthreads();
    if (c < g.channels && phase == 0) *p.partial.at(u, j, c) = joined(sums_of_all, lane, kPitch);
  }
}

// And dx, a thread an element.
template <class S>
__global__ void __launch_bounds__(kFinishThreads) inputs_of_any_taps(const Backward<S> p) {
  using T = Compute<S>;
  const Given<S>& g = p.given;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < g.rows * g.time * g.channels; task += threads) {
    const int64_t near = p.time_near ? g.time : g.channels, far = p.time_near ? g.channels : g.time;
    const int64_t i = task % near, rest = task / near, k = rest % far, row = rest / far;
    const int64_t t = p.time_near ? i : k, c = p.time_near ? k : i;
    Cursor at = g.find(row, t);
    g.advance(at, t);
    if (!at.holds(t)) continue;
    store(p.dx.at(row, t, c), p.with_last(at, t, c, p.dy.data ? p.of_input(at, t, c) : T(0)));
  }
}

// The parameter gradients, the sums of the spans in order, and dh0.
template <class S>
__global__ void __launch_bounds__(kFinishThreads) finish(const Backward<S> p) {
  using T = Compute<S>;
  constexpr int kAtOnce = 8;
  const Given<S>& g = p.given;
  const int64_t parameters = (g.taps + 1) * g.channels, before = g.taps - 1;
  const int64_t tasks = parameters + (p.dh0.data ? g.sequences * before * g.channels : 0);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < tasks; task += threads) {
    const int64_t c = task % g.channels, j = task / g.channels;
    if (task >= parameters) {
      const int64_t rest = j - (g.taps + 1), i = rest % before;
      Cursor at;
      at.n = rest / before;
      at.s = extent(g.cu_seqlens, at.n, g.time);
      const int64_t t = at.s.begin - before + i;
      *p.dh0.at(at.n, i, c) = p.with_last(at, t, c, p.of_input(at, t, c));
      continue;
    }
    T total(0);
    for (int64_t u = 0; u < p.spans.count; u += kAtOnce) {
      T some[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
        if (u + k < p.spans.count) some[k] = *p.partial.at(u + k, j, c);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
        if (u + k < p.spans.count) total = total + some[k];
    }
    if (j < g.taps)
      p.dweight.set(total, c, j);
    else
      p.dbias.set(total, c);
  }
}

template <class S>
void launch(const CausalConv1dBackward& args, const Indices& cu_seqlens, const Stream& stream) {
  const Backward<S> p(args, cu_seqlens);
  const Given<S>& g = p.given;
  const int64_t groups = (g.channels + kChannels - 1) / kChannels;
  const int64_t blocks = p.spans.count * groups, elements = g.rows * g.time * g.channels;
  for_taps(g.taps, [&](auto taps) {
    if constexpr (taps.value > 0) {
      const auto causal_conv1d_spans = spans<S, taps.value>;
      if (blocks > 0)
        RECURRA_LAUNCH(causal_conv1d_spans, blocks_for(blocks, 1), kThreadsOfSpan, stream, p);
    } else {
      const auto causal_conv1d_spans = spans_of_any_taps<S>;
      const auto causal_conv1d_inputs = inputs_of_any_taps<S>;
      if (blocks > 0)
        RECURRA_LAUNCH(causal_conv1d_spans, blocks_for(blocks * (g.taps + 1), 1), kThreadsOfSpan,
                       stream, p);
      if (elements > 0)
        RECURRA_LAUNCH(causal_conv1d_inputs, blocks_for(elements, kFinishThreads), kFinishThreads,
                       stream, p);
    }
  });
  const int64_t last = (g.taps + 1 + (p.dh0.data ? g.sequences * (g.taps - 1) : 0)) * g.channels;
  if (last == 0) return;
  const auto causal_conv1d_finish = finish<S>;
  RECURRA_LAUNCH(causal_conv1d_finish, blocks_for(last, kFinishThreads), kFinishThreads, stream, p);
}

}  // namespace causal_conv1d_detail
using namespace causal_conv1d_detail;

int64_t causal_conv1d_spans(int64_t batch, int64_t time, bool cu_seqlens) {
  return Spans(batch, time, cu_seqlens).count;
}

void causal_conv1d_backward(const CausalConv1dBackward& args, const Indices& cu_seqlens,
                            const Stream& stream) {
  for_storage(args.x.dtype, [&](auto* storage) {
    launch<std::remove_pointer_t<decltype(storage)>>(args, cu_seqlens, stream);
  });
}

}  // namespace recurra::cuda
