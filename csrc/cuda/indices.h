// cu_seqlens and slots as the ops of the device are given them.
#pragma once
#include "view.h"

namespace recurra::cuda {

struct Indices : View<1> {
  uint32_t* bad = nullptr;  // on the device: set where a value has to be clamped; or null

  Indices() = default;
  Indices(const View<1>& v, uint32_t* word = nullptr) : View<1>(v), bad(word) {}  // NOLINT
};

}  // namespace recurra::cuda
