// Views of arrays without gaps, the last dimension innermost, for programs that call kernels
// themselves: dense(pointer, B, T, D) is a View<3>. A View is a plain struct, so that other strides
// can be written into it.
#pragma once
#include <complex>

#include "view.h"

namespace recurra {

// The DType of a C++ type. C++20 has none for 16-bit floats: name theirs.
template <class T>
inline constexpr DType dtype_of_type = T::no_dtype;
template <>
inline constexpr DType dtype_of_type<float> = DType::f32;
template <>
inline constexpr DType dtype_of_type<double> = DType::f64;
template <>
inline constexpr DType dtype_of_type<std::complex<float>> = DType::c64;
template <>
inline constexpr DType dtype_of_type<std::complex<double>> = DType::c128;
template <>
inline constexpr DType dtype_of_type<int32_t> = DType::i32;
template <>
inline constexpr DType dtype_of_type<int64_t> = DType::i64;
template <>
inline constexpr DType dtype_of_type<bool> = DType::b8;

template <class... I>
View<sizeof...(I)> dense(DType dtype, const void* data, I... sizes) {
  constexpr int count = sizeof...(I);
  // Kernels do not write to what they read, but a view is of both.
  View<count> view{const_cast<void*>(data), dtype, {static_cast<int64_t>(sizes)...}, {}};
  int64_t stride = 1;
  for (int n = count - 1; n >= 0; --n) {
    view.stride[n] = stride;
    stride *= view.size[n];
  }
  return view;
}

template <class T, class... I>
View<sizeof...(I)> dense(const T* data, I... sizes) {
  return dense(dtype_of_type<T>, data, sizes...);
}

}  // namespace recurra
