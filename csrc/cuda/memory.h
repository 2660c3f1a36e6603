// What is done to memory of a device besides kernels, on a stream, without waiting for it.
#pragma once
#include <cstddef>

#include "cuda/stream.h"

namespace recurra::cuda {

void fill_zero(void* to, size_t bytes, const Stream& stream);

}  // namespace recurra::cuda
