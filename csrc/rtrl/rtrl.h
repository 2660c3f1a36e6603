// rtrl: sensitivities S of the states of a channel-wise recurrence to the parameters of its
// channel, carried over a chunk of T steps. The input is x[t,g,n] = sum_d W[g,n,d] u[t,d] + b[g,n].
// With P[k,j] = d h_T[k] / d h_0[j], F[k,t,g] = d h_T[k] / d x_t[g] and E[k,p] = d h_T[k] / d
// params[p], x held fixed, all of one sample and channel, a chunk moves
//
//   S.weight[k,g,d] <- sum_j P[k,j] S.weight[j,g,d] + sum_t F[k,t,g] u[t,d]
//   S.bias[k,g]     <- sum_j P[k,j] S.bias[j,g]     + sum_t F[k,t,g]
//   S.params[k,p]   <- sum_j P[k,j] S.params[j,p]   + E[k,p]
//
// and the gradient of the parameters is what the chunk gives plus sum_k dh_0[k] S[k]. Williams and
// Zipser 1989; the chunk form is that of Schmidhuber 1992, exact here because channels do not mix.
//
// Sums over j and t ascend, one fused multiply-add each; those over samples and k likewise. Where
// all P of a channel are 0, after a reset, S starts from 0 whatever it was; so does a sum where
// dh_0 is 0.
#pragma once
#include "cuda/stream.h"
#include "simd/isa.h"
#include "view.h"

namespace recurra {

constexpr int64_t kMostRtrlStates = 4;

// The arrays of S, and all others along their last dimension, are contiguous; one type for all.
struct RtrlUpdate {
  View<5> weight;   // (B, K, G, N, D)
  View<4> bias;     // (B, K, G, N)
  View<4> params;   // (B, K, P, N)
  View<3> u;        // (B, T, D)
  View<4> decay;    // (K, B, K, N)
  View<5> factors;  // (K, B, T, G, N)
  View<4> direct;   // (K, B, P, N)
};

struct RtrlGradient {
  View<5> weight;   // (B, K, G, N, D)
  View<4> bias;     // (B, K, G, N)
  View<4> params;   // (B, K, P, N)
  View<3> dh0;      // (B, K, N)
  View<4> dweight;  // (B or 1 for the sum over samples, G, N, D)
  View<3> dbias;    // (B or 1, G, N)
  View<3> dparams;  // (B or 1, P, N)
};

// P, F and E of a chunk of a cell, as rnn and K runs of its backward give them: on the device
// alone.
struct RtrlDerivatives {
  int cell = 0;    // its place in the list of csrc/cells/all.h
  View<4> x;       // (B, T, G, N)
  View<2> params;  // (P, N)
  View<3> h0;      // (B, K, N), or none
  View<2> reset;   // (B, T) of bool, or none
  // Contiguous: those of RtrlUpdate, and (B, T, K, N) for the states before each step.
  View<4> decay;
  View<5> factors;
  View<4> direct;
  void* states = nullptr;
};

}  // namespace recurra

RECURRA_KERNEL(rtrl_update, RtrlUpdate)
RECURRA_KERNEL(rtrl_gradient, RtrlGradient)

namespace recurra::cuda {
// On the device every array of a gradient is contiguous.
void rtrl_update(const RtrlUpdate& args, const Stream& stream);
void rtrl_gradient(const RtrlGradient& args, const Stream& stream);
void rtrl_derivatives(const RtrlDerivatives& args, const Stream& stream);
}  // namespace recurra::cuda
