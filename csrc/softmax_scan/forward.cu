// One thread walks one channel of one sequence, or of a part of it, reading the next eight steps
// while it computes the last eight. Where these are too few for a GPU, the parts of a sequence are
// reduced first, each from the empty state, and put together in order.
#include "cuda/launch.h"
#include "softmax_scan/device.h"

namespace recurra::cuda {
namespace softmax_scan_detail {

template <class S>
struct Forward {
  using T = Compute<S>;
  Inputs<S> in;
  Array<S, 3> o;
  Array<T, 3> h0, h_last;
  Integers slots;
  int64_t states = 0;
  T* saved = nullptr;
  T* parts = nullptr;  // (sequences, parts, 3, D): of each part what it is, then what is before it

  RECURRA_FN State<T> initial(int64_t slot, int64_t c) const {
    if (!h0.data) return {kEmpty<T>, T(0), T(0)};
    return {at_least(kEmpty<T>, *h0.at(slot, 0, c)), *h0.at(slot, 1, c), *h0.at(slot, 2, c)};
  }
  RECURRA_FN State<T> part_at(int64_t n, int64_t part, int64_t c) const {
    const T* const from = parts + in.scratch(n, part, kParts, c);
    return {from[0], from[in.channels], from[2 * in.channels]};
  }
  RECURRA_FN void put_part(int64_t n, int64_t part, int64_t c, const State<T>& h) const {
    T* const to = parts + in.scratch(n, part, kParts, c);
    to[0] = h.m, to[in.channels] = h.c, to[2 * in.channels] = h.a;
  }
};

// Writes what a row that skips gets.
template <class S>
RECURRA_FN void skip(const Forward<S>& p, const Piece& w) {
  for (int64_t t = w.start(); t < w.end(); ++t)
    store(p.o.at(w.batch, w.begin + t, w.c), Compute<S>(0));
}

// reduce: only the state that a part makes of the empty one.
template <class S, bool reduce>
__global__ void __launch_bounds__(kThreads) walk(const Forward<S> p) {
  using T = Compute<S>;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < p.in.tasks(); task += threads) {
    const Piece w = piece(p.in, task);
    if (reduce && w.part == p.in.parts - 1) continue;
    const int64_t slot = slot_of(p.slots, w.n, p.states);
    if (slot < 0) {
      skip(p, w);
      continue;
    }
    const int64_t steps = w.steps(), first = steps > 0 ? w.begin + w.start() : 0;
    const S* const from_s = p.in.s.at(w.batch, first, w.c);
    const S* const from_v = p.in.v.at(w.batch, first, w.c);
    const T decay = p.in.decay_at(w.c), bonus = p.in.bonus_at(w.c);
    const Weights<T> factors = output_factors(decay, bonus);
    State<T> h{kEmpty<T>, T(0), T(0)};
    if (!reduce) h = p.in.parts > 1 ? p.part_at(w.n, w.part, w.c) : p.initial(slot, w.c);

    T s[kAhead], v[kAhead];
    load_steps(from_s, p.in.s.step[1], 0, steps, s);
    load_steps(from_v, p.in.v.step[1], 0, steps, v);
    for (int64_t t = 0; t < steps; t += kAhead) {
      if (!reduce && p.saved && t % kSoftmaxChunk == 0) {
        const int64_t row = p.in.chunk_row(w.n, w.begin, w.first + t / kSoftmaxChunk);
        T* const to = p.saved + row * kParts * p.in.padded + w.c;
        to[0] = h.m, to[p.in.padded] = h.c, to[2 * p.in.padded] = h.a;
      }
      T next_s[kAhead], next_v[kAhead];
      load_steps(from_s, p.in.s.step[1], t + kAhead, steps, next_s);
      load_steps(from_v, p.in.v.step[1], t + kAhead, steps, next_v);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (t + i >= steps) break;
        const T x = h.m - decay;
        const Weights<T> f = weights(x, s[i]);
        T den = T(0), num = T(0);
        if (!reduce && p.in.bonus.data) {
          const Weights<T> read = output_weights(f, factors, h.m, s[i], bonus);
          den = fma(read.x, h.c, read.y);
          num = fma(read.x, h.a, read.y * v[i]);
        }
        h = advance(h, x, f, s[i], v[i]);
        if (reduce) continue;
        if (!p.in.bonus.data) den = h.c, num = h.a;
        store(p.o.at(w.batch, first + t + i, w.c), den == T(0) ? T(0) : num / den);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) s[i] = next_s[i], v[i] = next_v[i];
    }
    if (reduce) {
      p.put_part(w.n, w.part, w.c, h);
    } else if (w.ends) {
      *p.h_last.at(slot, 0, w.c) = h.m;
      *p.h_last.at(slot, 1, w.c) = h.c;
      *p.h_last.at(slot, 2, w.c) = h.a;
    }
  }
}

