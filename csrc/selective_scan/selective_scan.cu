// A block walks 64 channels of one sequence in pieces of 16 steps: all threads first compute dt and
// dt u of the piece, then each runs eight states of one channel through it, in registers, and at
// last all threads add up, gate and store y. What the next piece needs is read meanwhile. Complex
// states are two numbers, so there all of this is halved. More than sixteen states take turns,
// their values resting in h_last. Sums have the order of the CPU's, but for a number of real states
// that eight does not divide. Where blocks are too few for a GPU, each walks a part of a sequence
// from the state that parts.cu finds before it.
#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/shared.h"
#include "selective_scan/device.h"

namespace recurra::cuda {
namespace selective_scan_detail {

template <class K>
struct Forward : Inputs<K> {
  using Inputs<K>::Inputs;
  Array<typename K::Stored, 3> first, h_last;  // h0, or where time is split before each part
  Array<typename K::S, 3> y;
  typename K::T* saved;
  Integers slots;
  int64_t slot_count;
};

template <class K>
struct SharedRows {
  typename Projection<K>::Raw B[Tile<K>::rows], C[Tile<K>::rows];
};

// Whole: the number of states is a multiple of 16.
template <class K, bool Whole>
__global__ void __launch_bounds__(kThreads, sizeof(typename K::T) == 4 ? 4 : 2)
    forward(const Forward<K> p) {
  using S = typename K::S;
  using T = typename K::T;
  using V = typename K::State;
  using Raw = typename Projection<K>::Raw;
  constexpr int kTogether = Tile<K>::together, kShares = Tile<K>::shares, kItems = Tile<K>::items;
  constexpr int kChannels = Tile<K>::channels, kSteps = Tile<K>::steps, kRows = Tile<K>::rows;
  constexpr int kStates = Tile<K>::states, kSums = Tile<K>::sums;
  RECURRA_SHARED(T, dt_rows, kSteps * kChannels);
  RECURRA_SHARED(T, in_rows, kSteps * kChannels);
  RECURRA_SHARED(T, sums, kSums * kSteps * kChannels);
  RECURRA_SHARED(V, B_rows, kSteps * kStates);
  RECURRA_SHARED(V, C_rows, kSteps * kStates);
  RECURRA_SHARED(Place, place, 1);
  const int thread = static_cast<int>(threadIdx.x), c = thread % kChannels,
            share = thread / kChannels;
  const int64_t passes = p.passes(kStates);
  for (int64_t task = blockIdx.x; task < p.sequences * p.parts * p.blocks.count;
       task += gridDim.x) {
    const int64_t row = task / p.blocks.count, n = row / p.parts;
    const Channels block = p.blocks.at(task % p.blocks.count);
    const Extent s = p.part_at(n, row % p.parts);
    const int64_t slot = slot_of(p.slots, n, p.slot_count), length = s.end - s.begin;
    // A thread without a channel computes another's and stores nothing.
    const bool mine = c < block.count;
    const int64_t channel = block.first + (mine ? c : 0);
    S* const to = p.y.at(s.batch, s.begin + share, channel);
    if (slot < 0) {
      for (int64_t t = share; mine && t < length; t += kShares)
        store(to + (t - share) * p.y.step[1], T(0));
      continue;
    }
    const S* const from_u = p.u.at(s.batch, s.begin + share, channel);
    const S* const from_delta = p.delta.at(s.batch, s.begin + share, channel);
    const S* const from_z = p.z.at(s.batch, s.begin + share, channel);
    const void* const from_B = p.B.rows(s.batch, s.begin, block.group);
    const void* const from_C = p.C.rows(s.batch, s.begin, block.group);
    // Of a piece; none where it begins past the end.
    const auto steps_from = [&](int64_t t0) {
      return static_cast<int>(length - t0 < kSteps ? length - t0 : kSteps);
    };
    const auto fetch_rows = [&](int64_t t0, int64_t n0) {
      SharedRows<K> rows;
      const int steps = steps_from(t0);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int at = i * kThreads + thread;
        const int64_t t = t0 + at / kStates, state = n0 + at % kStates;
        const bool there = at / kStates < steps && (Whole || state < p.states);
        rows.B[i] = there ? p.B.at(from_B, t, state) : Raw{};
        rows.C[i] = there ? p.C.at(from_C, t, state) : Raw{};
      }
      return rows;
    };
    const int64_t first_saved = p.saved_row(n, s, 0);
    const int64_t saved = first_saved * K::parts * p.states * p.blocks.padded + block.lane + c;
    const T bias = p.bias_of(channel), skip = p.skip_of(channel);
    V h[kTogether], A[kTogether];
    S u[kItems], delta[kItems], z[kItems] = {};
    // The pointers start at `share`.
    fetch<kShares>(from_u, p.u.step[1], 0, steps_from(0) - share, u);
    fetch<kShares>(from_delta, p.delta.step[1], 0, steps_from(0) - share, delta);
    SharedRows<K> rows = fetch_rows(0, 0);

    // A part that is not the last one leaves its states where it found them.
    const bool last = row % p.parts == p.parts - 1;
    const int64_t begins = p.parts > 1 ? row : slot;
    if (thread == 0) place[0] = Place{row, last ? slot : row, first_saved, last};
    __syncthreads();
    const auto load_states = [&](const Array<typename K::Stored, 3>& from, int64_t at, int64_t n0) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const bool there = Whole || n0 + i < p.states;
        h[i] = there && from.data ? load(from.at(at, channel, n0 + i)) : V{};
        A[i] = there ? p.rate(channel, n0 + i) : V{};
      }
    };
    const auto store_states = [&](int64_t n0) {
      const Place to = place[0];
      const Array<typename K::Stored, 3>& rest = to.last ? p.h_last : p.first;
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (mine && (Whole || n0 + i < p.states)) store(rest.at(to.rest, channel, n0 + i), h[i]);
    };
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t n0 = pass * kStates + share * kTogether;
      load_states(p.first, begins, n0);
      if (passes > 1) store_states(n0);
    }

    for (int64_t t0 = 0; t0 < length; t0 += kSteps) {
      const int steps = steps_from(t0), next = steps_from(t0 + kSteps);
      T y[kItems];
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        T d = load(&delta[i]) + bias;
        if (p.softplus) d = step_size(d);
        const T x = load(&u[i]);
        const int at = (i * kShares + share) * kChannels + c;
        dt_rows[at] = d;
        in_rows[at] = d * x;
        y[i] = p.D.data ? x * skip : T(0);
      }
      if (p.z.data) fetch<kShares>(from_z, p.z.step[1], t0, steps - share, z);
      fetch<kShares>(from_u, p.u.step[1], t0 + kSteps, next - share, u);
      fetch<kShares>(from_delta, p.delta.step[1], t0 + kSteps, next - share, delta);
      for (int64_t pass = 0; pass < passes; ++pass) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          B_rows[i * kThreads + thread] = Projection<K>::value(rows.B[i]);
          C_rows[i * kThreads + thread] = Projection<K>::value(rows.C[i]);
        }
        rows =
            pass + 1 < passes ? fetch_rows(t0, (pass + 1) * kStates) : fetch_rows(t0 + kSteps, 0);
        const int64_t n0 = pass * kStates + share * kTogether;
        if (passes > 1) {
          const Place from = place[0];
          load_states(from.last ? p.h_last : p.first, from.rest, n0);
        }
        if (p.saved && t0 % kScanChunk == 0 && mine) {
          const int64_t apart = p.states * p.blocks.padded;
          const int64_t chunk = t0 / kScanChunk * K::parts * apart;
          T* const to_saved = p.saved + saved + chunk + n0 * p.blocks.padded;
#pragma unroll
          for (int i = 0; i < kTogether; ++i)
            if (Whole || n0 + i < p.states) K::store(to_saved + i * p.blocks.padded, apart, h[i]);
        }
        __syncthreads();
