// The cases of selective_scan. Its oracles are in Python; here its instruction sets are compared.
#pragma once
#include "case.h"
#include "selective_scan/selective_scan.h"

namespace recurra::test {

inline DType complex_of(DType activations) {
  return activations == DType::f64 ? DType::c128 : DType::c64;
}
// Of h, beside u.
inline DType state_dtype(const SelectiveScanInputs& in) {
  return in.complex ? complex_of(in.u.dtype) : state_of(in.u.dtype);
}

// The inputs of either direction, of which a quarter is complex; returns the number of groups.
inline int64_t selective_inputs(Case& c, SelectiveScanInputs& in, DType dtype, int64_t batch,
                                int64_t time, int64_t D, int64_t N) {
  const int64_t groups = D > 0 && D % 2 == 0 && c.random.chance(30) ? 2 : 1;
  in.complex = c.random.chance(25);
  const auto kind = [&](DType real) { return in.complex ? complex_of(dtype) : real; };
  const auto projection = [&] { return c.random.chance(60) ? kind(dtype) : dtype; };
  in.delta_softplus = c.random.chance(50);
  in.spans = Spans(D, groups, c.random.pick<int64_t>({1, 2, 8}));
  in.u = c.input<3>("u", dtype, {batch, time, D});
  in.delta = c.input<3>("delta", dtype, {batch, time, D}, {0, 0.5});
  if (c.random.chance(50)) in.z = c.input<3>("z", dtype, {batch, time, D});
  in.A = c.input<2>("A", kind(parameter(c.random, dtype)), {D, N}, {-2, 0});
  in.B = c.input<4>("B", projection(), {batch, time, groups, N});
  in.C = c.input<4>("C", projection(), {batch, time, groups, N});
  if (c.random.chance(50)) in.D = c.input<1>("D", parameter(c.random, dtype), {D});
  if (c.random.chance(50))
    in.delta_bias = c.input<1>("delta_bias", parameter(c.random, dtype), {D}, {0, 0.2});
  return groups;
}

// The last bit of a number of about one.
inline double unit(DType d) {
  return d == DType::f64 ? 0x1p-52 : d == DType::f32 ? 0x1p-23 : d == DType::f16 ? 0x1p-10 : 0x1p-7;
}
// The emulated kernel's y where eight does not divide the number of real states: those left over,
// at most seven, are added up before they join y.
inline double readout_error(const SelectiveScan& args) {
  return args.complex || args.states() % 8 == 0 ? 0 : 8 * unit(args.u.dtype);
}

// What the kernels work in where they split time.
inline cuda::SelectiveScanParts selective_parts(Case& c, const SelectiveScanInputs& in) {
  cuda::SelectiveScanParts parts;
  parts.count = cuda::selective_scan_parts(in);
  if (parts.count == 1) return parts;
  const int64_t rows = in.sequences.count * parts.count, D = in.u.size[2], N = in.states();
  parts.sums = scratch<2>(c, DType::f64, {rows, D});
  parts.states = scratch<3>(c, state_dtype(in), {rows, D, N});
  return parts;
}
// By how much that changes what a walk computes: the gate of a sum of step sizes is not the product
// of gates, each of them off by up to three ulp, and a state carries one more rounding for each
// step and each part before it. The storage rounds what differs to the next number.
inline double split_error(const SelectiveScanInputs& in, const cuda::SelectiveScanParts& parts) {
  if (parts.count == 1) return 0;
  const DType dtype = in.u.dtype;
  const bool narrow = dtype == DType::bf16 || dtype == DType::f16;
  return 4 * static_cast<double>(in.sequences.time) * unit(state_of(dtype)) +
         (narrow ? unit(dtype) : 0);
}

inline View<1> cu_seqlens_of(Case& c, const Sequences& sequences) {
  if (!sequences.offsets) return {};
  return c.indices("cu_seqlens", sequences.offsets, sequences.count + 1);
}
// The device has neither offsets nor slots on the host.
template <class Args>
Args on_device(Args args) {
  args.sequences.offsets = nullptr;
  if constexpr (requires { args.slots; }) args.slots = nullptr;
  return args;
}

// What parts without a step must leave as it is: those of the first of two sequences, which has
// none, and the last of the second one's. There an A of minus infinity has no gate and an infinite
// complex number no product with one.
struct Infinite {
  bool infinite;

