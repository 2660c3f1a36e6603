// A block walks 32 or 64 channels of one sequence backwards, in the chunks of which the forward
// saved the states. A thread holds 32 bytes of states: four of one or two channels, or two in
// double where they are complex; the lanes of a warp are four such groups of states by eight
// channels. In a chunk all threads first compute dt, dt u and Y = dy silu(z). Then pieces of four
// steps go backwards: their states are computed again and kept in registers, the gates once more
// where they are needed. Sums over states are taken by shuffles; those over channels by shuffles,
// then over the four warps, and over the blocks by a kernel of its own. More states than a block
// holds take turns in every piece, what they carry resting in dh0 and sum_A. Where blocks are too
// few for a GPU, each walks a part of a sequence, with sums of its own, from what parts.cu finds
// behind it.
#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/shared.h"
#include "cuda/sums.h"
#include "selective_scan/device.h"

namespace recurra::cuda {
namespace selective_scan_detail {

constexpr int kPiece = 4, kPieces = kChunk / kPiece;
constexpr int kWarps = kThreads / 32;
constexpr int kColumns = 8;  // channels of a warp, or pairs of them
constexpr int kQuads = 4;    // groups of states
static_assert(kColumns * kQuads == 32);

template <class K>
struct Backward : Inputs<K> {
  using S = typename K::S;
  using T = typename K::T;
  using Inputs<K>::Inputs;
  Array<S, 3> dy, du, ddelta, dz;
  Array<typename K::Stored, 3> first, dh0;  // dh_last, or where time is split behind each part
  const T* saved;
  T *sum_A, *sum_D, *sum_BC;
};

// A times log2(e), where `rate` has it so in its real part alone.
template <Plain T>
RECURRA_FN T times_log2e(T rate) {
  return rate;
}
template <class T>
RECURRA_FN Complex<T> times_log2e(Complex<T> rate) {
  return {rate.re, rate.im * T(1.4426950408889634)};
}

// Lane l of each Count lanes that are `apart` from one another gets the sum of their v[l] in v[0].
template <int Count, class T>
__device__ __forceinline__ void scatter_sums(T (&v)[Count], int lane, int apart) {
#pragma unroll
  for (int half = Count / 2; half > 0; half /= 2) {
    const bool upper = (lane / apart & half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const T keep = upper ? v[i + half] : v[i], send = upper ? v[i] : v[i + half];
      v[i] = keep + __shfl_xor_sync(0xffffffffu, send, half * apart);
    }
  }
}

// Whole: there are 16 states; otherwise any number.
template <class K, bool Whole>
__global__ void __launch_bounds__(kThreads, Whole && sizeof(typename K::S) == 2 ? 3 : 2)
    backward(const Backward<K> p) {
  using T = typename K::T;
  using V = typename K::State;
  constexpr int kEach = sizeof(V) == 4 ? 2 : 1;   // channels of a thread
  constexpr int kHeld = sizeof(V) == 16 ? 2 : 4;  // states of each
  constexpr int kStates = kQuads * kHeld;
  constexpr int kWidth = kWarps * kColumns * kEach, kShares = kThreads / kWidth;
  constexpr int kSteps = kQuads / kEach;  // whose sums over states are taken together
  // Sums over channels, dB and dC in all their parts, of which a lane gets one at a time.
  constexpr int kOfOne = K::parts * kHeld, kTimes = 2 * kOfOne / kColumns;
  RECURRA_SHARED(T, dt_rows, kChunk * kWidth);
  RECURRA_SHARED(T, in_rows, kChunk * kWidth);
  RECURRA_SHARED(T, Y_rows, kChunk * kWidth);
  RECURRA_SHARED(T, p_rows, kPiece * kWidth);
  RECURRA_SHARED(T, q_rows, kPiece * kWidth);
  RECURRA_SHARED(T, y_rows, kPiece * kWidth);
  RECURRA_SHARED(V, B_rows, kChunk * kStates);
  RECURRA_SHARED(V, C_rows, kChunk * kStates);
  RECURRA_SHARED(T, sums, kTimes * kPiece * kThreads);
  RECURRA_SHARED(Place, place, 1);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int quad = lane / kColumns, column = warp * kColumns * kEach + lane % kColumns;
  const int c = thread % kWidth, share = thread / kWidth;  // in what all threads do
  const int64_t passes = Whole ? 1 : p.passes(kStates);
  for (int64_t task = blockIdx.x; task < p.sequences * p.parts * p.blocks.count;
       task += gridDim.x) {
    const int64_t row = task / p.blocks.count, n = row / p.parts, span = task % p.blocks.count;
    const Channels block = p.blocks.at(span);
    const Extent s = p.part_at(n, p.parts - 1 - row % p.parts);
    const int64_t length = s.end - s.begin;
    const bool mine = c < block.count;
    const int64_t channel = block.first + (mine ? c : 0);
    const T bias = p.bias_of(channel), skip = p.skip_of(channel);
    const void* const from_B = p.B.rows(s.batch, s.begin, block.group);
    const void* const from_C = p.C.rows(s.batch, s.begin, block.group);
    const auto stage_rows = [&](int64_t t0, int steps, int64_t n0) {
      for (int at = thread; at < steps * kStates; at += kThreads) {
        const int64_t t = t0 + at / kStates, state = n0 + at % kStates;
        const bool there = Whole || state < p.states;
        B_rows[at] = there ? Projection<K>::value(p.B.at(from_B, t, state)) : V{};
        C_rows[at] = there ? Projection<K>::value(p.C.at(from_C, t, state)) : V{};
      }
    };

    // A as the gate takes it, the cotangent of the state, and dA; of channel k and state i.
    V A[kEach][kHeld], carry[kEach][kHeld], dA[kEach][kHeld];
    const auto has = [&](int64_t state, int k) {
      return column + k * kColumns < block.count && (Whole || state < p.states);
    };
    const auto sum_A_at = [&](int64_t row, int64_t d, int64_t state) {
      return p.sum_A + (row * K::parts * p.states + state) * p.channels + d;
    };
    // A part that is not the last one leaves what it carries where it found it.
    const bool ends = row % p.parts == p.parts - 1;  // at the first step of the sequence
    if (thread == 0) place[0] = Place{row, ends ? n : row, p.saved_row(n, s, 0), ends};
    __syncthreads();
    const auto load_states = [&](int64_t n0, bool first) {
      const Place at = place[0];
      const Array<typename K::Stored, 3>& source = first || !at.last ? p.first : p.dh0;
      const int64_t from = first ? at.row : at.rest;
#pragma unroll
      for (int k = 0; k < kEach; ++k)
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
          const int64_t state = n0 + quad * kHeld + i, d = block.first + column + k * kColumns;
          A[k][i] = carry[k][i] = dA[k][i] = V{};
          if (!has(state, k)) continue;
          A[k][i] = p.rate(d, state);
          if (source.data) carry[k][i] = load(source.at(from, d, state));
          if (!first) dA[k][i] = K::load(sum_A_at(at.row, d, state), p.states * p.channels);
        }
    };
    const auto store_states = [&](int64_t n0) {
      const Place at = place[0];
      const Array<typename K::Stored, 3>& target = at.last ? p.dh0 : p.first;
#pragma unroll
      for (int k = 0; k < kEach; ++k)
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
          const int64_t state = n0 + quad * kHeld + i, d = block.first + column + k * kColumns;
          if (!has(state, k)) continue;
          store(target.at(at.rest, d, state), carry[k][i]);
          K::store(sum_A_at(at.row, d, state), p.states * p.channels, dA[k][i]);
        }
    };
    for (int64_t pass = 0; pass < passes; ++pass) {
      load_states(pass * kStates, true);
      if (passes > 1) store_states(pass * kStates);
    }

