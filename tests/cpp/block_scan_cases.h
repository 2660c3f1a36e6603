// The cases of block_scan, with the equations that define its bits.
#pragma once
#include "block_scan/block_scan.h"
#include "case.h"

namespace recurra::test {

inline int64_t block_size(Random& random) {
  return random.pick<int64_t>({1, 2, 2, 3, 4, 4, 5, 7, 8, 13, 16});
}

// k^2 numbers a block: fewer steps where there are many.
inline Shape block_shape(const Shape& s, int64_t k) {
  if (k <= 4) return s;
  return {s.batch, std::min<int64_t>(s.time, 70), std::min<int64_t>(s.channels, 140)};
}

// One step of one block: out = A h + b, of which `matrix(i, j)` and `input(i)` are given.
template <class T, class M, class V>
void block_step(int64_t k, T* h, M matrix, V input) {
  T next[16];
  for (int64_t i = 0; i < k; ++i) {
    next[i] = input(i);
    for (int64_t j = 0; j < k; ++j) next[i] = std::fma(matrix(i, j), h[j], next[i]);
  }
  std::copy(next, next + k, h);
}

template <class T>
void block_scan_oracle(const BlockScan& args) {
  const int64_t k = args.b.size[3];
  const auto number = [](double x) { return static_cast<T>(x); };
  for (int64_t n = 0; n < args.sequences.count; ++n) {
    const Sequence s = args.sequences[n];
    const int64_t slot = args.slots ? args.slots[n] : n;
    for (int64_t d = 0; d < args.b.size[2]; ++d) {
      T h[16] = {};
      for (int64_t i = 0; slot >= 0 && i < k; ++i) h[i] = number(get(args.h0, slot, d, i));
      for (int64_t step = 0; step < s.length(); ++step) {
        const int64_t t = args.reverse ? s.end - 1 - step : s.begin + step;
        if (slot >= 0)
          block_step<T>(
              k, h, [&](int64_t i, int64_t j) { return number(get(args.A, s.batch, t, d, i, j)); },
              [&](int64_t i) { return number(get(args.b, s.batch, t, d, i)); });
        for (int64_t i = 0; i < k; ++i) set(args.h, h[i], s.batch, t, d, i);
      }
      for (int64_t i = 0; slot >= 0 && i < k; ++i) set(args.h_last, h[i], slot, d, i);
    }
  }
}

// Emulated shuffles take long, k of them a number, and k + 1 times as many where time is split.
inline bool is_small(const View<4>& v, bool split) {
  const int64_t shuffles = v.size[0] * v.size[1] * v.size[2] * v.size[3] * v.size[3];
  return shuffles * (split ? v.size[3] + 2 : 1) <= 1 << 13;
}

// Time split by the rule of the kernels, or, since it splits nothing so small where k is large,
// into a few parts. The state before a part is then nearly exact, while the other one carries k
// roundings of each step before it, which grow no faster than the states do; and the storage rounds
// what differs to the next number.
struct SplitBlocks {
  cuda::BlockScanParts parts;

  SplitBlocks(Case& c, const Sequences& s, const View<4>& like) {
    const int64_t steps = like.size[0] * like.size[1], blocks = like.size[2], k = like.size[3];
    const int64_t count = c.random.chance(50)
                              ? cuda::block_scan_parts(s.count, steps, blocks, k, like.dtype)
                              : c.random.pick<int64_t>({1, 2, 3, 7});
    if (count == 1) return;
    const int64_t products[] = {s.count, count, blocks, k, k};
    const int64_t states[] = {s.count, count, blocks, k};
    parts.products = scratch<5>(c, DType::f64, products);
    parts.states = scratch<4>(c, DType::f64, states);
    const double unit = like.dtype == DType::f64 ? 0x1p-53 : 0x1p-24;
    c.emulated_within = 4 * static_cast<double>(s.time * k) * unit + stored_unit(like.dtype);
  }
};

// What no order of operations rounds: whole numbers that permutations move; or, with `zero`, none
// at all under matrices whose products soon are infinite; or, with `over`, two in a row that add up
// to more than there is, and what follows is not finite again however small the matrices. The
// arrays are those of a dense case.
struct Exact {
  bool exact, zero, over;

