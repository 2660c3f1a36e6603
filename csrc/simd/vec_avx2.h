// AVX2, FMA and F16C: two registers of eight floats, or four of four doubles.
#pragma once
#include <immintrin.h>

namespace recurra::RECURRA_ISA {

RECURRA_INLINE void fence() { _mm_sfence(); }

template <>
struct Reg<float> {
  using type = __m256;
  using mask = __m256;
  static constexpr int width = 8;
  using V = type;
  using M = mask;

  static RECURRA_INLINE __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static RECURRA_INLINE V set(float x) { return _mm256_set1_ps(x); }
  static RECURRA_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
  static RECURRA_INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static RECURRA_INLINE void stream(float* p, V v) { _mm256_stream_ps(p, v); }
  static RECURRA_INLINE V load_part(const float* p, int n) {
    return _mm256_maskload_ps(p, first(n));
  }
  static RECURRA_INLINE void store_part(float* p, V v, int n) {
    if (n == width) return store(p, v);
    // By halves: a masked store takes dozens of cycles on several machines.
    __m128 part = _mm256_castps256_ps128(v);
    if (n & 4) {
      _mm_storeu_ps(p, part);
      part = _mm256_extractf128_ps(v, 1);
      p += 4;
    }
    if (n & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), part);
      part = _mm_movehl_ps(part, part);
      p += 2;
    }
    if (n & 1) _mm_store_ss(p, part);
  }
  static RECURRA_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
  static RECURRA_INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static RECURRA_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static RECURRA_INLINE V div(V a, V b) { return _mm256_div_ps(a, b); }
  static RECURRA_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static RECURRA_INLINE V min(V a, V b) { return _mm256_min_ps(a, b); }
  static RECURRA_INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }
  static RECURRA_INLINE V neg(V a) { return _mm256_xor_ps(a, set(-0.0f)); }
  static RECURRA_INLINE V abs(V a) { return _mm256_andnot_ps(set(-0.0f), a); }
  static RECURRA_INLINE V copysign(V a, V b) {
    return _mm256_or_ps(_mm256_andnot_ps(set(-0.0f), a), _mm256_and_ps(set(-0.0f), b));
  }
  static RECURRA_INLINE V sqrt(V a) { return _mm256_sqrt_ps(a); }
  static RECURRA_INLINE V round(V a) { return _mm256_round_ps(a, 8); }
  static RECURRA_INLINE V fraction(V a, V n) { return min(sub(a, n), set(0.5f)); }
  static RECURRA_INLINE V power2(__m256i n) {  // 2^n for a normal result
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
  // The largest step last when shrinking, so that it alone can leave the normal range and rounds
  // once; growing is exact until it overflows. NaN in either operand goes through.
  static RECURRA_INLINE V scale2(V a, V n) {
    n = _mm256_max_ps(set(-300.0f), _mm256_min_ps(set(300.0f), n));
    const V end = _mm256_max_ps(set(-126.0f), _mm256_min_ps(set(127.0f), n));
    const V start = _mm256_sub_ps(n, end);  // NaN where n is
    const __m256i i = _mm256_cvtps_epi32(start);
    const __m256i half = _mm256_srai_epi32(i, 1);
    a = mul(mul(sub(a, sub(start, start)), power2(half)), power2(_mm256_sub_epi32(i, half)));
    return mul(a, power2(_mm256_cvtps_epi32(end)));
  }
  static RECURRA_INLINE V exponent(V a) {
    const __m256i e = _mm256_srli_epi32(_mm256_castps_si256(a), 23);
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(e, _mm256_set1_epi32(127)));
  }
  static RECURRA_INLINE V mantissa(V a) {
    const V m = _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x007fffff)));
    return _mm256_or_ps(m, set(1.0f));
  }
  static RECURRA_INLINE M lt(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static RECURRA_INLINE M le(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
  static RECURRA_INLINE M eq(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static RECURRA_INLINE V select(M m, V a, V b) { return _mm256_blendv_ps(b, a, m); }
  static RECURRA_INLINE bool any(M m) { return _mm256_movemask_ps(m) != 0; }
  static RECURRA_INLINE bool all(M m) { return _mm256_movemask_ps(m) == 0xff; }
  static RECURRA_INLINE M negative(V a) { return a; }  // a mask is known by its signs
  static RECURRA_INLINE float sum(V v) {
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
  }
  static RECURRA_INLINE V load_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  // Eight numbers as bits of 16-bit storage.
  using half = __m128i;
  static RECURRA_INLINE half to_bf16(V v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    const V nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const V out = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan);
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(out), 16);
    const __m256i packed = _mm256_packus_epi32(high, high);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
  static RECURRA_INLINE half to_f16(V v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  static RECURRA_INLINE void store_half(uint16_t* p, half v) { _mm_storeu_si128((__m128i*)p, v); }
  static RECURRA_INLINE void stream_half(uint16_t* p, half v) { _mm_stream_si128((__m128i*)p, v); }
  static RECURRA_INLINE V load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  }

  static RECURRA_INLINE void transpose8(V (&r)[8]) {
    V a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 4; ++i) {
      a[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      a[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 2; ++i) {
      b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
      b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
      b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
      b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
      r[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
  }
  template <class Rows>
  static RECURRA_INLINE void transpose(Rows& rows) {
    V q[2][2][8];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) q[i][j][k] = rows[8 * i + k].r[j];
        transpose8(q[i][j]);
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) rows[8 * i + k].r[j] = q[j][i][k];
      }
    }
  }
};

