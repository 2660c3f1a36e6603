// Defines the ops of schemas.cpp. Their implementations register themselves in <op>.cpp and, for
// CUDA, in the CUDA library.
#include <torch/csrc/stable/library.h>

#include <string>

#include "parallel.h"
#include "simd/isa.h"
#include "torch/check.h"
#include "torch/schemas.h"

namespace recurra {
namespace {

std::string requirements_op(std::string op) { return requirements(op); }

// The instruction set in use; a name caps it from now on.
std::string isa_op(std::optional<std::string> cap) {
  if (cap) cap_isa(cap->c_str());
  return isa_name(isa());
}

int64_t threads_op() { return thread_count(); }

int torch_threads() {
  uint32_t count = 1;
  torch_get_num_threads(&count);
  return static_cast<int>(count);
}

[[maybe_unused]] const bool threads_from_torch = (set_thread_source(torch_threads), true);

}  // namespace

}  // namespace recurra

STABLE_TORCH_LIBRARY(recurra, m) {
  for (const recurra::Op& op : recurra::ops()) m.def(op.schema);
  m.def("_requirements(str op) -> str");
  m.def("_isa(str? cap=None) -> str");
  m.def("_threads() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(recurra, CompositeExplicitAutograd, m) {
  m.impl("_requirements", TORCH_BOX(&recurra::requirements_op));
  m.impl("_isa", TORCH_BOX(&recurra::isa_op));
  m.impl("_threads", TORCH_BOX(&recurra::threads_op));
}
