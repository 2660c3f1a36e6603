#include "rtrl/rtrl.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "rnn/rnn.h"
#include "torch/cells.h"
#include "torch/check.h"

namespace recurra {
namespace {

void check_exact(const char* op, const char* name, const Tensor& t) {
  const DType d = dtype_of(t);
  if (d == DType::bf16 || d == DType::f16)
    fail(op, std::string(name) + " must have dtype float32 or float64, got " +
                 (d == DType::bf16 ? "bfloat16" : "float16"));
}

void check_contiguous(const char* op, std::initializer_list<Argument> arguments) {
  for (const Argument& a : arguments)
    if (!a.tensor->is_contiguous()) fail(op, std::string(a.name) + " must be contiguous");
}

void check_states(const char* op, int64_t states) {
  if (states < 1 || states > kMostRtrlStates)
    fail(op, "K must be from 1 to " + std::to_string(kMostRtrlStates) + ", got " +
                 std::to_string(states));
}

void set_states(RtrlUpdate& args, const Tensor& weight, const Tensor& bias, const Tensor& params) {
  args.weight = view<5>(weight);
  args.bias = view<4>(bias);
  args.params = view<4>(params);
}

void rtrl_advance_cpu(Tensor weight, Tensor bias, Tensor params, Tensor u, Tensor decay,
                      Tensor factors, Tensor direct) {
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
  rtrl_update(args);
}

// Entry k of an array whose first dimension are the states of the end of the chunk.
template <int N>
View<N> entry(const View<N + 1>& v, int64_t k) {
  View<N> out;
  out.data = static_cast<char*>(v.data) + k * v.stride[0] * item_size(v.dtype);
  out.dtype = v.dtype;
  for (int n = 0; n < N; ++n) {
    out.size[n] = v.size[n + 1];
    out.stride[n] = v.stride[n + 1];
  }
  return out;
}

void rtrl_update_cpu(Tensor weight, Tensor bias, Tensor S_params, Tensor u, Tensor x, Tensor params,
                     OptionalTensor h0, std::string cell_name, OptionalTensor reset) {
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
  const int64_t batch = x.size(0), time = x.size(1), inputs = x.size(2), channels = x.size(3);
  const int64_t states = weight.size(1);
  check_states(op, states);
  if (batch == 0 || channels == 0) return;

  // The states before every stretch of the chunk.
  const DType compute = dtype_of(x);
  Rnn forward;
  forward.cell = cell.index;
  forward.sequences = {batch, time, nullptr};
  forward.x = view<4>(x);
  forward.params = view<2>(params);
  forward.h0 = view<3>(h0);
  forward.reset = view<2>(reset);
  const int64_t padded = forward.padded();
  Tensor y = empty(x, {batch, time, 1, channels}, compute);
  Tensor h_last = empty(x, {batch, states, channels}, compute);
  Tensor saved = empty(x, {forward.sequences.chunk_rows(kRnnChunk), states, padded}, compute);
  forward.y = view<4>(y);
  forward.h_last = view<3>(h_last);
  forward.saved = saved.data_ptr();
  rnn(forward);

  // What the end of the chunk owes to its start, its inputs and the parameters: a reverse pass from
  // each state, the parameters apart for every sample.
  Tensor factors = empty(x, {states, batch, time, inputs, channels}, compute);
  Tensor decay = empty(x, {states, batch, states, channels}, compute);
  Tensor direct = zeros(x, {states, batch, params.size(0), padded}, compute);
  const View<5> all_factors = view<5>(factors);
  const View<4> all_decay = view<4>(decay), all_direct = view<4>(direct);
  // The cotangent of h_last, of one state's ones, is a window of K rows on a row of ones among
  // rows of zeros.
  Tensor rows = zeros(x, {2 * states - 1, channels}, compute);
  const int64_t row = channels * item_size(compute);
  char* const ones = static_cast<char*>(rows.data_ptr()) + (states - 1) * row;
  for (int64_t n = 0; n < channels; ++n) {
    if (compute == DType::f64)
      reinterpret_cast<double*>(ones)[n] = 1;
    else
      reinterpret_cast<float*>(ones)[n] = 1;
  }
  for (int64_t k = 0; k < states; ++k) {
    RnnBackward back;
    static_cast<RnnInputs&>(back) = forward;
    back.dh_last = {ones - k * row, compute, {batch, states, channels}, {0, channels, 1}};
    back.saved = saved.data_ptr();
    back.dx = entry<4>(all_factors, k);
    back.dh0 = entry<3>(all_decay, k);
    back.parts = batch;
    back.sums = entry<3>(all_direct, k).data;
    rnn_backward(back);
  }

  RtrlUpdate args;
  set_states(args, weight, bias, S_params);
  args.u = view<3>(u);
  args.decay = all_decay;
  args.factors = all_factors;
  args.direct = all_direct;
  args.direct.size[3] = channels;
  rtrl_update(args);
}

std::tuple<Tensor, Tensor, Tensor> rtrl_gradient_cpu(Tensor weight, Tensor bias, Tensor params,
                                                     Tensor dh0, bool each) {
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
  rtrl_gradient(args);
  return {dweight, dbias, dparams};
}

}  // namespace
}  // namespace recurra

STABLE_TORCH_LIBRARY_IMPL(recurra, CPU, m) {
  m.impl("_rtrl_update", TORCH_BOX(&recurra::rtrl_update_cpu));
  m.impl("_rtrl_advance", TORCH_BOX(&recurra::rtrl_advance_cpu));
  m.impl("_rtrl_gradient", TORCH_BOX(&recurra::rtrl_gradient_cpu));
}
