// What recurra.jit compiles for a GPU behind a cell of the user's own, which RECURRA_CELL names:
// the kernels of this folder with that cell alone, of one argument.
#pragma once
#include "rnn/backward.h"
#include "rnn/jit_call.h"
#include "rnn/rnn.cu"

namespace recurra::cuda::rnn_detail {

template <class T>
__global__ void __launch_bounds__(kThreads, 8) jit_forward(const JitCall call) {
  Rnn args;
  set_inputs(call, args);
  args.y = call.y;
  args.h_last = call.h_last;
  args.saved = call.saved.data;
  const View<1> cu_seqlens = call.cu_seqlens;
  const Forward<T> p(args, cu_seqlens, {});
  advance_chains<RECURRA_CELL>(p);
}

template <class T>
__device__ __forceinline__ RnnBackward jit_arguments(const JitCall& call) {
  RnnBackward args;
  set_inputs(call, args);
  args.dy = call.y;
  args.dh_last = call.h_last;
  args.saved = call.saved.data;
  args.dx = call.dx;
  args.dparams = call.dparams;
  args.dh0 = call.dh0;
  args.parts = call.parts;
  return args;
}
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 8 : 6)
    jit_backward(const JitCall call) {
  const View<1> cu_seqlens = call.cu_seqlens;
  const Backward<T> p(jit_arguments<T>(call), cu_seqlens, call.sums.data);
  walk_chains_back<RECURRA_CELL>(p);
}
// After it, with a block for every sixteen channels of a parameter.
template <class T>
__global__ void __launch_bounds__(kColumns* kMostParts) jit_sums(const JitCall call) {
  const RnnBackward args = jit_arguments<T>(call);
  const View<1> cu_seqlens = call.cu_seqlens;
  const Backward<T> p(args, cu_seqlens, call.sums.data);
  const ParameterSums<T> sums{p,
                              p.chunk_sums,
                              Elements<2>(args.dparams),
                              args.params.size[0],
                              args.parts,
                              cu_seqlens ? 1 : args.together()};
  add_chunk_sums(sums);
}

}  // namespace recurra::cuda::rnn_detail
