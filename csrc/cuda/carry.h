// The state that goes from one part of time to the next, in double: not rounded from part to part,
// which would make the chain of roundings longer.
#pragma once
#include "math/complex.h"
#include "math/macros.h"

namespace recurra::cuda {

RECURRA_FN double widened(float v) { return v; }
RECURRA_FN double widened(double v) { return v; }
template <class T>
RECURRA_FN Complex<double> widened(Complex<T> v) {
  return {v.re, v.im};
}
RECURRA_FN void narrow(double v, float& to) { to = static_cast<float>(v); }
RECURRA_FN void narrow(double v, double& to) { to = v; }
template <class T>
RECURRA_FN void narrow(Complex<double> v, Complex<T>& to) {
  to = {static_cast<T>(v.re), static_cast<T>(v.im)};
}
// What is not finite as a state stays so, though a double holds more.
RECURRA_FN double limited(double v, const float&) {
  return abs(v) < 0x1.ffffffp127 ? v : v * __builtin_huge_val();
}
RECURRA_FN double limited(double v, const double&) { return v; }
template <class T>
RECURRA_FN Complex<double> limited(Complex<double> v, const Complex<T>&) {
  return {limited(v.re, T()), limited(v.im, T())};
}
RECURRA_FN double one(double) { return 1; }
RECURRA_FN Complex<double> one(Complex<double>) { return {1, 0}; }
template <Plain V>
RECURRA_FN bool is_zero(V v) {
  return v == 0;
}
template <class T>
RECURRA_FN bool is_zero(Complex<T> v) {
  return v.re == 0 && v.im == 0;
}

// The state after a part: from `exact` before it, which is stored as `state`, the product of the
// part's gates, and `own`, what the part makes of zeros. From a state of zero the part has its own
// end exactly, even past a product that is infinite.
template <class V, class Wide>
RECURRA_FN Wide after_part(V state, Wide exact, Wide product, Wide own) {
  return is_zero(state) ? own : limited(fma(product, exact, own), state);
}

}  // namespace recurra::cuda
