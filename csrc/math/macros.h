// What a compiler needs to hear so that cells and their mathematics end up inside the kernel, on
// the host and on the device.
#pragma once

#if defined(__CUDACC__)
#define RECURRA_FN __host__ __device__ __forceinline__
#define RECURRA_LAMBDA
#elif defined(__AVX2__) && !defined(RECURRA_SANITIZED)
#define RECURRA_FN inline __attribute__((always_inline))
#define RECURRA_LAMBDA __attribute__((always_inline))
#else
#define RECURRA_FN inline
#define RECURRA_LAMBDA
#endif

#ifndef RECURRA_ISA
#error "RECURRA_ISA must name the namespace of these headers, as -DRECURRA_ISA=mine: docs/cpp.md"
#endif

namespace recurra::RECURRA_ISA {

// Integers at compile time, and a loop over them that is unrolled at any optimisation level.
template <int I>
struct Index {
  static constexpr int value = I;
  constexpr RECURRA_FN operator int() const { return I; }
};

template <int I, int N, class F>
RECURRA_FN void for_each_index_from(F& f) {
  if constexpr (I < N) {
    f(Index<I>{});
    for_each_index_from<I + 1, N>(f);
  }
}
// f(Index<0>) ... f(Index<N - 1>)
template <int N, class F>
RECURRA_FN void for_each_index(F f) {
  for_each_index_from<0, N>(f);
}

// The scalar type behind a number, a vector or a dual number of either.
template <class V>
struct NumberOf {
  using type = V;
};
template <template <class> class Vector, class T>
struct NumberOf<Vector<T>> {
  using type = T;
};
template <class V>
using Number = typename NumberOf<V>::type;

// A constant of x's scalar type. Whole numbers mix with every type as they are (1 - z); others
// would turn plain float arithmetic into double.
template <class V>
RECURRA_FN constexpr Number<V> like(const V&, double constant) {
  return static_cast<Number<V>>(constant);
}

template <class A, class B>
inline constexpr bool kSame = false;
template <class A>
inline constexpr bool kSame<A, A> = true;

// A plain number or a vector of them, as opposed to a dual number, which the functions overload.
template <class V>
concept Plain = kSame<Number<V>, float> || kSame<Number<V>, double>;

}  // namespace recurra::RECURRA_ISA
