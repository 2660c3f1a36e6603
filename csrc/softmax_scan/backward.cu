// One thread walks one channel of one sequence, or of a part of it, backwards in chunks of 32
// steps. From the state that was saved before a chunk the states before each eight of its steps are
// computed and kept in shared memory, then the states of eight steps at a time in registers. Where
// sequences and channels are too few for a GPU, each part of a sequence is reduced first to what it
// makes of the cotangents after it, and the parts are put together in order.
#include "cuda/launch.h"
#include "cuda/shared.h"
#include "cuda/sums.h"
#include "softmax_scan/device.h"

namespace recurra::cuda {
namespace softmax_scan_detail {

constexpr int kGroups = static_cast<int>(kSoftmaxChunk) / kAhead;
constexpr int kLanes = 32;

// What a part makes of those after it: what it adds, and the factors of excess and of C and A.
template <class T>
struct Reduced {
  Cotangents<T> own;
  T of_excess, factor;
};
constexpr int kNumbers = 5;  // of Reduced

// How the gradients of what is broadcast are summed: numbers for each row, step and group of lanes.
struct Layout {
  bool over_time = false, over_channels = false, reduced = false;
  int64_t rows = 0, steps = 0, lanes = 0;

  Layout(const SoftmaxScanBackward& args, int64_t parts) {
    const int64_t channels = args.v.size[2], *from = args.s.size;
    over_time = from[1] == 1 && args.v.size[1] != 1;
    over_channels = from[2] == 1 && channels != 1;
    reduced = over_time || over_channels || from[0] != args.v.size[0];
    rows = over_time ? args.sequences.count * parts : args.v.size[0];
    steps = over_time ? 1 : args.v.size[1];
    lanes = over_channels ? (channels + kLanes - 1) / kLanes : channels;
  }
  int64_t size() const { return reduced ? rows * steps * lanes : 0; }
};

template <class S>
struct Backward {
  using T = Compute<S>;
  Inputs<S> in;
  Array<S, 3> d_o, ds, dv;
  Array<T, 3> dh_last, dh0;
  const T* saved = nullptr;
  // Scratch: (sequences, parts, 5, D) what parts are, and after combining what comes after each;
  // (sequences parts, D) sums of ddecay and of dbonus, null where there is none; sums of ds.
  T *parts = nullptr, *to_decay = nullptr, *to_bonus = nullptr, *partial = nullptr;
  bool over_time = false, over_channels = false;
  int64_t lanes = 0;

