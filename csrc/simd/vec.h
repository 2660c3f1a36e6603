// Vec<T>: sixteen lanes of float or double on every instruction set, held in as many registers as
// it takes. Lanes are channels. Everything that kernels and csrc/math may do with lanes is here;
// the per-register pieces are in the one vec_*.h that the compiler flags select.
#pragma once
#include <cstdint>

// Without vector instructions a function is sixteen times as long, and with a sanitizer's checks in
// it as well: there inlining is left to the compiler, since those builds are there to be right.
#if defined(__AVX2__) && !defined(RECURRA_SANITIZED)
#define RECURRA_INLINE inline __attribute__((always_inline))
#else
#define RECURRA_INLINE inline
#endif

namespace recurra::RECURRA_ISA {

constexpr int kLanes = 16;

// Asks for the line of p in the first or the second cache.
template <int cache>
RECURRA_INLINE void prefetch(const void* p) {
  __builtin_prefetch(p, 0, cache == 1 ? 3 : 2);
}

// One hardware register of T: type, mask, width and the operations of this instruction set.
template <class T>
struct Reg;

}  // namespace recurra::RECURRA_ISA

#if defined(__AVX512F__)
#include "simd/vec_avx512.h"
#elif defined(__AVX2__)
#include "simd/vec_avx2.h"
#else
#include "simd/vec_scalar.h"
#endif

namespace recurra::RECURRA_ISA {

// A few registers are unrolled; sixteen numbers stay a loop, which compiles in a tenth of the time.
#if defined(__AVX2__)
#define RECURRA_EACH _Pragma("GCC unroll 16") for (int k = 0; k < K; ++k)
#else
#define RECURRA_EACH _Pragma("GCC unroll 1") for (int k = 0; k < K; ++k)
#endif

template <class T>
struct Mask {
  static constexpr int K = kLanes / Reg<T>::width;
  typename Reg<T>::mask m[K];
};

template <class T>
struct Vec {
  using R = Reg<T>;
  static constexpr int K = kLanes / R::width;
  typename R::type r[K];

  Vec() = default;
  RECURRA_INLINE Vec(T value) {  // NOLINT: a scalar broadcasts wherever a vector is wanted
    RECURRA_EACH r[k] = R::set(value);
  }

  static RECURRA_INLINE Vec load(const T* p) {
    Vec v;
    RECURRA_EACH v.r[k] = R::load(p + k * R::width);
    return v;
  }
  RECURRA_INLINE void store(T* p) const { RECURRA_EACH R::store(p + k * R::width, r[k]); }
  // Past the caches; p aligned to 64 bytes. fence() afterwards, before another thread reads.
  RECURRA_INLINE void stream(T* p) const { RECURRA_EACH R::stream(p + k * R::width, r[k]); }
  // The first n lanes; the others load as zero and are not touched by a store.
  static RECURRA_INLINE Vec load(const T* p, int n) {
    Vec v;
    RECURRA_EACH v.r[k] = R::load_part(p + k * R::width, clamp(n - k * R::width));
    return v;
  }
  RECURRA_INLINE void store(T* p, int n) const {
    RECURRA_EACH R::store_part(p + k * R::width, r[k], clamp(n - k * R::width));
  }

