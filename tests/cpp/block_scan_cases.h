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

inline void run_with_oracle(Case& c, const BlockScan& args) {
  c.run = [args] { block_scan(args); };
  c.oracle = [args] {
    in_compute_type(args.b.dtype, [&](auto zero) { block_scan_oracle<decltype(zero)>(args); });
  };
}

inline void block_scan_case(Case& c, const Shape& given) {
  BlockScan args;
  const DType dtype = activation(c.random), state = state_of(dtype);
  const auto one_of = [&](int64_t n) { return c.random.chance(25) ? 1 : n; };
  const int64_t k = block_size(c.random);
  const Shape s = block_shape(given, k);
  const int64_t size[] = {s.batch, s.time, s.channels, k};
  args.reverse = c.random.chance(40);
  args.sequences = c.sequences(s.batch, s.time);
  const int64_t states[] = {args.sequences.count, s.channels, k};
  args.A = c.input<5>("A", dtype, {one_of(s.batch), one_of(s.time), one_of(s.channels), k, k},
                      {-0.6, 0.6});
  args.b = c.input<4>("b", dtype, size);
  args.h = c.output<4>("h", dtype, size);
  if (c.random.chance(60)) args.h0 = c.input<3>("h0", state, states);
  args.h_last = c.output<3>("h_last", state, states);
  run_with_oracle(c, args);
}

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

inline void block_scan_backward_case(Case& c, const Shape& given) {
  BlockScanBackward args;
  const DType dtype = activation(c.random), state = state_of(dtype);
  const auto one_of = [&](int64_t n) { return c.random.chance(25) ? 1 : n; };
  const int64_t k = block_size(c.random);
  const Shape s = block_shape(given, k);
  const int64_t size[] = {s.batch, s.time, s.channels, k};
  const int64_t matrices[] = {one_of(s.batch), one_of(s.time), one_of(s.channels), k, k};
  args.reverse = c.random.chance(40);
  args.sequences = c.sequences(s.batch, s.time);
  const int64_t states[] = {args.sequences.count, s.channels, k};
  args.A = c.input<5>("A", dtype, matrices, {-0.6, 0.6});
  args.h = c.input<4>("h", dtype, size);
  if (c.random.chance(60)) args.h0 = c.input<3>("h0", state, states);
  if (c.random.chance(80)) args.dh = c.input<4>("dh", dtype, size);
  if (c.random.chance(60)) args.dh_last = c.input<3>("dh_last", state, states);
  args.dA = c.output<5>("dA", dtype, matrices);
  args.db = c.output<4>("db", dtype, size);
  args.dh0 = c.output<3>("dh0", state, states);
  const int64_t partial[] = {args.partial_size()};
  args.partial = c.output<1>("partial", state, partial, true).data;
  c.run = [args] { block_scan_backward(args); };
  if (args.reduced()) return;
  c.oracle = [args] {
    in_compute_type(args.h.dtype,
                    [&](auto zero) { block_scan_backward_oracle<decltype(zero)>(args); });
  };
}

}  // namespace recurra::test
