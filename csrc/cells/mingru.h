// minGRU (Feng et al., arXiv 2410.01201), whose gate and candidate do not depend on the state, in
// linear space. scale is 1, or up to 2 where the state may be kept with either sign.
#pragma once
#include "cells/pack.h"

namespace recurra::RECURRA_ISA {

struct MinGru {
  static constexpr const char* name = "mingru";
  static constexpr auto inputs = names("update", "candidate");
  static constexpr auto states = names("h");
  static constexpr auto params = names("scale");
  static constexpr auto affine_params = affine();
  static constexpr int output = 0;

  template <class X, class H, class P>
  RECURRA_FN static auto step(X inputs, H states, P params) {
    auto [x_z, x_n] = inputs;
    auto [h] = states;
    auto [scale] = params;
    auto z = scale * sigmoid(x_z);
    auto small = sigmoid(x_n);
    auto n = select(x_n < like(x_n, 0), small, x_n + like(x_n, 0.5));
    return pack(fma(1 - z, h, z * n));
  }
};

}  // namespace recurra::RECURRA_ISA
