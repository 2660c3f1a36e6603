// The cases of softmax_scan. Its oracle is in Python; here its instruction sets are compared.
#pragma once
#include "case.h"
#include "softmax_scan/softmax_scan.h"

namespace recurra::test {

// The inputs of either direction, (batch, time, D).
inline void softmax_inputs(Case& c, SoftmaxScanInputs& in, DType dtype, int64_t batch, int64_t time,
                           int64_t D) {
  const auto one_of = [&](int64_t n) { return c.random.chance(20) ? 1 : n; };
  in.s = c.input<3>("s", dtype, {one_of(batch), one_of(time), one_of(D)}, {-4, 4});
  in.v = c.input<3>("v", dtype, {batch, time, D});
  if (c.random.chance(60))
    in.decay = c.input<1>("decay", parameter(c.random, dtype), {D}, {0, 0.5});
  if (c.random.chance(60)) in.bonus = c.input<1>("bonus", parameter(c.random, dtype), {D});
}

inline void softmax_scan_case(Case& c, const Shape& s) {
  SoftmaxScan args;
  const DType dtype = activation(c.random), state = state_of(dtype);
  const int64_t D = s.channels;
  args.sequences = c.sequences(s.batch, s.time);
  softmax_inputs(c, args, dtype, s.batch, s.time, D);
  if (c.random.chance(60)) args.h0 = c.input<3>("h0", state, {args.sequences.count, 3, D});
  args.o = c.output<3>("o", dtype, {s.batch, s.time, D});
  args.h_last = c.output<3>("h_last", state, {args.sequences.count, 3, D});
  const int64_t rows = args.sequences.chunk_rows(kSoftmaxChunk);
  if (c.random.chance(50))
    args.saved = c.output<3>("saved", state, {rows, 3, args.padded()}, true).data;
  c.run = [args] { softmax_scan(args); };
}

inline void softmax_scan_step_case(Case& c, const Shape& s) {
  SoftmaxScan args;
  const DType dtype = activation(c.random);
  const int64_t rows = s.time, states = rows + c.random.below(3), D = s.channels;
  if (states > rows || c.random.chance(50))
    args.slots = c.integers("slots", slots(c.random, rows, states));
  args.sequences = {rows, 1, nullptr};
  softmax_inputs(c, args, dtype, rows, 1, D);
  args.h0 = args.h_last = c.output<3>("h", state_of(dtype), {states, 3, D});
  args.o = c.output<3>("o", dtype, {rows, 1, D});
  c.run = [args] { softmax_scan(args); };
}

inline void softmax_scan_backward_case(Case& c, const Shape& s) {
  SoftmaxScanBackward args;
  const DType dtype = activation(c.random), state = state_of(dtype);
  const int64_t D = s.channels, size[] = {s.batch, s.time, D};
  args.sequences = c.sequences(s.batch, s.time);
  softmax_inputs(c, args, dtype, s.batch, s.time, D);
  const int64_t count = args.sequences.count, padded = args.padded(), *from = args.s.size;
  const int64_t states[] = {count, 3, D}, scores[] = {from[0], from[1], from[2]};
  if (c.random.chance(80)) args.d_o = c.input<3>("do", dtype, size);
  if (c.random.chance(60)) args.dh_last = c.input<3>("dh_last", state, states);
  args.ds = c.output<3>("ds", dtype, scores);
  args.dv = c.output<3>("dv", dtype, size);
  args.dh0 = c.output<3>("dh0", state, states);
  if (args.decay) args.ddecay = c.output<1>("ddecay", args.decay.dtype, {D});
  if (args.bonus) args.dbonus = c.output<1>("dbonus", args.bonus.dtype, {D});
  const bool reduced = !std::equal(size, size + 3, scores);
  if (reduced) {
    const int64_t lanes = from[2] == D ? D : (D + 15) / 16;
    args.partial = c.output<3>("partial", state, {from[0], from[1], lanes}, true);
  }
  const bool shared = reduced && (args.sequences.offsets ? from[1] == 1 : from[0] == 1);
  args.parts = shared ? 1 : std::clamp<int64_t>(count, 1, 8);
  const int64_t rows = args.sequences.chunk_rows(kSoftmaxChunk);
  args.saved = c.output<3>("saved", state, {rows, 3, padded}, true).data;
  args.sums = c.output<3>("sums", state, {args.parts, 2, padded}, true).data;
  c.run = [args] { softmax_scan_backward(args); };
}

}  // namespace recurra::test