// The state before each part, in the place of what the part is.
template <class S>
__global__ void __launch_bounds__(kThreads) combine(const Forward<S> p) {
  using T = Compute<S>;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < p.in.sequences * p.in.channels; task += threads) {
    const int64_t n = task / p.in.channels, c = task % p.in.channels;
    const T decay = p.in.decay_at(c);
    State<T> h = p.initial(n, c);
    for (int64_t part = 0; part < p.in.parts; part += kAhead) {
      State<T> own[kAhead] = {};
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (part + i < p.in.parts - 1) own[i] = p.part_at(n, part + i, c);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (part + i >= p.in.parts) break;
        p.put_part(n, part + i, c, h);
        const int64_t steps = piece(p.in, n, part + i, c).steps();
        // As taking the decay away step by step, it never goes below the empty state.
        const T x = at_least(kEmpty<T>, h.m - decay * static_cast<T>(steps));
        const Weights<T> f = weights(x, own[i].m);
        h = {x == x ? max(x, own[i].m) : x, fma(f.x, h.c, f.y * own[i].c),
             fma(f.x, h.a, f.y * own[i].a)};
      }
    }
  }
}

template <class S>
void launch(const SoftmaxScan& args, const Indices& cu_seqlens, const Indices& slots, void* scratch,
            const Stream& stream) {
  using T = Compute<S>;
  Forward<S> p;
  p.in = Inputs<S>(args, cu_seqlens, scratch ? parts_of(args) : 1);
  p.o = Array<S, 3>(args.o);
  p.h0 = Array<T, 3>(args.h0);
  p.h_last = Array<T, 3>(args.h_last);
  p.slots = Integers(slots);
  p.states = args.h_last.size[0];
  p.saved = static_cast<T*>(args.saved);
  p.parts = static_cast<T*>(scratch);
  const int64_t tasks = p.in.tasks(), channels = p.in.sequences * p.in.channels;
  if (tasks == 0) return;
  if (p.in.parts > 1) {
    const auto reduce_parts = walk<S, true>;
    RECURRA_LAUNCH(reduce_parts, blocks_for(tasks, kThreads), kThreads, stream, p);
    const auto combine_parts = combine<S>;
    RECURRA_LAUNCH(combine_parts, blocks_for(channels, kThreads), kThreads, stream, p);
  }
  const auto softmax_scan_forward = walk<S, false>;
  RECURRA_LAUNCH(softmax_scan_forward, blocks_for(tasks, kThreads), kThreads, stream, p);
}

}  // namespace softmax_scan_detail
using namespace softmax_scan_detail;

int64_t softmax_scan_scratch(const SoftmaxScan& args) {
  const int64_t parts = parts_of(args);
  return parts > 1 ? args.sequences.count * parts * kParts * args.v.size[2] : 0;
}

void softmax_scan(const SoftmaxScan& args, const Indices& cu_seqlens, const Indices& slots,
                  void* scratch, const Stream& stream) {
  switch (args.v.dtype) {
    case DType::f32: return launch<float>(args, cu_seqlens, slots, scratch, stream);
    case DType::f64: return launch<double>(args, cu_seqlens, slots, scratch, stream);
    case DType::bf16: return launch<BFloat16>(args, cu_seqlens, slots, scratch, stream);
    case DType::f16: return launch<Half>(args, cu_seqlens, slots, scratch, stream);
    default: throw std::runtime_error("softmax_scan: no CUDA kernel for this dtype");
  }
}

}  // namespace recurra::cuda
