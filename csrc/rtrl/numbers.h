// Several numbers that lie together, as the CUDA kernels of rtrl read and write them at once.
#pragma once
#include <cstdint>

#include "math/macros.h"

namespace recurra::cuda {
namespace rtrl_detail {

template <class T, int V>
struct alignas(V * sizeof(T)) Numbers {
  T v[V];
};
template <int V, class T>
RECURRA_FN Numbers<T, V> load_numbers(const T* from) {
  return *reinterpret_cast<const Numbers<T, V>*>(from);
}
template <class T, int V>
RECURRA_FN void store_numbers(T* to, const Numbers<T, V>& numbers) {
  *reinterpret_cast<Numbers<T, V>*>(to) = numbers;
}

// As many as 16 bytes hold.
template <class T>
constexpr int kMostNumbers = 16 / sizeof(T);
// Whether rows of `width` numbers from there on can all be read so.
template <class T>
bool in_whole_numbers(const void* data, int64_t width) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && width % kMostNumbers<T> == 0;
}

}  // namespace rtrl_detail
}  // namespace recurra::cuda
