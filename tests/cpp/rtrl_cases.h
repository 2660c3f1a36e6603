// The cases of rtrl, whose equations define the bits.
#pragma once
#include "case.h"
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

inline void rtrl_update_case(Case& c, const Shape& s) {
  RtrlUpdate args;
  c.dense();
  const DType dtype = c.random.chance(50) ? DType::f32 : DType::f64;
  const int64_t B = s.batch, T = s.time, N = s.channels, K = 1 + c.random.below(4);
  const int64_t G = 1 + c.random.below(3), P = c.random.below(3);
  const int64_t D = c.random.pick<int64_t>({0, 1, 15, 16, 17, 32, 33, 50});
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
  c.oracle = [args] {
    in_compute_type(args.weight.dtype,
                    [&](auto zero) { rtrl_update_oracle<decltype(zero)>(args); });
  };
}

inline void rtrl_gradient_case(Case& c, const Shape& s) {
  RtrlGradient args;
  const DType dtype = c.random.chance(50) ? DType::f32 : DType::f64;
  const int64_t B = s.batch, N = s.channels, K = 1 + c.random.below(4), G = 1 + c.random.below(3);
  const int64_t P = c.random.below(3), D = c.random.pick<int64_t>({0, 1, 15, 16, 17, 32, 33, 50});
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

}  // namespace recurra::test
