// How many numbers a tape of math/taped.h holds of a step, counted by the compiler: it runs the
// step on numbers of which nothing is known. RECURRA_FN is constexpr then (rnn/countable.h).
#pragma once
#include "cells/pack.h"
#include "math/taped.h"

namespace recurra::RECURRA_ISA {

struct Unknown {
  constexpr Unknown() = default;
  constexpr Unknown(float) {}  // NOLINT: any number will do
};
template <>
struct NumberOf<Unknown> {
  using type = float;
};
// Of a comparison.
struct UnknownMask {};

// clang-format off
constexpr Unknown operator-(Unknown) { return {}; }
constexpr Unknown operator+(Unknown, Unknown) { return {}; }
constexpr Unknown operator-(Unknown, Unknown) { return {}; }
constexpr Unknown operator*(Unknown, Unknown) { return {}; }
constexpr Unknown operator/(Unknown, Unknown) { return {}; }
constexpr UnknownMask operator<(Unknown, Unknown) { return {}; }
constexpr UnknownMask operator<=(Unknown, Unknown) { return {}; }
constexpr UnknownMask operator==(Unknown, Unknown) { return {}; }
constexpr UnknownMask operator>(Unknown, Unknown) { return {}; }
constexpr UnknownMask operator>=(Unknown, Unknown) { return {}; }
constexpr Unknown abs(Unknown) { return {}; }
constexpr Unknown sqrt(Unknown) { return {}; }
constexpr Unknown round(Unknown) { return {}; }
constexpr Unknown exponent(Unknown) { return {}; }
constexpr Unknown exp(Unknown) { return {}; }
constexpr Unknown tanh(Unknown) { return {}; }
constexpr Unknown exp_minus_abs(Unknown) { return {}; }
constexpr Unknown min(Unknown, Unknown) { return {}; }
constexpr Unknown max(Unknown, Unknown) { return {}; }
constexpr Unknown copysign(Unknown, Unknown) { return {}; }
constexpr Unknown fraction(Unknown, Unknown) { return {}; }
constexpr Unknown scale2(Unknown, Unknown) { return {}; }
constexpr Unknown fma(Unknown, Unknown, Unknown) { return {}; }
constexpr Unknown select(UnknownMask, Unknown, Unknown) { return {}; }
constexpr SigmoidSides<Unknown> sigmoid_sides(Unknown) { return {}; }
constexpr ValueSlope<Unknown> softplus_slope(Unknown) { return {}; }
constexpr ValueSlope<Unknown> silu_slope(Unknown) { return {}; }
// clang-format on

struct Counting {
  static constexpr bool replays = false;
  int count = 0;
  constexpr void keep(Unknown) { ++count; }
};

template <class Cell>
constexpr int count_kept() {
  Counting tape;
  const auto at = [&](auto) { return Taped<Unknown, Counting>(Unknown(), &tape); };
  Cell::step(generate<kInputs<Cell>>(at), generate<kStates<Cell>>(at), generate<kParams<Cell>>(at));
  return tape.count;
}

}  // namespace recurra::RECURRA_ISA
