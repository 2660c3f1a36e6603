// What stands before each part of a walk where time is split: every part at once makes a state of
// zeros, or hands a cotangent on, and all of them are combined in order. The product of a part's
// gates is the gate of the sum of its step sizes, so that a thread adds up one number for all
// states of a channel.
#include "cuda/carry.h"
#include "cuda/launch.h"
#include "cuda/shared.h"
#include "selective_scan/device.h"

namespace recurra::cuda {
namespace selective_scan_detail {

template <class K>
struct Reduce : Inputs<K> {
  using Inputs<K>::Inputs;
  Array<typename K::S, 3> dy;
  Array<typename K::Stored, 3> first, before;  // the first part, and each
  double* sums;
  bool backwards;
};

// The numbers of B or C that a thread reads at a time.
template <class K>
struct ProjectionRows {
  typename Projection<K>::Raw at[Tile<K>::rows];
};

// Backwards, steps are counted from the end of a part and parts from that of a sequence.
template <class K, bool kBackwards>
__global__ void __launch_bounds__(kThreads, sizeof(typename K::T) == 4 ? 4 : 2)
    reduce(const Reduce<K> p) {
  using S = typename K::S;
  using T = typename K::T;
  using V = typename K::State;
  using Raw = typename Projection<K>::Raw;
  constexpr int kTogether = Tile<K>::together, kShares = Tile<K>::shares, kItems = Tile<K>::items;
  constexpr int kChannels = Tile<K>::channels, kSteps = Tile<K>::steps;
  constexpr int kStates = Tile<K>::states, kBy = kBackwards ? -1 : 1;
  RECURRA_SHARED(T, dt_rows, kSteps * kChannels);
  RECURRA_SHARED(T, in_rows, kSteps * kChannels);
  RECURRA_SHARED(V, weights, kSteps * kStates);
  RECURRA_SHARED(double, sums, kThreads);
  const int thread = static_cast<int>(threadIdx.x), c = thread % kChannels,
            share = thread / kChannels;
  const int64_t passes = p.passes(kStates);
  for (int64_t task = blockIdx.x; task < p.sequences * (p.parts - 1) * p.blocks.count;
       task += gridDim.x) {
    const int64_t walk = task / p.blocks.count, n = walk / (p.parts - 1);
    const int64_t part = walk % (p.parts - 1), row = n * p.parts + part;
    const Channels block = p.blocks.at(task % p.blocks.count);
    const Extent s = p.part_at(n, kBackwards ? p.parts - 1 - part : part);
    const int64_t length = s.end - s.begin;
    // Without a step nothing is read.
    const int64_t begin = length == 0 ? 0 : kBackwards ? s.end - 1 : s.begin;
    const int64_t start = share < length ? begin + kBy * share : 0;
    // A thread without a channel computes another's and stores nothing.
    const bool mine = c < block.count;
    const int64_t channel = block.first + (mine ? c : 0);
    const Array<S, 3>& input = kBackwards ? p.dy : p.u;
    const Projection<K>& projection = kBackwards ? p.C : p.B;
    const S* const from_x = input.at(s.batch, start, channel);
    const S* const from_delta = p.delta.at(s.batch, start, channel);
    const S* const from_z = p.z.at(s.batch, start, channel);
    const void* const from_weights = projection.rows(s.batch, begin, block.group);
    const bool has_x = !kBackwards || input.data, has_z = kBackwards && p.z.data;
    // Of a piece; none where it begins past the end.
    const auto steps_from = [&](int64_t t0) {
      return static_cast<int>(length - t0 < kSteps ? length - t0 : kSteps);
    };
    const auto fetch_rows = [&](int64_t t0, int64_t n0) {
      ProjectionRows<K> rows;
      const int steps = steps_from(t0);
#pragma unroll
      for (int i = 0; i < Tile<K>::rows; ++i) {
        const int at = i * kThreads + thread;
        const int64_t t = t0 + at / kStates, state = n0 + at % kStates;
        const bool there = at / kStates < steps && state < p.states;
        rows.at[i] = there ? projection.at(from_weights, kBy * t, state) : Raw{};
      }
      return rows;
    };
    const T bias = p.bias_of(channel);
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t n0 = pass * kStates + share * kTogether;
      // States that are not there stay zero.
      V h[kTogether] = {}, A[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) A[i] = n0 + i < p.states ? p.rate(channel, n0 + i) : V{};
      double sum = 0;
      S x[kItems] = {}, delta[kItems], z[kItems] = {};
      const auto fetch_items = [&](int64_t t0) {
        const int steps = steps_from(t0) - share;
        if (has_x) fetch<kShares>(from_x, kBy * input.step[1], t0, steps, x);
        if (has_z) fetch<kShares>(from_z, kBy * p.z.step[1], t0, steps, z);
        fetch<kShares>(from_delta, kBy * p.delta.step[1], t0, steps, delta);
      };
      fetch_items(0);
      ProjectionRows<K> rows = fetch_rows(0, pass * kStates);
      for (int64_t t0 = 0; t0 < length; t0 += kSteps) {
        const int steps = steps_from(t0);
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          T d = load(&delta[i]) + bias;
          if (p.softplus) d = step_size(d);
          T in = load(&x[i]);
          if constexpr (kBackwards)
            in = (has_z ? in * output_gate(load(&z[i])) : in) * T(K::f);
          else
            in = d * in;
          const int at = (i * kShares + share) * kChannels + c;
          dt_rows[at] = d;
          in_rows[at] = in;
          if (i * kShares + share < steps) sum = sum + d;
        }
#pragma unroll
        for (int i = 0; i < Tile<K>::rows; ++i)
          weights[i * kThreads + thread] = Projection<K>::value(rows.at[i]);
        fetch_items(t0 + kSteps);
        rows = fetch_rows(t0 + kSteps, pass * kStates);
        __syncthreads();
        const int walked = n0 < p.states ? steps : 0;
#pragma unroll 4
        for (int t = 0; t < walked; ++t) {
          const T dt = dt_rows[t * kChannels + c], in = in_rows[t * kChannels + c];
#pragma unroll
          for (int i = 0; i < kTogether; ++i) {
            const V weight = weights[t * kStates + share * kTogether + i];
            if constexpr (kBackwards)
              h[i] = conj(gate(A[i] * dt)) * fma(conj(weight), in, h[i]);
            else
              h[i] = fma(gate(A[i] * dt), h[i], weight * in);
          }
        }
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (mine && n0 + i < p.states) store(p.before.at(row, channel, n0 + i), h[i]);
      if (pass > 0) continue;
      sums[thread] = sum;
      __syncthreads();
      if (share == 0 && mine) {
        for (int i = 1; i < kShares; ++i) sum = sum + sums[i * kChannels + c];
        p.sums[row * p.channels + channel] = sum;
      }
      __syncthreads();
    }
  }
}

RECURRA_FN bool is_finite(double v) { return abs(v) < __builtin_huge_val(); }
RECURRA_FN bool is_finite(Complex<double> v) { return is_finite(v.re) && is_finite(v.im); }

// In the place of what each part makes comes what stands before it.
template <class K>
__global__ void __launch_bounds__(kThreads) combine(const Reduce<K> p) {
  using V = typename K::State;
  using Wide = decltype(widened(V{}));
  constexpr int N = 8;  // parts that are read at a time
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < p.sequences * p.channels * p.states; task += threads) {
    const int64_t state = task % p.states, c = task / p.states % p.channels;
    const int64_t n = task / p.states / p.channels;
    Wide rate = widened(p.rate(c, state));
    if (p.backwards) rate = conj(rate);
    // Only these have steps: the others leave a state as it is.
    const int64_t full = p.full_parts(n), begin = p.backwards ? p.parts - full : 0;
    double sum[N];
    V own[N];
    const auto read = [&](int64_t part) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sum[i] = 0, own[i] = V{};
        if (part + i >= p.parts - 1) continue;  // of the last one nothing is known, nor needed
        const int64_t row = n * p.parts + part + i;
        sum[i] = p.sums[row * p.channels + c];
        own[i] = load(p.before.at(row, c, state));
      }
    };
    read(0);
    V carry = p.first.data ? load(p.first.at(n, c, state)) : V{};
    Wide exact = widened(carry);
    for (int64_t part = 0; part < p.parts; part += N) {
      double sums[N];
      V ends[N];
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i] = sum[i], ends[i] = own[i];
      read(part + N);  // on their way while these are used
      Wide product[N];
