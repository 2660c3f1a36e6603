#include "torch/rtrl.h"

#include "rnn/rnn.h"

namespace recurra {
namespace {

void rtrl_advance_cpu(Tensor weight, Tensor bias, Tensor params, Tensor u, Tensor decay,
                      Tensor factors, Tensor direct) {
  rtrl_update(checked_advance(weight, bias, params, u, decay, factors, direct));
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
  const Cell cell = checked_update(weight, bias, S_params, u, x, params, h0, cell_name, reset);
  const int64_t batch = x.size(0), time = x.size(1), inputs = x.size(2), channels = x.size(3);
  const int64_t states = weight.size(1);
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
  Tensor y = scratch(x, {batch, time, 1, channels}, compute);
  Tensor h_last = scratch(x, {batch, states, channels}, compute);
  Tensor saved = scratch(x, {forward.sequences.chunk_rows(kRnnChunk), states, padded}, compute);
  forward.y = view<4>(y);
  forward.h_last = view<3>(h_last);
  forward.saved = saved.data_ptr();
  rnn(forward);

  // What the end of the chunk owes to its start, its inputs and the parameters: a reverse pass from
  // each state, the parameters apart for every sample.
  Tensor factors = scratch(x, {states, batch, time, inputs, channels}, compute);
  Tensor decay = scratch(x, {states, batch, states, channels}, compute);
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
  const GradientTensors of = checked_gradient(weight, bias, params, dh0, each);
  rtrl_gradient(of.args);
  return {of.dweight, of.dbias, of.dparams};
}

}  // namespace
}  // namespace recurra

RECURRA_CPU_OPS(m) {
  m.impl("_rtrl_update", RECURRA_BOX(&recurra::rtrl_update_cpu));
  m.impl("_rtrl_advance", RECURRA_BOX(&recurra::rtrl_advance_cpu));
  m.impl("_rtrl_gradient", RECURRA_BOX(&recurra::rtrl_gradient_cpu));
}
