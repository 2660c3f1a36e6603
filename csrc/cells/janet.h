// JANET (van der Westhuizen and Lasenby, arXiv 1804.04849): the LSTM's forget gate alone. What
// comes in is gated by 1 - sigmoid(s - 1), so that more may be kept than is forgotten.
#pragma once
#include "cells/pack.h"

namespace recurra::RECURRA_ISA {

struct Janet {
  static constexpr const char* name = "janet";
  static constexpr auto inputs = names("forget", "candidate");
  static constexpr auto states = names("h");
  static constexpr auto params = names("a_forget", "a_candidate");
  static constexpr auto affine_params = affine(Affine{0, 0, 0}, Affine{1, 1, 0});
  static constexpr int output = 0;

  template <class X, class H, class P>
  RECURRA_FN static auto step(X inputs, H states, P params) {
    auto [x_f, x_n] = inputs;
    auto [h] = states;
    auto [a_f, a_n] = params;
    auto s = fma(a_f, h, x_f);
    auto f = sigmoid(s);
    auto g = sigmoid(1 - s);
    auto n = tanh(fma(a_n, h, x_n));
    return pack(fma(g, n, f * h));
  }
};

}  // namespace recurra::RECURRA_ISA
