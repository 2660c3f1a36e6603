// A vector as four fours of lanes: four short vectors, or the rows of one 4 x 4 matrix. Of floats
// in AVX registers, whose lanes turn by fours.
#pragma once
#include "simd/vec.h"

namespace recurra::RECURRA_ISA {

#if defined(__AVX2__)
template <class T>
constexpr bool kHasFours = sizeof(T) == 4;
#else
template <class T>
constexpr bool kHasFours = false;
#endif

#if defined(__AVX512F__)

// Four matrices, a vector each, to four vectors that have the same row, or column, of all four.
RECURRA_INLINE void rows_of_fours(Vec<float> (&m)[4]) {
  const __m512 low[2] = {_mm512_shuffle_f32x4(m[0].r[0], m[1].r[0], 0x44),
                         _mm512_shuffle_f32x4(m[2].r[0], m[3].r[0], 0x44)};
  const __m512 high[2] = {_mm512_shuffle_f32x4(m[0].r[0], m[1].r[0], 0xee),
                          _mm512_shuffle_f32x4(m[2].r[0], m[3].r[0], 0xee)};
  m[0].r[0] = _mm512_shuffle_f32x4(low[0], low[1], 0x88);
  m[1].r[0] = _mm512_shuffle_f32x4(low[0], low[1], 0xdd);
  m[2].r[0] = _mm512_shuffle_f32x4(high[0], high[1], 0x88);
  m[3].r[0] = _mm512_shuffle_f32x4(high[0], high[1], 0xdd);
}
RECURRA_INLINE void columns_of_fours(Vec<float> (&m)[4]) {
  // Of two matrices the first columns and the second ones, or the third and the fourth.
  const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
  const __m512i third = _mm512_add_epi32(first, _mm512_set1_epi32(2));
  const __m512 low[2] = {_mm512_permutex2var_ps(m[0].r[0], first, m[1].r[0]),
                         _mm512_permutex2var_ps(m[2].r[0], first, m[3].r[0])};
  const __m512 high[2] = {_mm512_permutex2var_ps(m[0].r[0], third, m[1].r[0]),
                          _mm512_permutex2var_ps(m[2].r[0], third, m[3].r[0])};
  m[0].r[0] = _mm512_shuffle_f32x4(low[0], low[1], 0x44);
  m[1].r[0] = _mm512_shuffle_f32x4(low[0], low[1], 0xee);
  m[2].r[0] = _mm512_shuffle_f32x4(high[0], high[1], 0x44);
  m[3].r[0] = _mm512_shuffle_f32x4(high[0], high[1], 0xee);
}
// Number i of each four in its place four times.
template <int i>
RECURRA_INLINE Vec<float> spread_in_fours(Vec<float> v) {
  v.r[0] = _mm512_permute_ps(v.r[0], i * 0x55);
  return v;
}
// Four i, four times.
template <int i>
RECURRA_INLINE Vec<float> repeat_four(Vec<float> v) {
  v.r[0] = _mm512_shuffle_f32x4(v.r[0], v.r[0], i * 0x55);
  return v;
}
// Each number of four i four times.
template <int i>
RECURRA_INLINE Vec<float> spread_four(Vec<float> v) {
  const __m512i each = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  v.r[0] = _mm512_permutexvar_ps(_mm512_add_epi32(each, _mm512_set1_epi32(4 * i)), v.r[0]);
  return v;
}

#elif defined(__AVX2__)

RECURRA_INLINE void rows_of_fours(Vec<float> (&m)[4]) {
  __m256 row[4][2];
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    const Vec<float>&a = m[2 * k], &b = m[2 * k + 1];
    row[0][k] = _mm256_permute2f128_ps(a.r[0], b.r[0], 0x20);
    row[1][k] = _mm256_permute2f128_ps(a.r[0], b.r[0], 0x31);
    row[2][k] = _mm256_permute2f128_ps(a.r[1], b.r[1], 0x20);
    row[3][k] = _mm256_permute2f128_ps(a.r[1], b.r[1], 0x31);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) m[i].r[0] = row[i][0], m[i].r[1] = row[i][1];
}
RECURRA_INLINE void columns_of_fours(Vec<float> (&m)[4]) {
  rows_of_fours(m);
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    const __m256 a = _mm256_unpacklo_ps(m[0].r[k], m[1].r[k]);
    const __m256 b = _mm256_unpackhi_ps(m[0].r[k], m[1].r[k]);
    const __m256 c = _mm256_unpacklo_ps(m[2].r[k], m[3].r[k]);
    const __m256 d = _mm256_unpackhi_ps(m[2].r[k], m[3].r[k]);
    m[0].r[k] = _mm256_shuffle_ps(a, c, 0x44);
    m[1].r[k] = _mm256_shuffle_ps(a, c, 0xee);
    m[2].r[k] = _mm256_shuffle_ps(b, d, 0x44);
    m[3].r[k] = _mm256_shuffle_ps(b, d, 0xee);
  }
}
template <int i>
RECURRA_INLINE Vec<float> spread_in_fours(Vec<float> v) {
  v.r[0] = _mm256_permute_ps(v.r[0], i * 0x55);
  v.r[1] = _mm256_permute_ps(v.r[1], i * 0x55);
  return v;
}
template <int i>
RECURRA_INLINE Vec<float> repeat_four(Vec<float> v) {
  v.r[0] = v.r[1] = _mm256_permute2f128_ps(v.r[i / 2], v.r[i / 2], i % 2 * 0x11);
  return v;
}
template <int i>
RECURRA_INLINE Vec<float> spread_four(Vec<float> v) {
  const Vec<float> four = repeat_four<i>(v);
  v.r[0] = _mm256_permutevar_ps(four.r[0], _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
  v.r[1] = _mm256_permutevar_ps(four.r[1], _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3));
  return v;
}

#endif

}  // namespace recurra::RECURRA_ISA