  static RECURRA_INLINE int clamp(int n) { return n < 0 ? 0 : n > R::width ? R::width : n; }
};

template <class T>
struct LaneCount {};

#define RECURRA_MAP(RESULT, ...) \
  constexpr int K = Vec<T>::K;   \
  RESULT out;                    \
  RECURRA_EACH __VA_ARGS__;      \
  return out;

// clang-format off
#define RECURRA_BINARY(NAME, OP)                                                        \
  template <class T> RECURRA_INLINE Vec<T> NAME(Vec<T> a, Vec<T> b) {                   \
    RECURRA_MAP(Vec<T>, out.r[k] = Reg<T>::OP(a.r[k], b.r[k])) }                        \
  template <class T> RECURRA_INLINE Vec<T> NAME(Vec<T> a, typename Same<T>::type b) {   \
    return NAME(a, Vec<T>(b)); }                                                        \
  template <class T> RECURRA_INLINE Vec<T> NAME(typename Same<T>::type a, Vec<T> b) {   \
    return NAME(Vec<T>(a), b); }
#define RECURRA_COMPARE(NAME, OP)                                                       \
  template <class T> RECURRA_INLINE Mask<T> NAME(Vec<T> a, Vec<T> b) {                  \
    RECURRA_MAP(Mask<T>, out.m[k] = Reg<T>::OP(a.r[k], b.r[k])) }                       \
  template <class T> RECURRA_INLINE Mask<T> NAME(Vec<T> a, typename Same<T>::type b) {  \
    return NAME(a, Vec<T>(b)); }
#define RECURRA_UNARY(NAME)                                                             \
  template <class T> RECURRA_INLINE Vec<T> NAME(Vec<T> a) {                             \
    RECURRA_MAP(Vec<T>, out.r[k] = Reg<T>::NAME(a.r[k])) }
// clang-format on

// Keeps T from being deduced from a scalar operand.
template <class T>
struct Same {
  using type = T;
};

RECURRA_BINARY(operator+, add)
RECURRA_BINARY(operator-, sub)
RECURRA_BINARY(operator*, mul)
RECURRA_BINARY(operator/, div)
RECURRA_BINARY(min, min)  // a < b ? a : b, so b where either is NaN
RECURRA_BINARY(max, max)  // a > b ? a : b, so b where either is NaN
RECURRA_BINARY(copysign, copysign)
RECURRA_BINARY(fraction, fraction)  // a - b for b = round(a), and anything finite for infinite a
RECURRA_BINARY(scale2, scale2)      // a * 2^b for integral b, rounded once; finite a
RECURRA_COMPARE(operator<, lt)
RECURRA_COMPARE(operator<=, le)
RECURRA_COMPARE(operator==, eq)
RECURRA_UNARY(abs)
RECURRA_UNARY(sqrt)
RECURRA_UNARY(round)     // to the nearest integer, ties to even
RECURRA_UNARY(exponent)  // floor(log2(a)) of a positive normal number
RECURRA_UNARY(mantissa)  // a / 2^exponent(a), in [1, 2)

template <class T>
RECURRA_INLINE Vec<T> operator-(Vec<T> a) {
  RECURRA_MAP(Vec<T>, out.r[k] = Reg<T>::neg(a.r[k]))
}
template <class T>
RECURRA_INLINE Mask<T> operator>(Vec<T> a, Vec<T> b) {
  return b < a;
}
template <class T>
RECURRA_INLINE Mask<T> operator>(Vec<T> a, typename Same<T>::type b) {
  return Vec<T>(b) < a;
}
template <class T>
RECURRA_INLINE Mask<T> operator>=(Vec<T> a, Vec<T> b) {
  return b <= a;
}
template <class T>
RECURRA_INLINE Mask<T> operator>=(Vec<T> a, typename Same<T>::type b) {
  return Vec<T>(b) <= a;
}
template <class T>
RECURRA_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  RECURRA_MAP(Vec<T>, out.r[k] = Reg<T>::fma(a.r[k], b.r[k], c.r[k]))
}
template <class T>
RECURRA_INLINE Vec<T> fma(Vec<T> a, typename Same<T>::type b, typename Same<T>::type c) {
  return fma(a, Vec<T>(b), Vec<T>(c));
}
template <class T>
RECURRA_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, typename Same<T>::type c) {
  return fma(a, b, Vec<T>(c));
}
template <class T>
RECURRA_INLINE Vec<T> fma(Vec<T> a, typename Same<T>::type b, Vec<T> c) {
  return fma(a, Vec<T>(b), c);
}
template <class T>
RECURRA_INLINE Vec<T> fma(typename Same<T>::type a, Vec<T> b, Vec<T> c) {
  return fma(Vec<T>(a), b, c);
}
template <class T>
RECURRA_INLINE Vec<T> fma(typename Same<T>::type a, Vec<T> b, typename Same<T>::type c) {
  return fma(Vec<T>(a), b, Vec<T>(c));
}
template <class T>
RECURRA_INLINE Vec<T> select(Mask<T> m, Vec<T> a, Vec<T> b) {
  RECURRA_MAP(Vec<T>, out.r[k] = Reg<T>::select(m.m[k], a.r[k], b.r[k]))
}
template <class T>
RECURRA_INLINE Vec<T> select(Mask<T> m, Vec<T> a, typename Same<T>::type b) {
  return select(m, a, Vec<T>(b));
}
template <class T>
RECURRA_INLINE Vec<T> select(Mask<T> m, typename Same<T>::type a, Vec<T> b) {
  return select(m, Vec<T>(a), b);
}
template <class T>
RECURRA_INLINE Vec<T> select(Mask<T> m, typename Same<T>::type a, typename Same<T>::type b) {
  return select(m, Vec<T>(a), Vec<T>(b));
}
template <class T>
RECURRA_INLINE bool any(Mask<T> m) {
  constexpr int K = Mask<T>::K;
  bool out = false;
  RECURRA_EACH out |= Reg<T>::any(m.m[k]);
  return out;
}

