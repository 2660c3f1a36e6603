// What the bindings of rtrl for the CPU and for CUDA have in common: checks, and the views of what
// passed them.
#pragma once
#include "rtrl/rtrl.h"

#include <string>
#include <tuple>

#include "torch/cells.h"
#include "torch/check.h"

namespace recurra {

inline void check_exact(const char* op, const char* name, const Tensor& t) {
  const DType d = dtype_of(t);
  if (d == DType::bf16 || d == DType::f16)
    fail(op, std::string(name) + " must have dtype float32 or float64, got " +
                 (d == DType::bf16 ? "bfloat16" : "float16"));
}

inline void check_contiguous(const char* op, std::initializer_list<Argument> arguments) {
  for (const Argument& a : arguments)
    if (!a.tensor->is_contiguous()) fail(op, std::string(a.name) + " must be contiguous");
}

inline void check_states(const char* op, int64_t states) {
  if (states < 1 || states > kMostRtrlStates)
    fail(op, "K must be from 1 to " + std::to_string(kMostRtrlStates) + ", got " +
                 std::to_string(states));
}

// The sensitivities of an update.
inline void set_states(RtrlUpdate& args, const Tensor& weight, const Tensor& bias,
                       const Tensor& params) {
  args.weight = view<5>(weight);
  args.bias = view<4>(bias);
  args.params = view<4>(params);
}

inline RtrlUpdate checked_advance(const Tensor& weight, const Tensor& bias, const Tensor& params,
                                  const Tensor& u, const Tensor& decay, const Tensor& factors,
                                  const Tensor& direct) {
  constexpr const char* op = "_rtrl_advance";
  check(op, {{"S_weight", weight},
             {"S_bias", bias},
             {"S_params", params},
             {"u", u},
             {"decay", decay},
             {"factors", factors},
             {"direct", direct}});
  check_exact(op, "S_weight", weight);
  check_states(op, weight.size(1));
  check_contiguous(op, {{"S_weight", weight},
                        {"S_bias", bias},
                        {"S_params", params},
                        {"u", u},
                        {"decay", decay},
                        {"factors", factors},
                        {"direct", direct}});
  RtrlUpdate args;
  set_states(args, weight, bias, params);
  args.u = view<3>(u);
  args.decay = view<4>(decay);
  args.factors = view<5>(factors);
  args.direct = view<4>(direct);
  return args;
}

// The cell of an update.
inline Cell checked_update(const Tensor& weight, const Tensor& bias, const Tensor& S_params,
                           const Tensor& u, const Tensor& x, const Tensor& params,
                           const OptionalTensor& h0, const std::string& cell_name,
                           const OptionalTensor& reset) {
  constexpr const char* op = "_rtrl_update";
  // What the cell wants comes first: S follows from it.
  check(op, {{"x", x}, {"params", params}, {"h0", h0}, {"reset", reset}});
  const Cell cell = find_cell(op, cell_name);
  check_exact(op, "x", x);
  check_cell(op, cell.info, x, params, "h0", h0);
  check(op, {{"x", x},
             {"params", params},
             {"u", u},
             {"S_weight", weight},
             {"S_bias", bias},
             {"S_params", S_params}});
  check_size(op, cell_name, "S_weight", weight, 1, "K", "states", cell.info.states);
  check_contiguous(op, {{"S_weight", weight}, {"S_bias", bias}, {"S_params", S_params}, {"u", u}});
  check_states(op, weight.size(1));
  return cell;
}

// The gradients, not yet computed, and what computes them.
struct GradientTensors {
  Tensor dweight, dbias, dparams;
  RtrlGradient args;
};
inline GradientTensors checked_gradient(const Tensor& weight, const Tensor& bias,
                                        const Tensor& params, const Tensor& dh0, bool each) {
  constexpr const char* op = "_rtrl_gradient";
  check(op, {{"S_weight", weight}, {"S_bias", bias}, {"S_params", params}, {"dh0", dh0}});
  check_exact(op, "S_weight", weight);
  check_contiguous(op,
                   {{"S_weight", weight}, {"S_bias", bias}, {"S_params", params}, {"dh0", dh0}});
  const DType compute = dtype_of(weight);
  const int64_t rows = each ? weight.size(0) : 1, inputs = weight.size(2);
  const int64_t channels = weight.size(3);
  Tensor dweight = empty(weight, {rows, inputs, channels, weight.size(4)}, compute);
  Tensor dbias = empty(weight, {rows, inputs, channels}, compute);
  Tensor dparams = empty(weight, {rows, params.size(2), channels}, compute);
  RtrlGradient args;
  args.weight = view<5>(weight);
  args.bias = view<4>(bias);
  args.params = view<4>(params);
  args.dh0 = view<3>(dh0);
  args.dweight = view<4>(dweight);
  args.dbias = view<3>(dbias);
  args.dparams = view<3>(dparams);
  return {dweight, dbias, dparams, args};
}

}  // namespace recurra
