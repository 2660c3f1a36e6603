// How time is split where sequences and channels are too few to fill a GPU: every sequence into the
// same number of parts, by shape alone, so that bits depend on neither the device nor cu_seqlens'
// values being known on the host. A first kernel reduces each part, a second one combines what
// comes before each, in order, and a third one runs the parts.
#pragma once
#include "integers.h"
#include "math/macros.h"

namespace recurra::cuda {

#if defined(RECURRA_CUDA_EMULATOR)
// So that the small shapes of tests are split too.
constexpr int64_t kThreadsToFill = 256, kBlocksToFill = 32, kLeastPart = 8;
#else
constexpr int64_t kThreadsToFill = 1 << 16, kBlocksToFill = 1 << 9, kLeastPart = 256;
#endif

// The parts of each sequence for `tasks` threads that would each walk one of `sequences`, which
// have `steps` together; or for as many blocks of 128 threads, which is what kBlocksToFill counts.
// Only in the mean do they have kLeastPart steps: the device alone knows the lengths of packed
// sequences.
inline int64_t time_parts(int64_t tasks, int64_t sequences, int64_t steps,
                          int64_t to_fill = kThreadsToFill) {
  if (tasks <= 0) return 1;
  const int64_t wanted = (to_fill + tasks - 1) / tasks, most = steps / sequences / kLeastPart;
  const int64_t parts = wanted < most ? wanted : most;
  return parts < 2 ? 1 : parts;
}

// The steps [begin, end) of one part of a sequence; the last ones may be empty.
struct Part {
  int64_t begin, end;
};
RECURRA_FN Part part_of(int64_t begin, int64_t end, int64_t part, int64_t parts) {
  const int64_t each = (end - begin + parts - 1) / parts, from = begin + part * each;
  const int64_t to = from + each;
  return {from < end ? from : end, to < end ? to : end};
}

}  // namespace recurra::cuda
