// minLSTM (Feng et al., arXiv 2410.01201) with normalised gates, in linear space: the part of the
// input gate is i / (i + f) of sigmoids, sigmoid(softplus(-x_f) - softplus(-x_i)). scale is 1, or
// up to 2 where the state may be kept with either sign.
#pragma once
#include "cells/pack.h"

namespace recurra::RECURRA_ISA {

struct MinLstm {
  static constexpr const char* name = "minlstm";
  static constexpr auto inputs = names("forget", "input", "candidate");
  static constexpr auto states = names("h");
  static constexpr auto params = names("scale");
  static constexpr auto affine_params = affine();
  static constexpr int output = 0;

  template <class X, class H, class P>
  RECURRA_FN static auto step(X inputs, H states, P params) {
    auto [x_f, x_i, x_n] = inputs;
    auto [h] = states;
    auto [scale] = params;
    auto forgotten = softplus(-x_f);
    auto refused = softplus(-x_i);
    auto z = scale * sigmoid(forgotten - refused);
    auto small = sigmoid(x_n);
    auto n = select(x_n < like(x_n, 0), small, x_n + like(x_n, 0.5));
    return pack(fma(1 - z, h, z * n));
  }
};

}  // namespace recurra::RECURRA_ISA
