#include "cuda/context.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace recurra::cuda {
namespace {

// In the driver's library, which the CUDA runtime has loaded by its first call.
void* find(const char* name) {
  void* const library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  void* const found = library ? dlsym(library, name) : nullptr;
  if (!found)
    throw std::runtime_error("recurra: the NVIDIA driver has no function " + std::string(name));
  return found;
}

}  // namespace

void* current_context() {
  using Get = int (*)(void** context);
  static const Get get = reinterpret_cast<Get>(find("cuCtxGetCurrent"));
  void* context = nullptr;
  if (get(&context) != 0) return nullptr;
  return context;
}

void set_current_context(void* context) {
  using Set = int (*)(void* context);
  static const Set set = reinterpret_cast<Set>(find("cuCtxSetCurrent"));
  set(context);
}

}  // namespace recurra::cuda
