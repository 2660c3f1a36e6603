// sLSTM of xLSTM (Beck et al., arXiv 2405.04517) with channel-wise recurrence: exponential input
// gate, sigmoid forget gate, and the stabiliser m, the logarithm to which c and n are relative. A
// state with n = 0, as the zero state is, is empty, and its m says nothing.
#pragma once
#include "cells/pack.h"

namespace recurra::RECURRA_ISA {

struct SLstm {
  static constexpr const char* name = "slstm";
  static constexpr auto inputs = names("input", "forget", "cell", "output");
  static constexpr auto states = names("c", "n", "m", "h");
  static constexpr auto params = names("r_input", "r_forget", "r_cell", "r_output");
  static constexpr auto affine_params =
      affine(Affine{0, 0, 3}, Affine{1, 1, 3}, Affine{2, 2, 3}, Affine{3, 3, 3});
  static constexpr int output = 3;

  template <class X, class H, class P>
  RECURRA_FN static auto step(X inputs, H states, P params) {
    auto [x_i, x_f, x_z, x_o] = inputs;
    auto [c, n, m, h] = states;
    auto [r_i, r_f, r_z, r_o] = params;
    auto i = fma(r_i, h, x_i);
    auto decayed = m - softplus(-fma(r_f, h, x_f));  // m + log sigmoid of the forget gate
    auto top = select(n <= like(n, 0), i, select(i <= i, max(i, decayed), i));  // keeps a NaN
    auto gap = decayed - top;
    // At most 1, and a NaN stays one. Of an empty state there is nothing to weigh.
    auto f = exp(select(gap > like(gap, 0), like(gap, 0), gap));
    auto g = exp(i - top);
    auto c_new = fma(f, c, g * tanh(fma(r_z, h, x_z)));
    auto n_new = fma(f, n, g);
    return pack(c_new, n_new, top, sigmoid(fma(r_o, h, x_o)) * (c_new / n_new));
  }
};

}  // namespace recurra::RECURRA_ISA