    V h[kEach][kHeld];
    // h after a step of the chunk, from h before it.
    const auto advance = [&](int t, int64_t n0) {
      V b[kHeld];
#pragma unroll
      for (int i = 0; i < kHeld; ++i) b[i] = B_rows[t * kStates + quad * kHeld + i];
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        const int at = t * kWidth + column + k * kColumns;
        const T dt = dt_rows[at], in = in_rows[at];
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
          if (Whole || n0 + quad * kHeld + i < p.states)
            h[k][i] = fma(gate(A[k][i] * dt), h[k][i], b[i] * in);
      }
    };

    T sum_D = T(0), sum_bias = T(0);
    const int64_t last_chunk = length > 0 ? (length - 1) / kChunk * kChunk : -kChunk;
    int steps = static_cast<int>(length - last_chunk);
    for (int64_t t0 = last_chunk; t0 >= 0; t0 -= kChunk, steps = kChunk) {
#pragma unroll 4
      for (int t = share; t < steps; t += kShares) {
        const int64_t time = s.begin + t0 + t;
        const int at = t * kWidth + c;
        T d = load(p.delta.at(s.batch, time, channel)) + bias;
        if (p.softplus) d = step_size(d);
        T Y = p.dy.data ? load(p.dy.at(s.batch, time, channel)) : T(0);
        if (p.z.data) Y = Y * silu(load(p.z.at(s.batch, time, channel)));
        const T in = d * load(p.u.at(s.batch, time, channel));
        dt_rows[at] = mine ? d : T(0);
        in_rows[at] = mine ? in : T(0);
        Y_rows[at] = mine ? Y : T(0);
      }
      if (passes == 1) stage_rows(t0, steps, 0);
      __syncthreads();
      V starts[kPieces][kEach][kHeld];  // the states before each piece, of a single pass
      const int last = (steps - 1) / kPiece;
      for (int piece = last; piece >= 0; --piece) {
        const int first = piece * kPiece, count = steps - first < kPiece ? steps - first : kPiece;
        for (int64_t pass = 0; pass < passes; ++pass) {
          const int64_t n0 = pass * kStates;
          if (passes > 1) {
            load_states(n0, false);
            stage_rows(t0, steps, n0);
            __syncthreads();
          }
          if (passes == 1 && piece < last) {
#pragma unroll
            for (int k = 0; k < kEach; ++k)
#pragma unroll
              for (int i = 0; i < kHeld; ++i) h[k][i] = starts[piece][k][i];
          } else {
#pragma unroll
            for (int k = 0; k < kEach; ++k)
#pragma unroll
              for (int i = 0; i < kHeld; ++i) {
                const int64_t state = n0 + quad * kHeld + i;
                const Place at = place[0];
                const int64_t saved_row =
                    (at.saved + t0 / kScanChunk) * K::parts * p.states + state;
                const T* const from = p.saved + saved_row * p.blocks.padded;
                h[k][i] = has(state, k) ? K::load(from + block.lane + column + k * kColumns,
                                                  p.states * p.blocks.padded)
                                        : V{};
              }
            for (int before = 0; before < piece; ++before) {
#pragma unroll
              for (int k = 0; k < kEach; ++k)
#pragma unroll
                for (int i = 0; i < kHeld; ++i) starts[before][k][i] = h[k][i];
#pragma unroll 4
              for (int t = 0; t < kPiece; ++t) advance(before * kPiece + t, n0);
            }
          }
          V held[kPiece][kEach][kHeld];  // the states before each step
#pragma unroll
          for (int t = 0; t < kPiece; ++t) {
            if (t >= count) break;
#pragma unroll
            for (int k = 0; k < kEach; ++k)
#pragma unroll
              for (int i = 0; i < kHeld; ++i) held[t][k][i] = h[k][i];
            advance(first + t, n0);
          }
#pragma unroll
          for (int end = kPiece; end > 0; end -= kSteps) {
            T sum_p[kQuads], sum_q[kQuads], sum_y[kQuads];
#pragma unroll
            for (int i = 0; i < kQuads; ++i) sum_p[i] = sum_q[i] = sum_y[i] = T(0);
#pragma unroll
            for (int r = 0; r < kSteps; ++r) {
              const int t = end - 1 - r, row = (first + t) * kStates + quad * kHeld;
              if (t >= count) continue;
              V dB[kHeld] = {}, dC[kHeld] = {};
#pragma unroll
              for (int k = 0; k < kEach; ++k) {
                const int at = (first + t) * kWidth + column + k * kColumns, sum = r * kEach + k;
                const T dt = dt_rows[at], in = in_rows[at], Y = Y_rows[at] * T(K::f);
#pragma unroll
                for (int i = 0; i < kHeld; ++i) {
                  if (!Whole && n0 + quad * kHeld + i >= p.states) break;
                  const V b = B_rows[row + i], weight = C_rows[row + i];
                  dC[i] = fma(conj(h[k][i]), Y, dC[i]);
                  sum_y[sum] = add_real(weight, h[k][i], sum_y[sum]);
                  const V g = fma(conj(weight), Y, carry[k][i]);
                  dB[i] = fma(g, in, dB[i]);
                  sum_p[sum] = add_real(g, conj(b), sum_p[sum]);
                  carry[k][i] = conj(gate(A[k][i] * dt)) * g;
                  const V turned = carry[k][i] * conj(held[t][k][i]);
                  sum_q[sum] = add_real(conj(times_log2e(A[k][i])), turned, sum_q[sum]);
                  dA[k][i] = fma(turned, dt, dA[k][i]);
                  h[k][i] = held[t][k][i];
                }
              }
#pragma unroll
              for (int time = 0; time < kTimes; ++time) {
                T of_channels[kColumns];
#pragma unroll
                for (int i = 0; i < kColumns; ++i) {
                  const int at = time * kColumns + i;
                  const V of = at < kOfOne ? dB[at % kHeld] : dC[at % kHeld];
                  of_channels[i] = K::part(of, at / kHeld % K::parts);
                }
                scatter_sums(of_channels, lane, 1);
                sums[(t * kTimes + time) * kThreads + thread] = of_channels[0];
              }
            }
            scatter_sums(sum_p, lane, kColumns);
            scatter_sums(sum_q, lane, kColumns);
            if (p.z.data) scatter_sums(sum_y, lane, kColumns);
            // The lanes of each four states have one of the sums.
            const int t = end - 1 - quad / kEach;
            const int at = t * kWidth + column + quad % kEach * kColumns;
            const T others_p = pass > 0 ? T(p_rows[at]) : T(0);
            const T others_q = pass > 0 ? T(q_rows[at]) : T(0);
            const T others_y = pass > 0 ? T(y_rows[at]) : T(0);
            p_rows[at] = others_p + sum_p[0];
            q_rows[at] = others_q + sum_q[0];
            y_rows[at] = others_y + sum_y[0];
          }
          if (passes > 1) store_states(n0);
          __syncthreads();
          for (int at = thread; at < count * kTimes * 32; at += kThreads) {
            const int from = at % 32, row = at / 32, t = row / kTimes;
            const int sum_of = row % kTimes * kColumns + from % kColumns;
            const int which = sum_of / kOfOne, part = sum_of / kHeld % K::parts;
            const int64_t state = n0 + from / kColumns * kHeld + sum_of % kHeld;
            if (!Whole && state >= p.states) continue;
            T sum = T(0);
#pragma unroll
            for (int w = 0; w < kWarps; ++w) sum = sum + sums[row * kThreads + w * 32 + from];
            const int64_t time = s.batch * p.time + s.begin + t0 + first + t;
            const int64_t step = (which * p.blocks.count + span) * p.u_rows + time;
            p.sum_BC[(step * K::parts + part) * p.states + state] = sum;
          }
        }
#pragma unroll
        for (int i = 0; i < kPiece / kShares; ++i) {
          const int t = i * kShares + share, at = (first + t) * kWidth + c;
          if (t >= count || !mine) break;
          const int64_t time = s.begin + t0 + first + t;
          const T x = load(p.u.at(s.batch, time, channel)), Y = Y_rows[at];
          const T sum_p = p_rows[t * kWidth + c];
          const T sum_q = q_rows[t * kWidth + c] * T(0.69314718055994530942);
          T du = dt_rows[at] * sum_p, d = fma(x, sum_p, sum_q);
          if (p.D.data) du = fma(skip, Y, du);
          if (p.softplus) d = d * step_slope(load(p.delta.at(s.batch, time, channel)) + bias);
          sum_D = fma(Y, x, sum_D);
          sum_bias = sum_bias + d;
          store(p.du.at(s.batch, time, channel), du);
          store(p.ddelta.at(s.batch, time, channel), d);
          if (p.z.data) {
            const T dy = p.dy.data ? load(p.dy.at(s.batch, time, channel)) : T(0);
            const T y = fma(T(y_rows[t * kWidth + c]), T(K::f), p.D.data ? x * skip : T(0));
            store(p.dz.at(s.batch, time, channel),
                  dy * y * silu_slope(load(p.z.at(s.batch, time, channel))).slope);
          }
        }
        __syncthreads();
      }
    }
    if (passes == 1) store_states(0);
    dt_rows[share * kWidth + c] = sum_D;
    in_rows[share * kWidth + c] = sum_bias;
    __syncthreads();
    if (share == 0 && mine) {
      for (int i = 1; i < kShares; ++i) {
        sum_D = sum_D + dt_rows[i * kWidth + c];
        sum_bias = sum_bias + in_rows[i * kWidth + c];
      }
      const Place at = place[0];
      p.sum_D[at.row * p.channels + channel] = sum_D;
      p.sum_D[(p.sequences * p.parts + at.row) * p.channels + channel] = sum_bias;
    }
    __syncthreads();
  }
}

