// Tiles of complex tensors: rows of pairs, in place where the channels are contiguous.
#pragma once
#include "simd/pairs.h"
#include "tile.h"

namespace recurra::RECURRA_ISA {

// The same memory as numbers of T, where the channels are contiguous.
template <class T>
RECURRA_INLINE Plane numbers(const Plane& p) {
  return {p.data, kDType<T>, 2 * p.stride_t, 1};
}

template <class T>
RECURRA_INLINE bool pairs_in_place(const Plane& p, int64_t channels) {
  return p.stride_c == 1 && channels % kPairs == 0;
}

RECURRA_INLINE int at_most_pairs(int64_t n) { return n < kPairs ? static_cast<int>(n) : kPairs; }

// As load_tile, of a plane of complex numbers; `width` counts numbers of T.
template <class T>
inline Tile<T> load_pairs(const Plane& p, int64_t steps, int64_t channels, T* buffer,
                          int64_t width) {
  if (p.stride_c == 1 || channels == 1)
    return load_tile<T>(numbers<T>(p), steps, 2 * channels, buffer, width);
  const T* const data = reinterpret_cast<const T*>(p.data);
  if (!worth_transposing(p, steps) || p.stride_c == 0) {
    for (int64_t t = 0; t < steps; ++t) {
      T* const row = buffer + t * width;
      for (int64_t c = 0; c < channels; ++c) {
        const T* from = data + 2 * (t * p.stride_t + c * p.stride_c);
        row[2 * c] = from[0];
        row[2 * c + 1] = from[1];
      }
      for (int64_t i = 2 * channels; i % kLanes; ++i) row[i] = T(0);
    }
    return {buffer, width};
  }
  for (int64_t c = 0; c < channels; c += kPairs) {
    const int pairs = at_most_pairs(channels - c);
    for (int64_t t = 0; t < steps; t += kPairs) {
      const int n = at_most_pairs(steps - t);
      // Time ascends in memory; walked backwards, the run starts at its last step.
      const T* from = data + 2 * (p.stride_t > 0 ? t : -(t + n - 1));
      const int64_t next = 2 * (p.stride_t > 0 ? steps : -steps);
      Vec<T> rows[kPairs];
      for (int i = 0; i < pairs; ++i) prefetch<2>(from + 2 * (c + i) * p.stride_c + next);
      for (int i = 0; i < kPairs; ++i) {
        const T* run = from + 2 * (c + i) * p.stride_c;
        rows[i] = i >= pairs    ? Vec<T>(T(0))
                  : n == kPairs ? Vec<T>::load(run)
                                : Vec<T>::load(run, 2 * n);
      }
      transpose_pairs(rows);
      for (int i = 0; i < n; ++i)
        rows[p.stride_t > 0 ? i : n - 1 - i].store(buffer + (t + i) * width + 2 * c);
    }
  }
  return {buffer, width};
}

// As load_row.
template <class T>
void load_pair_row(const Plane& p, int64_t channels, T* row, int64_t width) {
  if (!p) return load_row<T>(p, 2 * channels, row, width);
  const Tile<T> tile = load_pairs<T>(p, 1, channels, row, width);
  if (tile.data != row)
    for (int64_t i = 0; i < 2 * channels; ++i) row[i] = tile.data[i];
}

// As store_tile.
template <class T>
inline void store_pairs(const Plane& p, int64_t steps, int64_t channels, const T* rows,
                        int64_t width, bool stream) {
  if (!p) return;
  if (p.stride_c == 1 || channels == 1)
    return store_tile<T>(numbers<T>(p), steps, 2 * channels, rows, width, stream);
  T* const data = reinterpret_cast<T*>(p.data);
  if (!worth_transposing(p, steps)) {
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t c = 0; c < channels; ++c) {
        T* to = data + 2 * (t * p.stride_t + c * p.stride_c);
        to[0] = rows[t * width + 2 * c];
        to[1] = rows[t * width + 2 * c + 1];
      }
    return;
  }
  for (int64_t c = 0; c < channels; c += kPairs) {
    const int pairs = at_most_pairs(channels - c);
    for (int64_t t = 0; t < steps; t += kPairs) {
      const int n = at_most_pairs(steps - t);
      T* to = data + 2 * (p.stride_t > 0 ? t : -(t + n - 1));
      Vec<T> block[kPairs];
      for (int i = 0; i < kPairs; ++i) {
        const int row = p.stride_t > 0 ? i : n - 1 - i;
        block[i] = i < n ? Vec<T>::load(rows + (t + row) * width + 2 * c) : Vec<T>(T(0));
      }
      transpose_pairs(block);
      for (int i = 0; i < pairs; ++i) {
        T* run = to + 2 * (c + i) * p.stride_c;
        const bool past = stream && n == kPairs && reinterpret_cast<uintptr_t>(run) % 64 == 0;
        past          ? block[i].stream(run)
        : n == kPairs ? block[i].store(run)
                      : block[i].store(run, 2 * n);
      }
    }
  }
}

}  // namespace recurra::RECURRA_ISA
