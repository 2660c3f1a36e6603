// Packs: up to twelve values of different types, taken apart by a structured binding. A cell takes
// its inputs, states and parameters in packs and returns its new states in one. No standard
// library, so that they also exist on the device.
#pragma once
#include "math/dual.h"

namespace recurra::RECURRA_ISA {

// clang-format off
template <class... T> struct Pack;
template <> struct Pack<> {};
template <class A> struct Pack<A> { A a; };
template <class A, class B> struct Pack<A, B> { A a; B b; };
template <class A, class B, class C> struct Pack<A, B, C> { A a; B b; C c; };
template <class A, class B, class C, class D> struct Pack<A, B, C, D> { A a; B b; C c; D d; };
template <class A, class B, class C, class D, class E>
struct Pack<A, B, C, D, E> { A a; B b; C c; D d; E e; };
template <class A, class B, class C, class D, class E, class F>
struct Pack<A, B, C, D, E, F> { A a; B b; C c; D d; E e; F f; };
template <class A, class B, class C, class D, class E, class F, class G>
struct Pack<A, B, C, D, E, F, G> { A a; B b; C c; D d; E e; F f; G g; };
template <class A, class B, class C, class D, class E, class F, class G, class H>
struct Pack<A, B, C, D, E, F, G, H> { A a; B b; C c; D d; E e; F f; G g; H h; };
template <class A, class B, class C, class D, class E, class F, class G, class H, class I>
struct Pack<A, B, C, D, E, F, G, H, I> { A a; B b; C c; D d; E e; F f; G g; H h; I i; };
template <class A, class B, class C, class D, class E, class F, class G, class H, class I, class J>
struct Pack<A, B, C, D, E, F, G, H, I, J> { A a; B b; C c; D d; E e; F f; G g; H h; I i; J j; };
template <class A, class B, class C, class D, class E, class F, class G, class H, class I, class J,
          class K>
struct Pack<A, B, C, D, E, F, G, H, I, J, K> {
  A a; B b; C c; D d; E e; F f; G g; H h; I i; J j; K k;
};
template <class A, class B, class C, class D, class E, class F, class G, class H, class I, class J,
          class K, class L>
struct Pack<A, B, C, D, E, F, G, H, I, J, K, L> {
  A a; B b; C c; D d; E e; F f; G g; H h; I i; J j; K k; L l;
};
// clang-format on

template <class... T>
RECURRA_FN Pack<T...> pack(T... values) {
  return {values...};
}

// Element i.
template <int i, class P>
RECURRA_FN auto get(const P& p) {
  if constexpr (i == 0) return p.a;
  if constexpr (i == 1) return p.b;
  if constexpr (i == 2) return p.c;
  if constexpr (i == 3) return p.d;
  if constexpr (i == 4) return p.e;
  if constexpr (i == 5) return p.f;
  if constexpr (i == 6) return p.g;
  if constexpr (i == 7) return p.h;
  if constexpr (i == 8) return p.i;
  if constexpr (i == 9) return p.j;
  if constexpr (i == 10) return p.k;
  if constexpr (i == 11) return p.l;
}

// The pack f(Index<0>), ..., f(Index<N - 1>).
template <int N, int I = 0, class F, class... T>
RECURRA_FN auto generate(const F& f, T... values) {
  if constexpr (I == N) {
    return pack(values...);
  } else {
    return generate<N, I + 1>(f, values..., f(Index<I>{}));
  }
}

// The names of a cell's inputs, states or parameters; as many as there are of them.
template <int N>
struct Names {
  static constexpr int size = N;
  const char* name[N ? N : 1];
};
template <class... C>
constexpr Names<sizeof...(C)> names(C... c) {
  return {{c...}};
}

// A parameter that enters only as (input + parameter * state), or (input + parameter) where state
// is kAlone. The derivative along it is the input's times the state, so that engines need no
// tangent for it.
struct Affine {
  int param, input, state;
};
inline constexpr int kAlone = -1;

template <int N>
struct AffineList {
  static constexpr int size = N;
  Affine entry[N ? N : 1];

  // Where in the list a parameter is, or -1.
  RECURRA_CONSTANT_FN int find(int param) const {
    for (int i = 0; i < N; ++i)
      if (entry[i].param == param) return i;
    return -1;
  }
};
template <class... E>
constexpr AffineList<sizeof...(E)> affine(E... entries) {
  return {{entries...}};
}

// The numbers of a cell's inputs, states and parameters.
template <class Cell>
inline constexpr int kInputs = decltype(Cell::inputs)::size;
template <class Cell>
inline constexpr int kStates = decltype(Cell::states)::size;
template <class Cell>
inline constexpr int kParams = decltype(Cell::params)::size;

}  // namespace recurra::RECURRA_ISA
