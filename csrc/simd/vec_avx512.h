// AVX-512 F, BW, VL and DQ: one register of sixteen floats, or two of eight doubles.
#pragma once
// GCC 12 takes the undefined operand of its own unmasked intrinsics for a mistake of ours.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace recurra::RECURRA_ISA {

RECURRA_INLINE void fence() { _mm_sfence(); }

template <class T>
struct Vec;

template <>
struct Reg<float> {
  using type = __m512;
  using mask = __mmask16;
  static constexpr int width = 16;
  using V = type;
  using M = mask;

  static RECURRA_INLINE M first(int n) { return static_cast<M>((1u << n) - 1); }
  static RECURRA_INLINE V set(float x) { return _mm512_set1_ps(x); }
  static RECURRA_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
  static RECURRA_INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static RECURRA_INLINE void stream(float* p, V v) { _mm512_stream_ps(p, v); }
  static RECURRA_INLINE V load_part(const float* p, int n) {
    return _mm512_maskz_loadu_ps(first(n), p);
  }
  static RECURRA_INLINE void store_part(float* p, V v, int n) {
    _mm512_mask_storeu_ps(p, first(n), v);
  }
  static RECURRA_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
  static RECURRA_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static RECURRA_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static RECURRA_INLINE V div(V a, V b) { return _mm512_div_ps(a, b); }
  static RECURRA_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static RECURRA_INLINE V min(V a, V b) { return _mm512_min_ps(a, b); }
  static RECURRA_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
  static RECURRA_INLINE V neg(V a) { return _mm512_xor_ps(a, set(-0.0f)); }
  static RECURRA_INLINE V abs(V a) { return _mm512_andnot_ps(set(-0.0f), a); }
  static RECURRA_INLINE V copysign(V a, V b) {
    return _mm512_or_ps(_mm512_andnot_ps(set(-0.0f), a), _mm512_and_ps(set(-0.0f), b));
  }
  static RECURRA_INLINE V sqrt(V a) { return _mm512_sqrt_ps(a); }
  static RECURRA_INLINE V round(V a) { return _mm512_roundscale_ps(a, 8); }
  static RECURRA_INLINE V fraction(V a, V) { return _mm512_reduce_ps(a, 8); }
  static RECURRA_INLINE V scale2(V a, V n) { return _mm512_scalef_ps(a, n); }
  static RECURRA_INLINE V exponent(V a) { return _mm512_getexp_ps(a); }
  static RECURRA_INLINE V mantissa(V a) {
    return _mm512_getmant_ps(a, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero);
  }
  static RECURRA_INLINE M lt(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static RECURRA_INLINE M le(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
  static RECURRA_INLINE M eq(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static RECURRA_INLINE V select(M m, V a, V b) { return _mm512_mask_blend_ps(m, b, a); }
  static RECURRA_INLINE bool any(M m) { return m != 0; }
  static RECURRA_INLINE bool all(M m) { return m == 0xffff; }
  static RECURRA_INLINE M negative(V a) { return _mm512_movepi32_mask(_mm512_castps_si512(a)); }
  static RECURRA_INLINE float sum(V v) {
    const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
  }
  static RECURRA_INLINE V load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  // Sixteen numbers as bits of 16-bit storage.
  using half = __m256i;
  static RECURRA_INLINE half to_bf16(V v) {
    const __m512i bits = _mm512_castps_si512(v), quiet = _mm512_set1_epi32(0x00400000);
    const M odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const M nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i half_ulp =
        _mm512_mask_blend_epi32(odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
    const __m512i rounded =
        _mm512_mask_or_epi32(_mm512_add_epi32(bits, half_ulp), nan, bits, quiet);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
  static RECURRA_INLINE half to_f16(V v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  static RECURRA_INLINE void store_half(uint16_t* p, half v) {
    _mm256_storeu_si256((__m256i*)p, v);
  }
  static RECURRA_INLINE void stream_half(uint16_t* p, half v) {
    _mm256_stream_si256((__m256i*)p, v);
  }
  static RECURRA_INLINE V load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  }

  template <class Rows>
  static RECURRA_INLINE void transpose(Rows& rows) {
    V a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 8; ++i) {
      a[2 * i] = _mm512_unpacklo_ps(rows[2 * i].r[0], rows[2 * i + 1].r[0]);
      a[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i].r[0], rows[2 * i + 1].r[0]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {
      b[4 * i] = _mm512_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
      b[4 * i + 1] = _mm512_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
      b[4 * i + 2] = _mm512_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
      b[4 * i + 3] = _mm512_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {
      a[i] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
      a[i + 4] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
      a[i + 8] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
      a[i + 12] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 8; ++i) {
      rows[i].r[0] = _mm512_shuffle_f32x4(a[i], a[i + 8], 0x88);
      rows[i + 8].r[0] = _mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd);
    }
  }
};

template <>
struct Reg<double> {
  using type = __m512d;
  using mask = __mmask8;
  static constexpr int width = 8;
  using V = type;
  using M = mask;

  static RECURRA_INLINE M first(int n) { return static_cast<M>((1u << n) - 1); }
  static RECURRA_INLINE V set(double x) { return _mm512_set1_pd(x); }
  static RECURRA_INLINE V load(const double* p) { return _mm512_loadu_pd(p); }
  static RECURRA_INLINE void store(double* p, V v) { _mm512_storeu_pd(p, v); }
  static RECURRA_INLINE void stream(double* p, V v) { _mm512_stream_pd(p, v); }
  static RECURRA_INLINE V load_part(const double* p, int n) {
    return _mm512_maskz_loadu_pd(first(n), p);
  }
  static RECURRA_INLINE void store_part(double* p, V v, int n) {
    _mm512_mask_storeu_pd(p, first(n), v);
  }
  static RECURRA_INLINE V add(V a, V b) { return _mm512_add_pd(a, b); }
  static RECURRA_INLINE V sub(V a, V b) { return _mm512_sub_pd(a, b); }
  static RECURRA_INLINE V mul(V a, V b) { return _mm512_mul_pd(a, b); }
  static RECURRA_INLINE V div(V a, V b) { return _mm512_div_pd(a, b); }
  static RECURRA_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
  static RECURRA_INLINE V min(V a, V b) { return _mm512_min_pd(a, b); }
  static RECURRA_INLINE V max(V a, V b) { return _mm512_max_pd(a, b); }
  static RECURRA_INLINE V neg(V a) { return _mm512_xor_pd(a, set(-0.0)); }
  static RECURRA_INLINE V abs(V a) { return _mm512_andnot_pd(set(-0.0), a); }
  static RECURRA_INLINE V copysign(V a, V b) {
    return _mm512_or_pd(_mm512_andnot_pd(set(-0.0), a), _mm512_and_pd(set(-0.0), b));
  }
  static RECURRA_INLINE V sqrt(V a) { return _mm512_sqrt_pd(a); }
  static RECURRA_INLINE V round(V a) { return _mm512_roundscale_pd(a, 8); }
  static RECURRA_INLINE V fraction(V a, V) { return _mm512_reduce_pd(a, 8); }
  static RECURRA_INLINE V scale2(V a, V n) { return _mm512_scalef_pd(a, n); }
  static RECURRA_INLINE V exponent(V a) { return _mm512_getexp_pd(a); }
  static RECURRA_INLINE V mantissa(V a) {
    return _mm512_getmant_pd(a, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero);
  }
  static RECURRA_INLINE M lt(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
  static RECURRA_INLINE M le(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }
  static RECURRA_INLINE M eq(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
  static RECURRA_INLINE V select(M m, V a, V b) { return _mm512_mask_blend_pd(m, b, a); }
  static RECURRA_INLINE bool any(M m) { return m != 0; }
  static RECURRA_INLINE bool all(M m) { return m == 0xff; }
  static RECURRA_INLINE M negative(V a) { return _mm512_movepi64_mask(_mm512_castpd_si512(a)); }
  static RECURRA_INLINE double sum(V v) {
    const __m256d a = _mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1));
    const __m128d b = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
    return _mm_cvtsd_f64(_mm_add_sd(b, _mm_unpackhi_pd(b, b)));
  }
};

}  // namespace recurra::RECURRA_ISA
