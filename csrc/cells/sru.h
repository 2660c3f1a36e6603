// SRU (Lei et al., arXiv 1709.02755). The highway output h is a state that no step reads.
#pragma once
#include "cells/pack.h"

namespace recurra::RECURRA_ISA {

struct Sru {
  static constexpr const char* name = "sru";
  static constexpr auto inputs = names("candidate", "forget", "reset", "skip");
  static constexpr auto states = names("c", "h");
  static constexpr auto params = names("v_forget", "v_reset");
  static constexpr auto affine_params = affine(Affine{0, 1, 0}, Affine{1, 2, 0});
  static constexpr int output = 1;

  template <class X, class H, class P>
  RECURRA_FN static auto step(X inputs, H states, P params) {
    auto [x_c, x_f, x_r, skip] = inputs;
    auto [c, h] = states;
    auto [v_f, v_r] = params;
    auto f = sigmoid(fma(v_f, c, x_f));
    auto r = sigmoid(fma(v_r, c, x_r));
    auto memory = fma(f, c - x_c, x_c);
    return pack(memory, fma(r, memory - skip, skip));
  }
};

}  // namespace recurra::RECURRA_ISA
