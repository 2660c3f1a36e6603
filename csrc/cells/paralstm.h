// ParaLSTM, the diagonal LSTM of ParaRNN (arXiv 2510.21450): input and forget gate are coupled, and
// every gate also sees the memory, the output gate the new one.
#pragma once
#include "cells/pack.h"

namespace recurra::RECURRA_ISA {

struct ParaLstm {
  static constexpr const char* name = "paralstm";
  static constexpr auto inputs = names("forget", "cell", "output");
  static constexpr auto states = names("c", "h");
  static constexpr auto params = names("a_forget", "a_cell", "a_output", "c_forget", "c_output");
  static constexpr auto affine_params =
      affine(Affine{0, 0, 1}, Affine{1, 1, 1}, Affine{2, 2, 1}, Affine{3, 0, 0});
  static constexpr int output = 1;

  template <class X, class H, class P>
  RECURRA_FN static auto step(X inputs, H states, P params) {
    auto [x_f, x_g, x_o] = inputs;
    auto [c, h] = states;
    auto [a_f, a_g, a_o, c_f, c_o] = params;
    auto f = sigmoid(fma(c_f, c, fma(a_f, h, x_f)));
    auto g = tanh(fma(a_g, h, x_g));
    auto memory = fma(f, c - g, g);
    auto o = sigmoid(fma(c_o, memory, fma(a_o, h, x_o)));
    return pack(memory, o * tanh(memory));
  }
};

}  // namespace recurra::RECURRA_ISA
