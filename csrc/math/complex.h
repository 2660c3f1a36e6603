// Complex numbers of vectors, just enough for recurrences that may be complex; the same names for
// real ones, so that a kernel is written once.
#pragma once
#include "math/functions.h"

namespace recurra::RECURRA_ISA {

template <class V>
struct Complex {
  V re, im;
};

template <class V>
RECURRA_FN Complex<V> operator+(Complex<V> a, Complex<V> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class V>
RECURRA_FN Complex<V> operator*(Complex<V> a, Complex<V> b) {
  return {fma(a.re, b.re, -(a.im * b.im)), fma(a.re, b.im, a.im * b.re)};
}
template <class V>
RECURRA_FN Complex<V> operator*(Complex<V> a, V b) {
  return {a.re * b, a.im * b};
}
template <class V>
RECURRA_FN Complex<V> fma(Complex<V> a, Complex<V> b, Complex<V> c) {
  return {fma(a.re, b.re, fma(-a.im, b.im, c.re)), fma(a.re, b.im, fma(a.im, b.re, c.im))};
}
template <class V>
RECURRA_FN Complex<V> fma(Complex<V> a, V b, Complex<V> c) {
  return {fma(a.re, b, c.re), fma(a.im, b, c.im)};
}
template <class V>
RECURRA_FN Complex<V> conj(Complex<V> a) {
  return {a.re, -a.im};
}
template <Plain V>
RECURRA_FN V conj(V a) {
  return a;
}

// c + the real part of a b
template <Plain V>
RECURRA_FN V add_real(V a, V b, V c) {
  return fma(a, b, c);
}
template <class V>
RECURRA_FN V add_real(Complex<V> a, Complex<V> b, V c) {
  return fma(a.re, b.re, fma(-a.im, b.im, c));
}

// The exponent of exp_scaled: its real part, the only part of a real one, times `factor`.
template <Plain V>
RECURRA_FN V scaled(V a, Number<V> factor) {
  return a * V(factor);
}
template <class V>
RECURRA_FN Complex<V> scaled(Complex<V> a, Number<V> factor) {
  return {a.re * V(factor), a.im};
}

// e^a for an a whose real part was multiplied by log2(e) beforehand
template <Plain V>
RECURRA_FN V exp_scaled(V a) {
  return exp2_fast(a);
}
template <class V>
RECURRA_FN Complex<V> exp_scaled(Complex<V> a) {
  const V r = exp2_fast(a.re);
  const SinCos<V> turn = sincos(a.im);
  return {r * turn.cos, r * turn.sin};
}

}  // namespace recurra::RECURRA_ISA
