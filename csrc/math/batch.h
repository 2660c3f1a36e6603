// Batch<V, M>: M independent numbers or vectors that take every operation together. A function of
// csrc/math is one chain of some thirty dependent operations; on a batch the chains advance side by
// side in program order, and the units need not wait for the latency of one.
#pragma once
#include "math/functions.h"

namespace recurra::RECURRA_ISA {

template <class V, int M>
struct Batch {
  V v[M];

  Batch() = default;
  RECURRA_FN Batch(V x) {  // NOLINT: a number stands for M of it
    for_each_index<M>([&](auto i) RECURRA_LAMBDA { v[i] = x; });
  }
};

template <class V, int M>
struct NumberOf<Batch<V, M>> {
  using type = Number<V>;
};

template <class V, int M>
struct BatchMask {
  decltype(V() < V()) m[M];
};

// clang-format off
#define RECURRA_BATCH_1(NAME)                                                       \
  template <class V, int M> RECURRA_FN Batch<V, M> NAME(Batch<V, M> a) {            \
    for_each_index<M>([&](auto i) RECURRA_LAMBDA { a.v[i] = NAME(a.v[i]); });       \
    return a; }
#define RECURRA_BATCH_2(NAME)                                                       \
  template <class V, int M>                                                         \
  RECURRA_FN Batch<V, M> NAME(Batch<V, M> a, const Batch<V, M>& b) {                \
    for_each_index<M>([&](auto i) RECURRA_LAMBDA { a.v[i] = NAME(a.v[i], b.v[i]); });  \
    return a; }                                                                     \
  template <class V, int M>                                                         \
  RECURRA_FN Batch<V, M> NAME(const Batch<V, M>& a, Number<V> b) {                  \
    return NAME(a, Batch<V, M>(V(b))); }                                            \
  template <class V, int M>                                                         \
  RECURRA_FN Batch<V, M> NAME(Number<V> a, const Batch<V, M>& b) {                  \
    return NAME(Batch<V, M>(V(a)), b); }
#define RECURRA_BATCH_COMPARE(OP)                                                   \
  template <class V, int M>                                                         \
  RECURRA_FN BatchMask<V, M> operator OP(const Batch<V, M>& a, const Batch<V, M>& b) { \
    BatchMask<V, M> out;                                                            \
    for_each_index<M>([&](auto i) RECURRA_LAMBDA { out.m[i] = a.v[i] OP b.v[i]; });  \
    return out; }                                                                   \
  template <class V, int M>                                                         \
  RECURRA_FN BatchMask<V, M> operator OP(const Batch<V, M>& a, Number<V> b) {       \
    return a OP Batch<V, M>(V(b)); }
// clang-format on

RECURRA_BATCH_1(operator-)
RECURRA_BATCH_1(abs)
RECURRA_BATCH_1(sqrt)
RECURRA_BATCH_1(round)
RECURRA_BATCH_1(exponent)
RECURRA_BATCH_2(operator+)
RECURRA_BATCH_2(operator-)
RECURRA_BATCH_2(operator*)
RECURRA_BATCH_2(operator/)
RECURRA_BATCH_2(min)
RECURRA_BATCH_2(max)
RECURRA_BATCH_2(copysign)
RECURRA_BATCH_2(fraction)
RECURRA_BATCH_2(scale2)
RECURRA_BATCH_COMPARE(<)
RECURRA_BATCH_COMPARE(<=)
RECURRA_BATCH_COMPARE(==)
RECURRA_BATCH_COMPARE(>)

template <class V, int M>
RECURRA_FN Batch<V, M> fma(Batch<V, M> a, const Batch<V, M>& b, const Batch<V, M>& c) {
  for_each_index<M>([&](auto i) RECURRA_LAMBDA { a.v[i] = fma(a.v[i], b.v[i], c.v[i]); });
  return a;
}
template <class V, int M>
RECURRA_FN Batch<V, M> select(const BatchMask<V, M>& m, Batch<V, M> a, const Batch<V, M>& b) {
  for_each_index<M>([&](auto i) RECURRA_LAMBDA { a.v[i] = select(m.m[i], a.v[i], b.v[i]); });
  return a;
}
template <class V, int M>
RECURRA_FN Batch<V, M> select(const BatchMask<V, M>& m, Number<V> a, const Batch<V, M>& b) {
  return select(m, Batch<V, M>(V(a)), b);
}

#undef RECURRA_BATCH_1
#undef RECURRA_BATCH_2
#undef RECURRA_BATCH_COMPARE

}  // namespace recurra::RECURRA_ISA
