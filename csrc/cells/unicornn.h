// UnICORNN (Rusch and Mishra, arXiv 2103.05487): an undamped oscillator a channel, stepped so that
// its energy lasts.
#pragma once
#include "cells/pack.h"

namespace recurra::RECURRA_ISA {

struct UniCornn {
  static constexpr const char* name = "unicornn";
  static constexpr auto inputs = names("x");
  static constexpr auto states = names("y", "z");
  static constexpr auto params = names("w", "c", "alpha", "dt");
  static constexpr auto affine_params = affine(Affine{0, 0, 0});
  static constexpr int output = 0;

  template <class X, class H, class P>
  RECURRA_FN static auto step(X inputs, H states, P params) {
    auto [x] = inputs;
    auto [y, z] = states;
    auto [w, c, alpha, dt] = params;
    auto step = dt * sigmoid(c);
    auto force = fma(alpha, y, tanh(fma(w, y, x)));
    auto z_new = z - step * force;
    return pack(fma(step, z_new, y), z_new);
  }
};

}  // namespace recurra::RECURRA_ISA