  RECURRA_FN State<T> saved_at(const Piece& w, int64_t chunk) const {
    const T* const from = saved + in.chunk_row(w.n, w.begin, chunk) * kParts * in.padded + w.c;
    return {from[0], from[in.padded], from[2 * in.padded]};
  }
  RECURRA_FN Cotangents<T> given(int64_t n, int64_t c) const {
    if (!dh_last.data) return {T(0), T(0), T(0)};
    return {*dh_last.at(n, 0, c), *dh_last.at(n, 1, c), *dh_last.at(n, 2, c)};
  }
  RECURRA_FN Cotangents<T> cotangents_at(int64_t n, int64_t part, int64_t c) const {
    const T* const from = parts + in.scratch(n, part, kNumbers, c);
    return {from[0], from[in.channels], from[2 * in.channels]};
  }
  RECURRA_FN void put(int64_t n, int64_t part, int64_t c, const Cotangents<T>& value) const {
    T* const to = parts + in.scratch(n, part, kNumbers, c);
    to[0] = value.excess, to[in.channels] = value.C, to[2 * in.channels] = value.A;
  }
  RECURRA_FN Reduced<T> reduced_at(int64_t n, int64_t part, int64_t c) const {
    const T* const from = parts + in.scratch(n, part, kNumbers, c);
    return {cotangents_at(n, part, c), from[3 * in.channels], from[4 * in.channels]};
  }
  RECURRA_FN void put(int64_t n, int64_t part, int64_t c, const Reduced<T>& value) const {
    T* const to = parts + in.scratch(n, part, kNumbers, c);
    put(n, part, c, value.own);
    to[3 * in.channels] = value.of_excess, to[4 * in.channels] = value.factor;
  }
};

template <class T>
RECURRA_FN T sum_of_warp(T value) {
  for (int by = kLanes / 2; by > 0; by /= 2) value += __shfl_xor_sync(0xffffffffu, value, by);
  return value;
}

// The part of the maximum in one step against time, whose score it may have come from.
template <class T>
RECURRA_FN void reverse_maximum(Reduced<T>& r, T x, T s, Gradients<T>& to, T& to_decay) {
  T& excess = r.own.excess;
  const bool above = s > x;
  const T shared = x == s ? T(0.5) * excess : T(0), to_score = above ? excess : shared;
  // Nothing is added where there is nothing, so that zeros keep their sign.
  if (!(to_score == T(0))) to.s = to.s + to_score;
  excess = above ? T(0) : excess - shared;
  if (!(excess == T(0))) to_decay = to_decay - excess;
  r.of_excess = above ? T(0) : x == s ? T(0.5) * r.of_excess : r.of_excess;
}

// reduce: only what a part makes of the cotangents after it.
template <class S, bool reduce>
__global__ void __launch_bounds__(kThreads, 1) walk_back(const Backward<S> p) {
  using T = Compute<S>;
  RECURRA_SHARED(T, kept, kGroups * kParts * kThreads);
  const auto keep = [&](int group, const State<T>& h) {
    const int at = group * kParts * kThreads + static_cast<int>(threadIdx.x);
    kept[at] = h.m, kept[at + kThreads] = h.c, kept[at + 2 * kThreads] = h.a;
  };
  const auto kept_at = [&](int group) -> State<T> {
    const int at = group * kParts * kThreads + static_cast<int>(threadIdx.x);
    return {kept[at], kept[at + kThreads], kept[at + 2 * kThreads]};
  };
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < p.in.tasks(); task += threads) {
    Piece w = piece(p.in, task);
    if (reduce && w.part == 0) continue;
    // A warp sums its channels, and a lane without one walks the last with it.
    const bool real = w.c < p.in.channels;
    const int64_t group_of_lanes = w.c / kLanes;
    if (!real) w.c = p.in.channels - 1;
    const int64_t first = w.length > 0 ? w.begin : 0;
    const S* const from_s = p.in.s.at(w.batch, first, w.c);
    const S* const from_v = p.in.v.at(w.batch, first, w.c);
    const S* const from_o = p.d_o.data ? p.d_o.at(w.batch, first, w.c) : nullptr;
    const T decay = p.in.decay_at(w.c), bonus = p.in.bonus_at(w.c);
    const Weights<T> factors = output_factors(decay, bonus);
    Reduced<T> r{{T(0), T(0), T(0)}, T(1), T(1)};
    if (w.ends)
      r.own = p.given(w.n, w.c);
    else if (!reduce)
      r.own = p.cotangents_at(w.n, w.part, w.c);
    T sum_decay = T(0), sum_bonus = T(0), sum_s = T(0);

    for (int64_t k = w.last - 1; k >= w.first; --k) {
      const int64_t t0 = k * kSoftmaxChunk,
                    end = w.end() < t0 + kSoftmaxChunk ? w.end() : t0 + kSoftmaxChunk;
      const int groups = static_cast<int>((end - t0 + kAhead - 1) / kAhead);
      T s[kAhead], v[kAhead], d_o[kAhead], small[kAhead], sum_chunk = T(0);
      State<T> h = p.saved_at(w, k);
      for (int g = 0;; ++g) {
        keep(g, h);
        if (g == groups - 1) break;
        load_steps(from_s, p.in.s.step[1], t0 + g * kAhead, end, s);
        load_steps(from_v, p.in.v.step[1], t0 + g * kAhead, end, v);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const T x = h.m - decay;
          h = advance(h, x, weights(x, s[i]), s[i], v[i]);
        }
      }
      for (int g = groups - 1; g >= 0; --g) {
        const int64_t from = t0 + g * kAhead;
        load_steps(from_s, p.in.s.step[1], from, end, s);
        load_steps(from_v, p.in.v.step[1], from, end, v);
        if (from_o)
          load_steps(from_o, p.d_o.step[1], from, end, d_o);
        else
          for_each_index<kAhead>([&](auto i) { d_o[i] = T(0); });
        State<T> states[kAhead + 1];
        states[0] = kept_at(g);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          states[i + 1] = states[i], small[i] = T(0);
          if (from + i >= end) continue;
          const T x = states[i].m - decay;
          small[i] = exp_minus_abs(x - s[i]);
          states[i + 1] = advance(states[i], x, weights_where(s[i] > x, small[i]), s[i], v[i]);
        }
        if (w.ends && end == w.length && g == groups - 1)
          r.own.excess = r.own.excess - shared_part(r.own, states[kAhead]);
#pragma unroll
        for (int i = kAhead - 1; i >= 0; --i) {
          if (from + i >= end) continue;
          const State<T> state = states[i];
          const T x = state.m - decay;
          const Weights<T> f = weights_where(s[i] > x, small[i]);
          Gradients<T> to{T(0), T(0), T(0), T(0)};
          if (p.in.bonus.data) {
            const Weights<T> read = output_weights(f, factors, state.m, s[i], bonus);
            to = reverse_output(read, state, v[i], d_o[i]);
            sum_bonus = sum_bonus + to.s;
          } else {
            reverse_output(r.own, states[i + 1].c, states[i + 1].a, d_o[i]);
          }
          sum_decay = add_to_decay(sum_decay, r.own, f, state);
          reverse_state(r.own, f, v[i], to);
          r.factor = f.x * r.factor;
          reverse_maximum(r, x, s[i], to, sum_decay);
          if (reduce) continue;
          const int64_t t = first + from + i;
          if (real) store(p.dv.at(w.batch, t, w.c), to.v);
          if (!p.partial) {
            store(p.ds.at(w.batch, t, w.c), to.s);
          } else if (p.over_time) {
            sum_chunk = sum_chunk + to.s;
          } else if (p.over_channels) {
            const T sum = sum_of_warp(real ? to.s : T(0));
            if (threadIdx.x % kLanes == 0)
              p.partial[(w.batch * p.in.time + t) * p.lanes + group_of_lanes] = sum;
          } else {
            p.partial[(w.batch * p.in.time + t) * p.lanes + w.c] = to.s;
          }
        }
      }
      sum_s = sum_s + sum_chunk;
    }
    if (reduce) {
      if (real) p.put(w.n, w.part, w.c, r);
      continue;
    }
    const int64_t row = w.n * p.in.parts + w.part;
    if (p.partial && p.over_time) {
      const T sum = p.over_channels ? sum_of_warp(real ? sum_s : T(0)) : sum_s;
      if (!p.over_channels || threadIdx.x % kLanes == 0)
        p.partial[row * p.lanes + (p.over_channels ? group_of_lanes : w.c)] = sum;
    }
    if (!real) continue;
    if (p.to_decay) p.to_decay[row * p.in.channels + w.c] = sum_decay;
    if (p.to_bonus) p.to_bonus[row * p.in.channels + w.c] = sum_bonus;
    if (w.part > 0) continue;
    if (w.length > 0) r.own.excess = shared_part(r.own, p.saved_at(w, 0)) + r.own.excess;
    *p.dh0.at(w.n, 0, w.c) = r.own.excess;
    *p.dh0.at(w.n, 1, w.c) = r.own.C;
    *p.dh0.at(w.n, 2, w.c) = r.own.A;
  }
}

