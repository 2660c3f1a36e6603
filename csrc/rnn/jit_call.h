// What recurra.jit hands to what it has compiled, on the CPU and on a GPU.
#pragma once
#include "rnn/rnn.h"

namespace recurra {

// As python/recurra/jit/call.py has them. Data is null for what is not there.
struct JitTensor {
  void* data;
  int64_t dtype, size[4], stride[4];

  template <int N>
  operator View<N>() const {  // NOLINT: that is what it is for
    View<N> v;
    v.data = data;
    v.dtype = static_cast<DType>(dtype);
    for (int n = 0; n < N; ++n) {
      v.size[n] = size[n];
      v.stride[n] = stride[n];
    }
    return v;
  }
};
struct JitCall {
  JitTensor x, params, h0, reset;
  JitTensor y, h_last, saved;        // of the backward: their cotangents
  JitTensor dx, dparams, dh0, sums;  // of the backward alone
  JitTensor cu_seqlens;              // of packed sequences on a GPU
  int64_t count, time;               // of sequences, of a batch's steps
  const int64_t* offsets;            // of packed sequences on the CPU
  int64_t threads;                   // of the CPU
  int64_t parts;                     // of the backward on a GPU
};

inline void set_inputs(const JitCall& call, RnnInputs& args) {
  args.x = call.x;
  args.params = call.params;
  args.h0 = call.h0;
  args.reset = call.reset;
  args.sequences = {call.count, call.time, nullptr};
}

}  // namespace recurra