// dB or dC, or a part of it: the sums of its group's blocks, in order.
template <class S>
struct Finish {
  Array<S, 4> to;
  const Compute<S>* from;
  int64_t row;                                  // numbers of a step, of which `states` are added up
  int64_t time, steps, groups, states, blocks;  // blocks of a group
};
template <class S>
__global__ void __launch_bounds__(kThreads) over_blocks(const Finish<S> p) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i < p.steps * p.groups * p.states; i += threads) {
    const int64_t state = i % p.states, group_step = i / p.states, g = group_step % p.groups;
    const int64_t step = group_step / p.groups, apart = p.steps * p.row;
    const Compute<S>* const from = p.from + g * p.blocks * apart + step * p.row + state;
    Compute<S> sum = Compute<S>(0);
#pragma unroll 4
    for (int64_t block = 0; block < p.blocks; ++block) sum = sum + from[block * apart];
    store(p.to.data + step / p.time * p.to.step[0] + step % p.time * p.to.step[1] +
              g * p.to.step[2] + state * p.to.step[3],
          sum);
  }
}

template <class S>
void finish(const Blocks& blocks, const View<4>& to, const Compute<S>* from, int64_t row,
            const Stream& stream) {
  Finish<S> p;
  p.to = Array<S, 4>(to);
  p.from = from;
  p.row = row;
  p.time = to.size[1];
  p.steps = to.size[0] * to.size[1];
  p.groups = to.size[2];
  p.states = to.size[3];
  p.blocks = p.groups == 1 ? blocks.count : blocks.per_group;
  const int64_t count = p.steps * p.groups * p.states;
  if (count == 0) return;
  const auto selective_scan_over_blocks = over_blocks<S>;
  RECURRA_LAUNCH(selective_scan_over_blocks, blocks_for(count, kThreads), kThreads, stream, p);
}