template <>
struct Reg<double> {
  using type = __m256d;
  using mask = __m256d;
  static constexpr int width = 4;
  using V = type;
  using M = mask;

  static RECURRA_INLINE __m256i first(int n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  static RECURRA_INLINE V set(double x) { return _mm256_set1_pd(x); }
  static RECURRA_INLINE V load(const double* p) { return _mm256_loadu_pd(p); }
  static RECURRA_INLINE void store(double* p, V v) { _mm256_storeu_pd(p, v); }
  static RECURRA_INLINE void stream(double* p, V v) { _mm256_stream_pd(p, v); }
  static RECURRA_INLINE V load_part(const double* p, int n) {
    return _mm256_maskload_pd(p, first(n));
  }
  static RECURRA_INLINE void store_part(double* p, V v, int n) {
    if (n == width) return store(p, v);
    __m128d part = _mm256_castpd256_pd128(v);
    if (n & 2) {
      _mm_storeu_pd(p, part);
      part = _mm256_extractf128_pd(v, 1);
      p += 2;
    }
    if (n & 1) _mm_store_sd(p, part);
  }
  static RECURRA_INLINE V add(V a, V b) { return _mm256_add_pd(a, b); }
  static RECURRA_INLINE V sub(V a, V b) { return _mm256_sub_pd(a, b); }
  static RECURRA_INLINE V mul(V a, V b) { return _mm256_mul_pd(a, b); }
  static RECURRA_INLINE V div(V a, V b) { return _mm256_div_pd(a, b); }
  static RECURRA_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
  static RECURRA_INLINE V min(V a, V b) { return _mm256_min_pd(a, b); }
  static RECURRA_INLINE V max(V a, V b) { return _mm256_max_pd(a, b); }
  static RECURRA_INLINE V neg(V a) { return _mm256_xor_pd(a, set(-0.0)); }
  static RECURRA_INLINE V abs(V a) { return _mm256_andnot_pd(set(-0.0), a); }
  static RECURRA_INLINE V copysign(V a, V b) {
    return _mm256_or_pd(_mm256_andnot_pd(set(-0.0), a), _mm256_and_pd(set(-0.0), b));
  }
  static RECURRA_INLINE V sqrt(V a) { return _mm256_sqrt_pd(a); }
  static RECURRA_INLINE V round(V a) { return _mm256_round_pd(a, 8); }
  static RECURRA_INLINE V fraction(V a, V n) { return min(sub(a, n), set(0.5)); }
  static RECURRA_INLINE V power2(__m256i n) {
    return _mm256_castsi256_pd(
        _mm256_slli_epi64(_mm256_add_epi64(n, _mm256_set1_epi64x(1023)), 52));
  }
  static RECURRA_INLINE V scale2(V a, V n) {
    n = _mm256_max_pd(set(-2200.0), _mm256_min_pd(set(2200.0), n));
    const V end = _mm256_max_pd(set(-1022.0), _mm256_min_pd(set(1023.0), n));
    const V start = _mm256_sub_pd(n, end);  // NaN where n is
    const __m128i i = _mm256_cvtpd_epi32(start);
    const __m128i half = _mm_srai_epi32(i, 1);
    a = mul(sub(a, sub(start, start)), power2(_mm256_cvtepi32_epi64(half)));
    a = mul(a, power2(_mm256_cvtepi32_epi64(_mm_sub_epi32(i, half))));
    return mul(a, power2(_mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(end))));
  }
  static RECURRA_INLINE V exponent(V a) {
    // The biased exponent as the low bits of 2^52 + e, which subtracts to e exactly.
    const __m256i e = _mm256_srli_epi64(_mm256_castpd_si256(a), 52);
    const V big = set(4503599627370496.0);
    const V biased = _mm256_or_pd(_mm256_castsi256_pd(e), big);
    return _mm256_sub_pd(biased, set(4503599627370496.0 + 1023.0));
  }
  static RECURRA_INLINE V mantissa(V a) {
    const V m = _mm256_and_pd(a, _mm256_castsi256_pd(_mm256_set1_epi64x(0x000fffffffffffff)));
    return _mm256_or_pd(m, set(1.0));
  }
  static RECURRA_INLINE M lt(V a, V b) { return _mm256_cmp_pd(a, b, _CMP_LT_OQ); }
  static RECURRA_INLINE M le(V a, V b) { return _mm256_cmp_pd(a, b, _CMP_LE_OQ); }
  static RECURRA_INLINE M eq(V a, V b) { return _mm256_cmp_pd(a, b, _CMP_EQ_OQ); }
  static RECURRA_INLINE V select(M m, V a, V b) { return _mm256_blendv_pd(b, a, m); }
  static RECURRA_INLINE bool any(M m) { return _mm256_movemask_pd(m) != 0; }
  static RECURRA_INLINE bool all(M m) { return _mm256_movemask_pd(m) == 0xf; }
  static RECURRA_INLINE M negative(V a) { return a; }  // a mask is known by its signs
  static RECURRA_INLINE double sum(V v) {
    const __m128d b = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(b, _mm_unpackhi_pd(b, b)));
  }
};

}  // namespace recurra::RECURRA_ISA
