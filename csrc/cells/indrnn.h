// IndRNN (Li et al., arXiv 1803.04831): h' = max(0, x + u h).
#pragma once
#include "cells/pack.h"

namespace recurra::RECURRA_ISA {

struct IndRnn {
  static constexpr const char* name = "indrnn";
  static constexpr auto inputs = names("x");
  static constexpr auto states = names("h");
  static constexpr auto params = names("u");
  static constexpr auto affine_params = affine(Affine{0, 0, 0});
  static constexpr int output = 0;

  template <class X, class H, class P>
  RECURRA_FN static auto step(X inputs, H states, P params) {
    auto [x] = inputs;
    auto [h] = states;
    auto [u] = params;
    auto s = fma(u, h, x);
    return pack(select(s <= like(s, 0), like(s, 0), s));  // keeps a NaN, which max() may not
  }
};

}  // namespace recurra::RECURRA_ISA
