#include "cuda/stream.h"

#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace recurra::cuda {
namespace {

using CurrentStream = int32_t (*)(int32_t device, void** stream);

// The function of torch's stable C interface is looked up in the library that a torch with CUDA has
// loaded already. Linked to, it would keep this library from loading on any other torch.
CurrentStream find() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* found = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  if (!found)
    throw std::runtime_error("recurra: a CUDA tensor needs a torch that was built with CUDA");
  return reinterpret_cast<CurrentStream>(found);
}

}  // namespace

Stream current_stream(int device) {
  static const CurrentStream current = find();
  Stream stream{device, nullptr};
  if (current(device, &stream.handle) != 0)
    throw std::runtime_error("recurra: no CUDA stream for device " + std::to_string(device));
  return stream;
}

}  // namespace recurra::cuda
