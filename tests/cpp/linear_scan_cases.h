// The cases of linear_scan, with the equations that define its bits.
#pragma once
#include "case.h"
#include "linear_scan/linear_scan.h"

namespace recurra::test {

// Calls f(sequence, first, last, step) with the order in which time is walked.
template <class F>
void walk(const Sequences& sequences, bool backwards, F f) {
  for (int64_t n = 0; n < sequences.count; ++n) {
    const Sequence s = sequences[n];
    backwards ? f(n, s.batch, s.end - 1, s.begin - 1, -1) : f(n, s.batch, s.begin, s.end, 1);
  }
}

inline Range gates(bool log_a) { return log_a ? Range{-3, 0.2} : Range{-1.1, 1.1}; }

// Of linear_scan a quarter is complex, without an oracle here.
inline DType real_or_complex(Random& random) {
  return random.chance(25) ? random.pick({DType::c64, DType::c128}) : activation(random);
}

inline void zero(const View<3>& v) {
  if (v) std::memset(v.data, 0, v.size[0] * v.size[1] * v.size[2] * item_size(v.dtype));
}

// Splits time where the kernels do. The order of the sums then differs: every state carries one
// more rounding for each step and each part before it, of numbers that are not larger than the
// states since gates are seldom above 1; and the storage rounds what differs to the next number.
struct Split {
  cuda::ScanParts parts;

