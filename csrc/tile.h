// Tiles: a few time steps by a few channels of a tensor of any layout and dtype, as rows of lanes
// in the compute type. This is where 16-bit storage is converted and where layouts in which time,
// not the channel, is contiguous are transposed; kernels see only rows.
#pragma once
#include "math/macros.h"
#include "parallel.h"
#include "simd/vec.h"
#include "view.h"

namespace recurra::RECURRA_ISA {

template <class T>
constexpr DType kDType = sizeof(T) == 4 ? DType::f32 : DType::f64;

// A (time, channel) plane of a tensor. Time may run backwards: stride_t is then negative.
struct Plane {
  char* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride_t = 0, stride_c = 0;

  explicit operator bool() const { return data != nullptr; }
  RECURRA_INLINE Plane at(int64_t t, int64_t c) const {
    return {data + (t * stride_t + c * stride_c) * item_size(dtype), dtype, stride_t, stride_c};
  }
};

// The steps of a sequence in the order in which they are walked: forwards from `begin`, or
// backwards from the last one.
RECURRA_INLINE Plane plane(const View<3>& v, const Sequence& s, bool backwards, int64_t channel) {
  if (!v) return {};
  const int64_t first = backwards ? s.end - 1 : s.begin;
  return {v.at(s.batch, first, channel), v.dtype, backwards ? -v.step(1) : v.step(1), v.step(2)};
}

// One row: the state of sequence n.
RECURRA_INLINE Plane plane(const View<2>& v, int64_t n, int64_t channel) {
  if (!v) return {};
  return {v.at(n, channel), v.dtype, 0, v.step(1)};
}

template <class T>
struct Tile {
  T* data;
  int64_t stride;  // between rows
  RECURRA_INLINE T* row(int64_t t) const { return data + t * stride; }
};

template <class T>
RECURRA_INLINE T load_element(const char* p, DType dtype) {
  switch (dtype) {
    case DType::f32: return static_cast<T>(*reinterpret_cast<const float*>(p));
    case DType::f64: return static_cast<T>(*reinterpret_cast<const double*>(p));
    default: {
      uint16_t bits[kLanes] = {*reinterpret_cast<const uint16_t*>(p)};
      float lanes[kLanes];
      (dtype == DType::bf16 ? load_bf16(bits) : load_f16(bits)).store(lanes);
      return static_cast<T>(lanes[0]);
    }
  }
}

template <class T>
RECURRA_INLINE void store_element(char* p, DType dtype, T value) {
  switch (dtype) {
    case DType::f32: *reinterpret_cast<float*>(p) = static_cast<float>(value); break;
    case DType::f64: *reinterpret_cast<double*>(p) = static_cast<double>(value); break;
    default: {
      uint16_t bits[kLanes];
      const Vec<float> v(static_cast<float>(value));
      dtype == DType::bf16 ? store_bf16(bits, v) : store_f16(bits, v);
      *reinterpret_cast<uint16_t*>(p) = bits[0];
    }
  }
}

// n <= 16 consecutive elements as lanes; the other lanes are zero.
template <class T>
RECURRA_INLINE Vec<T> load_lanes(const char* p, DType dtype, int n) {
  if (dtype == kDType<T>) {
    const T* q = reinterpret_cast<const T*>(p);
    return n == kLanes ? Vec<T>::load(q) : Vec<T>::load(q, n);
  }
  if constexpr (sizeof(T) == 4) {
    if (dtype == DType::bf16 || dtype == DType::f16) {
      const uint16_t* q = reinterpret_cast<const uint16_t*>(p);
      uint16_t part[kLanes] = {};
      if (n < kLanes) {
        for (int i = 0; i < n; ++i) part[i] = q[i];
        q = part;
      }
      return dtype == DType::bf16 ? load_bf16(q) : load_f16(q);
    }
  }
  T lanes[kLanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = load_element<T>(p + i * item_size(dtype), dtype);
  return Vec<T>::load(lanes);
}

template <class T>
RECURRA_INLINE void store_lanes(char* p, DType dtype, Vec<T> v, int n) {
  if (dtype == kDType<T>) {
    T* q = reinterpret_cast<T*>(p);
    return n == kLanes ? v.store(q) : v.store(q, n);
  }
  if constexpr (sizeof(T) == 4) {
    if (dtype == DType::bf16 || dtype == DType::f16) {
      uint16_t* q = reinterpret_cast<uint16_t*>(p);
      uint16_t part[kLanes];
      uint16_t* to = n == kLanes ? q : part;
      dtype == DType::bf16 ? store_bf16(to, v) : store_f16(to, v);
      if (n < kLanes)
        for (int i = 0; i < n; ++i) q[i] = part[i];
      return;
    }
  }
  T lanes[kLanes];
  v.store(lanes);
  for (int i = 0; i < n; ++i) store_element<T>(p + i * item_size(dtype), dtype, lanes[i]);
}

// Sixteen stored numbers of a dtype that is known.
template <class T, DType S>
RECURRA_INLINE Vec<T> load_stored(const char* p) {
  if constexpr (S == kDType<T>)
    return Vec<T>::load(reinterpret_cast<const T*>(p));
  else if constexpr (S == DType::bf16)
    return load_bf16(reinterpret_cast<const uint16_t*>(p));
  else
    return load_f16(reinterpret_cast<const uint16_t*>(p));
}
template <class T, DType S>
RECURRA_INLINE void store_stored(char* p, Vec<T> v, bool past) {
  if constexpr (S == kDType<T>) {
    T* to = reinterpret_cast<T*>(p);
    past ? v.stream(to) : v.store(to);
  } else if constexpr (S == DType::bf16) {
    store_bf16(reinterpret_cast<uint16_t*>(p), v, past);
  } else {
    store_f16(reinterpret_cast<uint16_t*>(p), v, past);
  }
}

// Whether arithmetic on a dtype is in T, and load_stored and store_stored know it.
template <class T>
RECURRA_INLINE bool is_storage(DType dtype) {
  return dtype == kDType<T> || (sizeof(T) == 4 && (dtype == DType::bf16 || dtype == DType::f16));
}

// f(Index<dtype>) for the dtypes whose arithmetic is in T.
template <class T, class F>
RECURRA_INLINE void for_storage(DType dtype, F f) {
  if (dtype == kDType<T>) return f(Index<static_cast<int>(kDType<T>)>{});
  if constexpr (sizeof(T) == 4) {
    if (dtype == DType::bf16) return f(Index<static_cast<int>(DType::bf16)>{});
    return f(Index<static_cast<int>(DType::f16)>{});
  }
}

template <class T>
RECURRA_INLINE bool rows_in_place(const Plane& p, int64_t channels) {
  return p.dtype == kDType<T> && p.stride_c == 1 && channels % kLanes == 0;
}

RECURRA_INLINE int at_most_lanes(int64_t n) { return n < kLanes ? static_cast<int>(n) : kLanes; }

// Whether time is contiguous for long enough that whole vectors of it should be read and turned; of
// a few steps single numbers are faster.
RECURRA_INLINE bool worth_transposing(const Plane& p, int64_t steps) {
  return (p.stride_t == 1 || p.stride_t == -1) && steps > 4;
}

// Rows 0 .. steps-1 of a plane, in place where it already is rows of T and otherwise in `buffer`
// with `width` numbers a row. Lanes from `channels` up to the next multiple of 16 are zero.
template <class T>
inline Tile<T> load_tile(const Plane& p, int64_t steps, int64_t channels, T* buffer,
                         int64_t width) {
  if (rows_in_place<T>(p, channels)) return {reinterpret_cast<T*>(p.data), p.stride_t};
  const int64_t item = item_size(p.dtype);
  if (p.stride_c == 1 || channels == 1) {
    const int64_t whole = is_storage<T>(p.dtype) ? channels / kLanes * kLanes : 0;
    if (whole)
      for_storage<T>(p.dtype, [&](auto dtype) RECURRA_LAMBDA {
        for (int64_t t = 0; t < steps; ++t)
          for (int64_t c = 0; c < whole; c += kLanes) {
            const char* from = p.data + (t * p.stride_t + c) * item;
            // The same line of the next tile, whose rows are too short to be foreseen.
            prefetch<2>(from + steps * p.stride_t * item);
            load_stored<T, DType(dtype.value)>(from).store(buffer + t * width + c);
          }
      });
    if (p.dtype == kDType<T> && whole < channels) {  // the mask is made once
      const int rest = static_cast<int>(channels - whole);
      const T* const from = reinterpret_cast<const T*>(p.data) + whole;
      for (int64_t t = 0; t < steps; ++t)
        Vec<T>::load(from + t * p.stride_t, rest).store(buffer + t * width + whole);
      return {buffer, width};
    }
    for (int64_t t = 0; whole < channels && t < steps; ++t)
      for (int64_t c = whole; c < channels; c += kLanes)
        load_lanes<T>(p.data + (t * p.stride_t + c) * item, p.dtype, at_most_lanes(channels - c))
            .store(buffer + t * width + c);
  } else if (p.stride_c == 0 && channels > 0) {
    for (int64_t t = 0; t < steps; ++t) {
      const Vec<T> v(load_element<T>(p.data + t * p.stride_t * item, p.dtype));
      for (int64_t c = 0; c < channels; c += kLanes) {
        T* const to = buffer + t * width + c;
        if (channels - c < kLanes) Vec<T>(T(0)).store(to);
        v.store(to, at_most_lanes(channels - c));
      }
    }
  } else if (worth_transposing(p, steps)) {
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int lanes = at_most_lanes(channels - c);
      for (int64_t t = 0; t < steps; t += kLanes) {
        const int n = at_most_lanes(steps - t);
        // Time ascends in memory; walked backwards, the run starts at its last step.
        const char* from = p.data + (p.stride_t > 0 ? t : -(t + n - 1)) * item;
        Vec<T> rows[kLanes];
        // The same lines of the next tile: no machine foresees sixteen rows that end here.
        const int64_t next = (p.stride_t > 0 ? steps : -steps) * item;
        for (int i = 0; i < lanes; ++i) prefetch<2>(from + (c + i) * p.stride_c * item + next);
        if (p.dtype == kDType<T> && n == kLanes && lanes == kLanes)
          for (int i = 0; i < kLanes; ++i)
            rows[i] = Vec<T>::load(reinterpret_cast<const T*>(from) + (c + i) * p.stride_c);
        else
          for (int i = 0; i < kLanes; ++i)
            rows[i] = i < lanes ? load_lanes<T>(from + (c + i) * p.stride_c * item, p.dtype, n)
                                : Vec<T>(T(0));
        transpose(rows);
        if (n == kLanes && p.stride_t > 0)
          for (int i = 0; i < kLanes; ++i) rows[i].store(buffer + (t + i) * width + c);
        else
          for (int i = 0; i < n; ++i)
            rows[p.stride_t > 0 ? i : n - 1 - i].store(buffer + (t + i) * width + c);
      }
    }
  } else {
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t c = 0; c < channels; c += kLanes) {
        const char* from = p.data + (t * p.stride_t + c * p.stride_c) * item;
        T* const to = buffer + t * width + c;
        const int lanes = at_most_lanes(channels - c);
        if (lanes < kLanes) Vec<T>(T(0)).store(to);
        if (p.dtype == kDType<T>)
          for (int i = 0; i < lanes; ++i) to[i] = reinterpret_cast<const T*>(from)[i * p.stride_c];
        else
          for (int i = 0; i < lanes; ++i)
            to[i] = load_element<T>(from + i * p.stride_c * item, p.dtype);
      }
  }
  return {buffer, width};
}

