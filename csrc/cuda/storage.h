// Elements of tensors on the device: their storage types, and each in the type of arithmetic.
// Conversions have the results of simd/vec.h, any NaN being like any other.
#pragma once
#include "cuda/indices.h"
#include "integers.h"
#include "math/macros.h"
#include "view.h"

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
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(p->bits));
  return v;
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
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(p->bits) : "f"(v));
#else
  const uint32_t u = __builtin_bit_cast(uint32_t, v);
  const uint32_t rounded = v == v ? u + 0x7fff + ((u >> 16) & 1) : u | 0x00400000;
  p->bits = static_cast<uint16_t>(rounded >> 16);
#endif
}
RECURRA_FN void store(Half* p, float v) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(p->bits) : "f"(v));
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

// Parameters, which are stored as the activations S or as float.
template <class S, int N>
struct Parameters {
  void* data = nullptr;
  int64_t step[N] = {};
  bool plain = false;  // float

  Parameters() = default;
  explicit Parameters(const View<N>& v) : data(v.data), plain(v.dtype == DType::f32) {
    for (int n = 0; n < N; ++n) step[n] = v.step(n);
  }
  template <class... I>
  RECURRA_FN int64_t offset(I... index) const {
    static_assert(sizeof...(I) == N);
    const int64_t i[N] = {static_cast<int64_t>(index)...};
    int64_t out = 0;
    for (int n = 0; n < N; ++n) out += i[n] * step[n];
    return out;
  }
  template <class... I>
  RECURRA_FN Compute<S> at(I... index) const {
    const int64_t i = offset(index...);
    return plain ? static_cast<Compute<S>>(static_cast<const float*>(data)[i])
                 : load(static_cast<const S*>(data) + i);
  }
  template <class... I>
  RECURRA_FN void set(Compute<S> value, I... index) const {
    const int64_t i = offset(index...);
    if (plain)
      store(static_cast<float*>(data) + i, static_cast<float>(value));
    else
      store(static_cast<S*>(data) + i, value);
  }
};

template <bool first, class A, class B>
struct Either {
  using type = A;
};
template <class A, class B>
struct Either<false, A, B> {
  using type = B;
};

// V elements that are read or written at once, at an address that allows it. Those of two bytes
// are kept in words, which registers are.
template <class S, int V>
struct __attribute__((may_alias, aligned(sizeof(S) * V < 16 ? sizeof(S) * V : 16))) Packed {
  static constexpr bool kWords = sizeof(S) == 2 && V % 2 == 0;
  struct Plain {
    S at[V];
  };
  struct Words {
    uint32_t at[(V + 1) / 2];
  };
  typename Either<kWords, Words, Plain>::type data;

  RECURRA_FN Compute<S> get(int v) const {
    if constexpr (kWords) {
      const S s{static_cast<uint16_t>(data.at[v / 2] >> v % 2 * 16)};
      return load(&s);
    } else {
      return load(&data.at[v]);
    }
  }
  // In ascending order.
  RECURRA_FN void set(int v, Compute<S> value) {
    if constexpr (kWords) {
      S s;
      store(&s, value);
      const uint32_t bits = s.bits;
      data.at[v / 2] = v % 2 ? data.at[v / 2] | bits << 16 : bits;
    } else {
      store(&data.at[v], value);
    }
  }
};
// Whether the rows of an array, whose elements follow one another along the last dimension or, of
// three dimensions, along `along`, may be read so.
template <class P, int N>
bool aligned(const View<N>& v, int along = N - 1) {
  const int64_t item = item_size(v.dtype), most = static_cast<int64_t>(alignof(P));
  if (v.step(along) != 1 || reinterpret_cast<uintptr_t>(v.data) % alignof(P) != 0) return false;
  for (int n = 0; n < N; ++n)
    if (n != along && v.step(n) * item % most != 0) return false;
  return true;
}

// An int32 or int64 array on the device. Its values are not checked there, which would have to wait
// for them: whatever they are, nothing outside of an array is read or written, and those that are
// clamped leave a mark.
struct Integers {
  const void* data = nullptr;
  int64_t step = 0, count = 0;
  uint32_t* bad = nullptr;  // where the mark goes, or null
  bool wide = false;        // int64

  Integers() = default;
  explicit Integers(const Indices& v)
      : data(v.data), step(v.step(0)), count(v.size[0]), bad(v.bad), wide(v.dtype == DType::i64) {}
  RECURRA_FN int64_t at(int64_t n) const {
    return wide ? static_cast<const int64_t*>(data)[n * step]
                : static_cast<const int32_t*>(data)[n * step];
  }
  RECURRA_FN int64_t clamped(int64_t n, int64_t low, int64_t high) const {
    return between(at(n), low, high);
  }
  static RECURRA_FN int64_t between(int64_t value, int64_t low, int64_t high) {
    return value < low ? low : value > high ? high : value;
  }
  RECURRA_FN void mark(bool wrong) const {
    if (wrong && bad) *bad = 1;
  }
};

// Where sequence n lies: its row of the batch and its steps, by cu_seqlens where there are any.
struct Extent {
  int64_t batch, begin, end;
};
RECURRA_FN Extent extent(const Integers& cu_seqlens, int64_t n, int64_t time) {
  if (!cu_seqlens.data) return {n, 0, time};
  const int64_t from = cu_seqlens.at(n), to = cu_seqlens.at(n + 1);
  const int64_t begin = Integers::between(from, 0, time), end = Integers::between(to, begin, time);
  cu_seqlens.mark(begin != from || end != to || (n == 0 && begin != 0) ||
                  (n + 2 == cu_seqlens.count && end != time));
  return {0, begin, end};
}

// The state of a row of a step: itself without slots; -1, which skips, below zero and past the
// last.
RECURRA_FN int64_t slot_of(const Integers& slots, int64_t row, int64_t states) {
  if (!slots.data) return row;
  const int64_t slot = slots.at(row);
  slots.mark(slot >= states);
  return slot < 0 || slot >= states ? -1 : slot;
}

}  // namespace recurra::cuda
