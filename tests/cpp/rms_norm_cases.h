// The cases of rms_norm, with the equations that define its bits.
#pragma once
#include "case.h"
#include "rms_norm/rms_norm.h"

namespace recurra::test {

// The mean of f(d) over D numbers as rms_norm.h has it; f(d, sum) adds to a sum.
template <class T, class F>
T mean_of(int64_t D, F f) {
  T sums[64] = {};
  for (int64_t d = 0; d < D; ++d) sums[d % 64] = f(d, sums[d % 64]);
  for (int half = 32; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0] / static_cast<T>(D);
}

inline void rms_norm_case(Case& c, const Shape& s) {
  RmsNorm args;
  const DType dtype = activation(c.random);
  const int64_t B = s.batch, T = s.time, D = s.channels;
  args.x = c.input<3>("x", dtype, {B, T, D});
  args.weight = c.input<1>("weight", parameter(c.random, dtype), {D});
  args.eps = c.random.pick({0.0, 1e-6, 1e-5});
  args.y = c.output<3>("y", dtype, {B, T, D});
  args.rstd = c.output<2>("rstd", state_of(dtype), {B, T});
  c.run = [args] { rms_norm(args); };
  if (c.random.chance(50)) c.emulated = [args] { cuda::rms_norm(args, {}); };
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

inline void rms_norm_backward_case(Case& c, const Shape& s) {
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
  if (c.random.chance(50)) c.emulated = [args] { cuda::rms_norm_backward(args, {}); };
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

}  // namespace recurra::test
