// No vector instructions: sixteen numbers in an array. Right and portable rather than fast.
#pragma once
#include <cmath>
#include <cstring>

namespace recurra::RECURRA_ISA {

RECURRA_INLINE void fence() {}

template <class To, class From>
RECURRA_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T, class Int, int kBits, int kBias>
struct ScalarReg {
  using type = T;
  using mask = bool;
  static constexpr int width = 1;
  static constexpr Int kFraction = (Int(1) << kBits) - 1;

  static RECURRA_INLINE T set(T x) { return x; }
  static RECURRA_INLINE T load(const T* p) { return *p; }
  static RECURRA_INLINE void store(T* p, T v) { *p = v; }
  static RECURRA_INLINE void stream(T* p, T v) { *p = v; }
  static RECURRA_INLINE T load_part(const T* p, int n) { return n > 0 ? *p : T(0); }
  static RECURRA_INLINE void store_part(T* p, T v, int n) {
    if (n > 0) *p = v;
  }
  static RECURRA_INLINE T add(T a, T b) { return a + b; }
  static RECURRA_INLINE T sub(T a, T b) { return a - b; }
  static RECURRA_INLINE T mul(T a, T b) { return a * b; }
  static RECURRA_INLINE T div(T a, T b) { return a / b; }
  static RECURRA_INLINE T fma(T a, T b, T c) { return std::fma(a, b, c); }
  static RECURRA_INLINE T min(T a, T b) { return a < b ? a : b; }
  static RECURRA_INLINE T max(T a, T b) { return a > b ? a : b; }
  static RECURRA_INLINE T neg(T a) { return -a; }
  static RECURRA_INLINE T abs(T a) { return std::fabs(a); }
  static RECURRA_INLINE T copysign(T a, T b) { return std::copysign(a, b); }
  static RECURRA_INLINE T sqrt(T a) { return std::sqrt(a); }
  static RECURRA_INLINE T round(T a) {
    constexpr T big = T(1) / (kBits == 23 ? T(1.1920929e-07f) : T(2.220446049250313e-16));
    // Adding and taking away 2^bits rounds to nearest even; larger numbers are integers.
    if (!(std::fabs(a) < big)) return a;
    const T r = a < 0 ? (a - big) + big : (a + big) - big;
    return std::copysign(r, a);
  }
  static RECURRA_INLINE T fraction(T a, T n) { return min(a - n, T(0.5)); }
  static RECURRA_INLINE T power2(Int n) { return bits<T>((n + kBias) << kBits); }
  // The largest step last when shrinking, so that it alone can leave the normal range and rounds
  // once; growing is exact until it overflows. NaN in either operand goes through.
  static RECURRA_INLINE T scale2(T a, T n) {
    constexpr T limit = kBits == 23 ? T(300) : T(2200);
    if (n != n) return n;
    const Int i = static_cast<Int>(max(min(n, limit), -limit));
    const Int end = i < 1 - kBias ? 1 - kBias : i > kBias ? kBias : i;
    const Int start = i - end, half = start >> 1;
    return a * power2(half) * power2(start - half) * power2(end);
  }
  static RECURRA_INLINE T exponent(T a) {
    return static_cast<T>(((bits<Int>(a) >> kBits) & (2 * kBias + 1)) - kBias);
  }
  static RECURRA_INLINE T mantissa(T a) {
    return bits<T>((bits<Int>(a) & kFraction) | (Int(kBias) << kBits));
  }
  static RECURRA_INLINE bool lt(T a, T b) { return a < b; }
  static RECURRA_INLINE bool le(T a, T b) { return a <= b; }
  static RECURRA_INLINE bool eq(T a, T b) { return a == b; }
  static RECURRA_INLINE T select(bool m, T a, T b) { return m ? a : b; }
  static RECURRA_INLINE bool any(bool m) { return m; }
  static RECURRA_INLINE bool all(bool m) { return m; }
  static RECURRA_INLINE bool negative(T a) { return std::signbit(a); }
  static RECURRA_INLINE T sum(T v) { return v; }
};

template <>
struct Reg<double> : ScalarReg<double, int64_t, 52, 1023> {};

template <>
struct Reg<float> : ScalarReg<float, int32_t, 23, 127> {
  static RECURRA_INLINE float load_bf16(const uint16_t* p) {
    return bits<float>(static_cast<uint32_t>(*p) << 16);
  }
  // The bits of 16-bit storage.
  using half = uint16_t;
  static RECURRA_INLINE half to_bf16(float v) {
    const uint32_t u = bits<uint32_t>(v);
    return static_cast<half>((v == v ? u + 0x7fff + ((u >> 16) & 1) : u | 0x00400000) >> 16);
  }
  static RECURRA_INLINE float load_f16(const uint16_t* p) {
    const uint32_t sign = (*p & 0x8000u) << 16, rest = *p & 0x7fffu;
    if (rest >= 0x7c00) {  // infinite, or NaN made quiet
      const uint32_t payload = (rest & 0x3ff) << 13;
      return bits<float>(sign | 0x7f800000 | payload | (payload ? 0x00400000u : 0u));
    }
    // The bits shifted into place are the value divided by 2^112, subnormals included.
    return bits<float>(sign | bits<uint32_t>(bits<float>(rest << 13) * 0x1p112f));
  }
  static RECURRA_INLINE half to_f16(float v) {
    const uint32_t u = bits<uint32_t>(v), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
    uint32_t out;
    if (magnitude > 0x7f800000) {
      out = 0x7e00 | ((magnitude >> 13) & 0x3ff);
    } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
      out = 0x7c00;
    } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5 aligns and rounds the bits
      out = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000;
    } else {
      out = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    }
    return static_cast<half>(sign | out);
  }
  static RECURRA_INLINE void store_half(uint16_t* p, half v) { *p = v; }
  static RECURRA_INLINE void stream_half(uint16_t* p, half v) { *p = v; }
};

}  // namespace recurra::RECURRA_ISA