#pragma unroll 4
        for (int t = 0; t < steps; ++t) {
          const T dt = dt_rows[t * kChannels + c], in = in_rows[t * kChannels + c];
#pragma unroll
          for (int first = 0; first < kTogether; first += K::readout) {
            T sum = T(0);
#pragma unroll
            for (int i = first; i < first + K::readout; ++i) {
              if (!Whole && n0 + i >= p.states) break;
              const V b = B_rows[t * kStates + share * kTogether + i];
              const V weight = C_rows[t * kStates + share * kTogether + i];
              h[i] = fma(gate(A[i] * dt), h[i], b * in);
              sum = add_real(weight, h[i], sum);
            }
            const int k = (share * kTogether + first) / K::readout;
            sums[(k * kSteps + t) * kChannels + c] = sum;
          }
        }
        if (passes > 1) store_states(n0);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const int t = i * kShares + share;
          if (t >= steps) break;
#pragma unroll
          for (int k = 0; k < kSums; ++k)
            if (Whole || pass * kStates + k * K::readout < p.states)
              y[i] = fma(T(sums[(k * kSteps + t) * kChannels + c]), T(K::f), y[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (i * kShares + share >= steps || !mine) break;
        store(to + (t0 + i * kShares) * p.y.step[1],
              p.z.data ? y[i] * output_gate(load(&z[i])) : y[i]);
      }
    }
    if (passes == 1) store_states(share * kTogether);
    __syncthreads();
  }
}

template <class K>
void launch(const SelectiveScan& args, const Indices& cu_seqlens, const Indices& slots,
            const SelectiveScanParts& parts, const Stream& stream) {
  using Stored = typename K::Stored;
  Forward<K> p(args, cu_seqlens, Tile<K>::channels, parts.count);
  p.first = Array<Stored, 3>(parts.count > 1 ? parts.states : args.h0);
  p.h_last = Array<Stored, 3>(args.h_last);
  p.y = Array<typename K::S, 3>(args.y);
  p.saved = static_cast<typename K::T*>(args.saved);
  p.slots = Integers(slots);
  p.slot_count = args.h_last.size[0];
  const int64_t tasks = p.sequences * p.parts * p.blocks.count;
  if (tasks == 0) return;
  if (p.parts > 1) reduce_parts(args, {}, args.h0, false, cu_seqlens, parts, stream);
  auto selective_scan_forward = forward<K, false>;
  if constexpr (K::parts == 1)
    if (p.states > 0 && p.states % Tile<K>::states == 0) selective_scan_forward = forward<K, true>;
  RECURRA_LAUNCH(selective_scan_forward, blocks_for(tasks, 1), kThreads, stream, p);
}

}  // namespace selective_scan_detail
using namespace selective_scan_detail;

void selective_scan(const SelectiveScan& args, const Indices& cu_seqlens,
                    const SelectiveScanParts& parts, const Stream& stream) {
  with_states(args, "selective_scan: no CUDA kernel for this dtype",
              [&](auto k) { launch<decltype(k)>(args, cu_seqlens, {}, parts, stream); });
}

void selective_scan_step(const SelectiveScan& args, const Indices& slots, const Stream& stream) {
  with_states(args, "selective_scan_step: no CUDA kernel for this dtype",
              [&](auto k) { launch<decltype(k)>(args, {}, slots, {}, stream); });
}

}  // namespace recurra::cuda
