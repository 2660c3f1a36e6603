// The gradient of an argument (B, T, D) that is broadcast along some of its dimensions: partial
// sums in the compute type, (B, T, D) of the argument, except that a D of 1 becomes one sum for
// each sixteen channels and a B of 1 may become one for each sequence.
#pragma once
#include "tile.h"

namespace recurra::RECURRA_ISA {

constexpr int64_t kGroup = 16;  // steps that are summed before they join a gradient

// Adds a tile of gradients of `a` into the partial sums: over time in groups of kGroup steps, over
// the lanes of sixteen channels by the fixed tree. Both orders are those of the walk, whatever
// the layout and the tile.
template <class T>
void accumulate(const View<3>& a, const Plane& to, int64_t steps, int64_t channels, const T* rows,
                int64_t width) {
  const bool over_time = a.size[1] == 1, over_channels = a.size[2] == 1;
  for (int64_t t = 0; t < steps; t += kGroup) {
    const int64_t group = over_time ? (steps - t < kGroup ? steps - t : kGroup) : 1;
    const int64_t end = over_time ? t + 1 : (steps - t < kGroup ? steps : t + kGroup);
    for (int64_t first = t; first < end; ++first)
      for (int64_t c = 0; c < channels; c += kLanes) {
        Vec<T> v = Vec<T>::load(rows + first * width + c);
        for (int64_t i = 1; i < group; ++i) v = v + Vec<T>::load(rows + (first + i) * width + c);
        T* at = reinterpret_cast<T*>(to.at(over_time ? 0 : first, 0).data);
        if (over_channels) {
          at[c / kLanes] += sum(v);
        } else {
          const int lanes = at_most_lanes(channels - c);
          (Vec<T>::load(at + c, lanes) + v).store(at + c, lanes);
        }
      }
  }
}

// da = the partial sums, added in order over what they stand apart for. `parts`: numbers of T of an
// element, 2 of a complex one.
template <class T, int parts = 1>
void write_sums(const View<3>& partial, const View<3>& da) {
  const int64_t steps = da.size[1], channels = da.size[2], count = da.size[0] * steps * channels;
  const int64_t apart = count ? partial.size[0] / da.size[0] : 0;
  const int64_t blocks = count ? partial.size[2] / channels : 0;
  constexpr int64_t kSums = 1024;  // of a task
  constexpr DType part = kDType<T>;
  parallel((count + kSums - 1) / kSums, [&](int64_t task) {
    for (int64_t i = task * kSums; i < count && i < (task + 1) * kSums; ++i) {
      const int64_t b = i / channels / steps, t = i / channels % steps, d = i % channels;
      for (int p = 0; p < parts; ++p) {
        T total = T(0);
        for (int64_t n = 0; n < apart; ++n)
          for (int64_t k = 0; k < blocks; ++k)
            total += reinterpret_cast<const T*>(partial.at(b * apart + n, t, d * blocks + k))[p];
        store_element<T>(da.at(b, t, d) + p * item_size(part), parts == 1 ? da.dtype : part, total);
      }
    }
  });
}

}  // namespace recurra::RECURRA_ISA
