// The diagonal Elman cell: h' = tanh(x + a h).
#pragma once
#include "cells/pack.h"

namespace recurra::RECURRA_ISA {

struct Tanh {
  static constexpr const char* name = "tanh";
  static constexpr auto inputs = names("x");
  static constexpr auto states = names("h");
  static constexpr auto params = names("a");
  static constexpr auto affine_params = affine(Affine{0, 0, 0});
  static constexpr int output = 0;

  template <class X, class H, class P>
  RECURRA_FN static auto step(X inputs, H states, P params) {
    auto [x] = inputs;
    auto [h] = states;
    auto [a] = params;
    return pack(tanh(fma(a, h, x)));
  }
};

}  // namespace recurra::RECURRA_ISA
