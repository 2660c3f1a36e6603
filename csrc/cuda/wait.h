// The only functions that wait for the device: what calls them is documented as doing so.
#pragma once
#include <cstddef>

#include "cuda/stream.h"

namespace recurra::cuda {

// Whether what is put on a stream goes into a CUDA graph: nothing can be waited for there.
bool is_captured(const Stream& stream);

// Copies from the device what the kernels before it on the stream leave there.
void read_back(void* to, const void* from, size_t bytes, const Stream& stream);

void wait_for_device(int device);

}  // namespace recurra::cuda
