// The functions of csrc/math that tests hold to their bounds, each beside its reference in wider
// arithmetic. The namespace r is that of RECURRA_ISA.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "math/dual.h"

namespace r = recurra::RECURRA_ISA;

namespace math_functions {

template <class W>
W exact_sigmoid(W x) {
  return 1 / (1 + std::exp(-x));
}
template <class W>
W exact_softplus(W x) {
  return std::max(x, W(0)) + std::log1p(std::exp(-std::abs(x)));
}
template <class W>
W exact_silu(W x) {
  return std::isinf(x) && x < 0 ? -W(0) : x / (1 + std::exp(-x));
}

#define FUNCTION(NAME, CALL, EXACT) \
  struct NAME {                     \
    template <class V>              \
    static RECURRA_FN V f(V x) {    \
      return CALL;                  \
    }                               \
    template <class W>              \
    static W exact(W x) {           \
      return EXACT;                 \
    }                               \
  };
FUNCTION(Exp, r::exp(x), std::exp(x))
FUNCTION(Exp2, r::exp2(x), std::exp2(x))
FUNCTION(Exp2Fast, r::exp2_fast(x), std::exp2(x))
FUNCTION(Expm1, r::expm1(x), std::expm1(x))
FUNCTION(Log1p, r::log1p(x), std::log1p(x))
FUNCTION(Sigmoid, r::sigmoid(x), exact_sigmoid(x))
FUNCTION(Tanh, r::tanh(x), std::tanh(x))
FUNCTION(Softplus, r::softplus(x), exact_softplus(x))
FUNCTION(Silu, r::silu(x), exact_silu(x))

// The derivatives by dual numbers; that of SiLU has a root, at -1.28, where no ulp can hold.
#define TANGENT(NAME, CALL, EXACT) FUNCTION(NAME, r::tangent<0>(CALL((r::seed<1, 0>(x)))), EXACT)
template <class W>
W exact_sigmoid_slope(W x) {
  const W t = std::exp(-std::abs(x));
  return t / ((1 + t) * (1 + t));
}
template <class W>
W exact_tanh_slope(W x) {
  // Where it is that small, the slope is 0.
  const bool single = std::numeric_limits<W>::digits == 53;
  return std::abs(x + x) >= (single ? 80 : 700) ? 0 : 4 * exact_sigmoid_slope(x + x);
}
TANGENT(ExpSlope, exp, std::exp(x))
TANGENT(Expm1Slope, expm1, std::exp(x))
TANGENT(Log1pSlope, log1p, 1 / (1 + x))
TANGENT(SigmoidSlope, sigmoid, exact_sigmoid_slope(x))
TANGENT(TanhSlope, tanh, exact_tanh_slope(x))
TANGENT(SoftplusSlope, softplus, exact_sigmoid(x))

}  // namespace math_functions