template <class T>
RECURRA_INLINE bool all(Mask<T> m) {
  constexpr int K = Mask<T>::K;
  bool out = true;
  RECURRA_EACH out &= Reg<T>::all(m.m[k]);
  return out;
}
// Whether the sign is that of a negative number, of zeros too.
template <class T>
RECURRA_INLINE Mask<T> negative(Vec<T> a) {
  RECURRA_MAP(Mask<T>, out.m[k] = Reg<T>::negative(a.r[k]))
}

// The sum of the lanes by one fixed tree, lane i with lane i + 8, then 4, 2, 1.
template <class T>
RECURRA_INLINE T sum(Vec<T> v) {
  _Pragma("GCC unroll 16") for (int half = Vec<T>::K / 2; half > 0; half /= 2)
      _Pragma("GCC unroll 16") for (int k = 0; k < half; ++k)
          v.r[k] = Reg<T>::add(v.r[k], v.r[k + half]);
  return Reg<T>::sum(v.r[0]);
}

// rows[i] lane j <-> rows[j] lane i
template <class T>
RECURRA_INLINE void transpose(Vec<T> (&rows)[kLanes]) {
  if constexpr (requires { Reg<T>::transpose(rows); }) {
    Reg<T>::transpose(rows);
  } else {
    T from[kLanes][kLanes], to[kLanes][kLanes];
    for (int i = 0; i < kLanes; ++i) rows[i].store(from[i]);
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < kLanes; ++j) to[i][j] = from[j][i];
    for (int i = 0; i < kLanes; ++i) rows[i] = Vec<T>::load(to[i]);
  }
}

// 16-bit storage, given as bits. float -> bfloat16 and float16 round to nearest even, keep
// subnormals and make every NaN quiet.
RECURRA_INLINE Vec<float> load_bf16(const uint16_t* p) {
  using T = float;
  RECURRA_MAP(Vec<T>, out.r[k] = Reg<T>::load_bf16(p + k * Reg<T>::width))
}
RECURRA_INLINE Vec<float> load_f16(const uint16_t* p) {
  using T = float;
  RECURRA_MAP(Vec<T>, out.r[k] = Reg<T>::load_f16(p + k * Reg<T>::width))
}
// `past` the caches: p aligned to the bytes that this writes, and fence() afterwards.
// clang-format off
#define RECURRA_STORE_HALF(NAME, CONVERT)                                           \
  RECURRA_INLINE void NAME(uint16_t* p, Vec<float> v, bool past = false) {          \
    using R = Reg<float>;                                                           \
    constexpr int K = Vec<float>::K;                                                \
    RECURRA_EACH {                                                                  \
      uint16_t* to = p + k * R::width;                                              \
      const R::half bits = R::CONVERT(v.r[k]);                                      \
      past ? R::stream_half(to, bits) : R::store_half(to, bits);                    \
    }                                                                               \
  }
// clang-format on
RECURRA_STORE_HALF(store_bf16, to_bf16)
RECURRA_STORE_HALF(store_f16, to_f16)
#undef RECURRA_STORE_HALF

}  // namespace recurra::RECURRA_ISA
