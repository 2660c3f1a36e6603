// When Newton's method has converged.
#pragma once
#include "math/macros.h"

namespace recurra::RECURRA_ISA::recurrent {

// A step of this, relative to the size that the state had of late, is what sequential steps round
// away, too: sixteen units of its last place, as roundings add up while they are remembered. Of
// late, since a state crosses zero, and may have been far larger long before.
template <class T>
constexpr T kConverged = sizeof(T) == 4 ? T(1.9e-6) : T(3.6e-15);

template <class T>
RECURRA_FN T absolute(T x) {
  return x < 0 ? -x : x;
}
template <class T>
RECURRA_FN bool is_finite(T x) {
  return x - x == 0;
}

}  // namespace recurra::RECURRA_ISA::recurrent
