// The LSTM with peepholes (Gers and Schmidhuber 2000, "Recurrent nets that time and count") in
// channel-wise form. Input and forget gate see the old memory, the output gate the new one.
#pragma once
#include "cells/pack.h"

namespace recurra::RECURRA_ISA {

struct PeepholeLstm {
  static constexpr const char* name = "peephole_lstm";
  static constexpr auto inputs = names("input", "forget", "cell", "output");
  static constexpr auto states = names("c", "h");
  static constexpr auto params =
      names("a_input", "a_forget", "a_cell", "a_output", "p_input", "p_forget", "p_output");
  static constexpr auto affine_params = affine(Affine{0, 0, 1}, Affine{1, 1, 1}, Affine{2, 2, 1},
                                               Affine{3, 3, 1}, Affine{4, 0, 0}, Affine{5, 1, 0});
  static constexpr int output = 1;

  template <class X, class H, class P>
  RECURRA_FN static auto step(X inputs, H states, P params) {
    auto [x_i, x_f, x_g, x_o] = inputs;
    auto [c, h] = states;
    auto [a_i, a_f, a_g, a_o, p_i, p_f, p_o] = params;
    auto i = sigmoid(fma(p_i, c, fma(a_i, h, x_i)));
    auto f = sigmoid(fma(p_f, c, fma(a_f, h, x_f)));
    auto memory = fma(f, c, i * tanh(fma(a_g, h, x_g)));
    auto o = sigmoid(fma(p_o, memory, fma(a_o, h, x_o)));
    return pack(memory, o * tanh(memory));
  }
};

}  // namespace recurra::RECURRA_ISA
