// ParaGRU, the diagonal gated recurrent unit of ParaRNN (arXiv 2510.21450). Its update gate weighs
// the candidate, against torch.nn.GRU, whose gate weighs the old state.
#pragma once
#include "cells/pack.h"

namespace recurra::RECURRA_ISA {

struct ParaGru {
  static constexpr const char* name = "paragru";
  static constexpr auto inputs = names("update", "reset", "candidate");
  static constexpr auto states = names("h");
  static constexpr auto params = names("a_update", "a_reset", "a_candidate");
  static constexpr auto affine_params = affine(Affine{0, 0, 0}, Affine{1, 1, 0});
  static constexpr int output = 0;

  template <class X, class H, class P>
  RECURRA_FN static auto step(X inputs, H states, P params) {
    auto [x_z, x_r, x_n] = inputs;
    auto [h] = states;
    auto [a_z, a_r, a_n] = params;
    auto r = sigmoid(fma(a_r, h, x_r));  // first: the candidate waits for it
    auto z = sigmoid(fma(a_z, h, x_z));
    auto n = tanh(fma(a_n, h * r, x_n));
    return pack(fma(z, n - h, h));
  }
};

}  // namespace recurra::RECURRA_ISA
