// A thread takes one channel of one row and shifts its inputs by one, a few at a time.
#include "causal_conv1d/device.h"

namespace recurra::cuda {
namespace causal_conv1d_detail {

constexpr int kStepThreads = 128;
constexpr int kShifted = 4;

template <class S>
struct Step {
  Array<Compute<S>, 3> h;
  Array<S, 2> x, out;
  Parameters<S, 2> weight;
  Parameters<S, 1> bias;
  Integers slots;
  int64_t states, length, rows, channels, taps;
  bool silu;
};

template <class S>
__global__ void __launch_bounds__(kStepThreads) step(const Step<S> p) {
  using T = Compute<S>;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < p.rows * p.channels; task += threads) {
    const int64_t row = task / p.channels, c = task % p.channels;
    const int64_t slot = slot_of(p.slots, row, p.states);
    T s(0);
    if (slot >= 0) {
      const T x = load(p.x.at(row, c));
      s = p.bias.data ? p.bias.at(c) : T(0);
      T* const h = p.h.at(slot, 0, c);
      const int64_t by = p.h.step[1], older = p.length - (p.taps - 1);  // than what this step sees
      for (int64_t j = 0; j < p.length; j += kShifted) {
        T now[kShifted] = {};
#pragma unroll
        for (int i = 0; i < kShifted; ++i)
          if (j + i < p.length) now[i] = h[(j + i) * by];
#pragma unroll
        for (int i = 0; i < kShifted; ++i) {
          if (j + i >= p.length) break;
          if (j + i > 0) h[(j + i - 1) * by] = now[i];
          if (j + i >= older) s = fma(p.weight.at(c, j + i - older), now[i], s);
        }
      }
      h[(p.length - 1) * by] = x;
      s = fma(p.weight.at(c, p.taps - 1), x, s);
      if (p.silu) s = silu(s);
    }
    store(p.out.at(row, c), s);
  }
}

template <class S>
void launch(const CausalConv1dStep& args, const Indices& slots, const Stream& stream) {
  Step<S> p;
  p.h = Array<Compute<S>, 3>(args.h);
  p.x = Array<S, 2>(args.x);
  p.out = Array<S, 2>(args.out);
  p.weight = Parameters<S, 2>(args.weight);
  p.bias = Parameters<S, 1>(args.bias);
  p.slots = Integers(slots);
  p.states = args.h.size[0];
  p.length = args.h.size[1];
  p.rows = args.x.size[0];
  p.channels = args.x.size[1];
  p.taps = args.weight.size[1];
  p.silu = args.silu;
  const int64_t tasks = p.rows * p.channels;
  if (tasks == 0) return;
  const auto causal_conv1d_step = step<S>;
  RECURRA_LAUNCH(causal_conv1d_step, blocks_for(tasks, kStepThreads), kStepThreads, stream, p);
}

}  // namespace causal_conv1d_detail
using namespace causal_conv1d_detail;

void causal_conv1d_step(const CausalConv1dStep& args, const Indices& slots, const Stream& stream) {
  for_storage(args.x.dtype, [&](auto* storage) {
    launch<std::remove_pointer_t<decltype(storage)>>(args, slots, stream);
  });
}

}  // namespace recurra::cuda
