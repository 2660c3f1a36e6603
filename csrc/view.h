// What a kernel receives: raw pointers with sizes and strides, never a tensor.
#pragma once
#include "integers.h"

namespace recurra {

// Inlined wherever it is called: a copy of these functions that was compiled for one instruction
// set must never serve another.
#define RECURRA_EVERYWHERE inline __attribute__((always_inline))

enum class DType : int32_t { f32, f64, bf16, f16, c64, c128, i32, i64, b8 };

constexpr RECURRA_EVERYWHERE int64_t item_size(DType d) {
  switch (d) {
    case DType::bf16:
    case DType::f16: return 2;
    case DType::f32:
    case DType::i32: return 4;
    case DType::f64:
    case DType::c64:
    case DType::i64: return 8;
    case DType::c128: return 16;
    case DType::b8: return 1;
  }
  return 0;
}

constexpr RECURRA_EVERYWHERE bool is_complex(DType d) {
  return d == DType::c64 || d == DType::c128;
}

// Arithmetic is in float except where the storage is double.
constexpr RECURRA_EVERYWHERE bool computes_in_double(DType d) {
  return d == DType::f64 || d == DType::c128;
}

// An N-dimensional array. Strides count elements, may be zero or negative; a null pointer means
// that an optional argument is absent.
template <int N>
struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t size[N] = {};
  int64_t stride[N] = {};

  RECURRA_EVERYWHERE explicit operator bool() const { return data != nullptr; }

  // The address of an element; a size-1 dimension broadcasts because its stride is taken as 0.
  template <class... I>
  RECURRA_EVERYWHERE char* at(I... index) const {
    static_assert(sizeof...(I) == N);
    const int64_t i[N] = {static_cast<int64_t>(index)...};
    int64_t offset = 0;
    for (int n = 0; n < N; ++n) offset += i[n] * step(n);
    return static_cast<char*>(data) + offset * item_size(dtype);
  }
  RECURRA_EVERYWHERE int64_t step(int n) const { return size[n] == 1 ? 0 : stride[n]; }
};

// One run of consecutive time steps with a state of its own.
struct Sequence {
  int64_t batch, begin, end;
  RECURRA_EVERYWHERE int64_t length() const { return end - begin; }
};

// The sequences of a (B, T, ...) tensor: one per batch row, or, when offsets is not null, `count`
// of them packed along T of the single row, sequence n covering [offsets[n], offsets[n + 1]).
struct Sequences {
  int64_t count = 0;
  int64_t time = 0;
  const int64_t* offsets = nullptr;

  RECURRA_EVERYWHERE Sequence operator[](int64_t n) const {
    if (offsets) return {0, offsets[n], offsets[n + 1]};
    return {n, 0, time};
  }

  // Where a kernel that keeps something for every `length` steps has row k of sequence n: distinct,
  // and below chunk_rows.
  RECURRA_EVERYWHERE int64_t chunk_row(int64_t n, int64_t k, int64_t length) const {
    return (offsets ? (*this)[n].begin / length + n : n * ((time + length - 1) / length)) + k;
  }
  RECURRA_EVERYWHERE int64_t chunk_rows(int64_t length) const {
    return offsets ? time / length + count : count * ((time + length - 1) / length);
  }
};

}  // namespace recurra