#pragma unroll
      for (int i = 0; i < N; ++i) product[i] = gate(rate * sums[i]);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (part + i >= p.parts) continue;
        narrow(exact, carry);
        store(p.before.at(n * p.parts + part + i, c, state), carry);
        // No gates above zero make an infinite state finite, though their product may be zero.
        const Wide gates = is_finite(exact) ? product[i] : one(exact);
        const Wide after = after_part(carry, exact, gates, widened(ends[i]));
        if (part + i >= begin && part + i < begin + full) exact = after;
      }
    }
  }
}

template <class K>
void launch_parts(const SelectiveScanInputs& args, const View<3>& dy, const View<3>& first,
                  bool backwards, const Indices& cu_seqlens, const SelectiveScanParts& parts,
                  const Stream& stream) {
  using Stored = typename K::Stored;
  Reduce<K> p(args, cu_seqlens, Tile<K>::channels, parts.count);
  p.dy = Array<typename K::S, 3>(dy);
  p.first = Array<Stored, 3>(first);
  p.before = Array<Stored, 3>(parts.states);
  p.sums = static_cast<double*>(parts.sums.data);
  p.backwards = backwards;
  const int64_t tasks = p.sequences * (p.parts - 1) * p.blocks.count;
  const auto selective_scan_reduce = backwards ? reduce<K, true> : reduce<K, false>;
  RECURRA_LAUNCH(selective_scan_reduce, blocks_for(tasks, 1), kThreads, stream, p);
  const int64_t states = p.sequences * p.channels * p.states;
  if (states == 0) return;
  const auto selective_scan_combine = combine<K>;
  RECURRA_LAUNCH(selective_scan_combine, blocks_for(states, kThreads), kThreads, stream, p);
}

