#include <pybind11/pybind11.h>

#include "python/module.h"
#include "python/xla.h"

namespace py = pybind11;

namespace recurra {
namespace {

xla::Error* handle(xla::CallFrame* frame) {
  return handle_xla(frame, xla::kCpuApi,
                    [](const xla::CallFrame& each) { run_xla(each, Platform::cpu, nullptr); });
}

}  // namespace

void define_xla(py::module_& m) {
  m.def(
      "xla_handler",
      [] { return py::capsule(reinterpret_cast<void*>(&handle), "xla._CUSTOM_CALL_TARGET"); },
      "What jax.ffi.register_ffi_target takes: the ops as custom calls on the CPU.");
}

}  // namespace recurra
