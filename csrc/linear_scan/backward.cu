// The walk of linear_scan against time. The gradient of a broadcast `a` is summed as on the CPU and
// in its order: sixteen steps by sixteen steps, sixteen channels by a tree, into an array of
// partial sums that another kernel adds up. Where time is split, each part has sums of its own.
#include "linear_scan/device.h"

namespace recurra::cuda {
namespace linear_scan_detail {

constexpr int kGroup = 16;  // steps that are summed before they join a gradient, and channels

// Where the gradient of `a` goes: to itself, into one sum over time, or into sums of each step.
enum class Sum { none, over_time, each_step };

template <class S>
struct Backward {
  Array<S, 3> a, h, dh, da, db;
  Array<State<S>, 2> h0, dh_last, dh0;
  Array<State<S>, 3> partial;
  Array<State<S>, 3> states;  // what is handed to each part, where time is split
  Walks walks;
  bool log_a, over_channels;
};

// In the first of sixteen neighbouring lanes: total + their sum, in the order of the CPU.
template <Plain V>
__device__ __forceinline__ V add_lanes(V total, V v) {
  const unsigned mask = 0xffffu << (threadIdx.x & 16);
#pragma unroll
  for (int half = 8; half > 0; half /= 2) v = v + __shfl_xor_sync(mask, v, half);
  return total + v;
}
// Of complex numbers eight and eight.
template <class T>
__device__ __forceinline__ T add_halves(unsigned mask, T total, T v) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2) v = v + __shfl_xor_sync(mask, v, half);
  const T other = __shfl_xor_sync(mask, v, 8);
  return total + v + other;
}
template <class T>
__device__ __forceinline__ Complex<T> add_lanes(Complex<T> total, Complex<T> v) {
  const unsigned mask = 0xffffu << (threadIdx.x & 16);
  return {add_halves(mask, total.re, v.re), add_halves(mask, total.im, v.im)};
}

template <class S, Sum kSum>
__global__ void __launch_bounds__(kThreads) backward(const Backward<S> p) {
  using V = Value<S>;
  constexpr int N = kAhead<S> / 2;
  constexpr bool kConstant = kSum == Sum::over_time;
  const int64_t channels = p.walks.channels;
  // Lanes that are summed are there whether they have a channel or not.
  const bool over_channels = kSum != Sum::none && p.over_channels;
  const int64_t width = over_channels ? (channels + kGroup - 1) / kGroup * kGroup : channels;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t tasks = p.walks.sequences * p.walks.parts * width;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < tasks; task += threads) {
    const Walk w = walk_of(p.walks, task, width, p.walks.parts);
    const bool there = w.c < channels;
    // The states before these steps are one further; before the last one is h0.
    const int64_t steps = there ? w.length : 0, last = w.total - 1 - w.start;
    Ahead<S, N> a(p.a, w, kConstant ? 0 : steps), dh(p.dh, w, steps);
    Ahead<S, N> h(p.h, w, last < steps ? last : steps, 1);
    V gate[N] = {}, carry = {}, first = {};
    if (there && p.h0.data) first = load(p.h0.at(w.n, w.c));
    if (there && p.states.data)
      carry = load(p.states.at(w.n, w.part, w.c));
    else if (there && p.dh_last.data)
      carry = load(p.dh_last.at(w.n, w.c));
    if constexpr (kConstant) {
      const V same = there ? constant_gate(p.a, w, p.log_a) : V{};
#pragma unroll
      for (int i = 0; i < N; ++i) gate[i] = same;
    }
    S *to_a = nullptr, *to_b = p.db.at(w.batch, w.first, w.c);
    State<S>* to_sum = nullptr;
    const int64_t step_a = w.by * p.da.step[1], step_b = w.by * p.db.step[1];
    const int64_t step_sum = w.by * p.partial.step[1];
    const int64_t place = over_channels ? w.c / kGroup : w.c;
    const bool sums = over_channels ? w.c % kGroup == 0 : there;
    if constexpr (kSum == Sum::none) to_a = p.da.at(w.batch, w.first, w.c);
    if constexpr (kSum == Sum::each_step) to_sum = p.partial.at(w.batch, w.first, place);
    V group = {}, total = {};  // of some steps, and of all groups before
    along<N>(
        w.length,
        [&](auto batch, int64_t t, int count) {
          if constexpr (!kConstant) gates_of(a.item[batch.value], p.log_a, gate);
          const int until = last - t < N ? static_cast<int>(last - t) : N;
          if (kSum == Sum::over_time && t % kGroup == 0) group = V{};
#pragma unroll
          for (int i = 0; i < N; ++i) {
            if (i >= count) continue;
            const V g = p.dh.data ? load(&dh.item[batch.value][i]) + carry : carry;
            carry = conj(gate[i]) * g;
            const V before = i == until ? first : load(&h.item[batch.value][i]);
            const V d = conj(before) * (p.log_a ? carry : g);
            if (there) store(to_b, g);
            to_b += step_b;
            if constexpr (kSum == Sum::none) {
              store(to_a, d);
              to_a += step_a;
            } else if constexpr (kSum == Sum::over_time) {
              group = group + d;
            } else {
              const V sum = over_channels ? add_lanes(V{}, d) : V{} + d;
              if (sums) store(to_sum, sum);
              to_sum += step_sum;
            }
          }
          if (kSum == Sum::over_time && ((t + count) % kGroup == 0 || t + count == w.length))
            total = over_channels ? add_lanes(total, group) : total + group;
        },
        [&](auto batch) {
          if constexpr (!kConstant) a.template read<batch.value>();
          dh.template read<batch.value>();
          h.template read<batch.value>();
        });
    if (kSum == Sum::over_time && sums)
      store(p.partial.at(w.n * p.walks.parts + w.part, 0, place), total);
    if (there && w.ends) store(p.dh0.at(w.n, w.c), carry);
  }
}