  Exact(Case& c, bool may_overflow, bool other)
      : exact(!other && c.random.chance(30)),
        zero(exact && c.random.chance(50)),
        over(exact && !zero && may_overflow && c.random.chance(50)) {
    if (exact) c.dense();
  }
  // As many steps as it takes, and not more blocks than are emulated.
  Shape shape(const Shape& s) const {
    return zero || over ? Shape{s.batch, 40, std::min<int64_t>(s.channels, 2)} : s;
  }
  template <int N>
  void fill(Case& c, const View<N>& v) const {
    if (over) return fill_over(v);
    each(v, [&](int64_t at) { put(v, at, zero ? 0 : static_cast<double>(c.random.below(3) - 1)); });
  }
  void permute(Case& c, const View<5>& A) const {
    const int64_t k = A.size[4];
    const double one = over                    ? 0.5
                       : !zero                 ? 1
                       : A.dtype == DType::f64 ? 0x1p1000
                       : A.dtype == DType::f16 ? 0x1p15
                                               : 0x1p127;
    std::vector<int64_t> moved(static_cast<size_t>(k));
    each(A, [&](int64_t at) {
      if (at % (k * k) == 0)
        for (int64_t i = 0; i < k; ++i) {
          const int64_t other = c.random.below(i + 1);
          moved[static_cast<size_t>(i)] = moved[static_cast<size_t>(other)];
          moved[static_cast<size_t>(other)] = i;
        }
      put(A, at, moved[static_cast<size_t>(at / k % k)] == at % k ? one : 0);
    });
  }

