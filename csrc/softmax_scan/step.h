// The arithmetic of one step of softmax_scan, of a channel or of sixteen, the same on the CPU and
// on CUDA: softmax_scan.h has the mathematics.
#pragma once
#include "math/functions.h"

namespace recurra::RECURRA_ISA::softmax {

constexpr int kParts = 3;  // of a state: m, c, a

// The maximum of an empty state, below that of any other.
template <class T>
constexpr T kEmpty = T(-1e38);
// A decay whose size is at most the largest that the empty state takes away without a change: its
// weights are 0 or 1 all the same, and the infinite one of an empty state would not be a number.
template <Plain V>
RECURRA_FN V limited_decay(V decay) {
  using T = Number<V>;
  const T largest = sizeof(T) == 4 ? T(1e30) : T(1e21);
  return at_least(V(-largest), at_most(V(largest), decay));
}

template <Plain V>
struct State {
  V m, c, a;
};

// e^{x - q} and e^{y - q} for q = max(x, y), of which one is 1 and the other `small`, e^{-|x - y|}.
template <Plain V>
struct Weights {
  V x, y;
};
template <class Mask, Plain V>
RECURRA_FN Weights<V> weights_where(Mask above, V small) {
  const V one(Number<V>(1));
  return {select(above, small, one), select(above, one, small)};
}
template <Plain V>
RECURRA_FN Weights<V> weights(V x, V y) {
  return weights_where(y > x, exp_minus_abs(x - y));
}

// The state after a step, of which x = m - decay and the weights of x and s are known.
template <Plain V>
RECURRA_FN State<V> advance(const State<V>& h, V x, const Weights<V>& w, V s, V v) {
  // max() alone would lose a NaN in x.
  return {select(x == x, max(x, s), x), fma(w.x, h.c, w.y), fma(w.x, h.a, w.y * v)};
}

// With a bonus, what makes the weights of an output from those of the state after its step: e^decay
// and e^bonus, the larger of them 1. Zeros where these are so far apart that tiny values could lose
// digits, the larger weight of an output being as small as the smaller of these.
template <Plain V>
RECURRA_FN Weights<V> output_factors(V decay, V bonus) {
  using T = Number<V>;
  const V zero(T(0)), small = exp_minus_abs(decay - bonus);
  const auto near = small >= V(T(1e-10));
  const Weights<V> w = weights_where(bonus > decay, small);
  return {select(near, w.x, zero), select(near, w.y, zero)};
}
// The weights of the state and of the score in the output, up to a factor, neither above 1.
template <Plain V>
RECURRA_FN Weights<V> output_weights(const Weights<V>& w, const Weights<V>& factors) {
  return {w.x * factors.x, w.y * factors.y};
}
// Where they hold: not where one is so small that its exponential may have lost digits.
template <Plain V>
RECURRA_FN auto accurate(const Weights<V>& output) {
  return min(output.x, output.y) >= V(Number<V>(1e-24));
}
// The same with exponentials of their own where they do not hold.
template <Plain V>
RECURRA_FN Weights<V> output_weights(const Weights<V>& w, const Weights<V>& factors, V m, V s,
                                     V bonus) {
  const Weights<V> quick = output_weights(w, factors);
  const auto holds = accurate(quick);
  if (all(holds)) return quick;
  const Weights<V> exact = weights(m, s + bonus);
  return {select(holds, quick.x, exact.x), select(holds, quick.y, exact.y)};
}

template <Plain V>
RECURRA_FN V inverse_or_zero(V x) {
  const V zero(Number<V>(0));
  return select(x == zero, zero, V(Number<V>(1)) / x);
}

// The cotangents of a state; that of the maximum is what it has of its own.
template <Plain V>
struct Cotangents {
  V excess, C, A;
};
// What turns the cotangent of the maximum into that, taken away, and back, added.
template <Plain V>
RECURRA_FN V shared_part(const Cotangents<V>& d, const State<V>& h) {
  return fma(d.C, h.c, d.A * h.a);
}

// The gradients of one step, and what goes on to the C and A of the state that it read.
template <Plain V>
struct Gradients {
  V s, v, C, A;
};
// Of an output with a bonus, from the state before its step.
template <Plain V>
RECURRA_FN Gradients<V> reverse_output(const Weights<V>& w, const State<V>& h, V v, V cotangent) {
  const V inverse = inverse_or_zero(fma(w.x, h.c, w.y));
  const V p = w.x * inverse, r = w.y * inverse, o = fma(p, h.a, r * v);
  const V to_v = r * cotangent, to_a = p * cotangent;
  return {to_v * (v - o), to_v, -(to_a * o), to_a};
}
// Of an output without one, from the state after the step, in its cotangents.
template <Plain V>
RECURRA_FN void reverse_output(Cotangents<V>& d, V c, V a, V cotangent) {
  const V inverse = inverse_or_zero(c), y = cotangent * inverse;
  d.A = d.A + y;
  d.C = fma(-y, a * inverse, d.C);
}
// Of the state, to which those of the output come; all but the part of the maximum.
template <Plain V>
RECURRA_FN void reverse_state(Cotangents<V>& d, const Weights<V>& w, V v, Gradients<V>& to) {
  to.s = fma(w.y, fma(v, d.A, d.C), to.s);
  to.v = fma(w.y, d.A, to.v);
  d.C = fma(w.x, d.C, to.C);
  d.A = fma(w.x, d.A, to.A);
}
// The sum of ddecay before the cotangents have gone past a step.
template <Plain V>
RECURRA_FN V add_to_decay(V sum, const Cotangents<V>& d, const Weights<V>& w, const State<V>& h) {
  return fma(-w.x, shared_part(d, h), sum);
}

}  // namespace recurra::RECURRA_ISA::softmax
