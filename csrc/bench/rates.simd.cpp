// The loops whose rates bound the kernels. They are written like the kernels, on Vec and the
// functions of csrc/math, so what they reach is what a perfect kernel could.
#include "bench/rates.h"
#include "cells/paragru.h"
#include "math/batch.h"
#include "math/functions.h"
#include "tile.h"

namespace recurra::RECURRA_ISA {
namespace {

using V = Vec<float>;

constexpr int kBuffer = 1024;        // floats: input and output together fill 8 KiB of the L1 cache
constexpr int kUnroll = 4;           // independent chains of one pass
constexpr int64_t kChunk = 1 << 16;  // elements of a task of a stream

// The compiler may not move a pass across this, nor drop one whose output the next overwrites.
RECURRA_INLINE void touch(float* in, float* out) {
  asm volatile("" : : "r"(in), "r"(out) : "memory");
}

template <class F>
void pass_over_buffer(const LoopTask& task, float low, float high, F f) {
  float in[kBuffer] __attribute__((aligned(64))), out[kBuffer] __attribute__((aligned(64)));
  for (int i = 0; i < kBuffer; ++i) in[i] = low + (high - low) * static_cast<float>(i) / kBuffer;
  for (int64_t n = 0; n < task.repeats; ++n) {
    touch(in, out);
    for (int i = 0; i < kBuffer; i += kUnroll * kLanes) {
      Batch<V, kUnroll> v;
      for_each_index<kUnroll>([&](auto k)
                                  RECURRA_LAMBDA { v.v[k] = V::load(in + i + k * kLanes); });
      v = f(v);
      for_each_index<kUnroll>([&](auto k) RECURRA_LAMBDA { v.v[k].store(out + i + k * kLanes); });
    }
  }
  touch(in, out);
  *task.done = task.repeats * kBuffer;
}

// As many independent chains as there are registers for, to hide the latency of one.
void fma_chains(const LoopTask& task) {
  constexpr int chains = V::K == 1 ? 16 : V::K == 2 ? 6 : 1, rounds = 64;
  volatile float one = 0.999f, two = 0.001f;
  const V a(one), b(two);
  V v[chains];
  for (int k = 0; k < chains; ++k) v[k] = V(static_cast<float>(k));
  for (int64_t n = 0; n < task.repeats; ++n)
    for (int round = 0; round < rounds; ++round)
      _Pragma("GCC unroll 16") for (int k = 0; k < chains; ++k) v[k] = fma(v[k], a, b);
  float out[kLanes];
  for (int k = 1; k < chains; ++k) v[0] = v[0] + v[k];
  v[0].store(out);
  touch(out, out);
  *task.done = task.repeats * rounds * chains * kLanes;
}

void paragru_chain(const LoopTask& task) {
  constexpr int rounds = 64;
  // Six numbers of their own: of equal ones two gates would be one to the compiler.
  volatile float input = 0.25f;
  const V x_z(input), x_r(input), x_n(input), a_z(input), a_r(input), a_n(input);
  V h(0.0f);
  for (int64_t n = 0; n < task.repeats * rounds; ++n)
    h = get<0>(ParaGru::step(pack(x_z, x_r, x_n), pack(h), pack(a_z, a_r, a_n)));
  float out[kLanes];
  h.store(out);
  touch(out, out);
  *task.done = task.repeats * rounds * kLanes;
}

}  // namespace

void run_loop(const LoopTask& task) {
  const auto over = [&](float low, float high, auto f)
                        RECURRA_LAMBDA { pass_over_buffer(task, low, high, f); };
  switch (task.loop) {
    case Loop::fma: return fma_chains(task);
    case Loop::paragru_chain: return paragru_chain(task);
    case Loop::exp2: return over(-16, 0, [](auto x) RECURRA_LAMBDA { return exp2_fast(x); });
    case Loop::exp: return over(-16, 0, [](auto x) RECURRA_LAMBDA { return exp(x); });
    case Loop::sigmoid: return over(-8, 8, [](auto x) RECURRA_LAMBDA { return sigmoid(x); });
    case Loop::tanh: return over(-8, 8, [](auto x) RECURRA_LAMBDA { return tanh(x); });
    case Loop::softplus: return over(-8, 8, [](auto x) RECURRA_LAMBDA { return softplus(x); });
    case Loop::silu: return over(-8, 8, [](auto x) RECURRA_LAMBDA { return silu(x); });
  }
}

void run_stream(const Stream& s) {
  const bool past = s.kind == StreamKind::triad_past_caches;
  parallel((s.count + kChunk - 1) / kChunk, [&](int64_t task) {
    const int64_t begin = task * kChunk;
    const int64_t end = begin + kChunk < s.count ? begin + kChunk : s.count;
    const V scale(3.0f);
    if (s.kind == StreamKind::read) {
      V v[8] = {V(0.0f), V(0.0f), V(0.0f), V(0.0f), V(0.0f), V(0.0f), V(0.0f), V(0.0f)};
      int64_t i = begin;
      for (; i + 8 * kLanes <= end; i += 8 * kLanes)
        _Pragma("GCC unroll 16") for (int k = 0; k < 8; ++k) v[k] =
            v[k] + V::load(s.a + i + k * kLanes);
      for (int k = 1; k < 8; ++k) v[0] = v[0] + v[k];
      const float total = sum(v[0]);
      if (total == -1.25f) *s.sum = total;  // never so, which the compiler cannot know
      return;
    }
    const int64_t full = begin + (end - begin) / kLanes * kLanes;
    for (int64_t i = begin; i < full; i += kLanes) {
      const V v = fma(V::load(s.a + i), scale, V::load(s.b + i));
      if (past)
        v.stream(s.c + i);
      else
        v.store(s.c + i);
    }
    for (int64_t i = full; i < end; ++i) s.c[i] = fma(s.a[i], 3.0f, s.b[i]);
    if (past) fence();
  });
}

void exp2_values(const Exp2Values& args) {
  for (int64_t i = 0; i < args.count; i += kLanes) exp2_fast(V::load(args.x + i)).store(args.y + i);
}

}  // namespace recurra::RECURRA_ISA