template <class K>
void launch_backward(const SelectiveScanBackward& args, const Indices& cu_seqlens,
                     const SelectiveScanParts& parts, const Stream& stream) {
  using S = typename K::S;
  using T = typename K::T;
  using Stored = typename K::Stored;
  Backward<K> p(args, cu_seqlens, backward_channels(args.u.dtype, args.complex), parts.count);
  p.dy = Array<S, 3>(args.dy);
  p.du = Array<S, 3>(args.du);
  p.ddelta = Array<S, 3>(args.ddelta);
  p.dz = Array<S, 3>(args.dz);
  p.first = Array<Stored, 3>(parts.count > 1 ? parts.states : args.dh_last);
  p.dh0 = Array<Stored, 3>(args.dh0);
  p.saved = static_cast<const T*>(args.saved);
  p.sum_A = static_cast<T*>(args.sum_A);
  p.sum_D = static_cast<T*>(args.sum_D);
  p.sum_BC = static_cast<T*>(args.sum_BC);
  const int64_t rows = p.sequences * p.parts, tasks = rows * p.blocks.count;
  if (tasks > 0) {
    if (p.parts > 1) reduce_parts(args, args.dy, args.dh_last, true, cu_seqlens, parts, stream);
    auto selective_scan_backward = backward<K, false>;
    if constexpr (K::parts == 1)
      if (p.states == 16) selective_scan_backward = backward<K, true>;
    RECURRA_LAUNCH(selective_scan_backward, blocks_for(tasks, 1), kThreads, stream, p);
  }
  const T* from = p.sum_BC;
  for (const View<4>* to : {&args.dB, &args.dC}) {
    for (int i = 0; i < K::parts; ++i)
      if (!is_complex(to->dtype))
        finish<S>(p.blocks, part(*to, i), from + i * p.states, args.rows(), stream);
      else
        finish<T>(p.blocks, part(*to, i), from + i * p.states, args.rows(), stream);
    from += p.blocks.count * p.u_rows * args.rows();
  }
  const bool wide = computes_in_double(args.u.dtype);
  const View<2> dA = part(args.dA, 0);  // its parts follow one another
  add_up({{dA.data,
           dA.dtype,
           {1, K::parts, dA.size[1], dA.size[0], 1},
           {0, 1, dA.stride[1], dA.stride[0], 0}},
          p.sum_A,
          wide,
          rows},
         stream);
  const View<1>* const vectors[] = {&args.dD, &args.ddelta_bias};
  for (int i = 0; i < 2; ++i) {
    const View<1>& v = *vectors[i];
    if (v)
      add_up({{v.data, v.dtype, {1, 1, v.size[0], 1, 1}, {0, 0, v.stride[0], 0, 0}},
              p.sum_D + i * rows * p.channels,
              wide,
              rows},
             stream);
  }
}

}  // namespace selective_scan_detail
using namespace selective_scan_detail;

void selective_scan_backward(const SelectiveScanBackward& args, const Indices& cu_seqlens,
                             const SelectiveScanParts& parts, const Stream& stream) {
  with_states(args, "selective_scan: no CUDA kernel for this dtype",
              [&](auto k) { launch_backward<decltype(k)>(args, cu_seqlens, parts, stream); });
}

}  // namespace recurra::cuda
