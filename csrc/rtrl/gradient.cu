// A thread has one sum, or as many as 16 bytes hold, over samples and states in the order of
// gradient.simd.cpp. S is read once: memory is the limit.
#include "cuda/launch.h"
#include "math/functions.h"
#include "rtrl/numbers.h"
#include "rtrl/rtrl.h"

namespace recurra::cuda {
namespace rtrl_detail {

constexpr int kGradientThreads = 128;
constexpr int kReadAhead = 8;  // terms of a sum

template <class T>
struct Gradient {
  const T *from, *dh0;  // (terms of all sums, rows, channels, width), (terms, channels)
  T* to;                // (sums, rows, channels, width)
  int64_t sums, terms, rows, channels, width;  // terms: of each sum
};

template <class T, int V>
__global__ void __launch_bounds__(kGradientThreads) gradient(const Gradient<T> p) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t columns = p.width / V, each = p.rows * p.channels * columns;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < p.sums * each; task += threads) {
    const int64_t out = task / each, at = task % each, n = at / columns % p.channels;
    const int64_t apart = each * V;
    const T* const from = p.from + out * p.terms * apart + at * V;
    const T* const dh0 = p.dh0 + out * p.terms * p.channels + n;
    Numbers<T, V> sum = {};
    for (int64_t i = 0; i < p.terms; i += kReadAhead) {
      T scale[kReadAhead];
      Numbers<T, V> terms[kReadAhead];
#pragma unroll
      for (int j = 0; j < kReadAhead; ++j)
        scale[j] = i + j < p.terms ? dh0[(i + j) * p.channels] : T(0);
      // Where the scale is 0, S is not read.
#pragma unroll
      for (int j = 0; j < kReadAhead; ++j)
        if (scale[j] != T(0)) terms[j] = load_numbers<V>(from + (i + j) * apart);
#pragma unroll
      for (int j = 0; j < kReadAhead; ++j)
        if (scale[j] != T(0))
#pragma unroll
          for (int v = 0; v < V; ++v) sum.v[v] = fma(terms[j].v[v], scale[j], sum.v[v]);
    }
    store_numbers(p.to + task * V, sum);
  }
}

template <class T>
void launch_gradient(const void* from, void* to, int64_t rows, int64_t width, Gradient<T> p,
                     const Stream& stream) {
  p.from = static_cast<const T*>(from);
  p.to = static_cast<T*>(to);
  p.rows = rows;
  p.width = width;
  constexpr int V = kMostNumbers<T>;
  const bool whole = in_whole_numbers<T>(from, width) && in_whole_numbers<T>(to, width);
  const int64_t tasks = p.sums * rows * p.channels * (whole ? width / V : width);
  const auto rtrl_gradient = whole ? gradient<T, V> : gradient<T, 1>;
  if (tasks > 0)
    RECURRA_LAUNCH(rtrl_gradient, blocks_for(tasks, kGradientThreads), kGradientThreads, stream, p);
}

template <class T>
void launch_gradients(const RtrlGradient& args, const Stream& stream) {
  const auto& size = args.weight.size;
  Gradient<T> p;
  p.dh0 = static_cast<const T*>(args.dh0.data);
  p.sums = args.dweight.size[0];
  p.terms = p.sums == size[0] ? size[1] : size[0] * size[1];
  p.channels = size[3];
  launch_gradient<T>(args.weight.data, args.dweight.data, size[2], size[4], p, stream);
  launch_gradient<T>(args.bias.data, args.dbias.data, size[2], 1, p, stream);
  launch_gradient<T>(args.params.data, args.dparams.data, args.params.size[2], 1, p, stream);
}

}  // namespace rtrl_detail

void rtrl_gradient(const RtrlGradient& args, const Stream& stream) {
  args.weight.dtype == DType::f64 ? rtrl_detail::launch_gradients<double>(args, stream)
                                  : rtrl_detail::launch_gradients<float>(args, stream);
}

}  // namespace recurra::cuda