// The cotangents after each part, in the place of what the part is.
template <class S>
__global__ void __launch_bounds__(kThreads) combine_back(const Backward<S> p) {
  using T = Compute<S>;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < p.in.sequences * p.in.channels; task += threads) {
    const int64_t n = task / p.in.channels, c = task % p.in.channels;
    Cotangents<T> d{T(0), T(0), T(0)};  // what comes after a sequence is in its last part
    for (int64_t last = p.in.parts - 1; last >= 0; last -= kAhead) {
      Reduced<T> own[kAhead] = {};
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (last - i > 0) own[i] = p.reduced_at(n, last - i, c);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (last - i < 0) break;
        p.put(n, last - i, c, d);
        d = {fma(own[i].of_excess, d.excess, own[i].own.excess),
             fma(own[i].factor, d.C, own[i].own.C), fma(own[i].factor, d.A, own[i].own.A)};
      }
    }
  }
}

// The numbers of the scratch arrays, in the order of Backward.
struct Scratch {
  int64_t parts, sums, partial;

  Scratch(const SoftmaxScanBackward& args, int64_t count) {
    const int64_t each = args.sequences.count * count * args.v.size[2];
    parts = count > 1 ? kNumbers * each : 0;
    sums = each;
    partial = Layout(args, count).size();
  }
  int64_t size(const SoftmaxScanBackward& args) const {
    return parts + (args.decay ? sums : 0) + (args.bonus ? sums : 0) + partial;
  }
};

