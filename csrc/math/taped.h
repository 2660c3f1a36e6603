// Taped<V, Tape>: a number whose elementary functions leave what they come to on a tape, or find it
// there when the same step is run again. A backward pass that runs a step twice, the second time on
// duals of these, has each elementary function once, and of a step holds a number for each function
// instead of one for each derivative, of which there are many more.
//
// A tape offers keep(v) and take(), in the same order, and `replays`, which says which of the two
// is wanted. Arithmetic is V's own, and so are the functions that have no overload here: those are
// run twice. The order is that of the statements of a step, which therefore has at most one of the
// functions below in each.
#pragma once
#include "math/functions.h"

namespace recurra::RECURRA_ISA {

template <class V, class Tape>
struct Taped {
  V v;
  Tape* tape = nullptr;

  Taped() = default;
  RECURRA_FN Taped(V x, Tape* t = nullptr) : v(x), tape(t) {}  // NOLINT: a number stands for itself
  RECURRA_FN Taped(Number<V> x)                                // NOLINT
    requires(!kSame<V, Number<V>>)
      : v(V(x)) {}
};

template <class V, class Tape>
struct NumberOf<Taped<V, Tape>> {
  using type = Number<V>;
};

// clang-format off
#define RECURRA_TAPED template <class V, class Tape> RECURRA_FN
#define RECURRA_TAPED_1(NAME, EXPRESSION)                                                        \
  RECURRA_TAPED Taped<V, Tape> NAME(Taped<V, Tape> x) {                                          \
    const V a = x.v;                                                                             \
    return {EXPRESSION, x.tape}; }
#define RECURRA_TAPED_2(NAME, EXPRESSION)                                                        \
  RECURRA_TAPED Taped<V, Tape> NAME(Taped<V, Tape> x, Taped<V, Tape> y) {                        \
    const V a = x.v, b = y.v;                                                                    \
    return {EXPRESSION, x.tape ? x.tape : y.tape}; }                                             \
  RECURRA_TAPED Taped<V, Tape> NAME(Taped<V, Tape> x, Number<V> y) { return NAME(x, Taped<V, Tape>(V(y))); }   \
  RECURRA_TAPED Taped<V, Tape> NAME(Number<V> x, Taped<V, Tape> y) {                             \
    return NAME(Taped<V, Tape>(V(x)), y); }
#define RECURRA_TAPED_COMPARE(OP)                                                                \
  RECURRA_TAPED auto operator OP(Taped<V, Tape> a, Taped<V, Tape> b) { return a.v OP b.v; }      \
  RECURRA_TAPED auto operator OP(Taped<V, Tape> a, Number<V> b) { return a.v OP V(b); }
// clang-format on

RECURRA_TAPED_1(operator-, -a)
RECURRA_TAPED_1(abs, abs(a))
RECURRA_TAPED_1(sqrt, sqrt(a))
RECURRA_TAPED_1(round, round(a))
RECURRA_TAPED_1(exponent, exponent(a))
RECURRA_TAPED_2(operator+, a + b)
RECURRA_TAPED_2(operator-, a - b)
RECURRA_TAPED_2(operator*, a* b)
RECURRA_TAPED_2(operator/, a / b)
RECURRA_TAPED_2(min, min(a, b))
RECURRA_TAPED_2(max, max(a, b))
RECURRA_TAPED_2(copysign, copysign(a, b))
RECURRA_TAPED_2(fraction, fraction(a, b))
RECURRA_TAPED_2(scale2, scale2(a, b))
RECURRA_TAPED_COMPARE(<)
RECURRA_TAPED_COMPARE(<=)
RECURRA_TAPED_COMPARE(==)
RECURRA_TAPED_COMPARE(>)
RECURRA_TAPED_COMPARE(>=)

RECURRA_TAPED Taped<V, Tape> fma(Taped<V, Tape> a, Taped<V, Tape> b, Taped<V, Tape> c) {
  return {fma(a.v, b.v, c.v), a.tape ? a.tape : b.tape ? b.tape : c.tape};
}
template <class M, class V, class Tape>
RECURRA_FN Taped<V, Tape> select(M m, Taped<V, Tape> a, Taped<V, Tape> b) {
  return {select(m, a.v, b.v), a.tape ? a.tape : b.tape};
}
template <class M, class V, class Tape>
RECURRA_FN Taped<V, Tape> select(M m, Number<V> a, Taped<V, Tape> b) {
  return {select(m, V(a), b.v), b.tape};
}
template <class M, class V, class Tape>
RECURRA_FN Taped<V, Tape> select(M m, Taped<V, Tape> a, Number<V> b) {
  return {select(m, a.v, V(b)), a.tape};
}

// What f() is, when the tape is made.
template <class V, class Tape, class F>
RECURRA_FN Taped<V, Tape> through(Tape* tape, const F& f) {
  if constexpr (Tape::replays) {
    return {tape->take(), tape};
  } else {
    const V v = f();
    tape->keep(v);
    return {v, tape};
  }
}
template <class V, class Tape, class F>
RECURRA_FN ValueSlope<Taped<V, Tape>> both_through(Tape* tape, const F& f) {
  if constexpr (Tape::replays) {
    const V value = tape->take(), slope = tape->take();
    return {{value, tape}, {slope, tape}};
  } else {
    const ValueSlope<V> s = f();
    tape->keep(s.value);
    tape->keep(s.slope);
    return {{s.value, tape}, {s.slope, tape}};
  }
}

RECURRA_TAPED Taped<V, Tape> exp(Taped<V, Tape> x) {
  return through<V>(x.tape, [&]() RECURRA_LAMBDA { return exp(x.v); });
}
// Its dual takes an exponential for the slope, which the tape would have only the second time.
RECURRA_TAPED Taped<V, Tape> expm1(Taped<V, Tape> x) = delete;
// The smaller of sigmoid(x) and sigmoid(-x) with the sign of x, from which both, and the slope,
// come within a rounding: a step must not choose by the value of a sigmoid.
RECURRA_TAPED ValueSlope<Taped<V, Tape>> sigmoid_slope(Taped<V, Tape> x) {
  const V zero = V(Number<V>(0)), one = V(Number<V>(1));
  if constexpr (Tape::replays) {
    const V kept = x.tape->take(), small = abs(kept), large = one - small;
    return {{select(copysign(one, kept) < zero, small, large), x.tape}, {small * large, x.tape}};
  } else {
    const SigmoidSides<V> s = sigmoid_sides(exp_minus_abs(x.v));
    x.tape->keep(copysign(s.small, x.v));
    return {{select(x.v < zero, s.small, s.large), x.tape}, {s.small * s.large, x.tape}};
  }
}
// The slope from the value, 1 - t^2, is exact to a rounding of 1, as torch's own is: where float32
// has 1 for tanh, from 9 on, it is 0.
RECURRA_TAPED ValueSlope<Taped<V, Tape>> tanh_slope(Taped<V, Tape> x) {
  const auto t = through<V>(x.tape, [&]() RECURRA_LAMBDA { return tanh(x.v); });
  return {t, {fma(-t.v, t.v, V(Number<V>(1))), x.tape}};
}
RECURRA_TAPED ValueSlope<Taped<V, Tape>> softplus_slope(Taped<V, Tape> x) {
  return both_through<V>(x.tape, [&]() RECURRA_LAMBDA { return softplus_slope(x.v); });
}
RECURRA_TAPED ValueSlope<Taped<V, Tape>> silu_slope(Taped<V, Tape> x) {
  return both_through<V>(x.tape, [&]() RECURRA_LAMBDA { return silu_slope(x.v); });
}

#undef RECURRA_TAPED
#undef RECURRA_TAPED_1
#undef RECURRA_TAPED_2
#undef RECURRA_TAPED_COMPARE

}  // namespace recurra::RECURRA_ISA