  Infinite(Case& c, bool infinite) : infinite(infinite) {
    if (infinite) c.dense();
  }
  Shape shape(const Shape& s) const {
    return infinite ? Shape{1, 96, std::min<int64_t>(s.channels, 33)} : s;
  }
  Sequences sequences(Case& c, const Shape& s) const {
    if (!infinite) return c.sequences(s.batch, s.time);
    return {2, s.time, c.integers("offsets", {0, 0, s.time})};
  }
  // `state`: of each sequence, or null.
  void fill(Case& c, const SelectiveScanInputs& in, const View<3>& state) const {
    if (!infinite) return;
    const DType real = state_of(in.u.dtype);  // of a complex number, as of states
    const bool full = state && (in.complex || c.random.chance(30));
    for (int64_t d = 0; d < in.u.size[2]; ++d)
      for (int64_t n = 0; n < in.states(); ++n) {
        if (full)
          store(state.at(0, d, n), real, INFINITY);
        else
          store(in.A.at(d, n), in.complex ? real : in.A.dtype, -INFINITY);
      }
  }
};

inline void selective_scan_case(Case& c, const Shape& any, bool infinite) {
  SelectiveScan args;
  const Infinite fill(c, infinite);
  const Shape s = fill.shape(any);
  const DType dtype = activation(c.random), state = state_of(dtype);
  const int64_t N = c.random.pick<int64_t>({1, 3, 8, 16, 17}), D = s.channels;
  args.sequences = fill.sequences(c, s);
  selective_inputs(c, args, dtype, s.batch, s.time, D, N);
  const int64_t count = args.sequences.count, padded = args.spans.padded();
  if (c.random.chance(60)) args.h0 = c.input<3>("h0", state_dtype(args), {count, D, N});
  fill.fill(c, args, args.h0);
  args.y = c.output<3>("y", dtype, {s.batch, s.time, D});
  args.h_last = c.output<3>("h_last", state_dtype(args), {count, D, N});
  args.lanes_A = c.scratch<2>("lanes_A", state, {args.rows(), padded}).data;
  if (N > kFewStates) args.state = c.scratch<3>("state", state, {count, args.rows(), padded}).data;
  // Lanes without a channel may hold anything.
  const int64_t saved[] = {args.chunk_rows(), args.rows(), padded};
  if (c.random.chance(50))
    args.saved = (padded == D ? c.output<3>("saved", state, saved, true)
                              : c.scratch<3>("saved", state, saved))
                     .data;
  c.run = [args] { selective_scan(args); };
  const View<1> offsets = cu_seqlens_of(c, args.sequences);
  const cuda::SelectiveScanParts parts = selective_parts(c, args);
  c.emulated = [args, offsets, parts] {
    cuda::selective_scan(on_device(args), offsets, parts, {});
  };
  c.emulated_within = std::max(readout_error(args), split_error(args, parts));
}
inline void selective_scan_case(Case& c, const Shape& s) { selective_scan_case(c, s, false); }
inline void infinite_selective_scan_case(Case& c, const Shape& s) {
  selective_scan_case(c, s, true);
}

inline void selective_scan_step_case(Case& c, const Shape& s) {
  SelectiveScan args;
  const DType dtype = activation(c.random), state = state_of(dtype);
  const int64_t N = c.random.pick<int64_t>({1, 3, 8, 16, 17}), D = s.channels;
  const int64_t rows = s.time, states = rows + c.random.below(3);
  if (states > rows || c.random.chance(50))
    args.slots = c.integers("slots", slots(c.random, rows, states));
  args.sequences = {rows, 1, nullptr};
  selective_inputs(c, args, dtype, rows, 1, D, N);
  args.h0 = args.h_last = c.output<3>("h", state_dtype(args), {states, D, N});
  args.y = c.output<3>("y", dtype, {rows, 1, D});
  const int64_t padded = args.spans.padded();
  args.lanes_A = c.scratch<2>("lanes_A", state, {args.rows(), padded}).data;
  if (N > kFewStates) args.state = c.scratch<3>("state", state, {rows, args.rows(), padded}).data;
  c.run = [args] { selective_scan_step(args); };
  View<1> slots;
  if (args.slots) slots = c.indices("slots", args.slots, rows);
  c.emulated = [args, slots] { cuda::selective_scan_step(on_device(args), slots, {}); };
  c.emulated_within = readout_error(args);
}

// On the device the values of cu_seqlens and of slots are not checked: none may lead out of the
// arrays.
inline std::vector<int64_t> any_integers(Random& random, int64_t count, int64_t end) {
  std::vector<int64_t> out(static_cast<size_t>(count));
  for (int64_t& x : out)
    x = random.pick<int64_t>({0, -1, end, end + 1, random.below(end + 1),
                              static_cast<int64_t>(random.next()), INT64_MIN, INT64_MAX});
  return out;
}

inline void hostile_selective_scan_case(Case& c, const Shape& s) {
  SelectiveScan args;
  c.raced = true;
  const DType dtype = activation(c.random), state = state_of(dtype);
  const int64_t N = c.random.pick<int64_t>({1, 16, 17}), D = s.channels;
  const bool step = c.random.chance(40);
  const int64_t count = step ? s.time : c.random.below(6), batch = step ? count : 1;
  const int64_t states = step ? c.random.below(8) : count, time = step ? 1 : s.time;
  const auto values = any_integers(c.random, step ? count : count + 1, step ? states : time);
  args.sequences = {count, time, nullptr};
  selective_inputs(c, args, dtype, batch, time, D, N);
  args.y = c.output<3>("y", dtype, {batch, time, D});
  args.h_last = c.output<3>("h_last", state_dtype(args), {states, D, N});
  const View<1> indices = c.indices("indices", values.data(), static_cast<int64_t>(values.size()));
  if (step) {
    args.h0 = args.h_last;
    c.emulated = [args, indices] { cuda::selective_scan_step(args, indices, {}); };
    return;
  }
  const int64_t rows = cuda::saved_rows(args.sequences, true);
  args.saved = c.output<3>("saved", state, {rows, args.rows(), args.spans.padded()}, true).data;
  const cuda::SelectiveScanParts parts = selective_parts(c, args);
  c.emulated = [args, indices, parts] { cuda::selective_scan(args, indices, parts, {}); };
}

// What the backward writes.
inline void selective_gradients(Case& c, SelectiveScanBackward& args, DType dtype, int64_t groups) {
  const int64_t D = args.u.size[2], N = args.states();
  const int64_t shared[] = {args.u.size[0], args.u.size[1], groups, N};
  args.du = c.output<3>("du", dtype, args.u.size);
  args.ddelta = c.output<3>("ddelta", dtype, args.u.size);
  if (args.z) args.dz = c.output<3>("dz", dtype, args.u.size);
  args.dh0 = c.output<3>("dh0", state_dtype(args), {args.sequences.count, D, N});
  args.dA = c.output<2>("dA", args.A.dtype, {D, N});
  args.dB = c.output<4>("dB", args.B.dtype, shared);
  args.dC = c.output<4>("dC", args.C.dtype, shared);
  if (args.D) args.dD = c.output<1>("dD", args.D.dtype, {D});
  if (args.delta_bias) args.ddelta_bias = c.output<1>("ddelta_bias", args.delta_bias.dtype, {D});
}

// The backward's arguments on the device, with scratch of its own.
inline SelectiveScanBackward on_device(Case& c, SelectiveScanBackward args, int64_t groups,
                                       int64_t parts) {
  const DType dtype = args.u.dtype;
  const int64_t D = args.u.size[2], rows = args.rows(), count = args.sequences.count * parts;
  const int64_t item = item_size(state_of(dtype));
  const int64_t width = cuda::backward_channels(dtype, args.complex);
  args.sequences.offsets = nullptr;
  args.spans = Spans(D, groups, width / Spans::kLanes);
  args.sum_A = c.scratch(count * rows * D * item);
  args.sum_D = c.scratch(2 * count * D * item);
  args.sum_BC = c.scratch(2 * args.spans.count() * args.u.size[0] * args.u.size[1] * rows * item);
  return args;
}

inline void selective_scan_backward_case(Case& c, const Shape& any, bool infinite) {
  SelectiveScanBackward args;
  const Infinite fill(c, infinite);
  const Shape s = fill.shape(any);
  const DType dtype = activation(c.random), state = state_of(dtype);
  const int64_t N = c.random.pick<int64_t>({1, 3, 8, 16, 17}), D = s.channels;
  args.sequences = fill.sequences(c, s);
  const int64_t groups = selective_inputs(c, args, dtype, s.batch, s.time, D, N);
  const int64_t count = args.sequences.count, padded = args.spans.padded(), rows = args.rows();
  const int64_t size[] = {s.batch, s.time, D};
  if (c.random.chance(80)) args.dy = c.input<3>("dy", dtype, size);
  if (c.random.chance(60)) args.dh_last = c.input<3>("dh_last", state_dtype(args), {count, D, N});
  fill.fill(c, args, args.dh_last);
  selective_gradients(c, args, dtype, groups);
  args.parts = std::clamp<int64_t>(count, 1, 8);
  const auto scratch = [&](const char* name, int64_t a, int64_t b, int64_t width) {
    return c.scratch<3>(name, state, {a, b, width}).data;
  };
  args.lanes_A = scratch("lanes_A", 1, rows, padded);
  args.carry = scratch("carry", args.parts, rows, padded);
  args.sum_A = scratch("sum_A", args.parts, rows, padded);
  args.sum_D = scratch("sum_D", args.parts, 2, padded);
  args.sum_BC = scratch("sum_BC", 2 * args.spans.count(), s.batch * s.time, rows);
  const View<1> offsets = cu_seqlens_of(c, args.sequences);
  c.dense();
  args.saved = c.input<3>("saved", state, {args.chunk_rows(), rows, padded}).data;
  c.run = [args] { selective_scan_backward(args); };
  const cuda::SelectiveScanParts split = selective_parts(c, args);
  const SelectiveScanBackward emulated = on_device(c, args, groups, split.count);
  c.emulated = [emulated, offsets, split] {
    cuda::selective_scan_backward(emulated, offsets, split, {});
  };
  // The same terms in sums of another order, over up to 260 channels and 300 steps; in 16 bits they
  // are rounded once.
  const bool narrow = dtype == DType::bf16 || dtype == DType::f16;
  c.emulated_within = std::max((narrow ? 1 : 64) * unit(dtype), split_error(args, split));
}
inline void selective_scan_backward_case(Case& c, const Shape& s) {
  selective_scan_backward_case(c, s, false);
}
inline void infinite_selective_scan_backward_case(Case& c, const Shape& s) {
  selective_scan_backward_case(c, s, true);
}

inline void hostile_selective_scan_backward_case(Case& c, const Shape& s) {
  SelectiveScanBackward args;
  c.raced = true;
  const DType dtype = activation(c.random), state = state_of(dtype);
  const int64_t N = c.random.pick<int64_t>({1, 16, 17}), D = s.channels, count = c.random.below(6);
  const auto ends = any_integers(c.random, count + 1, s.time);
  args.sequences = {count, s.time, nullptr};
  const int64_t groups = selective_inputs(c, args, dtype, 1, s.time, D, N);
  args.dy = c.input<3>("dy", dtype, {1, s.time, D});
  selective_gradients(c, args, dtype, groups);
  const View<1> offsets = c.indices("cu_seqlens", ends.data(), count + 1);
  c.dense();
  const int64_t chunks = cuda::saved_rows(args.sequences, true);
  args.saved = c.input<3>("saved", state, {chunks, args.rows(), args.spans.padded()}).data;
  const cuda::SelectiveScanParts split = selective_parts(c, args);
  const SelectiveScanBackward emulated = on_device(c, args, groups, split.count);
  c.emulated = [emulated, offsets, split] {
    cuda::selective_scan_backward(emulated, offsets, split, {});
  };
}

}  // namespace recurra::test
