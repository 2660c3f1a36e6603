// What the CUDA kernels of rnn share. A chain is one channel of one sequence, walked by one thread.
// Kernels are compiled for each cell in float and in double; the storage types of the arrays are
// known when they run.
#pragma once
#include "cells/all.h"
#include "cells/jacobian.h"
#include "cuda/launch.h"
#include "cuda/shared.h"
#include "cuda/storage.h"
#include "rnn/rnn.h"

namespace recurra::cuda::rnn_detail {

constexpr int kThreads = 64;

template <class Cell>
struct Sizes {
  static constexpr int G = kInputs<Cell>, S = kStates<Cell>, P = kParams<Cell>;
};

// An element as it lies in memory, so that nothing waits for it before its value is needed.
template <class T>
struct RawOf {
  using type = uint32_t;
};
template <>
struct RawOf<double> {
  using type = uint64_t;
};
template <class T>
using Raw = typename RawOf<T>::type;

// An array of any of the storage types whose arithmetic is in T.
template <int N>
struct Elements {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t step[N] = {};

  Elements() = default;
  explicit Elements(const View<N>& v) : data(v.data), dtype(v.dtype) {
    for (int n = 0; n < N; ++n) step[n] = v.step(n);
  }
  // Offsets are in elements.
  RECURRA_FN int64_t at(int64_t i, int64_t j) const { return i * step[0] + j * step[1]; }
  RECURRA_FN int64_t at(int64_t i, int64_t j, int64_t k, int64_t l) const {
    return at(i, j) + k * step[2] + l * step[3];
  }
  RECURRA_FN bool narrow() const { return dtype == DType::bf16 || dtype == DType::f16; }
};

template <class T>
RECURRA_FN T value_of_raw(Raw<T> raw, DType dtype) {
  if constexpr (sizeof(T) == 8) {
    return __builtin_bit_cast(T, raw);
  } else {
    if (dtype == DType::f32) return __builtin_bit_cast(T, raw);
    if (dtype == DType::bf16) return __builtin_bit_cast(T, raw << 16);
    const Half half{static_cast<uint16_t>(raw)};
    return load(&half);
  }
}
// Whether 16 bits are read is known outside of the loops.
template <class T, bool narrow>
RECURRA_FN Raw<T> read_raw(const void* data, int64_t offset) {
  if constexpr (narrow)
    return static_cast<const uint16_t*>(data)[offset];
  else
    return static_cast<const Raw<T>*>(data)[offset];
}
template <class T, int N>
RECURRA_FN T read(const Elements<N>& from, int64_t offset) {
  if (sizeof(T) == 4 && from.narrow())
    return value_of_raw<T>(read_raw<T, true>(from.data, offset), from.dtype);
  return value_of_raw<T>(read_raw<T, false>(from.data, offset), from.dtype);
}
template <class T, int N>
RECURRA_FN void write(const Elements<N>& to, int64_t offset, T value) {
  if constexpr (sizeof(T) == 8) {
    static_cast<T*>(to.data)[offset] = value;
  } else {
    if (to.dtype == DType::f32)
      static_cast<T*>(to.data)[offset] = value;
    else if (to.dtype == DType::bf16)
      store(static_cast<BFloat16*>(to.data) + offset, value);
    else
      store(static_cast<Half*>(to.data) + offset, value);
  }
}

// Parameters may be float where all else is double.
template <class T>
RECURRA_FN T read_param(const Elements<2>& from, int64_t offset) {
  if (sizeof(T) == 8 && from.dtype == DType::f32)
    return static_cast<T>(static_cast<const float*>(from.data)[offset]);
  return read<T>(from, offset);
}
template <class T>
RECURRA_FN void write_param(const Elements<2>& to, int64_t offset, T value) {
  if (sizeof(T) == 8 && to.dtype == DType::f32)
    static_cast<float*>(to.data)[offset] = static_cast<float>(value);
  else
    write(to, offset, value);
}
// Those of one channel; one longer than needed, since a cell may have none.
template <class Cell, class T>
RECURRA_FN void read_params(const Elements<2>& params, int64_t c, T (&to)[Sizes<Cell>::P + 1]) {
  for_each_index<Sizes<Cell>::P>(
      [&](auto i) RECURRA_LAMBDA { to[i] = read_param<T>(params, params.at(i, c)); });
}

// The next steps of G rows of a (B, T, G, N) array, on their way while others are computed: `count`
// of them, A at most, from `offset` on, `by` from one to the next.
template <class T, int G, int A>
struct Ahead {
  Raw<T> raw[A * G] = {};

