// SiLU of a float with the bits of math/functions.h, in a third of the instructions where nothing
// underflows: there scaling by 2^n is one product, rounding to an integer an addition, and the
// quotient of t by 1 + t needs no check.
#pragma once
#include "math/functions.h"

namespace recurra::cuda {

// Correctly rounded a / b for b in [1, 2] and a in [2^-100, 1], by the steps that nvcc compiles a
// division to, after those that ask whether they may be taken.
RECURRA_FN float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
  r = fma(r, fma(-b, r, 1.0f), r);
  const float q = a * r;
  return fma(r, fma(-b, q, a), q);
#else
  return a / b;
#endif
}

// Beyond, and for NaN, exp(-|x|) or the remainder of the quotient might be subnormal.
RECURRA_FN bool silu_is_near(float x) { return abs(x) < 64; }

RECURRA_FN ValueSlope<float> silu_slope_near(float x) {
  constexpr float big = 12582912;  // 1.5 2^23: the last bits of what is added to it count ones
  const float y = -abs(x), shifted = y * 1.4426950408889634f + big, n = shifted - big;
  const float r = fma(n, -1.42860682030941723212e-6f, fma(n, -0.693145751953125f, y));
  const float p = exp_reduced(r);
  const uint32_t exponent = __builtin_bit_cast(uint32_t, shifted) << 23;
  const float scale = __builtin_bit_cast(float, exponent + 0x3f800000u), t = p * scale;
  const float q = quotient(t, 1 + t);
  const bool negative = x < 0;
  const float of_s = negative ? p : 1, of_other = negative ? 1 : t, by = negative ? scale : 1;
  const float s = fma(q, -of_s, of_s), other = fma(q, -of_other, of_other);
  return {x * s * by, s * fma(x, other, 1.0f) * by};
}

// Apart, so that its many instructions stand once in a kernel.
#if defined(__CUDACC__)
template <class T>
__device__ __noinline__ ValueSlope<T> silu_slope_anywhere(T x) {
  return silu_slope(x);
}
#else
template <class T>
ValueSlope<T> silu_slope_anywhere(T x) {
  return silu_slope(x);
}
#endif

// For V numbers, together.
template <int V>
__device__ __forceinline__ void silu_slopes(const float (&x)[V], ValueSlope<float> (&out)[V]) {
  bool near = true;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    out[v] = silu_slope_near(x[v]);
    near = near && silu_is_near(x[v]);
  }
  if (near) return;
#pragma unroll
  for (int v = 0; v < V; ++v) out[v] = silu_slope_anywhere(x[v]);
}
template <int V>
__device__ __forceinline__ void silu_slopes(const double (&x)[V], ValueSlope<double> (&out)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) out[v] = silu_slope(x[v]);
}

}  // namespace recurra::cuda
