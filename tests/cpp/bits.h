// The bits of a number.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// Equal bits, any NaN like any other.
template <class T>
bool same(T a, T b) {
  return (a != a && b != b) || bits<Bits<T>>(a) == bits<Bits<T>>(b);
}
