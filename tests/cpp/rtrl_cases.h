// The cases of rtrl, whose equations define the bits.
#pragma once
#include "case.h"
#include "rnn_cases.h"
#include "rtrl/rtrl.h"

namespace recurra::test {

// S after a chunk, one number at a time.
template <class T>
void rtrl_update_oracle(const RtrlUpdate& a) {
  const auto number = [](const auto& view, auto... index) {
    return static_cast<T>(get(view, index...));
  };
  const int64_t B = a.weight.size[0], K = a.weight.size[1], G = a.weight.size[2];
  const int64_t N = a.weight.size[3], D = a.weight.size[4], T_ = a.u.size[1];
  const int64_t P = a.params.size[2];
  for (int64_t b = 0; b < B; ++b)
    for (int64_t n = 0; n < N; ++n) {
      bool keep = false;
      for (int64_t k = 0; k < K; ++k)
        for (int64_t j = 0; j < K; ++j) keep |= number(a.decay, k, b, j, n) != T(0);
      // One number of each state, given what is added to state k.
      const auto move = [&](auto at, auto add) {
        std::vector<T> old(static_cast<size_t>(K));
        for (int64_t k = 0; k < K; ++k) old[static_cast<size_t>(k)] = keep ? at(k, nullptr) : T(0);
        for (int64_t k = 0; k < K; ++k) {
          T sum = old[0] * number(a.decay, k, b, 0, n);
          for (int64_t j = 1; j < K; ++j)
            sum = std::fma(old[static_cast<size_t>(j)], number(a.decay, k, b, j, n), sum);
          sum = add(k, sum);
          at(k, &sum);
        }
      };
      const auto in = [&](const auto& view, auto... index) {
        return [&view, number, b, index...](int64_t k, const T* value) {
          if (value) set(view, *value, b, k, index...);
          return number(view, b, k, index...);
        };
      };
      for (int64_t g = 0; g < G; ++g) {
        for (int64_t d = 0; d < D; ++d)
          move(in(a.weight, g, n, d), [&](int64_t k, T sum) {
            for (int64_t t = 0; t < T_; ++t)
              sum = std::fma(number(a.factors, k, b, t, g, n), number(a.u, b, t, d), sum);
            return sum;
          });
        move(in(a.bias, g, n), [&](int64_t k, T sum) {
          for (int64_t t = 0; t < T_; ++t) sum = sum + number(a.factors, k, b, t, g, n);
          return sum;
        });
      }
      for (int64_t p = 0; p < P; ++p)
        move(in(a.params, p, n),
             [&](int64_t k, T sum) { return sum + number(a.direct, k, b, p, n); });
    }
}

// The inputs of a layer of so many channels; more than a tile of the CUDA kernels where these are
// few.
inline int64_t rtrl_width(Random& random, int64_t channels) {
  if (channels <= 33 && random.chance(20)) return 132;
  return random.pick<int64_t>({0, 1, 15, 16, 17, 32, 33, 50});
}

inline void rtrl_update_case(Case& c, const Shape& s) {
  RtrlUpdate args;
  c.dense();
  const DType dtype = c.random.chance(50) ? DType::f32 : DType::f64;
  const int64_t B = s.batch, T = s.time, N = s.channels, K = 1 + c.random.below(4);
  const int64_t G = 1 + c.random.below(3), P = c.random.below(3);
  const int64_t D = rtrl_width(c.random, N);
  args.weight = c.output<5>("weight", dtype, {B, K, G, N, D});
  args.bias = c.output<4>("bias", dtype, {B, K, G, N});
  args.params = c.output<4>("params", dtype, {B, K, P, N});
  args.u = c.input<3>("u", dtype, {B, T, D});
  args.decay = c.input<4>("decay", dtype, {K, B, K, N});
  args.factors = c.input<5>("factors", dtype, {K, B, T, G, N});
  args.direct = c.input<4>("direct", dtype, {K, B, P, N});
  if (B * N > 0 && c.random.chance(40))  // a reset
    for (int64_t k = 0; k < K; ++k)
      for (int64_t j = 0; j < K; ++j) set(args.decay, 0.0, k, B - 1, j, N / 2);
  c.run = [args] { rtrl_update(args); };
  c.emulated = [args] { cuda::rtrl_update(args, {}); };
  c.oracle = [args] {
    in_compute_type(args.weight.dtype,
                    [&](auto zero) { rtrl_update_oracle<decltype(zero)>(args); });
  };
}

inline void rtrl_gradient_case(Case& c, const Shape& s) {
  RtrlGradient args;
  const DType dtype = c.random.chance(50) ? DType::f32 : DType::f64;
  const int64_t B = s.batch, N = s.channels, K = 1 + c.random.below(4), G = 1 + c.random.below(3);
  const int64_t P = c.random.below(3), D = rtrl_width(c.random, N);
  const int64_t rows = c.random.chance(50) ? B : 1;
  c.dense();
  args.weight = c.input<5>("weight", dtype, {B, K, G, N, D});
  args.bias = c.input<4>("bias", dtype, {B, K, G, N});
  args.params = c.input<4>("params", dtype, {B, K, P, N});
  args.dh0 = c.input<3>("dh0", dtype, {B, K, N});
  args.dweight = c.output<4>("dweight", dtype, {rows, G, N, D});
  args.dbias = c.output<3>("dbias", dtype, {rows, G, N});
  args.dparams = c.output<3>("dparams", dtype, {rows, P, N});
  c.run = [args] { rtrl_gradient(args); };
  c.emulated = [args] { cuda::rtrl_gradient(args, {}); };
  c.oracle = [args, rows, B, K] {
    in_compute_type(args.weight.dtype, [&](auto zero) {
      using T = decltype(zero);
      for (int64_t row = 0; row < rows; ++row) {
        const bool each = rows == B;
        const int64_t first = each ? row : 0, last = each ? row + 1 : B;
        const auto sum = [&](const auto& from, int64_t n, auto... index) {
          T total = T(0);
          for (int64_t b = first; b < last; ++b)
            for (int64_t k = 0; k < K; ++k) {
              const T scale = static_cast<T>(get(args.dh0, b, k, n));
              if (scale != T(0))
                total = std::fma(static_cast<T>(get(from, b, k, index...)), scale, total);
            }
          return total;
        };
        for (int64_t n = 0; n < args.weight.size[3]; ++n) {
          for (int64_t g = 0; g < args.weight.size[2]; ++g) {
            set(args.dbias, sum(args.bias, n, g, n), row, g, n);
            for (int64_t d = 0; d < args.weight.size[4]; ++d)
              set(args.dweight, sum(args.weight, n, g, n, d), row, g, n, d);
          }
          for (int64_t p = 0; p < args.params.size[2]; ++p)
            set(args.dparams, sum(args.params, n, p, n), row, p, n);
        }
      }
    });
  };
}

// Numbers of one type, of which nothing is asked before they are written.
struct Numbers {
  std::vector<double> memory;  // for either type
  DType dtype;

