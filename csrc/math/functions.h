// The closed vocabulary of the cells and kernels, on float, double and vectors of them: one
// definition for every instruction set and for CUDA, made of exactly rounded operations in a fixed
// order, so that the CPU results do not depend on the instruction set.
//
// All are right at zero (its sign is kept where the function is odd), at infinity and for NaN, and
// underflow gradually. Polynomials are near-minimax fits (weighted least squares, reweighted by the
// error) whose coefficients were rounded to the type one after the other, the lowest first, each
// time fitting the rest again; degree, interval and error are those of the function that they stand
// for. The errors given in ulp of the result are the largest seen over all floats of the range that
// matters, or over 2^20 doubles; tests/cpp/test_math.cpp holds them to their bounds.
#pragma once
#include "math/macros.h"
#include "math/scalar.h"

namespace recurra::RECURRA_ISA {

// c0 + c1 x + c2 x^2 + ..., with the fewest operations.
template <Plain V, class... C>
RECURRA_FN V polynomial(V x, double c0, C... rest) {
  if constexpr (sizeof...(rest) == 0) {
    return V(Number<V>(c0));
  } else {
    return fma(polynomial(x, rest...), x, V(Number<V>(c0)));
  }
}

// The same with even and odd powers apart, half as long a chain; for where x^2 is there anyway.
template <Plain V>
struct EvenOdd {
  V even, odd;
};
template <Plain V, class... C>
RECURRA_FN EvenOdd<V> even_odd(V x2, double c0, double c1, C... rest) {
  using T = Number<V>;
  if constexpr (sizeof...(rest) == 0) {
    return {V(T(c0)), V(T(c1))};
  } else if constexpr (sizeof...(rest) == 1) {
    return {fma(V(T(rest)...), x2, V(T(c0))), V(T(c1))};
  } else {
    const EvenOdd<V> high = even_odd(x2, rest...);
    return {fma(high.even, x2, V(T(c0))), fma(high.odd, x2, V(T(c1)))};
  }
}
template <Plain V, class... C>
RECURRA_FN V polynomial2(V x, V x2, double c0, double c1, C... rest) {
  const EvenOdd<V> parts = even_odd(x2, c0, c1, rest...);
  return fma(parts.odd, x, parts.even);
}

template <Plain V>
inline constexpr bool kIsFloat = kSame<Number<V>, float>;

// x = n ln 2 + r with |r| <= ln(2)/2, for |x| < 800. The high part of ln 2 is short, so that its
// product with n is exact.
template <Plain V>
struct Reduced {
  V n, r;
};
template <Plain V>
RECURRA_FN Reduced<V> reduce_ln2(V x) {
  using T = Number<V>;
  const V n = round(x * V(T(1.4426950408889634)));
  if constexpr (kIsFloat<V>) {
    const V r = fma(n, V(T(-0.693145751953125)), x);
    return {n, fma(n, V(T(-1.42860682030941723212e-6)), r)};
  } else {
    const V r = fma(n, V(T(-6.93147180369123816490e-01)), x);
    return {n, fma(n, V(T(-1.90821492927058770002e-10)), r)};
  }
}

// exp(r) on |r| <= ln(2)/2 as 1 + r + r^2 Q(r), the error relative to expm1(r):
// float: degree 6, 1.4e-8; double: degree 11, 1.9e-17.
template <Plain V>
RECURRA_FN V exp_reduced(V r) {
  if constexpr (kIsFloat<V>) {
    return polynomial(r, 1, 1, 0.49999997, 0.166665465, 0.0416674428, 0.00836625416, 0.00138699135);
  } else {
    return polynomial(r, 1, 1, 0.5000000000000006, 0.16666666666666627, 0.04166666666657399,
                      0.008333333333364576, 0.0013888888932227434, 0.00019841269774390096,
                      2.4801504637811178e-05, 2.7557357267513842e-06, 2.7626250304046656e-07,
                      2.5069870408426837e-08);
  }
}
template <Plain V>
RECURRA_FN V expm1_reduced(V r) {
  const V r2 = r * r;
  if constexpr (kIsFloat<V>) {
    return fma(
        polynomial2(r, r2, 0.49999997, 0.166665465, 0.0416674428, 0.00836625416, 0.00138699135), r2,
        r);
  } else {
    return fma(polynomial2(r, r2, 0.5000000000000006, 0.16666666666666627, 0.04166666666657399,
                           0.008333333333364576, 0.0013888888932227434, 0.00019841269774390096,
                           2.4801504637811178e-05, 2.7557357267513842e-06, 2.7626250304046656e-07,
                           2.5069870408426837e-08),
               r2, r);
  }
}

// The type's constant: one number for float, one for double.
template <Plain V>
RECURRA_FN V either(double if_float, double if_double) {
  return V(Number<V>(kIsFloat<V> ? if_float : if_double));
}

// NaN goes through: min and max return their second operand when either is NaN.
template <Plain V>
RECURRA_FN V at_least(V bound, V x) {
  return max(bound, x);
}
template <Plain V>
RECURRA_FN V at_most(V bound, V x) {
  return min(bound, x);
}

// float 0.87, double 0.88 ulp
template <Plain V>
RECURRA_FN V exp(V x) {
  const V y = at_least(either<V>(-105, -747), at_most(either<V>(89, 710), x));
  const Reduced<V> e = reduce_ln2(y);
  return scale2(exp_reduced(e.r), e.n);
}

// exp(-|x|), by which the functions below stay clear of overflow.
template <Plain V>
RECURRA_FN V exp_minus_abs(V x) {
  const Reduced<V> e = reduce_ln2(at_least(either<V>(-105, -747), -abs(x)));
  return scale2(exp_reduced(e.r), e.n);
}

// x - round(x), and anything finite for an infinite x, where the scaling by x alone decides.
template <Plain V>
RECURRA_FN V fraction(V x, V n) {
  return min(x - n, V(Number<V>(0.5)));
}

// float 0.79, double 0.79 ulp. Polynomial 1 + x P(x) on |x| <= 1/2:
// float: degree 6, 3.0e-9; double: degree 11, 4e-18.
template <Plain V>
RECURRA_FN V exp2(V x) {
  const V n = round(x), f = fraction(x, n);
  if constexpr (kIsFloat<V>) {
    return scale2(polynomial(f, 1, 0.693147182, 0.240226477, 0.0555035956, 0.00961849932,
                             0.00133909704, 0.000153292785),
                  n);
  } else {
    return scale2(polynomial(f, 1, 0.6931471805599453, 0.24022650695910108, 0.055504108664821715,
                             0.009618129107601603, 0.001333355814654755, 0.0001540353044904055,
                             1.5252733632685459e-05, 1.3215438833877639e-06, 1.0178160591070063e-07,
                             7.073233350694759e-09, 4.4387812965601623e-10),
                  n);
  }
}

// 2^x for an x that the kernel has already multiplied by log2(e): against exp(x) the error is then
// |x| 2^-24 of the result and 1.95 ulp if the scaling rounds once, from the exact log2(e); the
// float next to log2(e) adds |x| 0.23 2^-24. Degree 5 on |x| <= 1/2, 9.4e-8; exactly 1 at 0, where
// the error vanishes like x. The double version is exp2.
template <Plain V>
RECURRA_FN V exp2_fast(V x) {
#if defined(__CUDA_ARCH__)
  if constexpr (kIsFloat<V>) {
    float y;
    asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
#endif
  if constexpr (kIsFloat<V>) {
    const V n = round(x), f = fraction(x, n);
    return scale2(
        polynomial(f, 1, 0.693147004, 0.240222454, 0.0555070639, 0.00967136025, 0.00132715388), n);
  } else {
    return exp2(x);
  }
}

// float 1.70, double 2.04 ulp
template <Plain V>
RECURRA_FN V expm1(V x) {
  const V y = at_least(either<V>(-18, -38), at_most(either<V>(89, 710), x));
  const Reduced<V> e = reduce_ln2(y);
  const V one = V(Number<V>(1));
  // 2^n (expm1(r) + 1 - 2^-n), which overflows only where the result does.
  const V sum = expm1_reduced(e.r) + (one - scale2(one, -e.n));
  return copysign(scale2(sum, e.n), x);
}

// log(1 + x) for finite x > -1, but for the sign of zero. With 1 + x = 2^k (1 + m), m in
// [-1/4, 1/2): polynomial m + m^2 Q(m), float: degree 10, 5.0e-9; double: degree 21, 8.6e-18.
template <Plain V>
RECURRA_FN V log1p_finite(V x) {
  using T = Number<V>;
  const V third2 = V(T(2) / T(3)), one = V(T(1));
  const V k = exponent(fma(x, third2, third2)) + one;
  const V s = scale2(one, -k);
  const V m = fma(x, s, s - one);  // rounded once, while 2^-k counts beside 1
  const V m2 = m * m;
  V log_m, high;
  if constexpr (kIsFloat<V>) {
    log_m = fma(polynomial2(m, m2, -0.5, 0.333334506, -0.250001013, 0.199908093, -0.16647099,
                            0.144787237, -0.13163352, 0.104653068, -0.0450762026),
                m2, m);
    high = V(T(0.693145751953125));
    log_m = fma(k, V(T(1.42860682030941723212e-6)), log_m);
  } else {
    log_m = fma(polynomial2(m, m2, -0.4999999999999997, 0.3333333333333395, -0.2500000000001967,
                            0.19999999999816068, -0.166666666627442, 0.1428571430137073,
                            -0.12500000350460497, 0.11111110799322828, -0.09999983737545214,
                            0.09090889575031949, -0.08333732321801207, 0.07693482645281445,
                            -0.07138423197708245, 0.06642257361033051, -0.06249077167333018,
                            0.06087293468882897, -0.05977900500419565, 0.05075536525796376,
                            -0.02936245642495057, 0.008059169970266376),
                m2, m);
    high = V(T(6.93147180369123816490e-01));
    log_m = fma(k, V(T(1.90821492927058770002e-10)), log_m);
  }
  return fma(k, high, log_m);
}

// float 1.27, double 1.21 ulp; NaN below -1
template <Plain V>
RECURRA_FN V log1p(V x) {
  using T = Number<V>;
  const V log_x = copysign(log1p_finite(x), x);
  const T inf = T(__builtin_huge_val());
  const V outside = select(x == V(T(-1)), V(-inf), V(inf - inf));
  return select(x < V(inf), select(x > V(T(-1)), log_x, outside), x);
}

// log(1 + t) for t in [0, 1]. In float without a reduction: polynomial t + t^2 Q(t), degree 10,
// 5.3e-9; in double its 21 terms would lose too much near 1.
template <Plain V>
RECURRA_FN V log1p_unit(V t) {
  if constexpr (kIsFloat<V>) {
    const V t2 = t * t;
    return fma(polynomial2(t, t2, -0.499999315, 0.333304703, -0.24958156, 0.196931437, -0.15348734,
                           0.106689721, -0.0575470328, 0.0201404728, -0.00330390944),
               t2, t);
  } else {
    return log1p_finite(t);
  }
}

// A function together with its derivative, where they share their exponential.
template <class V>
struct ValueSlope {
  V value, slope;
};

// sigmoid(-|x|) and sigmoid(|x|) from t = exp(-|x|), by one division. They add up to 1 and the
// first has not lost digits where it is small; the derivative, 3.8 ulp, is their product.
template <Plain V>
struct SigmoidSides {
  V small, large;
};
template <Plain V>
RECURRA_FN SigmoidSides<V> sigmoid_sides(V t) {
  const V one = V(Number<V>(1)), q = t / (one + t);
  // As t - t q, it carries less of the rounding of 1 + t.
  return {fma(q, -t, t), one - q};
}
template <Plain V>
RECURRA_FN ValueSlope<V> sigmoid_slope_of(V x, V t) {
  const SigmoidSides<V> s = sigmoid_sides(t);
  return {select(x < V(Number<V>(0)), s.small, s.large), s.small * s.large};
}
template <Plain V>
RECURRA_FN ValueSlope<V> sigmoid_slope(V x) {
  return sigmoid_slope_of(x, exp_minus_abs(x));
}
// float 1.61, double 1.58 ulp
template <Plain V>
RECURRA_FN V sigmoid(V x) {
  return sigmoid_slope(x).value;
}

// tanh and 1 - tanh^2 without its cancellation, 4 e / (e + 1)^2 with e = exp(2 |x|); 0 where that
// is below 1e-34, 1e-303 in double; 4.3 ulp.
template <Plain V>
RECURRA_FN ValueSlope<V> tanh_slope(V x) {
  using T = Number<V>;
  const V one = V(T(1)), two = V(T(2)), bound = either<V>(80, 700), twice = abs(x + x);
  const Reduced<V> e = reduce_ln2(at_most(bound, twice));
  const V s = scale2(one, e.n);
  const V em = fma(expm1_reduced(e.r), s, s - one);  // expm1(2|x|)
  // em / (em + 2), and what the rounding of the denominator took away.
  const V inverse = one / (em + two), q = em * inverse;
  const V rest = fma(q, -em, fma(q, -two, em));
  const V slope = (em + one) * inverse * (inverse * V(T(4)));
  return {copysign(fma(rest, inverse, q), x), select(bound <= twice, V(T(0)), slope)};
}
// float 1.81, double 1.78 ulp
template <Plain V>
RECURRA_FN V tanh(V x) {
  return tanh_slope(x).value;
}

// log(1 + exp(x)) and sigmoid(x)
template <Plain V>
RECURRA_FN ValueSlope<V> softplus_slope(V x) {
  const V t = exp_minus_abs(x);
  return {max(x, V(Number<V>(0))) + log1p_unit(t), sigmoid_slope_of(x, t).value};
}
// float 2.98, double 1.54 ulp; no cut to the identity, at 20 or elsewhere
template <Plain V>
RECURRA_FN V softplus(V x) {
  return softplus_slope(x).value;
}

// x s and s (1 + x (1 - s)) with s = sigmoid(x). Both are scaled last, because for very negative x
// the sigmoid alone has lost its digits to underflow; x is bounded where it meets a zero.
template <Plain V>
RECURRA_FN ValueSlope<V> silu_slope(V x) {
  using T = Number<V>;
  const V zero = V(T(0)), one = V(T(1));
  const V y = at_least(either<V>(-128, -800), -abs(x));
  const Reduced<V> e = reduce_ln2(y);
  const V p = exp_reduced(e.r), t = scale2(p, e.n), q = t / (one + t);
  const auto negative = x < zero;
  const V large = one - q, s = select(negative, fma(q, -p, p), large);
  const V n = select(negative, e.n, zero), other = select(negative, large, fma(q, -t, t));
  return {scale2(select(negative, y, x) * s, n), scale2(s * fma(copysign(y, x), other, one), n)};
}
// float 2.60, double 2.49 ulp; -0 at -infinity
template <Plain V>
RECURRA_FN V silu(V x) {
  return silu_slope(x).value;
}

template <class V>
struct SinCos {
  V sin, cos;
};
// float: absolute error 1.16 2^-24 for |x| <= 1e5, beyond that |x| 2^-24; double: 1.13 2^-53 for
// |x| <= 1e5. Never larger than 1, NaN for an infinite x. On |r| <= pi/4, r + r^3 S(r^2) and
// 1 - r^2/2 + r^4 C(r^2), float: degrees 7 and 8, 4.0e-9 and 1.1e-10; double: degrees 13 and 14,
// 3.8e-18 and 4.9e-20.
template <Plain V>
RECURRA_FN SinCos<V> sincos(V x) {
  using T = Number<V>;
  const V one = V(T(1)), bound = V(T(1.7));
  const V n = round(x * V(T(0.63661977236758134308)));
  V r;  // x - n pi/2, with pi/2 in three parts
  if constexpr (kIsFloat<V>) {
    r = fma(n, V(T(-1.57079637050628662109375)), x);
    r = fma(n, V(T(4.371138828673793e-8)), r);
    r = fma(n, V(T(1.71512449944288281e-15)), r);
  } else {
    r = fma(n, V(T(-1.570796326794896557998981734272)), x);
    r = fma(n, V(T(-6.123233995736765886130329661375e-17)), r);
    r = fma(n, V(T(1.497384904859169777320797133936e-33)), r);
  }
  // |r| grows with the rounding of n; where n is no longer exact, r is noise, but the polynomials
  // stay below 1.
  r = at_least(-bound, at_most(bound, r));
  const V r2 = r * r;
  V s, c;
  if constexpr (kIsFloat<V>) {
    s = polynomial(r2, -0.166666552, 0.00833218731, -0.000195179091);
    c = polynomial(r2, 1, -0.5, 0.0416666456, -0.00138873013, 2.44306702e-05);
  } else {
    s = polynomial(r2, -0.1666666666666663, 0.00833333333332188, -0.00019841269829413906,
                   2.755731356385902e-06, -2.5050739111162655e-08, 1.5895742507410798e-10);
    c = polynomial(r2, 1, -0.5, 0.0416666666666666, -0.0013888888888874441, 2.4801587289636764e-05,
                   -2.7557314387751474e-07, 2.0875727116215316e-09, -1.1359806275600517e-11);
  }
  s = select(x == V(T(0)), x, fma(s * r2, r, r));  // the sign of zero
  c = min(one, c);
  // The quarter turn, n modulo 4 in -2 .. 2.
  const V quarter = fma(round(n * V(T(0.25))), V(T(-4)), n), size = abs(quarter);
  const auto swap = size == one;
  const V first = select(swap, c, s), second = select(swap, s, c);
  const V half = V(T(1.5));
  const V sine = select(quarter < V(T(-0.5)), -first, first);
  const V cosine = select(quarter > V(T(0.5)), -second, second);
  return {select(half < quarter, -first, sine), select(quarter < -half, -second, cosine)};
}

}  // namespace recurra::RECURRA_ISA
