#include "torch/schemas.h"

#include <stdexcept>

#include "torch/check.h"

namespace recurra {
namespace {

#define SELECTIVE_SCAN_REQUIREMENTS                                                              \
  "u:act(B,T,D) delta:act(B,T,D) A:param*(D,N) B:act*(B,T,N)/(B,T,G,N) C:act*(B,T,N)/(B,T,G,N) " \
  "D:param?(D) z:act?(B,T,D) delta_bias:param?(D) cu_seqlens:index?"

#define SOFTMAX_SCAN_REQUIREMENTS                                                     \
  "v:act(B,T,D) s:act(B|1,T|1,D|1) h0:state?(S,3,D) decay:param?(D) bonus:param?(D) " \
  "cu_seqlens:index?"

#define RNN_REQUIREMENTS \
  "x:act(B,T,G,N) params:param(P,N) h0:state?(S,K,N) reset:mask?(B,T) cu_seqlens:index?"

#define RNN_ARGUMENTS                                                                             \
  "(Tensor x, Tensor params, Tensor? h0=None, *, str cell, str algorithm=\"auto\", "              \
  "int? chunk=None, int? max_passes=None, str on_fail=\"sequential\", bool return_states=False, " \
  "Tensor? reset=None, Tensor? cu_seqlens=None)"

constexpr Op kOps[] = {
    {"linear_scan(Tensor a, Tensor b, Tensor? h0=None, *, bool log_a=False, bool reverse=False, "
     "Tensor? cu_seqlens=None) -> (Tensor, Tensor)",
     "b:act*(B,T,D) a:act(B|1,T|1,D|1) h0:state?(S,D) cu_seqlens:index?"},
    {"_linear_scan_backward(Tensor a, Tensor h, Tensor? h0, Tensor? dh, Tensor? dh_last, *, "
     "bool log_a=False, bool reverse=False, Tensor? cu_seqlens=None) -> (Tensor, Tensor, Tensor)",
     "h:act*(B,T,D) a:act(B|1,T|1,D|1) h0:state?(S,D) dh:act?(B,T,D) dh_last:state?(S,D) "
     "cu_seqlens:index?"},
    {"linear_scan_step(Tensor(a!) h, Tensor a, Tensor b, *, bool log_a=False, "
     "Tensor? slots=None) -> Tensor",
     "b:act*(B,D) a:act(B|1,D|1) h:state(M,D) slots:index?(B)"},
    {"block_scan(Tensor A, Tensor b, Tensor? h0=None, *, bool reverse=False, "
     "Tensor? cu_seqlens=None) -> (Tensor, Tensor)",
     "b:act(B,T,N,k=1..16) A:act(B|1,T|1,N|1,k,k) h0:state?(S,N,k) cu_seqlens:index?"},
    {"_block_scan_backward(Tensor A, Tensor h, Tensor? h0, Tensor? dh, Tensor? dh_last, *, "
     "bool reverse=False, Tensor? cu_seqlens=None) -> (Tensor, Tensor, Tensor)",
     "h:act(B,T,N,k=1..16) A:act(B|1,T|1,N|1,k,k) h0:state?(S,N,k) dh:act?(B,T,N,k) "
     "dh_last:state?(S,N,k) cu_seqlens:index?"},
    {"block_scan_step(Tensor(a!) h, Tensor A, Tensor b, *, Tensor? slots=None) -> Tensor",
     "b:act(B,N,k=1..16) A:act(B|1,N|1,k,k) h:state(M,N,k) slots:index?(B)"},
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
     "x:act(B,D) weight:param(D,W>=2) bias:param?(D) h:state(M,L,D) slots:index?(B)"},
    {"selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D=None, "
     "Tensor? z=None, Tensor? delta_bias=None, *, bool delta_softplus=False, Tensor? h0=None, "
     "Tensor? cu_seqlens=None) -> (Tensor, Tensor)",
     SELECTIVE_SCAN_REQUIREMENTS " h0:state*?(S,D,N)"},
    {"_selective_scan_save(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D=None, "
     "Tensor? z=None, Tensor? delta_bias=None, *, bool delta_softplus=False, Tensor? h0=None, "
     "Tensor? cu_seqlens=None) -> (Tensor, Tensor, Tensor)",
     SELECTIVE_SCAN_REQUIREMENTS " h0:state*?(S,D,N)"},
    {"_selective_scan_backward(Tensor? dy, Tensor? dh_last, Tensor saved, Tensor u, Tensor delta, "
     "Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, Tensor? delta_bias=None, *, "
     "bool delta_softplus=False, Tensor? h0=None, Tensor? cu_seqlens=None) -> (Tensor, Tensor, "
     "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
     SELECTIVE_SCAN_REQUIREMENTS " h0:state*?(S,D,N) dy:act?(B,T,D) dh_last:state*?(S,D,N)"},
    {"selective_scan_step(Tensor(a!) h, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, "
     "Tensor? D=None, Tensor? z=None, Tensor? delta_bias=None, *, bool delta_softplus=False, "
     "Tensor? slots=None) -> Tensor",
     "u:act(B,D) delta:act(B,D) A:param*(D,N) B:act*(B,N)/(B,G,N) C:act*(B,N)/(B,G,N) D:param?(D) "
     "z:act?(B,D) delta_bias:param?(D) h:state*(M,D,N) slots:index?(B)"},
    {"softmax_scan(Tensor s, Tensor v, Tensor? h0=None, *, Tensor? decay=None, "
     "Tensor? bonus=None, Tensor? cu_seqlens=None) -> (Tensor, Tensor)",
     SOFTMAX_SCAN_REQUIREMENTS},
    {"_softmax_scan_save(Tensor s, Tensor v, Tensor? h0=None, *, Tensor? decay=None, "
     "Tensor? bonus=None, Tensor? cu_seqlens=None) -> (Tensor, Tensor, Tensor)",
     SOFTMAX_SCAN_REQUIREMENTS},
    {"_softmax_scan_backward(Tensor? do, Tensor? dh_last, Tensor saved, Tensor s, Tensor v, "
     "Tensor? h0=None, *, Tensor? decay=None, Tensor? bonus=None, Tensor? cu_seqlens=None) -> "
     "(Tensor, Tensor, Tensor, Tensor, Tensor)",
     SOFTMAX_SCAN_REQUIREMENTS " do:act?(B,T,D) dh_last:state?(S,3,D)"},
    {"softmax_scan_step(Tensor(a!) h, Tensor s, Tensor v, *, Tensor? decay=None, "
     "Tensor? bonus=None, Tensor? slots=None) -> Tensor",
     "v:act(B,D) s:act(B|1,D|1) h:state(M,3,D) decay:param?(D) bonus:param?(D) slots:index?(B)"},
    {"rnn" RNN_ARGUMENTS " -> (Tensor, Tensor, Tensor, Tensor)", RNN_REQUIREMENTS},
    {"_rnn_save" RNN_ARGUMENTS " -> (Tensor, Tensor, Tensor, Tensor, Tensor)", RNN_REQUIREMENTS},
    {"_rnn_backward(Tensor? dy, Tensor? dh_last, Tensor saved, Tensor x, Tensor params, "
     "Tensor? h0=None, *, str cell, bool return_states=False, Tensor? reset=None, "
     "Tensor? cu_seqlens=None) -> (Tensor, Tensor, Tensor)",
     RNN_REQUIREMENTS " dy:act?(B,T,N)/(B,T,K,N) dh_last:state?(S,K,N)"},
    {"rnn_step(Tensor(a!) h, Tensor x, Tensor params, *, str cell, Tensor? slots=None) -> Tensor",
     "x:act(B,G,N) params:param(P,N) h:state(M,K,N) slots:index?(B)"},
    {"_rtrl_update(Tensor(a!) S_weight, Tensor(b!) S_bias, Tensor(c!) S_params, Tensor u, Tensor "
     "x, "
     "Tensor params, Tensor? h0=None, *, str cell, Tensor? reset=None) -> ()",
     "x:act(B,T,G,N) params:param(P,N) u:act(B,T,D) h0:state?(B,K,N) reset:mask?(B,T) "
     "S_weight:state(B,K,G,N,D) S_bias:state(B,K,G,N) S_params:state(B,K,P,N)"},
    {"_rtrl_advance(Tensor(a!) S_weight, Tensor(b!) S_bias, Tensor(c!) S_params, Tensor u, "
     "Tensor decay, Tensor factors, Tensor direct) -> ()",
     "S_weight:act(B,K,G,N,D) S_bias:act(B,K,G,N) S_params:act(B,K,P,N) u:act(B,T,D) "
     "decay:act(K,B,K,N) factors:act(K,B,T,G,N) direct:act(K,B,P,N)"},
    {"_rtrl_gradient(Tensor S_weight, Tensor S_bias, Tensor S_params, Tensor dh0, bool each) -> "
     "(Tensor, Tensor, Tensor)",
     "S_weight:act(B,K,G,N,D) S_bias:act(B,K,G,N) S_params:act(B,K,P,N) dh0:act(B,K,N)"},
    {"_linear_step(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
     "x:act(B,K) weight:param(N,K) bias:param?(N)"},
    {"_rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
     "x:act(B,D)/(B,T,D) weight:param(D)"},
    {"_rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
     "x:act(B,D)/(B,T,D) weight:param(D) dy:act rstd:state"},
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