// One row, in lanes; zeros where the plane is absent.
template <class T>
void load_row(const Plane& p, int64_t channels, T* row, int64_t width) {
  if (!p) {
    for (int64_t c = 0; c < width; ++c) row[c] = T(0);
    return;
  }
  const Tile<T> tile = load_tile<T>(p, 1, channels, row, width);
  if (tile.data != row)
    for (int64_t c = 0; c < channels; ++c) row[c] = tile.data[c];
}

RECURRA_INLINE void prefetch_row(const Plane& p, int64_t t, int64_t channels) {
  const char* row = p.at(t, 0).data;
  for (int64_t at = 0; at < channels * item_size(p.dtype); at += 64) prefetch<2>(row + at);
}

// Brings the lines of a tile closer while others are worked on.
RECURRA_INLINE void prefetch_tile(const Plane& p, int64_t steps, int64_t channels) {
  if (!p) return;
  const int64_t item = item_size(p.dtype), line = 64 / item;
  if (p.stride_c == 1) {
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t c = 0; c < channels; c += line)
        prefetch<2>(p.data + (t * p.stride_t + c) * item);
  } else if (p.stride_t == 1) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t t = 0; t < steps; t += line) prefetch<2>(p.data + (t + c * p.stride_c) * item);
  }
}

// Whether rows may be written past the caches, where each must start on a cache line.
template <class T>
bool may_stream(const Plane& p) {
  return p.dtype == kDType<T> && (reinterpret_cast<uintptr_t>(p.data) |
                                  static_cast<uintptr_t>(p.stride_t * item_size(p.dtype))) %
                                         64 ==
                                     0;
}

