// The operations of simd/vec.h on one plain float or double, with the same results bit for bit, so
// that csrc/math and the cells also run on plain numbers, on the host and on the device.
#pragma once
#include "math/macros.h"

namespace recurra::RECURRA_ISA {

template <class T>
struct Layout;
template <>
struct Layout<float> {
  using Int = int;
  static constexpr int fraction = 23, bias = 127;
  static constexpr float integers = 8388608.0f;  // from here on every number is an integer
};
template <>
struct Layout<double> {
  using Int = long long;
  static constexpr int fraction = 52, bias = 1023;
  static constexpr double integers = 4503599627370496.0;
};

#if defined(__CUDA_ARCH__)
#define RECURRA_BUILTIN(NAME) ::NAME
#else
#define RECURRA_BUILTIN(NAME) __builtin_##NAME
#endif

RECURRA_FN float fma(float a, float b, float c) { return RECURRA_BUILTIN(fmaf)(a, b, c); }
RECURRA_FN double fma(double a, double b, double c) { return RECURRA_BUILTIN(fma)(a, b, c); }
RECURRA_FN float abs(float a) { return RECURRA_BUILTIN(fabsf)(a); }
RECURRA_FN double abs(double a) { return RECURRA_BUILTIN(fabs)(a); }
RECURRA_FN float sqrt(float a) { return RECURRA_BUILTIN(sqrtf)(a); }
RECURRA_FN double sqrt(double a) { return RECURRA_BUILTIN(sqrt)(a); }
RECURRA_FN float copysign(float a, float b) { return RECURRA_BUILTIN(copysignf)(a, b); }
RECURRA_FN double copysign(double a, double b) { return RECURRA_BUILTIN(copysign)(a, b); }
#undef RECURRA_BUILTIN

RECURRA_FN float min(float a, float b) { return a < b ? a : b; }
RECURRA_FN double min(double a, double b) { return a < b ? a : b; }
RECURRA_FN float max(float a, float b) { return a > b ? a : b; }
RECURRA_FN double max(double a, double b) { return a > b ? a : b; }
RECURRA_FN float select(bool m, float a, float b) { return m ? a : b; }
RECURRA_FN double select(bool m, double a, double b) { return m ? a : b; }
RECURRA_FN bool any(bool m) { return m; }
RECURRA_FN bool all(bool m) { return m; }

template <class T>
RECURRA_FN T round_number(T a) {
  constexpr T big = Layout<T>::integers;
  // Adding and taking away 2^bits rounds to nearest even.
  if (!(abs(a) < big)) return a;
  const T r = a < 0 ? (a - big) + big : (a + big) - big;
  return copysign(r, a);
}
#if defined(__CUDA_ARCH__)
RECURRA_FN float round(float a) { return ::rintf(a); }
RECURRA_FN double round(double a) { return ::rint(a); }
#else
RECURRA_FN float round(float a) { return round_number(a); }
RECURRA_FN double round(double a) { return round_number(a); }
#endif

template <class T>
RECURRA_FN T power2(typename Layout<T>::Int n) {  // 2^n for a normal result
  using L = Layout<T>;
  return __builtin_bit_cast(T, (n + L::bias) << L::fraction);
}
// As Vec's: the largest step last when shrinking, so that it alone can leave the normal range.
template <class T>
RECURRA_FN T scale2_number(T a, T n) {
  using L = Layout<T>;
  using Int = typename L::Int;
  constexpr T limit = L::fraction == 23 ? T(300) : T(2200);
  constexpr Int top = L::bias, bottom = 1 - top;
  if (n != n) return n;
  const Int i = static_cast<Int>(max(min(n, limit), -limit));
  const Int last = i < bottom ? bottom : i > top ? top : i;
  const Int rest = i - last, half = rest >> 1;
  return a * power2<T>(half) * power2<T>(rest - half) * power2<T>(last);
}
RECURRA_FN float scale2(float a, float n) { return scale2_number(a, n); }
RECURRA_FN double scale2(double a, double n) { return scale2_number(a, n); }

template <class T>
RECURRA_FN T exponent_number(T a) {
  using L = Layout<T>;
  using Int = typename L::Int;
  const Int biased = (__builtin_bit_cast(Int, a) >> L::fraction) & (2 * L::bias + 1);
  return static_cast<T>(biased - L::bias);
}
RECURRA_FN float exponent(float a) { return exponent_number(a); }
RECURRA_FN double exponent(double a) { return exponent_number(a); }

template <class T>
RECURRA_FN T mantissa_number(T a) {
  using L = Layout<T>;
  using Int = typename L::Int;
  const Int fraction = __builtin_bit_cast(Int, a) & ((Int(1) << L::fraction) - 1);
  return __builtin_bit_cast(T, fraction | (Int(L::bias) << L::fraction));
}
RECURRA_FN float mantissa(float a) { return mantissa_number(a); }
RECURRA_FN double mantissa(double a) { return mantissa_number(a); }

}  // namespace recurra::RECURRA_ISA
