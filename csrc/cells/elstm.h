// eLSTM, the LSTM with element-wise recurrence of Irie, Gopalakrishnan and Schmidhuber
// (arXiv 2305.19044), whose gates see the memory. Its output gate is outside of the recurrence.
#pragma once
#include "cells/pack.h"

namespace recurra::RECURRA_ISA {

struct ELstm {
  static constexpr const char* name = "elstm";
  static constexpr auto inputs = names("forget", "candidate");
  static constexpr auto states = names("c");
  static constexpr auto params = names("w_forget", "w_candidate");
  static constexpr auto affine_params = affine(Affine{0, 0, 0}, Affine{1, 1, 0});
  static constexpr int output = 0;

  template <class X, class H, class P>
  RECURRA_FN static auto step(X inputs, H states, P params) {
    auto [x_f, x_z] = inputs;
    auto [c] = states;
    auto [w_f, w_z] = params;
    auto f = sigmoid(fma(w_f, c, x_f));
    auto z = tanh(fma(w_z, c, x_z));
    return pack(fma(f, c - z, z));
  }
};

}  // namespace recurra::RECURRA_ISA
