// Complex numbers in memory.
#pragma once
#include "cuda/storage.h"
#include "math/complex.h"

namespace recurra::cuda {

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T re, im;
};
template <class T>
struct ComputeOf<Pair<T>> {
  using type = Complex<T>;
};

template <class T>
RECURRA_FN Complex<T> load(const Pair<T>* p) {
  return {p->re, p->im};
}
template <class T>
RECURRA_FN void store(Pair<T>* p, Complex<T> v) {
  *p = {v.re, v.im};
}

}  // namespace recurra::cuda
