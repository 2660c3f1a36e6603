#include "torch/schemas.h"

#include <stdexcept>

#include "torch/check.h"

namespace recurra {
namespace {

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
     "b:act(B,D) a:act(B|1,D|1) h:state(S,D) slots:index?(B)"},
};

std::string name_of(const Op& op) {
  const std::string schema = op.schema;
  return schema.substr(0, schema.find('('));
}

}  // namespace

std::span<const Op> ops() { return kOps; }

const char* requirements(const std::string& op) {
  for (const Op& entry : kOps)
    if (name_of(entry) == op) return entry.requirements;
  throw std::runtime_error("recurra: no op is named " + op);
}

}  // namespace recurra
