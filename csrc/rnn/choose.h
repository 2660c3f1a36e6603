// Which algorithm `auto` takes, and how Newton's method cuts time: from the shape alone, never from
// the number of threads, so that bits do not depend on it. `recurra bench rnn/auto` measures what
// stands here.
#pragma once
#include <algorithm>
#include <cstdint>

#include "rnn/rnn.h"

namespace recurra {

constexpr int64_t kMaxPasses = 16;

// Runs of sequences that the backward sums by themselves: few where several share vectors.
inline int64_t rnn_parts(const RnnInputs& args) {
  const int64_t together = args.together();
  return std::clamp<int64_t>((args.sequences.count + together - 1) / together, 1, 8);
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

}  // namespace recurra
