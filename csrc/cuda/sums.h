// The last step of a gradient of something that is broadcast: what threads left for each sequence
// or group of lanes is added, always in the same order.
#pragma once
#include "cuda/stream.h"
#include "view.h"

namespace recurra::cuda {

// to(b, t, d, i, j) = the sum over r < rows and l < lanes of from[b][r][t][d][l][i][j], which lies
// so, in float, or in double where `wide`. Without any rows it is zero.
struct Sums {
  View<5> to;
  const void* from = nullptr;
  bool wide = false;
  int64_t rows = 0, lanes = 1;
};
void add_up(const Sums& sums, const Stream& stream);

}  // namespace recurra::cuda
