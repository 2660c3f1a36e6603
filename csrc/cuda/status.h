// cu_seqlens and slots on the device. Kernels clamp what these may not hold and say so in a word
// there, which the host reads when somebody asks.
#pragma once
#include <string>
#include <vector>

#include "cuda/stream.h"
#include "integers.h"

namespace recurra::cuda {

// Whether the library has code that a device runs. Loads a kernel there, but waits for nothing.
bool has_code(int device);

// The word of an argument, "cu_seqlens" or "slots", of an op or its backward.
uint32_t* status_word(const char* op, const char* argument, int device);

// The arguments of which a kernel met values that it clamped, as "cu_seqlens of rnn", since this
// was last asked. Waits for the whole device.
std::vector<std::string> take_status(const Stream& stream);

}  // namespace recurra::cuda
