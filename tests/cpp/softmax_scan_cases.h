// The cases of softmax_scan. Its oracle is in Python; here its instruction sets are compared.
#pragma once
#include "case.h"
#include "softmax_scan/softmax_scan.h"

namespace recurra::test {

// The inputs of either direction, (batch, time, D).
inline void softmax_inputs(Case& c, SoftmaxScanInputs& in, DType dtype, int64_t batch, int64_t time,
                           int64_t D) {
  const auto one_of = [&](int64_t n) { return c.random.chance(20) ? 1 : n; };
  const int64_t scores[] = {one_of(batch), one_of(time), one_of(D)};
  // Weights that are far apart, for which outputs take exponentials of their own; where all agree
  // in every bit, since what is left of them beside each other may be next to nothing.
  const bool whole = scores[0] == batch && scores[1] == time && scores[2] == D && time < 512;
  const bool far = whole && c.random.chance(30);
  in.s = c.input<3>("s", dtype, scores, far ? Range{-90, 90} : Range{-4, 4});
  in.v = c.input<3>("v", dtype, {batch, time, D});
  if (c.random.chance(60))
    in.decay = c.input<1>("decay", parameter(c.random, dtype), {D}, {-0.25, 0.5});
  const Range bonus = far ? Range{-40, 40} : Range{};
  if (c.random.chance(60)) in.bonus = c.input<1>("bonus", parameter(c.random, dtype), {D}, bonus);
}

// By how much combining the parts of a sequence may differ from walking it: the maximum of a weight
// takes the decay away once for a part instead of once a step, which in numbers of up to 200 rounds
// by up to 100 units a step, and what it differs by is a relative error of every weight. A gradient
// that is summed in another order differs by a unit of its largest partial sum for each of few
// additions that matter, and what is left of the sum may be a thousandth of that.
inline double softmax_within(const SoftmaxScanInputs& in, bool split, bool reduced) {
  const double unit = in.v.dtype == DType::f64 ? 0x1p-53 : 0x1p-24;
  const double stored = in.v.dtype == DType::bf16 ? 0x1p-7 : in.v.dtype == DType::f16 ? 0x1p-10 : 0;
  const double units = split ? 100.0 * static_cast<double>(in.sequences.time) : 8192;
  return split || reduced ? units * unit + stored : 0;
}

// The kernel on the device, which leaves the padding of `saved` as it is: here as the CPU wrote it.
inline void emulate_softmax_scan(Case& c, const SoftmaxScan& args, const View<1>& offsets,
                                 const View<1>& slots) {
  const int64_t item = item_size(state_of(args.v.dtype)), channels = args.v.size[2];
  const int64_t rows = args.saved ? 3 * args.sequences.chunk_rows(kSoftmaxChunk) : 0;
  void* const scratch = c.scratch(cuda::softmax_scan_scratch(args) * item);
  c.emulated_within = softmax_within(args, scratch != nullptr, false);
  c.emulated = [&c, args, offsets, slots, scratch, rows, channels, item] {
    SoftmaxScan given = args;
    given.sequences.offsets = given.slots = nullptr;
    if (rows > 0 && channels < args.padded()) {
      softmax_scan(args);
      char* const saved = static_cast<char*>(args.saved);
      const std::vector<char> all(saved, saved + rows * args.padded() * item);
      c.restore();
      for (int64_t i = 0; i < static_cast<int64_t>(all.size()); ++i)
        if (i / item % args.padded() >= channels) saved[i] = all[static_cast<size_t>(i)];
    }
    cuda::softmax_scan(given, offsets, slots, scratch, {});
  };
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
  emulate_softmax_scan(c, args, offsets_of(c, args.sequences), {});
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
  emulate_softmax_scan(c, args, {}, args.slots ? c.indices("device", args.slots, rows) : View<1>{});
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
  const int64_t lanes = from[2] == D ? D : std::max<int64_t>(1, (D + 15) / 16),
                item = item_size(state);
  const int64_t partial = reduced ? from[0] * from[1] * lanes : 0;
  const bool shared = reduced && (args.sequences.offsets ? from[1] == 1 : from[0] == 1);
  args.parts = shared ? 1 : std::clamp<int64_t>(count, 1, 8);
  const int64_t rows = args.sequences.chunk_rows(kSoftmaxChunk), sums = args.parts * 2 * padded;
  c.dense();
  args.saved = c.input<3>("saved", state, {rows, 3, padded}, {0.1, 2}).data;
  // What the device has no use for: no output.
  const int64_t bytes = (partial + sums) * item;
  char* const zeros = static_cast<char*>(c.scratch(bytes));
  args.sums = zeros + partial * item;
  if (reduced)
    args.partial = {zeros, state, {from[0], from[1], lanes}, {from[1] * lanes, lanes, 1}};
  c.run = [args, zeros, bytes] {
    if (zeros) std::memset(zeros, 0, static_cast<size_t>(bytes));
    softmax_scan_backward(args);
  };
  SoftmaxScanBackward device = args;
  device.sequences.offsets = nullptr;
  device.partial = {};
  device.sums = nullptr;
  void* const scratch = c.scratch(cuda::softmax_scan_backward_scratch(device) * item);
  const View<1> offsets = offsets_of(c, args.sequences);
  SoftmaxScan forward;  // whose time is split alike
  static_cast<SoftmaxScanInputs&>(forward) = args;
  c.emulated_within = softmax_within(args, cuda::softmax_scan_scratch(forward) > 0, reduced);
  c.emulated = [device, offsets, scratch] {
    cuda::softmax_scan_backward(device, offsets, scratch, {});
  };
}

// On the device no value of cu_seqlens or slots may lead out of the arrays, though sequences that
// overlap write the same elements.
inline void hostile_softmax_scan_case(Case& c, const Shape& s) {
  const DType dtype = activation(c.random), state = state_of(dtype);
  const int64_t D = s.channels, item = item_size(state);
  c.raced = true;
  if (c.random.chance(30)) {  // a step
    SoftmaxScan args;
    const int64_t states = 1 + c.random.below(4);
    args.sequences = {s.time, 1, nullptr};
    softmax_inputs(c, args, dtype, s.time, 1, D);
    args.h0 = args.h_last = c.output<3>("h", state, {states, 3, D});
    args.o = c.output<3>("o", dtype, {s.time, 1, D});
    const auto slots = hostile_integers(c.random, s.time, states);
    const View<1> on_device = c.indices("slots", slots.data(), s.time);
    c.emulated = [args, on_device] { cuda::softmax_scan(args, {}, on_device, nullptr, {}); };
    return;
  }
  const auto ends = hostile_integers(c.random, 1 + c.random.below(6), s.time);
  const auto count = static_cast<int64_t>(ends.size()) - 1;
  const View<1> offsets = c.indices("cu_seqlens", ends.data(), count + 1);
  // What is saved has a row more for each packed sequence.
  const int64_t rows[] = {s.time / kSoftmaxChunk + count, 3, (D + 15) / 16 * 16};
  if (c.random.chance(50)) {
    SoftmaxScan args;
    args.sequences = {count, s.time, nullptr};
    softmax_inputs(c, args, dtype, 1, s.time, D);
    args.o = c.output<3>("o", dtype, {1, s.time, D});
    args.h_last = c.output<3>("h_last", state, {count, 3, D});
    args.saved = c.output<3>("saved", state, rows, true).data;
    void* const scratch = c.scratch(cuda::softmax_scan_scratch(args) * item);
    c.emulated = [args, offsets, scratch] { cuda::softmax_scan(args, offsets, {}, scratch, {}); };
    return;
  }
  SoftmaxScanBackward args;
  args.sequences = {count, s.time, nullptr};
  softmax_inputs(c, args, dtype, 1, s.time, D);
  args.saved = c.output<3>("saved", state, rows, true).data;
  args.d_o = c.input<3>("do", dtype, {1, s.time, D});
  args.ds = c.output<3>("ds", dtype, {args.s.size[0], args.s.size[1], args.s.size[2]});
  args.dv = c.output<3>("dv", dtype, {1, s.time, D});
  args.dh0 = c.output<3>("dh0", state, {count, 3, D});
  if (args.decay) args.ddecay = c.output<1>("ddecay", args.decay.dtype, {D});
  if (args.bonus) args.dbonus = c.output<1>("dbonus", args.bonus.dtype, {D});
  void* const scratch = c.scratch(cuda::softmax_scan_backward_scratch(args) * item);
  c.emulated = [args, offsets, scratch] {
    cuda::softmax_scan_backward(args, offsets, scratch, {});
  };
}

}  // namespace recurra::test
