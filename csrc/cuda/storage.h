// Elements of tensors on the device: their storage types, and each in the type of arithmetic.
// Conversions have the results of simd/vec.h, any NaN being like any other.
#pragma once
#include <cstdint>

#include "math/macros.h"
#include "view.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace recurra::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

RECURRA_FN float load(const float* p) { return *p; }
RECURRA_FN double load(const double* p) { return *p; }
RECURRA_FN float load(const BFloat16* p) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(p->bits) << 16);
}
RECURRA_FN float load(const Half* p) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(p->bits));
#else
  const uint32_t sign = (p->bits & 0x8000u) << 16, rest = p->bits & 0x7fffu;
  if (rest >= 0x7c00) return __builtin_bit_cast(float, sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // The bits shifted into place are the value divided by 2^112, subnormals included.
  const float size = __builtin_bit_cast(float, rest << 13) * 0x1p112f;
  return __builtin_bit_cast(float, sign | __builtin_bit_cast(uint32_t, size));
#endif
}

RECURRA_FN void store(float* p, float v) { *p = v; }
RECURRA_FN void store(double* p, double v) { *p = v; }
RECURRA_FN void store(BFloat16* p, float v) {
  const uint32_t u = __builtin_bit_cast(uint32_t, v);
  const uint32_t rounded = v == v ? u + 0x7fff + ((u >> 16) & 1) : u | 0x00400000;
  p->bits = static_cast<uint16_t>(rounded >> 16);
}
RECURRA_FN void store(Half* p, float v) {
#if defined(__CUDA_ARCH__)
  p->bits = __half_as_ushort(__float2half_rn(v));
#else
  const uint32_t u = __builtin_bit_cast(uint32_t, v), size = u & 0x7fffffff;
  uint32_t out;
  if (size > 0x7f800000)
    out = 0x7e00;
  else if (size >= 0x477ff000)  // rounds to 65536 or more
    out = 0x7c00;
  else if (size < 0x38800000)  // subnormal: adding 0.5 aligns and rounds the bits
    out = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, size) + 0.5f) - 0x3f000000;
  else
    out = (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13;
  p->bits = static_cast<uint16_t>((u >> 16 & 0x8000) | out);
#endif
}

// A view with the element type known and the strides of broadcast dimensions zero.
template <class S, int N>
struct Array {
  S* data = nullptr;
  int64_t step[N] = {};

  Array() = default;
  explicit Array(const View<N>& v) : data(static_cast<S*>(v.data)) {
    for (int n = 0; n < N; ++n) step[n] = v.step(n);
  }
  RECURRA_FN S* at(int64_t i, int64_t j) const { return data + i * step[0] + j * step[1]; }
  RECURRA_FN S* at(int64_t i, int64_t j, int64_t k) const { return at(i, j) + k * step[2]; }
};

// cu_seqlens as they lie on the device. Their values are not checked there, which would have to
// wait for them: whatever they are, a sequence lies within [0, time).
struct Offsets {
  const void* data = nullptr;
  int64_t step = 0;
  bool wide = false;  // int64

  Offsets() = default;
  explicit Offsets(const View<1>& v) : data(v.data), step(v.step(0)), wide(v.dtype == DType::i64) {}
  RECURRA_FN int64_t clamped(int64_t n, int64_t low, int64_t high) const {
    const int64_t value = wide ? static_cast<const int64_t*>(data)[n * step]
                               : static_cast<const int32_t*>(data)[n * step];
    return value < low ? low : value > high ? high : value;
  }
};

}  // namespace recurra::cuda
