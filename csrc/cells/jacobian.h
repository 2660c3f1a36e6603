// A cell's step and its derivatives, from the step alone.
#pragma once
#include "cells/pack.h"

namespace recurra::RECURRA_ISA {

// The step on arrays of inputs x[G], states h[S] and parameters p[P].
template <class Cell, class V>
RECURRA_FN void step(const V* x, const V* h, const V* p, V* out) {
  const auto at = [](const V* v)
                      RECURRA_LAMBDA { return [v](auto i) RECURRA_LAMBDA { return v[i.value]; }; };
  const auto next = Cell::step(generate<kInputs<Cell>>(at(x)), generate<kStates<Cell>>(at(h)),
                               generate<kParams<Cell>>(at(p)));
  for_each_index<kStates<Cell>>([&](auto s) RECURRA_LAMBDA { out[s.value] = get<s.value>(next); });
}

// The step on duals that have the directions in Directions, numbered inputs first, then states,
// then parameters.
template <class Cell, unsigned Directions, class V>
RECURRA_FN auto step_along(const V* x, const V* h, const V* p) {
  constexpr int G = kInputs<Cell>, S = kStates<Cell>, P = kParams<Cell>, K = G + S + P;
  const auto seeded = [](const V* v, auto first) RECURRA_LAMBDA {
    return [v](auto i) RECURRA_LAMBDA {
      constexpr int k = decltype(first)::value + i.value;
      if constexpr ((Directions >> k) & 1) {
        return seed<K, k>(v[i.value]);
      } else {
        return v[i.value];
      }
    };
  };
  return Cell::step(generate<G>(seeded(x, Index<0>{})), generate<S>(seeded(h, Index<G>{})),
                    generate<P>(seeded(p, Index<G + S>{})));
}

// The directions on which new state s depends, of those in Directions.
template <class Cell, unsigned Directions, int s, class V>
inline constexpr unsigned kDependsOn =
    DualTraits<decltype(get<s>(step_along<Cell, Directions, V>(nullptr, nullptr, nullptr)))>::mask;

// The step and J[s][j], the derivative of new state s along direction j of those in Directions. The
// other columns of J are not touched.
template <class Cell, unsigned Directions, class V>
RECURRA_FN void jacobian_along(const V* x, const V* h, const V* p, V* out,
                               V (*J)[kInputs<Cell> + kStates<Cell> + kParams<Cell>]) {
  constexpr int S = kStates<Cell>, K = kInputs<Cell> + S + kParams<Cell>;
  const auto next = step_along<Cell, Directions>(x, h, p);
  for_each_index<S>([&](auto s) RECURRA_LAMBDA {
    const auto state = get<s.value>(next);
    out[s.value] = value(state);
    for_each_index<K>([&](auto k) RECURRA_LAMBDA {
      if constexpr ((Directions >> k.value) & 1)
        J[s.value][k.value] = tangent_or_zero<k.value, V>(state);
    });
  });
}

// All of them.
template <class Cell, class V>
RECURRA_FN void jacobian(const V* x, const V* h, const V* p, V* out,
                         V (*J)[kInputs<Cell> + kStates<Cell> + kParams<Cell>]) {
  constexpr int K = kInputs<Cell> + kStates<Cell> + kParams<Cell>;
  jacobian_along<Cell, (K == 32 ? ~0u : (1u << (K % 32)) - 1)>(x, h, p, out, J);
}

}  // namespace recurra::RECURRA_ISA