void reduce_parts(const SelectiveScanInputs& args, const View<3>& dy, const View<3>& first,
                  bool backwards, const Indices& cu_seqlens, const SelectiveScanParts& parts,
                  const Stream& stream) {
  with_states(args, "selective_scan: no CUDA kernel for this dtype", [&](auto k) {
    launch_parts<decltype(k)>(args, dy, first, backwards, cu_seqlens, parts, stream);
  });
}

}  // namespace selective_scan_detail
using namespace selective_scan_detail;

// Four blocks share a multiprocessor, of which an H200 has 132. To split costs nearly as much as
// the scan itself again, so that two blocks for three multiprocessors are better left alone.
int64_t selective_scan_parts(const SelectiveScanInputs& args) {
  const int64_t width = args.complex ? Tile<Cplx<float>>::channels : Tile<Real<float>>::channels;
  const Blocks blocks(args.u.size[2], args.spans.groups, width);
  const int64_t sequences = args.sequences.count, tasks = sequences * blocks.count;
  if (tasks * 6 > kBlocksToFill) return 1;
  const int64_t steps = args.u.size[0] * args.u.size[1];
  const int64_t parts = time_parts(tasks, sequences, steps, kBlocksToFill);
  return parts < 4 ? 1 : parts;
}

}  // namespace recurra::cuda
