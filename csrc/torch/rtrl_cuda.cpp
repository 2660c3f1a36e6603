#include "torch/device.h"
#include "torch/rtrl.h"

namespace recurra {
namespace {

void rtrl_advance_cuda(Tensor weight, Tensor bias, Tensor params, Tensor u, Tensor decay,
                       Tensor factors, Tensor direct) {
  cuda::rtrl_update(checked_advance(weight, bias, params, u, decay, factors, direct),
                    stream_of(weight));
}

void rtrl_update_cuda(Tensor weight, Tensor bias, Tensor S_params, Tensor u, Tensor x,
                      Tensor params, OptionalTensor h0, std::string cell_name,
                      OptionalTensor reset) {
  const Cell cell = checked_update(weight, bias, S_params, u, x, params, h0, cell_name, reset);
  const int64_t batch = x.size(0), time = x.size(1), inputs = x.size(2), channels = x.size(3);
  const int64_t K = weight.size(1);
  if (batch == 0 || channels == 0) return;
  const DType compute = dtype_of(x);
  Tensor factors = scratch(x, {K, batch, time, inputs, channels}, compute);
  Tensor decay = scratch(x, {K, batch, K, channels}, compute);
  Tensor direct = scratch(x, {K, batch, params.size(0), channels}, compute);
  Tensor states = scratch(x, {batch, time, K, channels}, compute);
  RtrlDerivatives of;
  of.cell = cell.index;
  of.x = view<4>(x);
  of.params = view<2>(params);
  of.h0 = view<3>(h0);
  of.reset = view<2>(reset);
  of.decay = view<4>(decay);
  of.factors = view<5>(factors);
  of.direct = view<4>(direct);
  of.states = states.data_ptr();
  const cuda::Stream stream = stream_of(x);
  cuda::rtrl_derivatives(of, stream);

  RtrlUpdate args;
  set_states(args, weight, bias, S_params);
  args.u = view<3>(u);
  args.decay = of.decay;
  args.factors = of.factors;
  args.direct = of.direct;
  cuda::rtrl_update(args, stream);
}

std::tuple<Tensor, Tensor, Tensor> rtrl_gradient_cuda(Tensor weight, Tensor bias, Tensor params,
                                                      Tensor dh0, bool each) {
  const GradientTensors of = checked_gradient(weight, bias, params, dh0, each);
  cuda::rtrl_gradient(of.args, stream_of(weight));
  return {of.dweight, of.dbias, of.dparams};
}

}  // namespace
}  // namespace recurra

RECURRA_CUDA_OPS(m) {
  m.impl("_rtrl_update", RECURRA_BOX(&recurra::rtrl_update_cuda));
  m.impl("_rtrl_advance", RECURRA_BOX(&recurra::rtrl_advance_cuda));
  m.impl("_rtrl_gradient", RECURRA_BOX(&recurra::rtrl_gradient_cuda));
}