 private:
  template <int N>
  static void fill_over(const View<N>& v) {
    const double most = v.dtype == DType::f64 ? 0x1.8p1023 : 0x1.8p127;
    each(v, [&](int64_t at) {
      bool there = false;
      if constexpr (N == 4) {
        const int64_t t = at / (v.size[2] * v.size[3]) % v.size[1];
        there = t == 3 || t == 4;
      }
      put(v, at, there ? most : 0);
    });
  }
  template <int N, class F>
  static void each(const View<N>& v, F f) {
    int64_t count = v ? 1 : 0;
    for (int64_t size : v.size) count *= size;
    for (int64_t at = 0; at < count; ++at) f(at);
  }
  template <int N>
  static void put(const View<N>& v, int64_t at, double value) {
    store(static_cast<char*>(v.data) + at * item_size(v.dtype), v.dtype, value);
  }
};

inline void run_with_oracle(Case& c, const BlockScan& args, const SplitBlocks* split = nullptr) {
  BlockScan device = args;
  device.sequences.offsets = device.slots = nullptr;
  View<1> offsets, slots;
  const int64_t count = args.sequences.count;
  if (args.sequences.offsets) offsets = c.indices("cu_seqlens", args.sequences.offsets, count + 1);
  if (args.slots) slots = c.indices("slots", args.slots, count);
  const cuda::BlockScanParts parts = split ? split->parts : cuda::BlockScanParts{};
  if (is_small(args.b, parts.count() > 1))
    c.emulated = [device, offsets, slots, parts] {
      cuda::block_scan(device, offsets, slots, parts, {});
    };
  c.run = [args] { block_scan(args); };
  c.oracle = [args] {
    in_compute_type(args.b.dtype, [&](auto zero) { block_scan_oracle<decltype(zero)>(args); });
  };
}

inline Shape empty_first_blocks(const Shape& s) {
  return {1, 40, std::min<int64_t>(s.channels, 2)};
}

inline void block_scan_case(Case& c, const Shape& given, bool infinite) {
  BlockScan args;
  const DType dtype = activation(c.random), state = state_of(dtype);
  const auto one_of = [&](int64_t n) { return c.random.chance(25) ? 1 : n; };
  const int64_t k = block_size(c.random);
  const Exact exact(c, true, infinite);
  const Shape s = infinite ? empty_first_blocks(given) : exact.shape(block_shape(given, k));
  const int64_t size[] = {s.batch, s.time, s.channels, k};
  args.reverse = c.random.chance(40);
  args.sequences = infinite ? c.empty_first(s.time) : c.sequences(s.batch, s.time);
  const int64_t states[] = {args.sequences.count, s.channels, k};
  args.A = c.input<5>("A", dtype, {one_of(s.batch), one_of(s.time), one_of(s.channels), k, k},
                      {-0.6, 0.6});
  args.b = c.input<4>("b", dtype, size);
  args.h = c.output<4>("h", dtype, size);
  if (infinite || c.random.chance(60)) args.h0 = c.input<3>("h0", state, states);
  if (infinite) c.make_infinite_first(args.h0);
  args.h_last = c.output<3>("h_last", state, states);
  const SplitBlocks split(c, args.sequences, args.b);
  if (exact.exact) {
    exact.permute(c, args.A), exact.fill(c, args.b), exact.fill(c, args.h0);
    c.emulated_within = 0;
  }
  run_with_oracle(c, args, &split);
}

inline void block_scan_case(Case& c, const Shape& s) { block_scan_case(c, s, false); }
inline void infinite_block_scan_case(Case& c, const Shape& s) { block_scan_case(c, s, true); }

inline void block_scan_step_case(Case& c, const Shape& given) {
  BlockScan args;
  const DType dtype = activation(c.random);
  const auto one_of = [&](int64_t n) { return c.random.chance(25) ? 1 : n; };
  const int64_t k = block_size(c.random);
  const Shape s = block_shape(given, k);
  const int64_t rows = s.time, states = rows + c.random.below(3);
  if (states > rows || c.random.chance(50))
    args.slots = c.integers("slots", slots(c.random, rows, states));
  args.sequences = {rows, 1, nullptr};
  args.A = c.input<5>("A", dtype, {one_of(rows), 1, one_of(s.channels), k, k}, {-0.6, 0.6});
  args.b = c.input<4>("b", dtype, {rows, 1, s.channels, k});
  args.h = c.output<4>("out", dtype, {rows, 1, s.channels, k});
  args.h0 = args.h_last = c.output<3>("h", state_of(dtype), {states, s.channels, k});
  run_with_oracle(c, args);
}

template <class T>
void block_scan_backward_oracle(const BlockScanBackward& args) {
  const int64_t k = args.h.size[3];
  const auto number = [](double x) { return static_cast<T>(x); };
  for (int64_t n = 0; n < args.sequences.count; ++n) {
    const Sequence s = args.sequences[n];
    for (int64_t d = 0; d < args.h.size[2]; ++d) {
      T carry[16] = {};
      for (int64_t i = 0; i < k; ++i) carry[i] = number(get(args.dh_last, n, d, i));
      for (int64_t step = 0; step < s.length(); ++step) {
        const int64_t by = args.reverse ? 1 : -1,
                      t = args.reverse ? s.begin + step : s.end - 1 - step;
        const bool last = step == s.length() - 1;
        T g[16];
        for (int64_t i = 0; i < k; ++i) {
          g[i] = args.dh ? number(get(args.dh, s.batch, t, d, i)) + carry[i] : carry[i];
          set(args.db, g[i], s.batch, t, d, i);
        }
        for (int64_t i = 0; i < k; ++i)
          for (int64_t j = 0; j < k; ++j) {
            const T h = number(last ? get(args.h0, n, d, j) : get(args.h, s.batch, t + by, d, j));
            set(args.dA, g[i] * h, s.batch, t, d, i, j);
          }
        for (int64_t j = 0; j < k; ++j) {
          const auto entry = [&](int64_t i) { return number(get(args.A, s.batch, t, d, i, j)); };
          carry[j] = entry(0) * g[0];
          for (int64_t i = 1; i < k; ++i) carry[j] = std::fma(entry(i), g[i], carry[j]);
        }
      }
      for (int64_t i = 0; i < k; ++i) set(args.dh0, carry[i], n, d, i);
    }
  }
}

inline void block_scan_backward_case(Case& c, const Shape& given, bool infinite) {
  BlockScanBackward args;
  const DType dtype = activation(c.random), state = state_of(dtype);
  const auto one_of = [&](int64_t n) { return c.random.chance(25) ? 1 : n; };
  const int64_t k = block_size(c.random);
  const Exact exact(c, false, infinite);
  const Shape s = infinite ? empty_first_blocks(given) : exact.shape(block_shape(given, k));
  const int64_t size[] = {s.batch, s.time, s.channels, k};
  const int64_t matrices[] = {one_of(s.batch), one_of(s.time), one_of(s.channels), k, k};
  args.reverse = c.random.chance(40);
  args.sequences = infinite ? c.empty_first(s.time) : c.sequences(s.batch, s.time);
  const int64_t states[] = {args.sequences.count, s.channels, k};
  args.A = c.input<5>("A", dtype, matrices, {-0.6, 0.6});
  args.h = c.input<4>("h", dtype, size);
  if (c.random.chance(60)) args.h0 = c.input<3>("h0", state, states);
  if (c.random.chance(80)) args.dh = c.input<4>("dh", dtype, size);
  if (infinite || c.random.chance(60)) args.dh_last = c.input<3>("dh_last", state, states);
  if (infinite) c.make_infinite_first(args.dh_last);
  args.dA = c.output<5>("dA", dtype, matrices);
  args.db = c.output<4>("db", dtype, size);
  args.dh0 = c.output<3>("dh0", state, states);
  // What the device has no use for: no output.
  const int64_t bytes = args.partial_size() * item_size(state);
  args.partial = c.scratch(bytes);
  c.run = [args, bytes] {
    if (bytes > 0) std::memset(args.partial, 0, static_cast<size_t>(bytes));
    block_scan_backward(args);
  };
  BlockScanBackward device = args;
  device.sequences.offsets = nullptr;
  View<1> offsets;
  if (args.sequences.offsets)
    offsets = c.indices("cu_seqlens", args.sequences.offsets, args.sequences.count + 1);
  const cuda::BlockScanParts parts = SplitBlocks(c, args.sequences, args.h).parts;
  void* const scratch =
      c.scratch(cuda::block_scan_backward_scratch(device, parts.count()) * item_size(state));
  // A gradient that is summed in another order differs by a unit of its largest partial sum for
  // each of the few additions that matter, and what is left of the sum may be a thousandth of that.
  if (args.reduced())
    c.emulated_within = std::max(
        c.emulated_within, 8192 * (dtype == DType::f64 ? 0x1p-53 : 0x1p-24) + stored_unit(dtype));
  if (exact.exact) {
    exact.permute(c, args.A), exact.fill(c, args.h), exact.fill(c, args.h0);
    exact.fill(c, args.dh), exact.fill(c, args.dh_last);
    c.emulated_within = 0;
  }
  if (is_small(args.h, parts.count() > 1))
    c.emulated = [device, offsets, scratch, parts] {
      cuda::block_scan_backward(device, offsets, scratch, parts, {});
    };
  if (args.reduced()) return;
  c.oracle = [args] {
    in_compute_type(args.h.dtype,
                    [&](auto zero) { block_scan_backward_oracle<decltype(zero)>(args); });
  };
}

inline void block_scan_backward_case(Case& c, const Shape& s) {
  block_scan_backward_case(c, s, false);
}
inline void infinite_block_scan_backward_case(Case& c, const Shape& s) {
  block_scan_backward_case(c, s, true);
}

// On the device no value of cu_seqlens or slots may lead out of the arrays, though sequences that
// overlap write the same elements.
inline void hostile_block_scan_case(Case& c, const Shape& s) {
  const DType dtype = activation(c.random), state = state_of(dtype);
  const auto one_of = [&](int64_t n) { return c.random.chance(25) ? 1 : n; };
  const int64_t k = block_size(c.random), N = 1 + c.random.below(9);
  const int64_t time = std::min<int64_t>(s.time, 33);
  c.raced = true;
  if (c.random.chance(30)) {  // a step
    BlockScan args;
    const int64_t states = 1 + c.random.below(4);
    args.sequences = {time, 1, nullptr};
    args.A = c.input<5>("A", dtype, {one_of(time), 1, one_of(N), k, k});
    args.b = c.input<4>("b", dtype, {time, 1, N, k});
    args.h = c.output<4>("out", dtype, {time, 1, N, k});
    args.h0 = args.h_last = c.output<3>("h", state, {states, N, k});
    const auto slots = hostile_integers(c.random, time, states);
    const View<1> on_device = c.indices("slots", slots.data(), time);
    c.emulated = [args, on_device] { cuda::block_scan(args, {}, on_device, {}, {}); };
    return;
  }
  const auto ends = hostile_integers(c.random, 1 + c.random.below(6), time);
  const auto count = static_cast<int64_t>(ends.size()) - 1;
  const View<1> offsets = c.indices("cu_seqlens", ends.data(), count + 1);
  const int64_t size[] = {1, time, N, k}, matrices[] = {1, one_of(time), one_of(N), k, k};
  if (c.random.chance(50)) {
    BlockScan args;
    args.sequences = {count, time, nullptr};
    args.reverse = c.random.chance(50);
    args.A = c.input<5>("A", dtype, matrices);
    args.b = c.input<4>("b", dtype, size);
    args.h = c.output<4>("h", dtype, size);
    args.h_last = c.output<3>("h_last", state, {count, N, k});
    const cuda::BlockScanParts parts = SplitBlocks(c, args.sequences, args.b).parts;
    c.emulated = [args, offsets, parts] { cuda::block_scan(args, offsets, {}, parts, {}); };
    return;
  }
  BlockScanBackward args;
  args.sequences = {count, time, nullptr};
  args.reverse = c.random.chance(50);
  args.A = c.input<5>("A", dtype, matrices);
  args.h = c.input<4>("h", dtype, size);
  args.dh = c.input<4>("dh", dtype, size);
  args.dA = c.output<5>("dA", dtype, matrices);
  args.db = c.output<4>("db", dtype, size);
  args.dh0 = c.output<3>("dh0", state, {count, N, k});
  const cuda::BlockScanParts parts = SplitBlocks(c, args.sequences, args.h).parts;
  void* const scratch =
      c.scratch(cuda::block_scan_backward_scratch(args, parts.count()) * item_size(state));
  c.emulated = [args, offsets, scratch, parts] {
    cuda::block_scan_backward(args, offsets, scratch, parts, {});
  };
}

}  // namespace recurra::test
