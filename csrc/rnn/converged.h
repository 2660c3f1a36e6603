// When Newton's method has converged.
#pragma once
#include "math/macros.h"

namespace recurra::RECURRA_ISA::recurrent {

// A step of this, relative to the largest state, is what the sequential steps round away, too: four
// units of its last place.
template <class T>
constexpr T kConverged = sizeof(T) == 4 ? T(4.8e-7) : T(8.9e-16);

template <class T>
RECURRA_FN T absolute(T x) {
  return x < 0 ? -x : x;
}
template <class T>
RECURRA_FN bool is_finite(T x) {
  return x - x == 0;
}

}  // namespace recurra::RECURRA_ISA::recurrent
