// Defines the ops of schemas.cpp. Their implementations register themselves in <op>.cpp and, for
// CUDA, in the CUDA library.
#include <torch/csrc/stable/library.h>

#include <string>
#include <utility>

#include "cells/evaluate.h"
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

// A line a cell: its name, inputs, states, parameters and output, then what enters with an input,
// as parameter:input:state.
std::string cells_op() {
  std::string out;
  for (const char* name : cell_names()) {
    const CellInfo& info = *cell_info(name);
    out.append(name);
    for (const auto* names : {&info.inputs, &info.states, &info.params}) {
      const char* separator = " ";
      for (const char* one : *names) out.append(std::exchange(separator, ",")).append(one);
    }
    out.append(" ").append(info.states[static_cast<size_t>(info.output)]);
    for (const AffineParam& a : info.affine) {
      out.append(" ").append(std::to_string(a.param));
      out.append(":").append(std::to_string(a.input));
      out.append(":").append(std::to_string(a.state));
    }
    out.append("\n");
  }
  return out;
}

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
  m.def("_cells() -> str");
  m.def("_device_status(Tensor on) -> str");
  m.def("_has_cuda_code(int device) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(recurra, CompositeExplicitAutograd, m) {
  m.impl("_requirements", TORCH_BOX(&recurra::requirements_op));
  m.impl("_isa", TORCH_BOX(&recurra::isa_op));
  m.impl("_threads", TORCH_BOX(&recurra::threads_op));
  m.impl("_cells", TORCH_BOX(&recurra::cells_op));
}