  Numbers(DType d, int64_t count) : memory(static_cast<size_t>(count)), dtype(d) {}
  template <int N>
  View<N> view(const int64_t (&size)[N]) {
    View<N> v;
    v.data = memory.data();
    v.dtype = dtype;
    for (int64_t n = N - 1, step = 1; n >= 0; step *= size[n--])
      v.size[n] = size[n], v.stride[n] = step;
    return v;
  }
};

// By rnn and a run of its backward for each state of the end.
inline void rtrl_derivatives_by_rnn(const RtrlDerivatives& a, const CellOf& cell) {
  const DType dtype = a.x.dtype;
  const int64_t B = a.x.size[0], T = a.x.size[1], N = a.x.size[3], K = cell.states;
  Rnn forward;
  forward.cell = a.cell;
  forward.sequences = {B, T, nullptr};
  forward.x = a.x;
  forward.params = a.params;
  forward.h0 = a.h0;
  forward.reset = a.reset;
  const int64_t padded = forward.padded(), rows = forward.sequences.chunk_rows(kRnnChunk);
  Numbers y(dtype, B * T * N), last(dtype, B * K * N), saved(dtype, rows * K * padded);
  forward.y = y.view<4>({B, T, 1, N});
  forward.h_last = last.view<3>({B, K, N});
  forward.saved = saved.memory.data();
  rnn(forward);
  for (int64_t k = 0; k < K; ++k) {
    RnnBackward back;
    static_cast<RnnInputs&>(back) = forward;
    Numbers ends(dtype, B * K * N), sums(dtype, B * cell.params * padded);
    back.dh_last = ends.view<3>({B, K, N});
    for (int64_t b = 0; b < B; ++b)
      for (int64_t n = 0; n < N; ++n) set(back.dh_last, 1.0, b, k, n);
    back.saved = saved.memory.data();
    back.dx = {a.factors.at(k, 0, 0, 0, 0), dtype, {B, T, cell.inputs, N}, {}};
    back.dh0 = {a.decay.at(k, 0, 0, 0), dtype, {B, K, N}, {}};
    std::copy_n(a.factors.stride + 1, 4, back.dx.stride);
    std::copy_n(a.decay.stride + 1, 3, back.dh0.stride);
    back.parts = B;
    back.sums = sums.memory.data();
    rnn_backward(back);
    const View<3> of = sums.view<3>({B, cell.params, padded});
    for (int64_t b = 0; b < B; ++b)
      for (int64_t p = 0; p < cell.params; ++p)
        for (int64_t n = 0; n < N; ++n) set(a.direct, get(of, b, p, n), k, b, p, n);
  }
}

inline void rtrl_derivatives_case(Case& c, const Shape& s) {
  RnnInputs in;
  const CellOf cell(c.random);
  const DType dtype = c.random.chance(50) ? DType::f32 : DType::f64;
  const int64_t B = std::max<int64_t>(1, s.batch), T = s.time, K = cell.states;
  const int64_t N = std::max<int64_t>(1, s.channels);
  rnn_inputs(c, in, cell, dtype, {B, T, N});
  in.sequences = {B, T, nullptr};
  RtrlDerivatives args;
  args.cell = cell.index;
  args.x = in.x;
  args.params = in.params;
  if (in.h0.size[0] == B) args.h0 = in.h0;  // and not of packed sequences
  args.reset = in.reset;
  c.dense();
  args.decay = c.output<4>("decay", dtype, {K, B, K, N});
  args.factors = c.output<5>("factors", dtype, {K, B, T, cell.inputs, N});
  args.direct = c.output<4>("direct", dtype, {K, B, cell.params, N});
  c.run = [args, cell] { rtrl_derivatives_by_rnn(args, cell); };
  // A scratch array like any other, but that only the CUDA kernel has it.
  auto states = std::make_shared<Numbers>(dtype, B * T * K * N);
  c.emulated = [args, states]() mutable {
    args.states = states->memory.data();
    cuda::rtrl_derivatives(args, {});
  };
}

}  // namespace recurra::test
