// Every schema of the library and, beside it, what the op requires of its arguments; check.h
// explains the notation. The implementations register themselves in <op>.cpp and, for CUDA, in
// the CUDA library.
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>

#include "parallel.h"
#include "simd/isa.h"
#include "torch/check.h"

namespace recurra {
namespace {

struct Op {
  const char* schema;
  const char* requirements;
};

constexpr Op kOps[] = {
    {"linear_scan(Tensor a, Tensor b, Tensor? h0=None, *, bool log_a=False, bool reverse=False, "
     "Tensor? cu_seqlens=None) -> (Tensor, Tensor)",
     "b:act(B,T,D) a:act(B|1,T|1,D|1) h0:state?(S,D) cu_seqlens:index?"},
    {"_linear_scan_backward(Tensor a, Tensor h, Tensor? h0, Tensor? dh, Tensor? dh_last, *, "
     "bool log_a=False, bool reverse=False, Tensor? cu_seqlens=None) -> (Tensor, Tensor, Tensor)",
     "h:act(B,T,D) a:act(B|1,T|1,D|1) h0:state?(S,D) dh:act?(B,T,D) dh_last:state?(S,D) "
     "cu_seqlens:index?"},
    {"linear_scan_step(Tensor(a!) h, Tensor a, Tensor b, *, bool log_a=False, "
     "Tensor? slots=None) -> Tensor",
     "b:act(B,D) a:act(B|1,D|1) h:state(N,D) slots:index?(B)"},
    {"causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, Tensor? h0=None, *, "
     "str? activation=None, Tensor? cu_seqlens=None) -> (Tensor, Tensor)",
     "x:act(B,T,D) weight:param(D,W>=2) bias:param?(D) h0:state?(S,W-1,D) cu_seqlens:index?"},
    {"_causal_conv1d_backward(Tensor? dy, Tensor? dh_last, Tensor x, Tensor weight, "
     "Tensor? bias=None, Tensor? h0=None, *, str? activation=None, Tensor? cu_seqlens=None) "
     "-> (Tensor, Tensor, Tensor, Tensor)",
     "x:act(B,T,D) weight:param(D,W>=2) bias:param?(D) h0:state?(S,W-1,D) dy:act?(B,T,D) "
     "dh_last:state?(S,W-1,D) cu_seqlens:index?"},
    {"causal_conv1d_step(Tensor(a!) h, Tensor x, Tensor weight, Tensor? bias=None, *, "
     "str? activation=None, Tensor? slots=None) -> Tensor",
     "x:act(B,D) weight:param(D,W>=2) bias:param?(D) h:state(N,W-1,D) slots:index?(B)"},
};

std::string name_of(const Op& op) {
  const std::string schema = op.schema;
  return schema.substr(0, schema.find('('));
}

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

const char* requirements(const std::string& op) {
  for (const Op& entry : kOps)
    if (name_of(entry) == op) return entry.requirements;
  throw std::runtime_error("recurra: no op is named " + op);
}

}  // namespace recurra

STABLE_TORCH_LIBRARY(recurra, m) {
  for (const auto& op : recurra::kOps) m.def(op.schema);
  m.def("_requirements(str op) -> str");
  m.def("_isa(str? cap=None) -> str");
  m.def("_threads() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(recurra, CompositeExplicitAutograd, m) {
  m.impl("_requirements", TORCH_BOX(&recurra::requirements_op));
  m.impl("_isa", TORCH_BOX(&recurra::isa_op));
  m.impl("_threads", TORCH_BOX(&recurra::threads_op));
}
