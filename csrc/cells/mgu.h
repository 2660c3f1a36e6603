// MGU, the minimal gated unit (Zhou et al., arXiv 1603.09420): one gate to forget and to reset.
#pragma once
#include "cells/pack.h"

namespace recurra::RECURRA_ISA {

struct Mgu {
  static constexpr const char* name = "mgu";
  static constexpr auto inputs = names("forget", "candidate");
  static constexpr auto states = names("h");
  static constexpr auto params = names("a_forget", "a_candidate");
  static constexpr auto affine_params = affine(Affine{0, 0, 0});
  static constexpr int output = 0;

  template <class X, class H, class P>
  RECURRA_FN static auto step(X inputs, H states, P params) {
    auto [x_f, x_n] = inputs;
    auto [h] = states;
    auto [a_f, a_n] = params;
    auto f = sigmoid(fma(a_f, h, x_f));
    auto n = tanh(fma(a_n, f * h, x_n));
    return pack(fma(f, n - h, h));
  }
};

}  // namespace recurra::RECURRA_ISA
