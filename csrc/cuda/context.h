// The context that the driver holds for this thread, by which all CUDA runtimes of a process agree
// on the current device. The runtime itself can only change it to that of a device, and makes one.
#pragma once

namespace recurra::cuda {

// Null where there is none.
void* current_context();
void set_current_context(void* context);

}  // namespace recurra::cuda
