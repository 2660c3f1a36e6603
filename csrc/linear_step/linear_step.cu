// A warp takes a row of weights for up to four rows of x at once: every lane adds the products of
// its columns, sixteen bytes of weights at a time, then the lanes are added by a tree. This is
// another order than the CPU's, whose sixteen sums would leave most lanes without work.
#include "linear_step/linear_step.h"

#include "cuda/launch.h"
#include "cuda/storage.h"
#include "math/functions.h"

namespace recurra::cuda {
namespace linear_step_detail {

constexpr int kThreads = 128;
constexpr int kRows = 4;   // of x at once
constexpr int kAhead = 4;  // packs of weights that are read at a time

template <class S, class W>
struct Linear {
  Array<S, 2> x, y;
  Array<W, 2> weight;
  Parameters<S, 1> bias;
  int64_t batch, outputs, columns;
};

// Products of V columns from k on with rows of x that lie `step` apart in memory.
template <class S, class W, int V>
__global__ void __launch_bounds__(kThreads, 4) products(const Linear<S, W> p) {
  using T = Compute<S>;
  const int lane = threadIdx.x % 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  int64_t n = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  for (; n < p.outputs; n += warps) {
    const W* const weights = p.weight.at(n, 0);
    for (int64_t b0 = 0; b0 < p.batch; b0 += kRows) {
      T sums[kRows] = {};
      for (int64_t k0 = lane * V; k0 < p.columns; k0 += kAhead * 32 * V) {
        Packed<W, V> w[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int64_t k = k0 + i * 32 * V;
          if (k < p.columns)
            w[i] = *reinterpret_cast<const Packed<W, V>*>(weights + k * p.weight.step[1]);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int64_t k = k0 + i * 32 * V;
          if (k >= p.columns) break;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            if (b0 + r >= p.batch) break;
            const auto x = *reinterpret_cast<const Packed<S, V>*>(p.x.at(b0 + r, k));
#pragma unroll
            for (int v = 0; v < V; ++v)
              sums[r] = fma(static_cast<T>(w[i].get(v)), x.get(v), sums[r]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int half = 16; half > 0; half /= 2)
          sums[r] = sums[r] + __shfl_xor_sync(0xffffffff, sums[r], half);
        if (lane == r && b0 + r < p.batch)
          store(p.y.at(b0 + r, n), p.bias.data ? sums[r] + p.bias.at(n) : sums[r]);
      }
    }
  }
}

template <class S, class W>
void launch(const LinearStep& args, const Stream& stream) {
  constexpr int V = 16 / sizeof(W);
  Linear<S, W> p;
  p.x = Array<S, 2>(args.x);
  p.y = Array<S, 2>(args.y);
  p.weight = Array<W, 2>(args.weight);
  p.bias = Parameters<S, 1>(args.bias);
  p.batch = args.x.size[0];
  p.outputs = args.weight.size[0];
  p.columns = args.x.size[1];
  if (p.batch == 0 || p.outputs == 0) return;
  const bool all =
      p.columns % V == 0 && aligned<Packed<W, V>>(args.weight) && aligned<Packed<S, V>>(args.x);
  const auto linear_step_products = all ? products<S, W, V> : products<S, W, 1>;
  RECURRA_LAUNCH(linear_step_products, blocks_for(p.outputs, kThreads / 32), kThreads, stream, p);
}

template <class S>
void launch_any(const LinearStep& args, const Stream& stream) {
  args.weight.dtype == DType::f32 ? launch<S, float>(args, stream) : launch<S, S>(args, stream);
}

}  // namespace linear_step_detail
using namespace linear_step_detail;

void linear_step(const LinearStep& args, const Stream& stream) {
  switch (args.x.dtype) {
    case DType::f32: return launch_any<float>(args, stream);
    case DType::f64: return launch_any<double>(args, stream);
    case DType::bf16: return launch_any<BFloat16>(args, stream);
    case DType::f16: return launch_any<Half>(args, stream);
    default: throw std::runtime_error("linear_step: no CUDA kernel for this dtype");
  }
}

}  // namespace recurra::cuda
