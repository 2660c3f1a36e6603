// How the dimensions of a tensor lie in memory.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <utility>
#include <vector>

namespace recurra {

// The dimensions from the outermost in memory to the innermost. recurra._check has the same for
// fake tensors.
template <class Tensor>
std::vector<int> memory_order(const Tensor& t) {
  const int count = static_cast<int>(t.dim());
  std::vector<int> order;  // from the innermost out
  for (int n = count - 1; n >= 0; --n) order.push_back(n);
  // As torch finds it: a dimension passes those of larger strides, and of equal ones and more
  // elements; what is expanded neither moves nor stops another. NumPy also has arrays that lie
  // backwards.
  for (int i = 1; i < count; ++i)
    for (int at = i, before = i - 1; before >= 0; --before) {
      int &inner = order[static_cast<size_t>(before)], &outer = order[static_cast<size_t>(at)];
      const int64_t a = std::abs(t.stride(inner)), b = std::abs(t.stride(outer));
      if (a == 0 || b == 0) continue;
      if (a < b) break;
      if (a == b && t.size(inner) <= t.size(outer)) continue;
      std::swap(inner, outer);
      at = before;
    }
  return {order.rbegin(), order.rend()};
}

}  // namespace recurra