template <class S>
void launch(const SoftmaxScanBackward& args, const Indices& cu_seqlens, void* scratch,
            const Stream& stream) {
  using T = Compute<S>;
  const int64_t parts = parts_of(args);
  const Layout layout(args, parts);
  const Scratch sizes(args, parts);
  Backward<S> p;
  p.in = Inputs<S>(args, cu_seqlens, parts);
  if (layout.over_channels) p.in.width = layout.lanes * kLanes;
  p.d_o = Array<S, 3>(args.d_o);
  p.ds = Array<S, 3>(args.ds);
  p.dv = Array<S, 3>(args.dv);
  p.dh_last = Array<T, 3>(args.dh_last);
  p.dh0 = Array<T, 3>(args.dh0);
  p.saved = static_cast<const T*>(args.saved);
  p.over_time = layout.over_time;
  p.over_channels = layout.over_channels;
  p.lanes = layout.lanes;
  T* next = static_cast<T*>(scratch);
  p.parts = next, next += sizes.parts;
  if (args.decay) p.to_decay = next, next += sizes.sums;
  if (args.bonus) p.to_bonus = next, next += sizes.sums;
  if (layout.reduced) p.partial = next;

  const int64_t tasks = p.in.tasks(), channels = p.in.sequences * p.in.channels;
  if (tasks > 0) {
    if (parts > 1) {
      const auto reduce_parts = walk_back<S, true>;
      RECURRA_LAUNCH(reduce_parts, blocks_for(tasks, kThreads), kThreads, stream, p);
      const auto combine_parts = combine_back<S>;
      RECURRA_LAUNCH(combine_parts, blocks_for(channels, kThreads), kThreads, stream, p);
    }
    const auto softmax_scan_backward = walk_back<S, false>;
    RECURRA_LAUNCH(softmax_scan_backward, blocks_for(tasks, kThreads), kThreads, stream, p);
  }
  const bool wide = args.v.dtype == DType::f64;
  const auto parameter = [&](const View<1>& to, const T* from) {
    if (!to) return;
    const View<5> row{to.data, to.dtype, {1, 1, to.size[0], 1, 1}, {0, 0, to.stride[0], 0, 0}};
    add_up({row, from, wide, p.in.sequences * parts, 1}, stream);
  };
  parameter(args.ddecay, p.to_decay);
  parameter(args.dbonus, p.to_bonus);
  const View<3>& ds = args.ds;
  const View<5> scores{ds.data,
                       ds.dtype,
                       {ds.size[0], ds.size[1], ds.size[2], 1, 1},
                       {ds.stride[0], ds.stride[1], ds.stride[2], 0, 0}};
  if (layout.reduced)
    add_up({scores, p.partial, wide, args.ds.size[0] ? layout.rows / args.ds.size[0] : 0,
            layout.over_channels ? layout.lanes : 1},
           stream);
}

}  // namespace softmax_scan_detail
using namespace softmax_scan_detail;

int64_t softmax_scan_backward_scratch(const SoftmaxScanBackward& args) {
  return Scratch(args, parts_of(args)).size(args);
}

void softmax_scan_backward(const SoftmaxScanBackward& args, const Indices& cu_seqlens,
                           void* scratch, const Stream& stream) {
  switch (args.v.dtype) {
    case DType::f32: return launch<float>(args, cu_seqlens, scratch, stream);
    case DType::f64: return launch<double>(args, cu_seqlens, scratch, stream);
    case DType::bf16: return launch<BFloat16>(args, cu_seqlens, scratch, stream);
    case DType::f16: return launch<Half>(args, cu_seqlens, scratch, stream);
    default: throw std::runtime_error("softmax_scan: no CUDA kernel for this dtype");
  }
}

}  // namespace recurra::cuda
