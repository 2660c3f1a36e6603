// One thread walks one channel of one sequence, reading the next eight steps while it computes the
// last eight: neighbouring threads read neighbouring channels, and memory is the limit.
#include "cuda/launch.h"
#include "cuda/storage.h"
#include "linear_scan/linear_scan.h"
#include "math/functions.h"

namespace recurra::cuda {
// Named, because nvcc names what is in an unnamed one after the path of this file.
namespace linear_scan_detail {

constexpr int kAhead = 8;
constexpr int kThreads = 128;

template <class S>
struct Forward {
  Array<S, 3> a, b, h;
  Array<Compute<S>, 2> h0, h_last;
  Offsets offsets;
  int64_t sequences, time, channels;
  bool log_a, reverse;
};

template <class S>
__global__ void __launch_bounds__(kThreads) forward(const Forward<S> p) {
  using T = Compute<S>;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < p.sequences * p.channels; task += threads) {
    const int64_t n = task / p.channels, c = task % p.channels;
    int64_t batch = n, begin = 0, end = p.time;
    if (p.offsets.data) {
      batch = 0;
      begin = p.offsets.clamped(n, 0, p.time);
      end = p.offsets.clamped(n + 1, begin, p.time);
    }
    const int64_t length = end - begin, by = p.reverse ? -1 : 1;
    const int64_t first = length == 0 ? 0 : p.reverse ? end - 1 : begin;
    const S *from_a = p.a.at(batch, first, c), *from_b = p.b.at(batch, first, c);
    S* to = p.h.at(batch, first, c);
    const int64_t step_a = by * p.a.step[1], step_b = by * p.b.step[1], step_h = by * p.h.step[1];

    T a[kAhead] = {}, b[kAhead] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (i < length) a[i] = load(from_a + i * step_a), b[i] = load(from_b + i * step_b);
    T h = p.h0.data ? *p.h0.at(n, c) : T(0);
    for (int64_t t = 0; t < length; t += kAhead) {
      T next_a[kAhead] = {}, next_b[kAhead] = {};
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t later = t + kAhead + i;
        if (later < length) {
          next_a[i] = load(from_a + later * step_a);
          next_b[i] = load(from_b + later * step_b);
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (t + i >= length) break;
        h = fma(p.log_a ? exp(a[i]) : a[i], h, b[i]);
        store(to + (t + i) * step_h, h);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) a[i] = next_a[i], b[i] = next_b[i];
    }
    *p.h_last.at(n, c) = h;
  }
}

template <class S>
void launch(const LinearScan& args, const View<1>& cu_seqlens, const Stream& stream) {
  Forward<S> p;
  p.a = Array<S, 3>(args.a);
  p.b = Array<S, 3>(args.b);
  p.h = Array<S, 3>(args.h);
  p.h0 = Array<Compute<S>, 2>(args.h0);
  p.h_last = Array<Compute<S>, 2>(args.h_last);
  p.offsets = Offsets(cu_seqlens);
  p.sequences = args.sequences.count;
  p.time = args.sequences.time;
  p.channels = args.b.size[2];
  p.log_a = args.log_a;
  p.reverse = args.reverse;
  const int64_t tasks = p.sequences * p.channels;
  if (tasks == 0) return;
  const auto linear_scan_forward = forward<S>;
  RECURRA_LAUNCH(linear_scan_forward, blocks_for(tasks, kThreads), kThreads, stream, p);
}

}  // namespace linear_scan_detail
using namespace linear_scan_detail;

void linear_scan(const LinearScan& args, const View<1>& cu_seqlens, const Stream& stream) {
  switch (args.b.dtype) {
    case DType::f32: return launch<float>(args, cu_seqlens, stream);
    case DType::f64: return launch<double>(args, cu_seqlens, stream);
    case DType::bf16: return launch<BFloat16>(args, cu_seqlens, stream);
    case DType::f16: return launch<Half>(args, cu_seqlens, stream);
    default: throw std::runtime_error("linear_scan: no CUDA kernel for this dtype");
  }
}

}  // namespace recurra::cuda