  Split(Case& c, const Sequences& s, const View<3>& like) {
    const int64_t steps = like.size[0] * like.size[1], channels = like.size[2];
    const DType dtype = like.dtype;
    const int64_t count = cuda::linear_scan_parts(s.count, steps, channels, dtype);
    if (count == 1) return;
    const int64_t size[] = {s.count, count, channels};
    parts.products = scratch<3>(c, is_complex(dtype) ? DType::c128 : DType::f64, size);
    parts.states = scratch<3>(c, state_of(dtype), size);
    const double unit = computes_in_double(dtype) ? 0x1p-53 : 0x1p-24;
    c.emulated_within = 4 * static_cast<double>(s.time) * unit + stored_unit(dtype);
  }
};

inline Shape empty_first_shape(const Shape& s) { return {1, 96, std::min<int64_t>(s.channels, 3)}; }

inline void linear_scan_case(Case& c, const Shape& any, bool infinite) {
  LinearScan args;
  const Shape s = infinite ? empty_first_shape(any) : any;
  const DType dtype = real_or_complex(c.random), state = state_of(dtype);
  const auto one_of = [&](int64_t n) { return c.random.chance(25) ? 1 : n; };
  args.log_a = c.random.chance(40);
  args.reverse = c.random.chance(40);
  args.sequences = infinite ? c.empty_first(s.time) : c.sequences(s.batch, s.time);
  args.a = c.input<3>("a", dtype, {one_of(s.batch), one_of(s.time), one_of(s.channels)},
                      gates(args.log_a));
  args.b = c.input<3>("b", dtype, {s.batch, s.time, s.channels});
  args.h = c.output<3>("h", dtype, {s.batch, s.time, s.channels});
  if (infinite || c.random.chance(60))
    args.h0 = c.input<2>("h0", state, {args.sequences.count, s.channels});
  if (infinite) c.make_infinite_first(args.h0);
  args.h_last = c.output<2>("h_last", state, {args.sequences.count, s.channels});
  View<1> offsets;
  if (args.sequences.offsets)
    offsets = c.indices("cu_seqlens", args.sequences.offsets, args.sequences.count + 1);
  const Split split(c, args.sequences, args.h);
  c.emulated = [args, offsets, split] { cuda::linear_scan(args, offsets, split.parts, {}); };
  if (is_complex(dtype)) {
    c.run = [args] { complex_scan(args); };
    return;
  }
  c.run = [args] { linear_scan(args); };
  if (args.log_a) return;
  c.oracle = [args] {
    in_compute_type(args.b.dtype, [&](auto zero) {
      using T = decltype(zero);
      walk(args.sequences, args.reverse, [&](int64_t n, int64_t b, int64_t t0, int64_t t1, int by) {
        for (int64_t d = 0; d < args.b.size[2]; ++d) {
          T h = static_cast<T>(get(args.h0, n, d));
          for (int64_t t = t0; t != t1; t += by) {
            h = std::fma(static_cast<T>(get(args.a, b, t, d)), h,
                         static_cast<T>(get(args.b, b, t, d)));
            set(args.h, h, b, t, d);
          }
          set(args.h_last, h, n, d);
        }
      });
    });
  };
}

inline void linear_scan_case(Case& c, const Shape& s) { linear_scan_case(c, s, false); }
inline void infinite_linear_scan_case(Case& c, const Shape& s) { linear_scan_case(c, s, true); }

inline std::vector<int64_t> hostile_ends(Random& random, int64_t time) {
  std::vector<int64_t> ends(static_cast<size_t>(1 + random.below(6)));
  for (int64_t& end : ends)
    end = random.pick<int64_t>({0, -1, time, time + 1, random.below(time + 1),
                                static_cast<int64_t>(random.next()), INT64_MIN, INT64_MAX});
  return ends;
}

// On the device the values of cu_seqlens are not checked: none may lead out of the arrays, though
// sequences that overlap write the same elements.
inline void hostile_cu_seqlens_case(Case& c, const Shape& s) {
  LinearScan args;
  c.raced = true;
  const DType dtype = real_or_complex(c.random);
  const std::vector<int64_t> ends = hostile_ends(c.random, s.time);
  args.sequences = {static_cast<int64_t>(ends.size()) - 1, s.time, nullptr};
  args.reverse = c.random.chance(50);
  args.a = c.input<3>("a", dtype, {1, s.time, s.channels});
  args.b = c.input<3>("b", dtype, {1, s.time, s.channels});
  args.h = c.output<3>("h", dtype, {1, s.time, s.channels});
  args.h_last = c.output<2>("h_last", state_of(dtype), {args.sequences.count, s.channels});
  const View<1> offsets = c.indices("cu_seqlens", ends.data(), args.sequences.count + 1);
  const Split split(c, args.sequences, args.h);
  c.emulated = [args, offsets, split] { cuda::linear_scan(args, offsets, split.parts, {}); };
}

// With partial sums of its own.
inline void emulate_backward(Case& c, LinearScanBackward args, const View<1>& offsets) {
  const Split split(c, args.sequences, args.h);
  const int64_t parts = split.parts.products ? split.parts.products.size[1] : 1;
  if (args.partial) {
    const int64_t rows = cuda::linear_scan_sums(args, parts);
    const int64_t size[] = {rows, args.partial.size[1], args.partial.size[2]};
    args.partial = scratch<3>(c, args.partial.dtype, size);
    // Sums of up to thousands of numbers may be this much smaller than they are.
    c.emulated_within *= 16;
    // Of complex numbers the CPU adds half of sixteen channels at a time to what all sequences
    // share, the kernel whole ones: other roundings of sums of some hundred numbers.
    const double unit = args.h.dtype == DType::c128 ? 0x1p-53 : 0x1p-24;
    if (is_complex(args.h.dtype) && args.owned() > 1 && args.a.size[2] != args.h.size[2])
      c.emulated_within = std::max(c.emulated_within, 256 * unit);
  }
  c.emulated = [args, offsets, split] {
    cuda::linear_scan_backward(args, offsets, split.parts, {});
  };
}

inline void linear_scan_backward_case(Case& c, const Shape& any, bool infinite) {
  LinearScanBackward args;
  const Shape s = infinite ? empty_first_shape(any) : any;
  const DType dtype = real_or_complex(c.random), state = state_of(dtype);
  const auto one_of = [&](int64_t n) { return c.random.chance(20) ? 1 : n; };
  const int64_t size[] = {s.batch, s.time, s.channels};
  const int64_t gate[] = {one_of(s.batch), one_of(s.time), one_of(s.channels)};
  args.log_a = c.random.chance(40);
  args.reverse = c.random.chance(40);
  args.sequences = infinite ? c.empty_first(s.time) : c.sequences(s.batch, s.time);
  const int64_t states[] = {args.sequences.count, s.channels};
  args.a = c.input<3>("a", dtype, gate, gates(args.log_a));
  args.h = c.input<3>("h", dtype, size);
  if (c.random.chance(60)) args.h0 = c.input<2>("h0", state, states);
  if (c.random.chance(80)) args.dh = c.input<3>("dh", dtype, size);
  if (infinite || c.random.chance(60)) args.dh_last = c.input<2>("dh_last", state, states);
  if (infinite) c.make_infinite_first(args.dh_last);
  args.da = c.output<3>("da", dtype, gate);
  args.db = c.output<3>("db", dtype, size);
  args.dh0 = c.output<2>("dh0", state, states);
  const bool reduced = !std::equal(size, size + 3, gate);
  if (reduced) {
    const int64_t blocks = gate[2] == size[2] ? size[2] : (size[2] + 15) / 16;
    const int64_t rows = args.constant() ? std::max<int64_t>(1, args.sequences.count) : gate[0];
    args.partial = scratch<3>(c, state, {rows, gate[1], blocks});
  }
  View<1> offsets;
  if (args.sequences.offsets)
    offsets = c.indices("cu_seqlens", args.sequences.offsets, args.sequences.count + 1);
  emulate_backward(c, args, offsets);
  if (is_complex(dtype)) {
    c.run = [args] { zero(args.partial), complex_scan_backward(args); };
    return;
  }
  c.run = [args] { zero(args.partial), linear_scan_backward(args); };
  if (reduced || args.log_a) return;
  c.oracle = [args] {
    in_compute_type(args.h.dtype, [&](auto zero) {
      using T = decltype(zero);
      const auto number = [](double x) { return static_cast<T>(x); };
      walk(args.sequences, !args.reverse,
           [&](int64_t n, int64_t b, int64_t t0, int64_t t1, int by) {
             for (int64_t d = 0; d < args.h.size[2]; ++d) {
               T carry = number(get(args.dh_last, n, d));
               for (int64_t t = t0; t != t1; t += by) {
                 const T g = args.dh ? number(get(args.dh, b, t, d)) + carry : carry;
                 const T before =
                     number(t + by == t1 ? get(args.h0, n, d) : get(args.h, b, t + by, d));
                 set(args.db, g, b, t, d);
                 set(args.da, g * before, b, t, d);
                 carry = number(get(args.a, b, t, d)) * g;
               }
               set(args.dh0, carry, n, d);
             }
           });
    });
  };
}

inline void linear_scan_backward_case(Case& c, const Shape& s) {
  linear_scan_backward_case(c, s, false);
}
inline void infinite_linear_scan_backward_case(Case& c, const Shape& s) {
  linear_scan_backward_case(c, s, true);
}

inline void hostile_backward_case(Case& c, const Shape& s) {
  LinearScanBackward args;
  c.raced = true;
  const DType dtype = real_or_complex(c.random), state = state_of(dtype);
  const std::vector<int64_t> ends = hostile_ends(c.random, s.time);
  const auto one_of = [&](int64_t n) { return c.random.chance(30) ? 1 : n; };
  const int64_t size[] = {1, s.time, s.channels};
  const int64_t gate[] = {1, one_of(s.time), one_of(s.channels)};
  args.sequences = {static_cast<int64_t>(ends.size()) - 1, s.time, nullptr};
  args.reverse = c.random.chance(50);
  const int64_t states[] = {args.sequences.count, s.channels};
  args.a = c.input<3>("a", dtype, gate);
  args.h = c.input<3>("h", dtype, size);
  args.h0 = c.input<2>("h0", state, states);
  args.dh = c.input<3>("dh", dtype, size);
  args.dh_last = c.input<2>("dh_last", state, states);
  args.da = c.output<3>("da", dtype, gate);
  args.db = c.output<3>("db", dtype, size);
  args.dh0 = c.output<2>("dh0", state, states);
  if (!std::equal(size, size + 3, gate)) {
    const int64_t blocks = gate[2] == size[2] ? size[2] : std::max<int64_t>(1, (size[2] + 15) / 16);
    args.partial = scratch<3>(c, state, {1, gate[1], blocks});
  }
  emulate_backward(c, args, c.indices("cu_seqlens", ends.data(), args.sequences.count + 1));
}

inline void linear_scan_step_case(Case& c, const Shape& s) {
  LinearScanStep args;
  const DType dtype = real_or_complex(c.random);
  const auto one_of = [&](int64_t n) { return c.random.chance(25) ? 1 : n; };
  const int64_t rows = s.time, states = rows + c.random.below(3);
  args.log_a = c.random.chance(40);
  if (states > rows || c.random.chance(50))
    args.slots = c.integers("slots", slots(c.random, rows, states));
  args.h = c.output<2>("h", state_of(dtype), {states, s.channels});
  args.a = c.input<2>("a", dtype, {one_of(rows), one_of(s.channels)}, gates(args.log_a));
  args.b = c.input<2>("b", dtype, {rows, s.channels});
  args.out = c.output<2>("out", dtype, {rows, s.channels});
  View<1> indices;
  if (args.slots) indices = c.indices("device_slots", args.slots, rows);
  c.emulated = [args, indices] { cuda::linear_scan_step(args, indices, {}); };
  if (is_complex(dtype)) {
    c.run = [args] { complex_scan_step(args); };
    return;
  }
  c.run = [args] { linear_scan_step(args); };
  if (args.log_a) return;
  c.oracle = [args] {
    in_compute_type(args.b.dtype, [&](auto zero) {
      using T = decltype(zero);
      for (int64_t n = 0; n < args.b.size[0]; ++n)
        for (int64_t d = 0; d < args.b.size[1]; ++d) {
          const int64_t slot = args.slots ? args.slots[n] : n;
          T h = T(0);
          if (slot >= 0) {
            h = std::fma(static_cast<T>(get(args.a, n, d)), static_cast<T>(get(args.h, slot, d)),
                         static_cast<T>(get(args.b, n, d)));
            set(args.h, h, slot, d);
          }
          set(args.out, h, n, d);
        }
    });
  };
}

// Nor are slots checked: one that is no state is skipped, and one that comes twice is written
// twice.
inline void hostile_slots_case(Case& c, const Shape& s) {
  LinearScanStep args;
  c.raced = true;
  const DType dtype = real_or_complex(c.random);
  const int64_t rows = s.time, states = c.random.below(3);
  std::vector<int64_t> slots(static_cast<size_t>(rows));
  for (int64_t& slot : slots)
    slot = c.random.pick<int64_t>(
        {0, -1, states, states + 1, static_cast<int64_t>(c.random.next()), INT64_MIN, INT64_MAX});
  args.h = c.output<2>("h", state_of(dtype), {states, s.channels});
  args.a = c.input<2>("a", dtype, {rows, s.channels});
  args.b = c.input<2>("b", dtype, {rows, s.channels});
  args.out = c.output<2>("out", dtype, {rows, s.channels});
  const View<1> indices = c.indices("slots", slots.data(), rows);
  c.emulated = [args, indices] { cuda::linear_scan_step(args, indices, {}); };
}

}  // namespace recurra::test
