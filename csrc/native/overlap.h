// Which bytes an array covers, and whether two cover one in common. The ranges of addresses tell
// for nearly all arrays, so that what comes after need not be fast.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>

#include "view.h"

namespace recurra {

// Every byte `first` + the sum of n_k * by_k + p with 0 <= n_k <= most_k and 0 <= p < item.
struct Footprint {
  struct Dim {
    int64_t by, most;
  };
  Dim dims[8];
  int count = 0;
  int64_t item = 0;  // 0: no bytes at all
  uintptr_t first = 0, last = 0;
};

// Of an array of at most eight dimensions; expanded ones cover nothing more.
template <class Tensor>
Footprint footprint(const Tensor& t) {
  Footprint f;
  f.item = item_size(dtype_of(t));
  f.first = reinterpret_cast<uintptr_t>(t.data_ptr());
  f.last = f.first + static_cast<uintptr_t>(f.item - 1);
  for (int64_t n = 0; n < t.dim(); ++n) {
    const int64_t size = t.size(n);
    if (size == 0) return {};
    if (size == 1) continue;
    const int64_t by = t.stride(n) * f.item;
    if (by == 0) continue;
    (by < 0 ? f.first : f.last) += static_cast<uintptr_t>((size - 1) * by);
    f.dims[f.count++] = {by < 0 ? -by : by, size - 1};
  }
  return f;
}

// Searches for a sum of n_k * by_k with 0 <= n_k <= most_k that is a given number.
class BoundedSums {
 public:
  void add(int64_t by, int64_t most) {
    if (most == 0) return;
    for (int k = 0; k < count_; ++k)
      if (terms_[k].by == by) {
        terms_[k].most += most;
        return;
      }
    terms_[count_++] = {by, most};
  }

  // False also where too many tries left it open, as strides that do not nest may.
  bool reach(int64_t target) {
    std::sort(terms_, terms_ + count_, [](const auto& a, const auto& b) { return a.by > b.by; });
    largest_[count_] = divisor_[count_] = 0;
    for (int k = count_ - 1; k >= 0; --k) {
      largest_[k] = largest_[k + 1] + terms_[k].by * terms_[k].most;
      divisor_[k] = std::gcd(divisor_[k + 1], terms_[k].by);
    }
    tries_ = 2000;
    return search(0, target);
  }

 private:
  // By the terms from k on, of which the first has the largest step.
  bool search(int k, int64_t target) {
    if (target == 0) return true;
    if (--tries_ < 0 || target > largest_[k] || target % divisor_[k] != 0) return false;
    const auto [by, most] = terms_[k];
    const int64_t high = std::min(most, target / by), left = target - largest_[k + 1];
    const int64_t low = left > 0 ? (left + by - 1) / by : 0;
    for (int64_t n = high; n >= low && tries_ >= 0; --n)
      if (search(k + 1, target - n * by)) return true;
    return false;
  }

  Footprint::Dim terms_[18];
  int64_t largest_[19], divisor_[19];
  int count_ = 0, tries_ = 0;
};

// Whether a byte is surely in both.
inline bool overlap(const Footprint& a, const Footprint& b) {
  if (a.item == 0 || b.item == 0 || a.last < b.first || b.last < a.first) return false;
  // From a byte of a on to one of b, counted from the last of b back.
  BoundedSums sums;
  for (int k = 0; k < a.count; ++k) sums.add(a.dims[k].by, a.dims[k].most);
  for (int k = 0; k < b.count; ++k) sums.add(b.dims[k].by, b.dims[k].most);
  sums.add(1, a.item + b.item - 2);
  return sums.reach(static_cast<int64_t>(b.last - a.first));
}

// Whether two elements surely share a byte.
inline bool overlaps_itself(Footprint f) {
  std::sort(f.dims, f.dims + f.count, [](const auto& a, const auto& b) { return a.by < b.by; });
  int64_t last = f.item - 1;  // of what the dimensions so far cover
  for (int k = 0; k < f.count; ++k) {
    const auto [by, most] = f.dims[k];
    if (by <= last) {
      // Some steps along this dimension, at least one, against any along those before.
      BoundedSums sums;
      sums.add(1, 2 * (f.item - 1));
      for (int j = 0; j < k; ++j) sums.add(f.dims[j].by, 2 * f.dims[j].most);
      sums.add(by, most - 1);
      if (sums.reach(last + by * most)) return true;
    }
    last += by * most;
  }
  return false;
}

}  // namespace recurra
