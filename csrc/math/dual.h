// Dual<V, K, Mask>: a value and its derivatives along those of K directions whose bit is set in
// Mask, the others being zero. The mask is part of the type and is joined where numbers meet, since
// IEEE arithmetic forbids the compiler to drop a multiplication by zero: a cell run on duals then
// costs what its Jacobian written by hand would.
#pragma once
#include "math/functions.h"

// Of constants; where RECURRA_FN is constexpr itself, it may not be said twice (rnn/countable.h).
#ifndef RECURRA_CONSTANT_FN
#define RECURRA_CONSTANT_FN constexpr RECURRA_FN
#endif

namespace recurra::RECURRA_ISA {

RECURRA_CONSTANT_FN int count_bits(unsigned mask) {
  int count = 0;
  for (; mask; mask &= mask - 1) ++count;
  return count;
}

template <class V, int K, unsigned Mask>
struct Dual {
  static_assert(0 < K && K <= 32 && Mask != 0);
  V value;
  V tangents[count_bits(Mask)];

  template <int k>
  static constexpr bool has = (Mask >> k) & 1;
  // Where direction k is stored.
  template <int k>
  static constexpr int slot = count_bits(Mask & ((1u << k) - 1));
};

template <class V, int K, unsigned Mask>
struct NumberOf<Dual<V, K, Mask>> {
  using type = Number<V>;
};

// What a plain operand and a dual one have in common.
template <class X>
struct DualTraits {
  static constexpr bool is_dual = false;
  static constexpr unsigned mask = 0;
  static constexpr int directions = 0;
  using Value = X;
};
template <class V, int K, unsigned Mask>
struct DualTraits<Dual<V, K, Mask>> {
  static constexpr bool is_dual = true;
  static constexpr unsigned mask = Mask;
  static constexpr int directions = K;
  using Value = V;
};
template <class X>
inline constexpr bool kIsDual = DualTraits<X>::is_dual;
template <class... X>
concept AnyDual = (kIsDual<X> || ...);

// The value type and number of directions of the dual operands among X.
template <class First, class... Rest>
struct Meet {
  using Value = typename Meet<Rest...>::Value;
  static constexpr int directions = Meet<Rest...>::directions;
};
template <class V, int K, unsigned Mask, class... Rest>
struct Meet<Dual<V, K, Mask>, Rest...> {
  using Value = V;
  static constexpr int directions = K;
};

template <class V, class X>
RECURRA_FN V value_of(const X& x) {
  if constexpr (kIsDual<X>) {
    return x.value;
  } else {
    return V(x);
  }
}
// The value of a dual number or the number itself.
template <class X>
RECURRA_FN auto value(const X& x) {
  if constexpr (kIsDual<X>) {
    return x.value;
  } else {
    return x;
  }
}
// The derivative along direction k; zero where the mask has it so.
template <int k, class V, int K, unsigned Mask>
RECURRA_FN V tangent(const Dual<V, K, Mask>& x) {
  if constexpr (Dual<V, K, Mask>::template has<k>) {
    return x.tangents[Dual<V, K, Mask>::template slot<k>];
  } else {
    return V(Number<V>(0));
  }
}
template <int k, class X>
inline constexpr bool kHas = (DualTraits<X>::mask >> k) & 1;

// A variable of its own: derivative 1 along direction k.
template <int K, int k, class V>
RECURRA_FN Dual<V, K, 1u << k> seed(V x) {
  return {x, {V(Number<V>(1))}};
}

// value with f(Index<k>) as its derivative along every direction that some X has.
template <class... X, class V, class F>
RECURRA_FN auto make_dual(V value, F f) {
  constexpr int K = Meet<X...>::directions;
  using D = Dual<V, K, (DualTraits<X>::mask | ...)>;
  static_assert(((!kIsDual<X> || DualTraits<X>::directions == K) && ...));
  D out;
  out.value = value;
  for_each_index<K>([&](auto k) RECURRA_LAMBDA {
    if constexpr (D::template has<k.value>) out.tangents[D::template slot<k.value>] = f(k);
  });
  return out;
}

// f(x) from its value and slope.
template <class V, int K, unsigned M>
RECURRA_FN Dual<V, K, M> chain(const Dual<V, K, M>& x, V value, V slope) {
  return make_dual<Dual<V, K, M>>(
      value, [&](auto k) RECURRA_LAMBDA { return slope * tangent<k.value>(x); });
}

template <class A, class B>
  requires AnyDual<A, B>
RECURRA_FN auto operator+(const A& a, const B& b) {
  using V = typename Meet<A, B>::Value;
  return make_dual<A, B>(value_of<V>(a) + value_of<V>(b), [&](auto k) RECURRA_LAMBDA {
    if constexpr (!kHas<k.value, B>) {
      return tangent<k.value>(a);
    } else if constexpr (!kHas<k.value, A>) {
      return tangent<k.value>(b);
    } else {
      return tangent<k.value>(a) + tangent<k.value>(b);
    }
  });
}
template <class A, class B>
  requires AnyDual<A, B>
RECURRA_FN auto operator-(const A& a, const B& b) {
  using V = typename Meet<A, B>::Value;
  return make_dual<A, B>(value_of<V>(a) - value_of<V>(b), [&](auto k) RECURRA_LAMBDA {
    if constexpr (!kHas<k.value, B>) {
      return tangent<k.value>(a);
    } else if constexpr (!kHas<k.value, A>) {
      return -tangent<k.value>(b);
    } else {
      return tangent<k.value>(a) - tangent<k.value>(b);
    }
  });
}
template <class A, class B>
  requires AnyDual<A, B>
RECURRA_FN auto operator*(const A& a, const B& b) {
  using V = typename Meet<A, B>::Value;
  const V va = value_of<V>(a), vb = value_of<V>(b);
  return make_dual<A, B>(va * vb, [&](auto k) RECURRA_LAMBDA {
    if constexpr (!kHas<k.value, B>) {
      return tangent<k.value>(a) * vb;
    } else if constexpr (!kHas<k.value, A>) {
      return va * tangent<k.value>(b);
    } else {
      return fma(tangent<k.value>(a), vb, va * tangent<k.value>(b));
    }
  });
}
template <class A, class B>
  requires AnyDual<A, B>
RECURRA_FN auto operator/(const A& a, const B& b) {
  using V = typename Meet<A, B>::Value;
  const V va = value_of<V>(a), vb = value_of<V>(b), quotient = va / vb;
  const V inverse = V(Number<V>(1)) / vb;
  return make_dual<A, B>(quotient, [&](auto k) RECURRA_LAMBDA {
    if constexpr (!kHas<k.value, B>) {
      return tangent<k.value>(a) * inverse;
    } else if constexpr (!kHas<k.value, A>) {
      return -quotient * tangent<k.value>(b) * inverse;
    } else {
      return fma(-quotient, tangent<k.value>(b), tangent<k.value>(a)) * inverse;
    }
  });
}
template <class V, int K, unsigned M>
RECURRA_FN Dual<V, K, M> operator-(const Dual<V, K, M>& a) {
  return make_dual<Dual<V, K, M>>(-a.value,
                                  [&](auto k) RECURRA_LAMBDA { return -tangent<k.value>(a); });
}

template <class A, class B, class C>
  requires AnyDual<A, B, C>
RECURRA_FN auto fma(const A& a, const B& b, const C& c) {
  using V = typename Meet<A, B, C>::Value;
  const V va = value_of<V>(a), vb = value_of<V>(b);
  return make_dual<A, B, C>(fma(va, vb, value_of<V>(c)), [&](auto k) RECURRA_LAMBDA {
    constexpr bool has_a = kHas<k.value, A>, has_b = kHas<k.value, B>, has_c = kHas<k.value, C>;
    if constexpr (has_a && has_b && has_c) {
      return fma(va, tangent<k.value>(b), fma(vb, tangent<k.value>(a), tangent<k.value>(c)));
    } else if constexpr (has_a && has_b) {
      return fma(va, tangent<k.value>(b), vb * tangent<k.value>(a));
    } else if constexpr (has_a && has_c) {
      return fma(vb, tangent<k.value>(a), tangent<k.value>(c));
    } else if constexpr (has_b && has_c) {
      return fma(va, tangent<k.value>(b), tangent<k.value>(c));
    } else if constexpr (has_a) {
      return vb * tangent<k.value>(a);
    } else if constexpr (has_b) {
      return va * tangent<k.value>(b);
    } else {
      return tangent<k.value>(c);
    }
  });
}

template <int k, class V, class X>
RECURRA_FN V tangent_or_zero(const X& x) {
  if constexpr (kHas<k, X>) {
    return tangent<k>(x);
  } else {
    return V(Number<V>(0));
  }
}
template <class M, class A, class B>
  requires AnyDual<A, B>
RECURRA_FN auto select(M m, const A& a, const B& b) {
  using V = typename Meet<A, B>::Value;
  return make_dual<A, B>(select(m, value_of<V>(a), value_of<V>(b)), [&](auto k) RECURRA_LAMBDA {
    return select(m, tangent_or_zero<k.value, V>(a), tangent_or_zero<k.value, V>(b));
  });
}
template <class A, class B>
  requires AnyDual<A, B>
RECURRA_FN auto operator<(const A& a, const B& b) {
  using V = typename Meet<A, B>::Value;
  return value_of<V>(a) < value_of<V>(b);
}
template <class A, class B>
  requires AnyDual<A, B>
RECURRA_FN auto operator>(const A& a, const B& b) {
  using V = typename Meet<A, B>::Value;
  return value_of<V>(a) > value_of<V>(b);
}
template <class A, class B>
  requires AnyDual<A, B>
RECURRA_FN auto operator<=(const A& a, const B& b) {
  using V = typename Meet<A, B>::Value;
  return value_of<V>(a) <= value_of<V>(b);
}
template <class A, class B>
  requires AnyDual<A, B>
RECURRA_FN auto operator>=(const A& a, const B& b) {
  using V = typename Meet<A, B>::Value;
  return value_of<V>(a) >= value_of<V>(b);
}
// The derivative is the chosen operand's; the second's where they are equal.
template <class A, class B>
  requires AnyDual<A, B>
RECURRA_FN auto min(const A& a, const B& b) {
  return select(a < b, a, b);
}
template <class A, class B>
  requires AnyDual<A, B>
RECURRA_FN auto max(const A& a, const B& b) {
  return select(a > b, a, b);
}

#define RECURRA_DUAL                    \
  template <class V, int K, unsigned M> \
  RECURRA_FN Dual<V, K, M>

RECURRA_DUAL abs(const Dual<V, K, M>& x) {
  return chain(x, abs(x.value), copysign(V(Number<V>(1)), x.value));
}
RECURRA_DUAL sqrt(const Dual<V, K, M>& x) {  // infinite derivative at 0
  const V root = sqrt(x.value);
  return chain(x, root, V(Number<V>(0.5)) / root);
}
RECURRA_DUAL exp(const Dual<V, K, M>& x) {
  const V e = exp(x.value);
  return chain(x, e, e);
}
RECURRA_DUAL exp2(const Dual<V, K, M>& x) {
  const V e = exp2(x.value);
  return chain(x, e, e * V(Number<V>(0.69314718055994530942)));
}
RECURRA_DUAL exp2_fast(const Dual<V, K, M>& x) {
  const V e = exp2_fast(x.value);
  return chain(x, e, e * V(Number<V>(0.69314718055994530942)));
}
RECURRA_DUAL expm1(const Dual<V, K, M>& x) { return chain(x, expm1(x.value), exp(x.value)); }
RECURRA_DUAL log1p(const Dual<V, K, M>& x) {
  const V one = V(Number<V>(1));
  return chain(x, log1p(x.value), one / (one + x.value));
}
RECURRA_DUAL sigmoid(const Dual<V, K, M>& x) {
  const ValueSlope<V> s = sigmoid_slope(x.value);
  return chain(x, s.value, s.slope);
}
RECURRA_DUAL tanh(const Dual<V, K, M>& x) {
  const ValueSlope<V> t = tanh_slope(x.value);
  return chain(x, t.value, t.slope);
}
RECURRA_DUAL softplus(const Dual<V, K, M>& x) {
  const ValueSlope<V> f = softplus_slope(x.value);
  return chain(x, f.value, f.slope);
}
RECURRA_DUAL silu(const Dual<V, K, M>& x) {
  const ValueSlope<V> f = silu_slope(x.value);
  return chain(x, f.value, f.slope);
}
#undef RECURRA_DUAL

template <class V, int K, unsigned M>
RECURRA_FN SinCos<Dual<V, K, M>> sincos(const Dual<V, K, M>& x) {
  const SinCos<V> f = sincos(x.value);
  return {chain(x, f.sin, f.cos), chain(x, f.cos, -f.sin)};
}

}  // namespace recurra::RECURRA_ISA
