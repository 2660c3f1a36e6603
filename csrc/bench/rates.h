// What this machine can do at most, from the loops that kernels are made of: memory streams and
// elementary functions on lanes. `recurra bench` prints floors made of these numbers.
#pragma once
#include <cstdint>

#include "simd/isa.h"

namespace recurra {

enum class Loop : int { fma, exp2, exp, sigmoid, tanh, softplus, silu, paragru_chain };

// One task of a rate measurement: `repeats` passes over a buffer that stays in the L1 cache, or as
// many rounds of independent fused multiply-adds in registers, or of steps of ParaGRU that wait for
// one another. `done` receives the lanes computed.
struct LoopTask {
  Loop loop = Loop::fma;
  int64_t repeats = 1;
  int64_t* done = nullptr;
};

enum class StreamKind : int { triad, triad_past_caches, read };

// One run over [0, count): c = a * 3 + b, 12 bytes an element, or only the reading of a. `sum`
// keeps the reads from being left out.
struct Stream {
  StreamKind kind = StreamKind::triad;
  const float* a = nullptr;
  const float* b = nullptr;
  float* c = nullptr;
  int64_t count = 0;
  float* sum = nullptr;
};

// y = exp2_fast(x) of `count` floats, a multiple of 16.
struct Exp2Values {
  const float* x = nullptr;
  float* y = nullptr;
  int64_t count = 0;
};

// Floats per nanosecond of a loop on `threads` threads, over about `milliseconds`.
double loop_rate(Loop loop, int threads, double milliseconds);

// Seconds of one run over the arrays, on the threads that parallel_run uses.
double stream_seconds(const Stream& stream);

// The largest error of exp2_fast in units in the last place, against double, over `count` values
// spread over [low, high].
double exp2_max_ulp(float low, float high, int64_t count);

}  // namespace recurra

RECURRA_KERNEL(run_loop, LoopTask)
RECURRA_KERNEL(run_stream, Stream)
RECURRA_KERNEL(exp2_values, Exp2Values)
