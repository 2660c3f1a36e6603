// What recurra.jit compiles behind a cell of the user's own, which RECURRA_CELL names: the engines
// of this folder with that cell alone, called through C.
#include <atomic>

#include "cells/all.h"
#include "cells/jacobian.h"
#include "parallel.cpp"
#include "rnn/backward.simd.cpp"
#include "rnn/choose.h"
#include "rnn/forward.simd.cpp"
#include "rnn/jit_call.h"
#include "rnn/rows.simd.cpp"

namespace recurra::RECURRA_ISA {

std::atomic<int> jit_threads{1};

void start(const JitCall& call, RnnInputs& args) {
  set_inputs(call, args);
  args.sequences.offsets = call.offsets;
  jit_threads = static_cast<int>(call.threads);
  set_thread_source([] { return jit_threads.load(); });
}

}  // namespace recurra::RECURRA_ISA

#define RECURRA_C extern "C" __attribute__((visibility("default")))

// Rows that the backward holds of a step.
RECURRA_C int64_t recurra_jit_held() {
  return recurra::RECURRA_ISA::recurrent::cell_rows<float>(0).held;
}
RECURRA_C void recurra_jit_forward(const recurra::JitCall* call) {
  recurra::Rnn args;
  recurra::RECURRA_ISA::start(*call, args);
  args.y = call->y;
  args.h_last = call->h_last;
  args.saved = call->saved.data;
  recurra::RECURRA_ISA::rnn(args);
}
// Rows of sums that the backward needs.
RECURRA_C int64_t recurra_jit_parts(const recurra::JitCall* call) {
  recurra::RnnInputs args;
  recurra::RECURRA_ISA::start(*call, args);
  return recurra::rnn_parts(args, call->offsets != nullptr);
}
RECURRA_C void recurra_jit_backward(const recurra::JitCall* call) {
  recurra::RnnBackward args;
  recurra::RECURRA_ISA::start(*call, args);
  args.dy = call->y;
  args.dh_last = call->h_last;
  args.saved = call->saved.data;
  args.dx = call->dx;
  args.dparams = call->dparams;
  args.dh0 = call->dh0;
  args.sums = call->sums.data;
  args.parts = recurra::rnn_parts(args, call->offsets != nullptr);
  recurra::RECURRA_ISA::rnn_backward(args);
}
// One step and all of its derivatives, without a tape and whatever affine_params says.
RECURRA_C void recurra_jit_jacobian(const double* x, const double* h, const double* p, double* out,
                                    double* J) {
  using Cell = recurra::RECURRA_ISA::RECURRA_CELL;
  constexpr int K = recurra::RECURRA_ISA::kInputs<Cell> + recurra::RECURRA_ISA::kStates<Cell> +
                    recurra::RECURRA_ISA::kParams<Cell>;
  recurra::RECURRA_ISA::jacobian<Cell>(x, h, p, out, reinterpret_cast<double (*)[K]>(J));
}
