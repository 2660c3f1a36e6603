// LEM, long expressive memory (Rusch et al., arXiv 2110.04744), in channel-wise form.
#pragma once
#include "cells/pack.h"

namespace recurra::RECURRA_ISA {

struct Lem {
  static constexpr const char* name = "lem";
  static constexpr auto inputs = names("step_y", "step_z", "z", "y");
  static constexpr auto states = names("y", "z");
  static constexpr auto params = names("a_step_y", "a_step_z", "a_z", "a_y", "dt");
  static constexpr auto affine_params = affine(Affine{0, 0, 0}, Affine{1, 1, 0}, Affine{2, 2, 0});
  static constexpr int output = 0;

  template <class X, class H, class P>
  RECURRA_FN static auto step(X inputs, H states, P params) {
    auto [x_s, x_t, x_z, x_y] = inputs;
    auto [y, z] = states;
    auto [a_s, a_t, a_z, a_y, dt] = params;
    auto step_y = dt * sigmoid(fma(a_s, y, x_s));
    auto step_z = dt * sigmoid(fma(a_t, y, x_t));
    auto z_new = fma(step_z, tanh(fma(a_z, y, x_z)) - z, z);
    auto y_new = fma(step_y, tanh(fma(a_y, z_new, x_y)) - y, y);
    return pack(y_new, z_new);
  }
};

}  // namespace recurra::RECURRA_ISA