  template <bool narrow>
  __device__ __forceinline__ void start(const Elements<4>& from, int64_t offset, int64_t by,
                                        int64_t count) {
#pragma unroll
    for (int i = 0; i < A; ++i)
      if (i < count)
#pragma unroll
        for (int g = 0; g < G; ++g)
          raw[i * G + g] = read_raw<T, narrow>(from.data, offset + i * by + g * from.step[2]);
  }
  __device__ __forceinline__ void start(const Elements<4>& from, int64_t offset, int64_t by,
                                        int64_t count) {
    if (sizeof(T) == 4 && from.narrow())
      start<true>(from, offset, by, count);
    else
      start<false>(from, offset, by, count);
  }
  // Into the rows of a shared array, where the loop over steps finds them by number.
  template <class Rows>
  __device__ __forceinline__ void finish(Rows& rows, DType dtype) const {
#pragma unroll
    for (int i = 0; i < A * G; ++i)
      rows[i * kThreads + threadIdx.x] = value_of_raw<T>(raw[i], dtype);
  }
};

// Which steps begin with an empty state.
struct Resets {
  const uint8_t* data = nullptr;
  int64_t step[2] = {};

  Resets() = default;
  explicit Resets(const View<2>& v) : data(static_cast<const uint8_t*>(v.data)) {
    for (int n = 0; n < 2; ++n) step[n] = v.step(n);
  }
  RECURRA_FN bool at(int64_t b, int64_t t) const {
    return data && data[b * step[0] + t * step[1]] != 0;
  }
};
// Those of the next A steps.
template <int A>
struct ResetsAhead {
  uint8_t raw[A] = {};

  __device__ __forceinline__ void start(const Resets& from, int64_t b, int64_t t, int64_t count) {
    if (!from.data) return;
#pragma unroll
    for (int i = 0; i < A; ++i)
      raw[i] = i < count ? from.data[b * from.step[0] + (t + i) * from.step[1]] : 0;
  }
  // A bit a step.
  __device__ __forceinline__ unsigned finish() const {
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < A; ++i) bits |= (raw[i] != 0 ? 1u : 0u) << i;
    return bits;
  }
};

// What all kernels are given.
template <class T>
struct Inputs {
  Elements<4> x;
  Elements<2> params;
  Resets reset;
  Integers cu_seqlens;
  int64_t sequences, time, channels, padded;

  Inputs(const RnnInputs& args, const Indices& offsets)
      : x(args.x),
        params(args.params),
        reset(args.reset),
        cu_seqlens(offsets),
        sequences(args.sequences.count),
        time(args.sequences.time),
        channels(args.x.size[3]),
        padded(args.padded()) {}
  // As Sequences has it. Whatever cu_seqlens holds, below chunk_rows.
  RECURRA_FN int64_t chunk_row(int64_t n, const Extent& where, int64_t k) const {
    const int64_t first =
        cu_seqlens.data ? where.begin / kRnnChunk + n : n * ((time + kRnnChunk - 1) / kRnnChunk);
    return first + k;
  }
};

// f(Cell{}) for cell number `index` of the list.
template <class F, class... Cell>
void with_cell_at(int index, const F& f, CellList<Cell...>) {
  int i = 0;
  ((i++ == index && (f(Cell{}), true)) || ...);
}

}  // namespace recurra::cuda::rnn_detail