// One thread adds up the partial sums of one element of da: those of sequences and parts one after
// the other, each block by block; or, of sums of each step, block by block.
template <class S>
struct Sums {
  Array<S, 3> da;
  const State<S>* partial;
  int64_t count, steps, channels;  // elements, and the last two dimensions of da
  int64_t apart, blocks, row;      // of an element; from one row of the partial sums to the next
  bool over_time;
};
template <class S>
__device__ __forceinline__ Value<S> add_up(const State<S>* from, int64_t count, int64_t step,
                                           Value<S> total) {
  constexpr int N = 16;
  for (; count >= N; count -= N) {
    Value<S> v[N];
#pragma unroll
    for (int i = 0; i < N; ++i, from += step) v[i] = load(from);
#pragma unroll
    for (int i = 0; i < N; ++i) total = total + v[i];
  }
  for (; count > 0; --count, from += step) total = total + load(from);
  return total;
}
template <class S>
__global__ void __launch_bounds__(kThreads) sums(const Sums<S> p) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < p.count; task += threads) {
    const int64_t d = task % p.channels, t = task / p.channels % p.steps;
    const int64_t b = task / p.channels / p.steps;
    const int64_t length = p.row / p.steps;  // of a step in the partial sums
    const State<S>* from = p.partial + b * p.apart * p.row + t * length + d;
    Value<S> total = {};
    if (p.over_time && p.blocks == length && p.channels == 1)
      total = add_up<S>(from, p.apart * p.blocks, 1, total);
    else if (p.apart == 1)
      total = add_up<S>(from, p.blocks, 1, total);
    else
      for (int64_t k = 0; k < p.blocks; ++k)
        total = total + add_up<S>(from + k, p.apart, p.row, Value<S>{});
    store(p.da.at(b, t, d), total);
  }
}

template <class S>
void launch_sums(const LinearScanBackward& args, const Walks& walks, const Stream& stream) {
  const View<3>& da = args.da;
  Sums<S> p;
  p.da = Array<S, 3>(da);
  p.partial = static_cast<const State<S>*>(args.partial.data);
  p.count = da.size[0] * da.size[1] * da.size[2];
  if (p.count == 0) return;
  p.steps = da.size[1];
  p.channels = da.size[2];
  p.over_time = args.a.size[1] == 1;
  const int64_t rows = p.over_time ? walks.sequences * walks.parts : args.h.size[0];
  p.apart = rows / da.size[0];
  const bool over_channels = da.size[2] != walks.channels;
  p.blocks = over_channels ? (walks.channels + kGroup - 1) / kGroup : 1;
  p.row = args.partial.size[1] * args.partial.size[2];
  const auto linear_scan_sums = sums<S>;
  RECURRA_LAUNCH(linear_scan_sums, blocks_for(p.count, kThreads), kThreads, stream, p);
}

template <class S>
void launch(const LinearScanBackward& args, const Indices& cu_seqlens, const ScanParts& parts,
            const Stream& stream) {
  Backward<S> p;
  p.walks = walks_of(args.sequences, cu_seqlens, args.h.size[2], parts, !args.reverse);
  p.a = Array<S, 3>(args.a);
  p.h = Array<S, 3>(args.h);
  p.dh = Array<S, 3>(args.dh);
  p.da = Array<S, 3>(args.da);
  p.db = Array<S, 3>(args.db);
  p.h0 = Array<State<S>, 2>(args.h0);
  p.dh_last = Array<State<S>, 2>(args.dh_last);
  p.dh0 = Array<State<S>, 2>(args.dh0);
  p.partial = Array<State<S>, 3>(args.partial);
  p.states = Array<State<S>, 3>(parts.states);
  p.log_a = args.log_a;
  p.over_channels = args.a.size[2] != p.walks.channels;
  const bool reduced = static_cast<bool>(args.partial);
  if (p.walks.sequences * p.walks.channels > 0) {
    if (p.walks.parts > 1)
      reduce_parts<S, true>(args.a, args.dh, args.dh_last, args.log_a, p.walks, parts, stream);
    const auto linear_scan_backward = !reduced              ? backward<S, Sum::none>
                                      : args.a.size[1] == 1 ? backward<S, Sum::over_time>
                                                            : backward<S, Sum::each_step>;
    const int64_t width = p.walks.channels + (p.over_channels ? kGroup - 1 : 0);
    const unsigned blocks = blocks_for(p.walks.sequences * p.walks.parts * width, kThreads);
    RECURRA_LAUNCH(linear_scan_backward, blocks, kThreads, stream, p);
  }
  if (reduced) launch_sums<S>(args, p.walks, stream);
}

}  // namespace linear_scan_detail
using namespace linear_scan_detail;

int64_t linear_scan_sums(const LinearScanBackward& args, int64_t parts) {
  return args.a.size[1] == 1 ? args.sequences.count * parts : args.h.size[0];
}

void linear_scan_backward(const LinearScanBackward& args, const Indices& cu_seqlens,
                          const ScanParts& parts, const Stream& stream) {
  for_storage(args.h.dtype,
              [&](auto zero) { launch<decltype(zero)>(args, cu_seqlens, parts, stream); });
}

}  // namespace recurra::cuda
