// The cases of linear_step, with the equations that define its bits.
#pragma once
#include "case.h"
#include "linear_step/linear_step.h"

namespace recurra::test {

inline void linear_step_case(Case& c, const Shape& s) {
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
  const auto fill_copy = [args, padded] {
    for (int64_t b = 0; b < args.x.size[0]; ++b)
      for (int64_t k = 0; k < padded; ++k)
        set(args.copy, k < args.x.size[1] ? get(args.x, b, k) : 0.0, b, k);
  };
  if (c.random.chance(25))
    c.emulated = [args, fill_copy] {
      cuda::linear_step(args, {});
      fill_copy();  // which only the CPU needs
    };
  // Two orders of up to 1040 products. In either the error is below 70 units, u, of the sum of the
  // products' sizes, which may be some 30 times the largest y.
  c.emulated_within =
      0x1p11 * (computes_in_double(dtype) ? 0x1p-53 : 0x1p-24) + (dtype == DType::bf16  ? 0x1p-7
                                                                  : dtype == DType::f16 ? 0x1p-10
                                                                                        : 0);
  c.oracle = [args, padded, fill_copy] {
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
      }
    });
    fill_copy();
  };
}

}  // namespace recurra::test
