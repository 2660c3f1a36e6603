// Every kernel on random shapes, dtypes and layouts: no byte outside an output is written, every
// instruction set gives the same bits, and these are the equations' where they define the bits.
//
//   test_kernels                       the quick tier
//   test_kernels --seconds 600         fuzzing: other seeds, numbers of random bytes
//   test_kernels --concurrent          many calls at once, for ThreadSanitizer
//   test_kernels --isa scalar          this instruction set alone, for Valgrind
//   test_kernels --op NAME --seed N --cases 1   repeats one case that failed
//
// To add an op, write its function below and name it in kOps.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>

#include "block_scan_cases.h"
#include "case.h"
#include "causal_conv1d/causal_conv1d.h"
#include "linear_scan/linear_scan.h"
#include "linear_step/linear_step.h"
#include "parallel.h"
#include "rms_norm/rms_norm.h"
#include "rnn_cases.h"
#include "rtrl_cases.h"
#include "selective_scan/selective_scan.h"
#include "softmax_scan_cases.h"

namespace recurra::test {
namespace {

// Calls f(sequence, first, last, step) with the order in which time is walked.
template <class F>
void walk(const Sequences& sequences, bool backwards, F f) {
  for (int64_t n = 0; n < sequences.count; ++n) {
    const Sequence s = sequences[n];
    backwards ? f(n, s.batch, s.end - 1, s.begin - 1, -1) : f(n, s.batch, s.begin, s.end, 1);
  }
}

Range gates(bool log_a) { return log_a ? Range{-3, 0.2} : Range{-1.1, 1.1}; }

// Of linear_scan a quarter is complex, without an oracle here and only on the CPU.
DType real_or_complex(Random& random) {
  return random.chance(25) ? random.pick({DType::c64, DType::c128}) : activation(random);
}

void linear_scan_case(Case& c, const Shape& s) {
  LinearScan args;
  const DType dtype = real_or_complex(c.random), state = state_of(dtype);
  const auto one_of = [&](int64_t n) { return c.random.chance(25) ? 1 : n; };
  args.log_a = c.random.chance(40);
  args.reverse = c.random.chance(40);
  args.sequences = c.sequences(s.batch, s.time);
  args.a = c.input<3>("a", dtype, {one_of(s.batch), one_of(s.time), one_of(s.channels)},
                      gates(args.log_a));
  args.b = c.input<3>("b", dtype, {s.batch, s.time, s.channels});
  args.h = c.output<3>("h", dtype, {s.batch, s.time, s.channels});
  if (c.random.chance(60)) args.h0 = c.input<2>("h0", state, {args.sequences.count, s.channels});
  args.h_last = c.output<2>("h_last", state, {args.sequences.count, s.channels});
  if (is_complex(dtype)) {
    c.run = [args] { complex_scan(args); };
    return;
  }
  c.run = [args] { linear_scan(args); };
  View<1> offsets;
  if (args.sequences.offsets)
    offsets = c.indices("cu_seqlens", args.sequences.offsets, args.sequences.count + 1);
  c.emulated = [args, offsets] { cuda::linear_scan(args, offsets, {}); };
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

// On the device the values of cu_seqlens are not checked: none may lead out of the arrays.
void hostile_cu_seqlens_case(Case& c, const Shape& s) {
  LinearScan args;
  const DType dtype = activation(c.random);
  std::vector<int64_t> ends(static_cast<size_t>(1 + c.random.below(6)));
  for (int64_t& end : ends)
    end = c.random.pick<int64_t>({0, -1, s.time, s.time + 1, c.random.below(s.time + 1),
                                  static_cast<int64_t>(c.random.next()), INT64_MIN, INT64_MAX});
  args.sequences = {static_cast<int64_t>(ends.size()) - 1, s.time, nullptr};
  args.reverse = c.random.chance(50);
  args.a = c.input<3>("a", dtype, {1, s.time, s.channels});
  args.b = c.input<3>("b", dtype, {1, s.time, s.channels});
  args.h = c.output<3>("h", dtype, {1, s.time, s.channels});
  args.h_last = c.output<2>("h_last", state_of(dtype), {args.sequences.count, s.channels});
  const View<1> offsets = c.indices("cu_seqlens", ends.data(), args.sequences.count + 1);
  c.emulated = [args, offsets] { cuda::linear_scan(args, offsets, {}); };
}

void linear_scan_backward_case(Case& c, const Shape& s) {
  LinearScanBackward args;
  const DType dtype = real_or_complex(c.random), state = state_of(dtype);
  const auto one_of = [&](int64_t n) { return c.random.chance(20) ? 1 : n; };
  const int64_t size[] = {s.batch, s.time, s.channels};
  const int64_t gate[] = {one_of(s.batch), one_of(s.time), one_of(s.channels)};
  args.log_a = c.random.chance(40);
  args.reverse = c.random.chance(40);
  args.sequences = c.sequences(s.batch, s.time);
  const int64_t states[] = {args.sequences.count, s.channels};
  args.a = c.input<3>("a", dtype, gate, gates(args.log_a));
  args.h = c.input<3>("h", dtype, size);
  if (c.random.chance(60)) args.h0 = c.input<2>("h0", state, states);
  if (c.random.chance(80)) args.dh = c.input<3>("dh", dtype, size);
  if (c.random.chance(60)) args.dh_last = c.input<2>("dh_last", state, states);
  args.da = c.output<3>("da", dtype, gate);
  args.db = c.output<3>("db", dtype, size);
  args.dh0 = c.output<2>("dh0", state, states);
  const bool reduced = !std::equal(size, size + 3, gate);
  if (reduced) {
    const int64_t blocks = gate[2] == size[2] ? size[2] : (size[2] + 15) / 16;
    const int64_t rows = args.constant() ? std::max<int64_t>(1, args.sequences.count) : gate[0];
    args.partial = c.output<3>("partial", state, {rows, gate[1], blocks}, true);
  }
  if (is_complex(dtype)) {
    c.run = [args] { complex_scan_backward(args); };
    return;
  }
  c.run = [args] { linear_scan_backward(args); };
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

void linear_scan_step_case(Case& c, const Shape& s) {
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

// The other ops have oracles in Python; here their instruction sets are compared.

template <class Args>
std::shared_ptr<std::vector<ConvSpan>> cut_spans(Args& args) {
  auto spans = std::make_shared<std::vector<ConvSpan>>(conv_spans(args.sequences));
  args.spans = spans->data();
  args.span_count = static_cast<int64_t>(spans->size());
  return spans;
}

// The inputs of either direction; returns W.
template <class Args>
int64_t conv_inputs(Case& c, Args& args, DType dtype, const Shape& s) {
  const int64_t W = c.random.pick<int64_t>({2, 3, 4, 4, 5, 8}), D = s.channels;
  args.silu = c.random.chance(60);
  args.sequences = c.sequences(s.batch, s.time);
  args.x = c.input<3>("x", dtype, {s.batch, s.time, D});
  args.weight = c.input<2>("weight", parameter(c.random, dtype), {D, W});
  if (c.random.chance(60)) args.bias = c.input<1>("bias", parameter(c.random, dtype), {D});
  if (c.random.chance(60))
    args.h0 = c.input<3>("h0", state_of(dtype), {args.sequences.count, W - 1, D});
  return W;
}

void causal_conv1d_case(Case& c, const Shape& s) {
  CausalConv1d args;
  const DType dtype = activation(c.random);
  const int64_t W = conv_inputs(c, args, dtype, s);
  args.y = c.output<3>("y", dtype, {s.batch, s.time, s.channels});
  args.h_last = c.output<3>("h_last", state_of(dtype), {args.sequences.count, W - 1, s.channels});
  const auto spans = cut_spans(args);  // before the capture, which copies args
  c.run = [args, spans] { causal_conv1d(args); };
}

void causal_conv1d_backward_case(Case& c, const Shape& s) {
  CausalConv1dBackward args;
  const DType dtype = activation(c.random), state = state_of(dtype);
  const int64_t W = conv_inputs(c, args, dtype, s), D = s.channels;
  const int64_t size[] = {s.batch, s.time, D}, states[] = {args.sequences.count, W - 1, D};
  if (c.random.chance(80)) args.dy = c.input<3>("dy", dtype, size);
  if (c.random.chance(60)) args.dh_last = c.input<3>("dh_last", state, states);
  args.dx = c.output<3>("dx", dtype, size);
  args.dh0 = c.output<3>("dh0", state, states);
  args.dweight = c.output<2>("dweight", args.weight.dtype, {D, W});
  args.dbias = c.output<1>("dbias", args.weight.dtype, {D});
  const auto spans = cut_spans(args);
  args.partial = c.output<3>("partial", state, {args.span_count, W + 1, D}, true);
  c.run = [args, spans] { causal_conv1d_backward(args); };
}

void causal_conv1d_step_case(Case& c, const Shape& s) {
  CausalConv1dStep args;
  const DType dtype = activation(c.random);
  const int64_t W = c.random.pick<int64_t>({2, 3, 4, 4, 5, 8}), D = s.channels;
  const int64_t rows = s.time, states = rows + c.random.below(3);
  args.silu = c.random.chance(60);
  if (states > rows || c.random.chance(50))
    args.slots = c.integers("slots", slots(c.random, rows, states));
  args.h = c.output<3>("h", state_of(dtype), {states, W - 1, D});
  args.x = c.input<2>("x", dtype, {rows, D});
  args.weight = c.input<2>("weight", parameter(c.random, dtype), {D, W});
  if (c.random.chance(60)) args.bias = c.input<1>("bias", parameter(c.random, dtype), {D});
  args.out = c.output<2>("out", dtype, {rows, D});
  c.run = [args] { causal_conv1d_step(args); };
}

// The inputs of either direction; returns the number of groups.
int64_t selective_inputs(Case& c, SelectiveScanInputs& in, DType dtype, int64_t batch, int64_t time,
                         int64_t D, int64_t N) {
  const int64_t groups = D > 0 && D % 2 == 0 && c.random.chance(30) ? 2 : 1;
  in.delta_softplus = c.random.chance(50);
  in.spans = Spans(D, groups, c.random.pick<int64_t>({1, 2, 8}));
  in.u = c.input<3>("u", dtype, {batch, time, D});
  in.delta = c.input<3>("delta", dtype, {batch, time, D}, {0, 0.5});
  if (c.random.chance(50)) in.z = c.input<3>("z", dtype, {batch, time, D});
  in.A = c.input<2>("A", parameter(c.random, dtype), {D, N}, {-2, 0});
  in.B = c.input<4>("B", dtype, {batch, time, groups, N});
  in.C = c.input<4>("C", dtype, {batch, time, groups, N});
  if (c.random.chance(50)) in.D = c.input<1>("D", parameter(c.random, dtype), {D});
  if (c.random.chance(50))
    in.delta_bias = c.input<1>("delta_bias", parameter(c.random, dtype), {D}, {0, 0.2});
  return groups;
}

void selective_scan_case(Case& c, const Shape& s) {
  SelectiveScan args;
  const DType dtype = activation(c.random), state = state_of(dtype);
  const int64_t N = c.random.pick<int64_t>({1, 3, 8, 16, 17}), D = s.channels;
  args.sequences = c.sequences(s.batch, s.time);
  selective_inputs(c, args, dtype, s.batch, s.time, D, N);
  const int64_t count = args.sequences.count, padded = args.spans.padded();
  if (c.random.chance(60)) args.h0 = c.input<3>("h0", state, {count, D, N});
  args.y = c.output<3>("y", dtype, {s.batch, s.time, D});
  args.h_last = c.output<3>("h_last", state, {count, D, N});
  args.lanes_A = c.output<2>("lanes_A", state, {N, padded}, true).data;
  if (N > kFewStates) args.state = c.output<3>("state", state, {count, N, padded}, true).data;
  if (c.random.chance(50))
    args.saved = c.output<3>("saved", state, {args.chunk_rows(), N, padded}, true).data;
  c.run = [args] { selective_scan(args); };
}

void selective_scan_step_case(Case& c, const Shape& s) {
  SelectiveScan args;
  const DType dtype = activation(c.random), state = state_of(dtype);
  const int64_t N = c.random.pick<int64_t>({1, 3, 8, 16, 17}), D = s.channels;
  const int64_t rows = s.time, states = rows + c.random.below(3);
  if (states > rows || c.random.chance(50))
    args.slots = c.integers("slots", slots(c.random, rows, states));
  args.sequences = {rows, 1, nullptr};
  selective_inputs(c, args, dtype, rows, 1, D, N);
  args.h0 = args.h_last = c.output<3>("h", state, {states, D, N});
  args.y = c.output<3>("y", dtype, {rows, 1, D});
  const int64_t padded = args.spans.padded();
  args.lanes_A = c.output<2>("lanes_A", state, {N, padded}, true).data;
  if (N > kFewStates) args.state = c.output<3>("state", state, {rows, N, padded}, true).data;
  c.run = [args] { selective_scan_step(args); };
}

void selective_scan_backward_case(Case& c, const Shape& s) {
  SelectiveScanBackward args;
  const DType dtype = activation(c.random), state = state_of(dtype);
  const int64_t N = c.random.pick<int64_t>({1, 3, 8, 16, 17}), D = s.channels;
  args.sequences = c.sequences(s.batch, s.time);
  const int64_t groups = selective_inputs(c, args, dtype, s.batch, s.time, D, N);
  const int64_t count = args.sequences.count, padded = args.spans.padded();
  const int64_t size[] = {s.batch, s.time, D}, shared[] = {s.batch, s.time, groups, N};
  if (c.random.chance(80)) args.dy = c.input<3>("dy", dtype, size);
  if (c.random.chance(60)) args.dh_last = c.input<3>("dh_last", state, {count, D, N});
  args.du = c.output<3>("du", dtype, size);
  args.ddelta = c.output<3>("ddelta", dtype, size);
  if (args.z) args.dz = c.output<3>("dz", dtype, size);
  args.dh0 = c.output<3>("dh0", state, {count, D, N});
  args.dA = c.output<2>("dA", args.A.dtype, {D, N});
  args.dB = c.output<4>("dB", dtype, shared);
  args.dC = c.output<4>("dC", dtype, shared);
  if (args.D) args.dD = c.output<1>("dD", args.D.dtype, {D});
  if (args.delta_bias) args.ddelta_bias = c.output<1>("ddelta_bias", args.delta_bias.dtype, {D});
  args.parts = std::clamp<int64_t>(count, 1, 8);
  const auto scratch = [&](const char* name, int64_t a, int64_t b, int64_t width) {
    return c.output<3>(name, state, {a, b, width}, true).data;
  };
  args.saved = scratch("saved", args.chunk_rows(), N, padded);
  args.lanes_A = scratch("lanes_A", 1, N, padded);
  args.carry = scratch("carry", args.parts, N, padded);
  args.sum_A = scratch("sum_A", args.parts, N, padded);
  args.sum_D = scratch("sum_D", args.parts, 2, padded);
  args.sum_BC = scratch("sum_BC", 2 * args.spans.count(), s.batch * s.time, N);
  c.run = [args] { selective_scan_backward(args); };
}

void linear_step_case(Case& c, const Shape& s) {
  LinearStep args;
  const DType dtype = activation(c.random);
  const int64_t B = s.batch + (c.random.chance(40) ? c.random.below(9) : 0), N = s.time;
  const int64_t K = s.channels, padded = (K + 15) / 16 * 16;
  args.x = c.input<2>("x", dtype, {B, K});
  args.weight = c.input<2>("weight", parameter(c.random, dtype), {N, K});
  if (c.random.chance(60)) args.bias = c.input<1>("bias", parameter(c.random, dtype), {N});
  args.y = c.output<2>("y", dtype, {B, N});
  if (args.copies_x()) args.copy = c.output<2>("copy", state_of(dtype), {B, padded}, true);
  c.run = [args] { linear_step(args); };
  c.oracle = [args, padded] {
    in_compute_type(args.x.dtype, [&](auto zero) {
      using T = decltype(zero);
      const auto number = [&](const View<2>& v, int64_t n, int64_t k) {
        return k < v.size[1] ? static_cast<T>(get(v, n, k)) : T(0);
      };
      for (int64_t b = 0; b < args.x.size[0]; ++b) {
        for (int64_t n = 0; n < args.weight.size[0]; ++n) {
          T sums[16] = {};
          for (int64_t k = 0; k < padded; ++k)
            sums[k % 16] = std::fma(number(args.weight, n, k), number(args.x, b, k), sums[k % 16]);
          for (int half = 8; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
          set(args.y, args.bias ? sums[0] + static_cast<T>(get(args.bias, n)) : sums[0], b, n);
        }
        for (int64_t k = 0; k < padded; ++k) set(args.copy, number(args.x, b, k), b, k);
      }
    });
  };
}

// The mean of f(d) over D numbers as rms_norm.h has it; f(d, sum) adds to a sum.
template <class T, class F>
T mean_of(int64_t D, F f) {
  T sums[64] = {};
  for (int64_t d = 0; d < D; ++d) sums[d % 64] = f(d, sums[d % 64]);
  for (int half = 32; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0] / static_cast<T>(D);
}

void rms_norm_case(Case& c, const Shape& s) {
  RmsNorm args;
  const DType dtype = activation(c.random);
  const int64_t B = s.batch, T = s.time, D = s.channels;
  args.x = c.input<3>("x", dtype, {B, T, D});
  args.weight = c.input<1>("weight", parameter(c.random, dtype), {D});
  args.eps = c.random.pick({0.0, 1e-6, 1e-5});
  args.y = c.output<3>("y", dtype, {B, T, D});
  args.rstd = c.output<2>("rstd", state_of(dtype), {B, T});
  c.run = [args] { rms_norm(args); };
  c.oracle = [args, B, T, D] {
    in_compute_type(args.x.dtype, [&](auto zero) {
      using N = decltype(zero);
      for (int64_t row = 0; row < B * T; ++row) {
        const int64_t b = row / T, t = row % T;
        const auto x = [&](int64_t d) { return static_cast<N>(get(args.x, b, t, d)); };
        const N mean = mean_of<N>(D, [&](int64_t d, N sum) { return std::fma(x(d), x(d), sum); });
        const N rstd = N(1) / std::sqrt(mean + static_cast<N>(args.eps));
        set(args.rstd, rstd, b, t);
        for (int64_t d = 0; d < D; ++d)
          set(args.y, x(d) * rstd * static_cast<N>(get(args.weight, d)), b, t, d);
      }
    });
  };
}

void rms_norm_backward_case(Case& c, const Shape& s) {
  RmsNormBackward args;
  const DType dtype = activation(c.random), compute = state_of(dtype);
  const int64_t T = s.time, D = s.channels, size[] = {s.batch, T, D};
  args.dy = c.input<3>("dy", dtype, size);
  args.x = c.input<3>("x", dtype, size);
  args.weight = c.input<1>("weight", parameter(c.random, dtype), {D});
  args.rstd = c.input<2>("rstd", compute, {s.batch, T});
  args.dx = c.output<3>("dx", dtype, size);
  args.dweight = c.output<1>("dweight", args.weight.dtype, {D});
  const NormChunks chunks = args.chunks();
  const View<2> sums = c.output<2>("sums", compute, {chunks.count(), args.padded()}, true);
  args.sums = sums.data;
  c.run = [args] { rms_norm_backward(args); };
  c.oracle = [args, sums, chunks, T, D] {
    in_compute_type(args.x.dtype, [&](auto zero) {
      using N = decltype(zero);
      const auto at = [](const auto& v, auto... i) { return static_cast<N>(get(v, i...)); };
      for (int64_t row = 0; row < chunks.rows; ++row) {
        const int64_t b = row / T, t = row % T, chunk = row / chunks.each;
        const N rstd = at(args.rstd, b, t);
        const auto x = [&](const auto& v, int64_t d) { return d < D ? at(v, b, t, d) : N(0); };
        const auto dy = [&](int64_t d) { return x(args.dy, d); };
        const auto n = [&](int64_t d) { return x(args.x, d) * rstd; };
        const auto g = [&](int64_t d) { return dy(d) * at(args.weight, d); };
        const N mean = mean_of<N>(D, [&](int64_t d, N sum) { return std::fma(g(d), n(d), sum); });
        for (int64_t d = 0; d < args.padded(); ++d) {
          if (d < D) set(args.dx, std::fma(n(d), -mean, g(d)) * rstd, b, t, d);
          set(sums, std::fma(dy(d), n(d), at(sums, chunk, d)), chunk, d);
        }
      }
      for (int64_t d = 0; d < D; ++d) {
        N total = 0;
        for (int64_t chunk = 0; chunk < chunks.count(); ++chunk) total += at(sums, chunk, d);
        set(args.dweight, total, d);
      }
    });
  };
}

struct Op {
  const char* name;
  void (*make)(Case&, const Shape&);
  Shape large;          // outputs that a kernel writes past the caches
  uint64_t one_in = 1;  // of the quick cases, for what takes long
};
constexpr Op kOps[] = {
    {"linear_scan", linear_scan_case, {1, 700, 3072}},
    {"linear_scan_backward", linear_scan_backward_case, {1, 700, 3072}},
    {"linear_scan_step", linear_scan_step_case, {1, 300, 512}},
    {"block_scan", block_scan_case, {1, 600, 1100}},
    {"block_scan_backward", block_scan_backward_case, {1, 600, 1100}},
    {"block_scan_step", block_scan_step_case, {1, 300, 512}},
    {"causal_conv1d", causal_conv1d_case, {2, 1030, 1040}},
    {"causal_conv1d_backward", causal_conv1d_backward_case, {2, 1030, 1040}},
    {"causal_conv1d_step", causal_conv1d_step_case, {1, 300, 512}},
    {"selective_scan", selective_scan_case, {1, 1050, 2080}},
    {"selective_scan_backward", selective_scan_backward_case, {1, 1050, 2080}},
    {"selective_scan_step", selective_scan_step_case, {1, 300, 512}},
    {"softmax_scan", softmax_scan_case, {1, 1050, 2080}},
    {"softmax_scan_backward", softmax_scan_backward_case, {1, 1050, 2080}},
    {"softmax_scan_step", softmax_scan_step_case, {1, 300, 512}},
    {"rnn", rnn_case, {1, 300, 520}, 10},
    {"rnn_step", rnn_step_case, {1, 300, 512}, 10},
    {"rnn_newton", rnn_newton_case, {1, 300, 30}, 10},
    {"rnn_global_newton", rnn_global_newton_case, {1, 300, 100}, 10},
    {"rnn_backward", rnn_backward_case, {1, 300, 520}, 10},
    {"linear_step", linear_step_case, {1, 700, 1040}},
    {"rms_norm", rms_norm_case, {3, 700, 300}},
    {"rms_norm_backward", rms_norm_backward_case, {3, 700, 300}},
    {"rtrl_update", rtrl_update_case, {2, 300, 130}},
    {"rtrl_gradient", rtrl_gradient_case, {5, 1, 700}},
    {"hostile_cu_seqlens", hostile_cu_seqlens_case, {1, 300, 512}},
};

enum class Kind { quick, large, any_bytes };

// One case on every instruction set that may be chosen; `alone` when no other thread calls kernels.
void check(const Op& op, uint64_t seed, Kind kind, bool alone, const std::string& only = "") {
  Case c(seed * 31 + static_cast<uint64_t>(&op - kOps), kind == Kind::any_bytes);
  op.make(c, kind == Kind::large ? op.large : shape(c.random));
  c.remember();
  std::vector<std::vector<char>> wanted;
  const auto compare = [&](const char* who) {
    try {
      c.check_untouched();
      wanted.empty() ? void(wanted = c.results()) : c.check_results(wanted);
    } catch (const std::exception& error) {
      throw std::runtime_error(std::string(op.name) + ", seed " + std::to_string(seed) +
                               (kind == Kind::any_bytes ? ", random bytes" : "") + ", " + who +
                               ": " + error.what());
    }
    c.restore();
  };
  if (c.oracle) c.oracle(), compare("oracle");
  if (c.emulated && kind != Kind::large) c.emulated(), compare("emulated CUDA");
  if (!c.run) return;
  if (!alone) return c.run(), compare(isa_name(isa()));
  for (const char* name : {"scalar", "avx2", "avx512"}) {
    if (!only.empty() && only != name) continue;
    cap_isa(name);
    if (std::strcmp(isa_name(isa()), name) == 0) c.run(), compare(name);
  }
}

int main(int argc, char** argv) {
  uint64_t seed = 1, cases = 400;
  double seconds = 0;
  bool concurrent = false;
  std::string only, isa_only;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    const char* value = i + 1 < argc ? argv[i + 1] : "";
    if (flag == "--concurrent") {
      concurrent = true;
      continue;
    }
    ++i;
    if (flag == "--seed") {
      seed = std::strtoull(value, nullptr, 10);
    } else if (flag == "--cases") {
      cases = std::strtoull(value, nullptr, 10);
    } else if (flag == "--seconds") {
      seconds = std::atof(value);
    } else if (flag == "--op") {
      only = value;
    } else if (flag == "--isa") {
      isa_only = value;
    } else {
      std::fprintf(stderr, "unknown option %s\n", flag.c_str());
      return 2;
    }
  }
  const auto chosen = [&](const Op& op) { return only.empty() || only == op.name; };
  set_thread_source([] { return 1; });
  std::atomic<uint64_t> done{0};
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  if (concurrent) {
    std::atomic<bool> failed{false};
    std::vector<std::thread> threads;
    for (uint64_t n = 0; n < 4; ++n)
      threads.emplace_back([&, n] {
        try {
          for (uint64_t i = n; i < cases; i += 4)
            for (const Op& op : kOps)
              if (chosen(op)) check(op, seed + i, Kind::quick, false), ++done;
        } catch (const std::exception& error) {
          std::fprintf(stderr, "test_kernels: %s\n", error.what());
          failed = true;
        }
      });
    for (std::thread& thread : threads) thread.join();
    if (failed) return 1;
    // Tasks of one call on several threads, where this build starts them by std::thread.
    set_thread_source([] { return 4; });
  }
  try {
    for (const Op& op : kOps) {
      if (!chosen(op)) continue;
      for (uint64_t i = 0; i < cases; i += op.one_in) {
        check(op, seed + i, Kind::quick, true, isa_only);
        if (i % 4 == 0) check(op, seed + i, Kind::any_bytes, true, isa_only);
        ++done;
      }
      if (cases > 1) check(op, seed, Kind::large, true, isa_only);
    }
    for (uint64_t i = cases; elapsed() < seconds; ++i, ++done)
      for (const Op& op : kOps)
        if (chosen(op)) check(op, seed + i, i % 2 ? Kind::any_bytes : Kind::quick, true, isa_only);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "test_kernels: %s\n", error.what());
    return 1;
  }
  std::printf("test_kernels: %llu cases passed in %.1f s\n",
              static_cast<unsigned long long>(done.load()), elapsed());
  return 0;
}

}  // namespace
}  // namespace recurra::test

int main(int argc, char** argv) { return recurra::test::main(argc, argv); }
