// What kernels that go along time with a chain are given, and how its outputs are written.
#pragma once
#include "rnn/chain.h"

namespace recurra::cuda::rnn_detail {

// Steps whose inputs are on their way while as many are computed.
constexpr int kAhead = 4;

template <class T>
struct Forward : Inputs<T> {
  Elements<4> y;
  Array<T, 3> h0, h_last;
  T* saved;
  Integers slots;
  int64_t slot_count;
  const int64_t* taken;  // (S, N): steps that are taken already, with the states after them in h0
  bool all_states;

  Forward(const Rnn& args, const Indices& cu_seqlens, const Indices& slots_of,
          const int64_t* steps_taken = nullptr)
      : Inputs<T>(args, cu_seqlens),
        y(args.y),
        h0(steps_taken ? args.h_last : args.h0),
        h_last(args.h_last),
        saved(static_cast<T*>(args.saved)),
        slots(slots_of),
        slot_count(args.h_last.size[0]),
        taken(steps_taken),
        all_states(args.y.size[2] > 1) {}
};

template <class Cell, class T>
RECURRA_FN void put(const Forward<T>& p, int64_t offset, const T (&h)[Sizes<Cell>::S]) {
  if (!p.all_states) return write(p.y, offset, h[Cell::output]);
  for_each_index<Sizes<Cell>::S>(
      [&](auto s) RECURRA_LAMBDA { write(p.y, offset + s * p.y.step[2], h[s]); });
}

// NewtonSummary.
template <class T>
struct Summary {
  int32_t* passes;
  T* mismatch;
  int32_t* failures;

  explicit Summary(const NewtonSummary& of)
      : passes(of.passes), mismatch(static_cast<T*>(of.mismatch)), failures(of.failures) {}
};

// The steps of each chain but the first `taken`, whose last states are in args.h_last; all of them,
// from args.h0, where that is null. The summary is that of a sequential call, or null.
void rest(const Rnn& args, const Indices& cu_seqlens, const Indices& slots, const int64_t* taken,
          const NewtonSummary& summary, const Stream& stream);

}  // namespace recurra::cuda::rnn_detail