// Rows of a plane as they are stored where channels are contiguous, whatever the dtype, and
// otherwise as a tile of T: for kernels that read each number once and convert as they go.
template <class T>
struct StoredRows {
  const char* data = nullptr;
  DType dtype = kDType<T>;
  int64_t stride = 0;  // bytes between rows

  RECURRA_INLINE Vec<T> at(int64_t t, int64_t channel, int lanes) const {
    return load_lanes<T>(data + t * stride + channel * item_size(dtype), dtype, lanes);
  }
};

template <class T>
inline StoredRows<T> stored_rows(const Plane& p, int64_t steps, int64_t channels, T* buffer,
                                 int64_t width) {
  if (!p) return {};
  if (p.stride_c == 1) return {p.data, p.dtype, p.stride_t * item_size(p.dtype)};
  const Tile<T> tile = load_tile<T>(p, steps, channels, buffer, width);
  return {reinterpret_cast<const char*>(tile.data), kDType<T>,
          tile.stride * static_cast<int64_t>(sizeof(T))};
}

// Writes rows to a plane; `stream` goes past the caches where the layout lets it.
template <class T>
inline void store_tile(const Plane& p, int64_t steps, int64_t channels, const T* rows,
                       int64_t width, bool stream) {
  if (!p) return;
  const int64_t item = item_size(p.dtype);
  const auto aligned = [&](int64_t stride) {
    return (reinterpret_cast<uintptr_t>(p.data) | static_cast<uintptr_t>(stride * item)) % 64 == 0;
  };
  if (p.stride_c == 1) {
    const bool past = stream && rows_in_place<T>(p, channels) && aligned(p.stride_t);
    const int64_t whole = is_storage<T>(p.dtype) ? channels / kLanes * kLanes : 0;
    if (whole)
      for_storage<T>(p.dtype, [&](auto dtype) RECURRA_LAMBDA {
        for (int64_t t = 0; t < steps; ++t)
          for (int64_t c = 0; c < whole; c += kLanes)
            store_stored<T, DType(dtype.value)>(p.data + (t * p.stride_t + c) * item,
                                                Vec<T>::load(rows + t * width + c), past);
      });
    if (p.dtype == kDType<T> && whole < channels) {
      const int rest = static_cast<int>(channels - whole);
      T* const to = reinterpret_cast<T*>(p.data) + whole;
      for (int64_t t = 0; t < steps; ++t)
        Vec<T>::load(rows + t * width + whole).store(to + t * p.stride_t, rest);
      return;
    }
    for (int64_t t = 0; whole < channels && t < steps; ++t)
      for (int64_t c = whole; c < channels; c += kLanes)
        store_lanes<T>(p.data + (t * p.stride_t + c) * item, p.dtype,
                       Vec<T>::load(rows + t * width + c), at_most_lanes(channels - c));
  } else if (worth_transposing(p, steps)) {
    const bool past = stream && p.dtype == kDType<T> && p.stride_t == 1 && aligned(p.stride_c);
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int lanes = at_most_lanes(channels - c);
      for (int64_t t = 0; t < steps; t += kLanes) {
        const int n = at_most_lanes(steps - t);
        char* to = p.data + (p.stride_t > 0 ? t : -(t + n - 1)) * item;
        Vec<T> block[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const int row = p.stride_t > 0 ? i : n - 1 - i;
          block[i] = i < n ? Vec<T>::load(rows + (t + row) * width + c) : Vec<T>(T(0));
        }
        transpose(block);
        for (int i = 0; i < lanes; ++i) {
          char* at = to + (c + i) * p.stride_c * item;
          if (past && n == kLanes)
            block[i].stream(reinterpret_cast<T*>(at));
          else
            store_lanes<T>(at, p.dtype, block[i], n);
        }
      }
    }
  } else if (p.dtype == kDType<T>) {
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t c = 0; c < channels; ++c)
        reinterpret_cast<T*>(p.data)[t * p.stride_t + c * p.stride_c] = rows[t * width + c];
  } else {
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t c = 0; c < channels; ++c)
        store_element<T>(p.data + (t * p.stride_t + c * p.stride_c) * item, p.dtype,
                         rows[t * width + c]);
  }
}

// Calls f(i) for i in [0, n) through parallel_run.
template <class F>
inline void parallel(int64_t n, const F& f) {
  parallel_run(
      n, [](void* context, int64_t i) { (*static_cast<const F*>(context))(i); },
      const_cast<F*>(&f));
}

// The same in this thread alone where that is no slower.
template <class F>
inline void parallel_unless(bool serial, int64_t n, const F& f) {
  if (serial)
    for (int64_t i = 0; i < n; ++i) f(i);
  else
    parallel(n, f);
}

}  // namespace recurra::RECURRA_ISA
