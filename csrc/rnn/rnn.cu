// Sequentially: the inputs of the next steps are read while these are computed, and go through
// shared memory, so that a step of the cell is there once in the code.
#include "rnn/forward.h"

namespace recurra::cuda {
namespace rnn_detail {

template <class Cell, class T>
__device__ __forceinline__ void advance_chains(const Forward<T>& p) {
  constexpr int G = Sizes<Cell>::G, S = Sizes<Cell>::S, P = Sizes<Cell>::P;
  RECURRA_SHARED(T, rows, kAhead * G * kThreads);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < p.sequences * p.channels; task += threads) {
    const int64_t n = task / p.channels, c = task % p.channels;
    const Extent where = extent(p.cu_seqlens, n, p.time);
    const int64_t length = where.end - where.begin, first = length == 0 ? 0 : where.begin;
    const int64_t to = p.y.at(where.batch, first, 0, c), to_step = p.y.step[1];
    const int64_t from = p.x.at(where.batch, first, 0, c), from_step = p.x.step[1];
    const int64_t slot = slot_of(p.slots, n, p.slot_count);
    T h[S] = {}, params[P + 1];
    if (slot < 0) {
      for (int64_t t = 0; t < length; ++t) put<Cell>(p, to + t * to_step, h);
      continue;
    }
    const int64_t begin = p.taken ? p.taken[task] : 0;
    Ahead<T, G, kAhead> next;
    ResetsAhead<kAhead> resets;
    next.start(p.x, from + begin * from_step, from_step, length - begin);
    resets.start(p.reset, where.batch, first + begin, length - begin);
    read_params<Cell>(p.params, c, params);
    if (p.h0.data) for_each_index<S>([&](auto s) RECURRA_LAMBDA { h[s] = *p.h0.at(slot, s, c); });
    for (int64_t t0 = begin; t0 < length; t0 += kAhead) {
      next.finish(rows, p.x.dtype);
      const unsigned empty = resets.finish();
      const int64_t later = t0 + kAhead, left = length - t0;
      next.start(p.x, from + later * from_step, from_step, length - later);
      resets.start(p.reset, where.batch, first + later, length - later);
      if (p.saved && t0 % kRnnChunk == 0) {
        T* const at = p.saved + p.chunk_row(n, where, t0 / kRnnChunk) * S * p.padded + c;
        for_each_index<S>([&](auto s) RECURRA_LAMBDA { at[s * p.padded] = h[s]; });
      }
#pragma unroll 1
      for (int i = 0; i < kAhead && i < left; ++i) {
        T x[G], out[S];
        for_each_index<G>(
            [&](auto g) RECURRA_LAMBDA { x[g] = rows[(i * G + g) * kThreads + threadIdx.x]; });
        if (empty >> i & 1) for_each_index<S>([&](auto s) RECURRA_LAMBDA { h[s] = T(0); });
        step<Cell>(x, h, params, out);
        for_each_index<S>([&](auto s) RECURRA_LAMBDA { h[s] = out[s]; });
        put<Cell>(p, to + (t0 + i) * to_step, h);
      }
    }
    for_each_index<S>([&](auto s) RECURRA_LAMBDA { *p.h_last.at(slot, s, c) = h[s]; });
  }
}

template <class Cell, class T>
__global__ void __launch_bounds__(kThreads, 8)
    advance(const Forward<T> p, const Summary<T> sequential) {
  if (sequential.passes && blockIdx.x == 0 && threadIdx.x == 0) {
    *sequential.passes = 0;
    *sequential.mismatch = T(0);
  }
  advance_chains<Cell>(p);
}

template <class T>
void run(const Rnn& args, const Indices& cu_seqlens, const Indices& slots, const int64_t* taken,
         const NewtonSummary& summary, const Stream& stream) {
  const Forward<T> p(args, cu_seqlens, slots, taken);
  const int64_t tasks = p.sequences * p.channels;
  if (tasks == 0) return;
  with_cell_at(
      args.cell,
      [&](auto cell) {
        const auto rnn_advance = advance<decltype(cell), T>;
        RECURRA_LAUNCH(rnn_advance, blocks_for(tasks, kThreads), kThreads, stream, p,
                       Summary<T>(summary));
      },
      Cells{});
}

void rest(const Rnn& args, const Indices& cu_seqlens, const Indices& slots, const int64_t* taken,
          const NewtonSummary& summary, const Stream& stream) {
  computes_in_double(args.x.dtype) ? run<double>(args, cu_seqlens, slots, taken, summary, stream)
                                   : run<float>(args, cu_seqlens, slots, taken, summary, stream);
}

}  // namespace rnn_detail

void rnn(const Rnn& args, const Indices& cu_seqlens, const Indices& slots,
         const NewtonSummary& summary, const Stream& stream) {
  rnn_detail::rest(args, cu_seqlens, slots, nullptr, summary, stream);
}

}  // namespace recurra::cuda
