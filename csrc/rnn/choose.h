// Which algorithm `auto` takes, and how Newton's method cuts time: from the shape alone, never from
// the number of threads, so that bits do not depend on it. `recurra bench rnn/auto` measures what
// stands here.
#pragma once
#include <algorithm>
#include <cstdint>

#include "rnn/rnn.h"

namespace recurra {

constexpr int64_t kMaxPasses = 16;

// Runs of sequences that the backward sums by themselves: few where several share vectors, which
// packed ones do not.
inline int64_t rnn_parts(const RnnInputs& args, bool packed) {
  const int64_t together = packed ? 1 : args.together();
  return std::clamp<int64_t>((args.sequences.count + together - 1) / together, 1, kRnnMostParts);
}

struct NewtonShape {
  int64_t chunk, warm_up;
};

// Enough lanes of a channel that neither their latency nor two threads leave anything to do, of
// stretches that are long beside the runs that find their starts.
inline NewtonShape newton_shape(int64_t channels, int64_t steps) {
  constexpr int64_t lanes = 128, warm_up = 128;
  const int64_t each = channels < 16 ? std::max<int64_t>(lanes / channels, 32) : 16;
  const int64_t chunk = std::max<int64_t>((steps + each - 1) / each, 2 * warm_up);
  // An odd number of blocks: at powers of two the lines of all lanes fall on one set of the caches.
  return {((chunk + kRnnChunk - 1) / kRnnChunk | 1) * kRnnChunk, warm_up};
}

// chains: sequences by channels; steps: the length of one. Sequentially a step waits for the one
// before, which sixteen chains do not notice; Newton's method carries a matrix of states by states
// along, and its stretches must be longer than the runs that find their starts.
inline bool prefers_newton(int64_t chains, int64_t steps, DType dtype, int64_t states) {
  const int64_t weight = states * states * (dtype == DType::f64 ? 2 : 1);
  const bool few = chains <= 16 && chains * weight <= 128;
  return few && steps >= std::max<int64_t>(1024, 512 * weight * chains);
}

// On a GPU, where a thread has a chain or a stretch of one. A sequential step takes 60 to 95 ns
// however few chains there are, up to 2^15 chains, where bandwidth binds; a pass of Newton's method
// takes two or three times the arithmetic and ends when the longest stretch and the walk along the
// boundaries do. These numbers are estimates from the floors, not measured.
namespace cuda {

// Enough stretches to fill the machine, long beside the runs that find their starts, and no more
// boundaries, which a warp walks one by one, than a stretch takes time.
inline NewtonShape newton_shape(int64_t channels, int64_t steps) {
  constexpr int64_t threads = 1 << 16, warm_up = 128;
  const int64_t each = std::max<int64_t>(threads / std::max<int64_t>(channels, 1), 1);
  int64_t chunk = std::max<int64_t>((steps + each - 1) / each, 2 * warm_up);
  while (2 * chunk * chunk < steps) chunk += kRnnChunk;
  return {(chunk + kRnnChunk - 1) / kRnnChunk * kRnnChunk, warm_up};
}

inline bool prefers_newton(int64_t chains, int64_t steps, DType dtype, int64_t states) {
  const int64_t weight = states * states * (dtype == DType::f64 ? 2 : 1);
  return chains > 0 && chains * weight <= 1 << 12 && steps >= 4096;
}

}  // namespace cuda

}  // namespace recurra
