// Complex numbers as they lie in memory: eight of them are a Vec<T>, real parts in its even lanes
// and imaginary parts in its odd ones.
#pragma once
#include "simd/vec.h"

namespace recurra::RECURRA_ISA {

constexpr int kPairs = kLanes / 2;

#if defined(__AVX512F__)
template <class T>
struct Pairs;
template <>
struct Pairs<float> {
  using V = __m512;
  static RECURRA_INLINE V evens(V v) { return _mm512_moveldup_ps(v); }
  static RECURRA_INLINE V odds(V v) { return _mm512_movehdup_ps(v); }
  static RECURRA_INLINE V swapped(V v) { return _mm512_permute_ps(v, 0xb1); }
  static RECURRA_INLINE V alternate(V a, V b) { return _mm512_mask_blend_ps(0xaaaa, a, b); }
};
template <>
struct Pairs<double> {
  using V = __m512d;
  static RECURRA_INLINE V evens(V v) { return _mm512_movedup_pd(v); }
  static RECURRA_INLINE V odds(V v) { return _mm512_permute_pd(v, 0xff); }
  static RECURRA_INLINE V swapped(V v) { return _mm512_permute_pd(v, 0x55); }
  static RECURRA_INLINE V alternate(V a, V b) { return _mm512_mask_blend_pd(0xaa, a, b); }
};
#elif defined(__AVX2__)
template <class T>
struct Pairs;
template <>
struct Pairs<float> {
  using V = __m256;
  static RECURRA_INLINE V evens(V v) { return _mm256_moveldup_ps(v); }
  static RECURRA_INLINE V odds(V v) { return _mm256_movehdup_ps(v); }
  static RECURRA_INLINE V swapped(V v) { return _mm256_permute_ps(v, 0xb1); }
  static RECURRA_INLINE V alternate(V a, V b) { return _mm256_blend_ps(a, b, 0xaa); }
};
template <>
struct Pairs<double> {
  using V = __m256d;
  static RECURRA_INLINE V evens(V v) { return _mm256_movedup_pd(v); }
  static RECURRA_INLINE V odds(V v) { return _mm256_permute_pd(v, 0xf); }
  static RECURRA_INLINE V swapped(V v) { return _mm256_permute_pd(v, 0x5); }
  static RECURRA_INLINE V alternate(V a, V b) { return _mm256_blend_pd(a, b, 0xa); }
};
#endif

// Real parts in both lanes of each pair, imaginary parts in both, and the two exchanged.
#if defined(__AVX2__)
template <class T>
RECURRA_INLINE Vec<T> evens(Vec<T> v) {
  RECURRA_MAP(Vec<T>, out.r[k] = Pairs<T>::evens(v.r[k]))
}
template <class T>
RECURRA_INLINE Vec<T> odds(Vec<T> v) {
  RECURRA_MAP(Vec<T>, out.r[k] = Pairs<T>::odds(v.r[k]))
}
template <class T>
RECURRA_INLINE Vec<T> swapped(Vec<T> v) {
  RECURRA_MAP(Vec<T>, out.r[k] = Pairs<T>::swapped(v.r[k]))
}
// The even lanes of a and the odd lanes of b.
template <class T>
RECURRA_INLINE Vec<T> alternate(Vec<T> a, Vec<T> b) {
  RECURRA_MAP(Vec<T>, out.r[k] = Pairs<T>::alternate(a.r[k], b.r[k]))
}
#else
template <class T>
RECURRA_INLINE Vec<T> evens(Vec<T> v) {
  RECURRA_MAP(Vec<T>, out.r[k] = v.r[k & ~1])
}
template <class T>
RECURRA_INLINE Vec<T> odds(Vec<T> v) {
  RECURRA_MAP(Vec<T>, out.r[k] = v.r[k | 1])
}
template <class T>
RECURRA_INLINE Vec<T> swapped(Vec<T> v) {
  RECURRA_MAP(Vec<T>, out.r[k] = v.r[k ^ 1])
}
template <class T>
RECURRA_INLINE Vec<T> alternate(Vec<T> a, Vec<T> b) {
  RECURRA_MAP(Vec<T>, out.r[k] = k & 1 ? b.r[k] : a.r[k])
}
#endif

// A complex factor as two vectors: with x = u + iv in pairs, f x = re (u, v) + im (v, u).
template <class T>
struct Factor {
  Vec<T> re, im;
};

template <class T>
RECURRA_INLINE Factor<T> factor(Vec<T> v) {
  const Vec<T> im = odds(v);
  return {evens(v), alternate(-im, im)};
}
template <class T>
RECURRA_INLINE Factor<T> conj_factor(Vec<T> v) {
  const Vec<T> im = odds(v);
  return {evens(v), alternate(im, -im)};
}
template <class T>
RECURRA_INLINE Vec<T> operator*(Factor<T> f, Vec<T> x) {
  return fma(f.re, x, f.im * swapped(x));
}
template <class T>
RECURRA_INLINE Vec<T> fma(Factor<T> f, Vec<T> x, Vec<T> c) {
  return fma(f.re, x, fma(f.im, swapped(x), c));
}

// rows[i] pair j <-> rows[j] pair i
template <class T>
RECURRA_INLINE void transpose_pairs(Vec<T> (&rows)[kPairs]) {
  T from[kPairs][kLanes], to[kPairs][kLanes];
  for (int i = 0; i < kPairs; ++i) rows[i].store(from[i]);
  for (int i = 0; i < kPairs; ++i)
    for (int j = 0; j < kLanes; ++j) to[i][j] = from[j / 2][2 * i + j % 2];
  for (int i = 0; i < kPairs; ++i) rows[i] = Vec<T>::load(to[i]);
}
#if defined(__AVX512F__)
template <>
RECURRA_INLINE void transpose_pairs<float>(Vec<float> (&rows)[kPairs]) {
  __m512d a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    const __m512d even = _mm512_castps_pd(rows[2 * i].r[0]);
    const __m512d odd = _mm512_castps_pd(rows[2 * i + 1].r[0]);
    a[i] = _mm512_unpacklo_pd(even, odd);      // columns 0, 2, 4, 6 of two rows
    a[i + 4] = _mm512_unpackhi_pd(even, odd);  // columns 1, 3, 5, 7
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm512_shuffle_f64x2(a[2 * i], a[2 * i + 1], 0x88);
    b[2 * i + 1] = _mm512_shuffle_f64x2(a[2 * i], a[2 * i + 1], 0xdd);
  }
  // b: columns 0 and 4, then 2 and 6, of rows 0 to 3, of rows 4 to 7; then 1 and 5, 3 and 7.
  for (int i = 0; i < 2; ++i) {
    const __m512d *top = b + 4 * i, *bottom = top + 2;
    rows[i].r[0] = _mm512_castpd_ps(_mm512_shuffle_f64x2(top[0], bottom[0], 0x88));
    rows[i + 4].r[0] = _mm512_castpd_ps(_mm512_shuffle_f64x2(top[0], bottom[0], 0xdd));
    rows[i + 2].r[0] = _mm512_castpd_ps(_mm512_shuffle_f64x2(top[1], bottom[1], 0x88));
    rows[i + 6].r[0] = _mm512_castpd_ps(_mm512_shuffle_f64x2(top[1], bottom[1], 0xdd));
  }
}
#elif defined(__AVX2__)
template <>
RECURRA_INLINE void transpose_pairs<float>(Vec<float> (&rows)[kPairs]) {
  __m256d q[2][2][4];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      __m256d r[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) r[k] = _mm256_castps_pd(rows[4 * i + k].r[j]);
      const __m256d a = _mm256_unpacklo_pd(r[0], r[1]), b = _mm256_unpackhi_pd(r[0], r[1]);
      const __m256d c = _mm256_unpacklo_pd(r[2], r[3]), d = _mm256_unpackhi_pd(r[2], r[3]);
      q[i][j][0] = _mm256_permute2f128_pd(a, c, 0x20);
      q[i][j][1] = _mm256_permute2f128_pd(b, d, 0x20);
      q[i][j][2] = _mm256_permute2f128_pd(a, c, 0x31);
      q[i][j][3] = _mm256_permute2f128_pd(b, d, 0x31);
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) rows[4 * i + k].r[j] = _mm256_castpd_ps(q[j][i][k]);
    }
  }
}
#endif

}  // namespace recurra::RECURRA_ISA
