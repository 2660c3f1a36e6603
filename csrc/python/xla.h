// One handler of XLA custom calls for all ops. Its attributes are the name of the op, which of its
// arrays are given (a "1" or a "0" for each), and by their names the arguments that are no arrays.
// Results are written to the buffers of XLA.
#pragma once
#include "native/registry.h"
#include "python/xla_ffi.h"

namespace recurra {

// Calls the op of a frame, whose buffers are on the device, or on the CPU where that is null.
void run_xla(const xla::CallFrame& frame, Platform platform, Device* device);

// What a handler does: answers what XLA asks of it, and returns what `execute` throws as an error.
// `api_size` is how much of the frame's api that reads.
xla::Error* handle_xla(xla::CallFrame* frame, size_t api_size,
                       void (*execute)(const xla::CallFrame& frame));

}  // namespace recurra
