// Sixteen threads take a row, each four channels of every 64 that follow one another: so the 64
// sums of a mean are those of the CPU, and so is the tree that adds them. A row is read twice,
// the second time from a cache, for which no more rows are under way than fit one. dweight is
// summed again by its own kernel, a thread for a channel of a chunk of rows.
#include "rms_norm/rms_norm.h"

#include "cuda/launch.h"
#include "cuda/storage.h"
#include "math/functions.h"

namespace recurra::cuda {
namespace rms_norm_detail {

constexpr int kThreads = 128;
constexpr int kLanes = 16, kEach = 4;  // threads of a row, and channels of each
constexpr int kStep = kLanes * kEach;  // channels that they read at once
constexpr int kAhead = 8;              // of these at a time
constexpr int64_t kCached = 24 << 20;  // bytes of the rows that are under way, unless
constexpr int64_t kLeastBlocks = 264;  // that makes fewer blocks

RECURRA_FN int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
RECURRA_FN int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Four channels from c on of a row whose channels lie `step` apart: at once where kPacked.
template <bool kPacked, class S>
RECURRA_FN void read(const S* row, int64_t step, int64_t c, int64_t channels,
                     Compute<S> (&out)[kEach]) {
  if constexpr (kPacked) {
    const auto p = *reinterpret_cast<const Packed<S, kEach>*>(row + c);
    for_each_index<kEach>([&](auto v) { out[v] = p.get(v); });
  } else {
    for_each_index<kEach>(
        [&](auto v) { out[v] = c + v < channels ? load(row + (c + v) * step) : Compute<S>(0); });
  }
}
template <bool kPacked, class S>
RECURRA_FN void write(S* row, int64_t step, int64_t c, int64_t channels,
                      const Compute<S> (&in)[kEach]) {
  if constexpr (kPacked) {
    Packed<S, kEach> p;
    for_each_index<kEach>([&](auto v) { p.set(v, in[v]); });
    *reinterpret_cast<Packed<S, kEach>*>(row + c) = p;
  } else {
    for_each_index<kEach>([&](auto v) {
      if (c + v < channels) store(row + (c + v) * step, in[v]);
    });
  }
}

template <class S>
struct Norm {
  using T = Compute<S>;
  Array<S, 3> x, y, dy;  // y: of the backward dx
  Array<T, 2> rstd;
  Parameters<S, 1> weight, dweight;
  T* sums = nullptr;
  T eps = T(0);
  int64_t rows = 0, time = 0, channels = 0, padded = 0, chunk = 0, chunks = 0;

  template <bool kPacked>
  RECURRA_FN void read_weights(int64_t c, T (&out)[kEach]) const {
    if constexpr (kPacked) {
      if (weight.plain) {
        const auto w = *reinterpret_cast<const Packed<float, kEach>*>(
            static_cast<const float*>(weight.data) + c);
        for_each_index<kEach>([&](auto v) { out[v] = static_cast<T>(w.get(v)); });
      } else {
        read<true>(static_cast<const S*>(weight.data), 1, c, channels, out);
      }
    } else {
      for_each_index<kEach>([&](auto v) { out[v] = c + v < channels ? weight.at(c + v) : T(0); });
    }
  }
};

// The mean of what f(c, sums) adds to the sums for channels from c on, which are `by` for all
// threads of a row together.
template <class T, class F>
__device__ __forceinline__ T mean(int lane, int64_t by, int64_t channels, const F& f) {
  T s[kEach] = {};
  for (int64_t c = lane * kEach; c < channels; c += by) f(c, s);
#pragma unroll
  for (int half = kLanes / 2; half > 0; half /= 2)
#pragma unroll
    for (int v = 0; v < kEach; ++v) s[v] = s[v] + __shfl_xor_sync(0xffffffff, s[v], half);
  return ((s[0] + s[2]) + (s[1] + s[3])) / static_cast<T>(channels);
}

// f(mine, b, t) for the rows of a group of sixteen threads; all threads of a warp take part, those
// without a row with the last.
template <class S, class F>
__device__ __forceinline__ void for_rows(const Norm<S>& p, const F& f) {
  const int64_t groups = static_cast<int64_t>(gridDim.x) * (kThreads / kLanes);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes);
  for (int64_t begin = first; begin < p.rows; begin += groups) {
    const int64_t row = begin + threadIdx.x / kLanes, some = least(row, p.rows - 1);
    f(row < p.rows, some / p.time, some % p.time);
  }
}

template <class S, bool kPacked>
__global__ void __launch_bounds__(kThreads) forward(const Norm<S> p) {
  using T = Compute<S>;
  constexpr int N = kPacked ? kAhead : 1;
  const int lane = threadIdx.x % kLanes;
  for_rows(p, [&](bool mine, int64_t b, int64_t t) {
    const S* const x = p.x.at(b, t, 0);
    const T square = mean<T>(lane, N * kStep, p.channels, [&](int64_t c, T(&s)[kEach]) {
      T v[N][kEach] = {};
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (c + i * kStep < p.channels)
          read<kPacked>(x, p.x.step[2], c + i * kStep, p.channels, v[i]);
#pragma unroll
      for (int i = 0; i < N; ++i)
#pragma unroll
        for (int k = 0; k < kEach; ++k) s[k] = fma(v[i][k], v[i][k], s[k]);
    });
    const T rstd = T(1) / sqrt(square + p.eps);
    if (!mine) return;
    if (lane == 0) *p.rstd.at(b, t) = rstd;
    S* const y = p.y.at(b, t, 0);
    constexpr int M = kPacked ? 4 : 1;
    for (int64_t c0 = lane * kEach; c0 < p.channels; c0 += M * kStep) {
      T v[M][kEach];
#pragma unroll
      for (int i = 0; i < M; ++i)
        if (c0 + i * kStep < p.channels)
          read<kPacked>(x, p.x.step[2], c0 + i * kStep, p.channels, v[i]);
#pragma unroll
      for (int i = 0; i < M; ++i) {
        const int64_t c = c0 + i * kStep;
        if (c >= p.channels) break;
        T w[kEach];
        p.template read_weights<kPacked>(c, w);
#pragma unroll
        for (int k = 0; k < kEach; ++k) v[i][k] = v[i][k] * rstd * w[k];
        write<kPacked>(y, p.y.step[2], c, p.channels, v[i]);
      }
    }
  });
}

template <class S, bool kPacked>
__global__ void __launch_bounds__(kThreads, 4) backward(const Norm<S> p) {
  using T = Compute<S>;
  constexpr int N = !kPacked ? 1 : sizeof(S) == 8 ? kAhead / 4 : kAhead / 2;
  const int lane = threadIdx.x % kLanes;
  for_rows(p, [&](bool mine, int64_t b, int64_t t) {
    const S *const x = p.x.at(b, t, 0), *const dy = p.dy.at(b, t, 0);
    const T rstd = *p.rstd.at(b, t);
    const auto read_both = [&](int64_t c, T(&v)[kEach], T(&d)[kEach]) {
      read<kPacked>(x, p.x.step[2], c, p.channels, v);
      read<kPacked>(dy, p.dy.step[2], c, p.channels, d);
    };
    const T minus_mean = -mean<T>(lane, N * kStep, p.channels, [&](int64_t c0, T(&s)[kEach]) {
      T v[N][kEach] = {}, d[N][kEach] = {};
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (c0 + i * kStep < p.channels) read_both(c0 + i * kStep, v[i], d[i]);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int64_t c = c0 + i * kStep;
        if (c >= p.channels) break;
        T w[kEach];
        p.template read_weights<kPacked>(c, w);
#pragma unroll
        for (int k = 0; k < kEach; ++k)
          if (kPacked || c + k < p.channels) s[k] = fma(d[i][k] * w[k], v[i][k] * rstd, s[k]);
      }
    });
    if (!mine) return;
    S* const dx = p.y.at(b, t, 0);
    constexpr int M = kPacked ? 2 : 1;
    for (int64_t c0 = lane * kEach; c0 < p.channels; c0 += M * kStep) {
      T v[M][kEach], d[M][kEach];
#pragma unroll
      for (int i = 0; i < M; ++i)
        if (c0 + i * kStep < p.channels) read_both(c0 + i * kStep, v[i], d[i]);
#pragma unroll
      for (int i = 0; i < M; ++i) {
        const int64_t c = c0 + i * kStep;
        if (c >= p.channels) break;
        T w[kEach];
        p.template read_weights<kPacked>(c, w);
#pragma unroll
        for (int k = 0; k < kEach; ++k)
          v[i][k] = fma(v[i][k] * rstd, minus_mean, d[i][k] * w[k]) * rstd;
        write<kPacked>(dx, p.y.step[2], c, p.channels, v[i]);
      }
    }
  });
}

// The sum of a channel over a chunk of rows.
template <class S>
__global__ void __launch_bounds__(kThreads) chunk_sums(const Norm<S> p) {
  using T = Compute<S>;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < p.chunks * p.padded; task += threads) {
    const int64_t c = task % p.padded, chunk = task / p.padded;
    const int64_t first = chunk * p.chunk, last = least(p.rows, first + p.chunk);
    int64_t b = first / p.time, t = first % p.time;
    T total(0);
    for (int64_t row = first; row < last; row += kAhead) {
      T x[kAhead] = {}, dy[kAhead] = {}, rstd[kAhead] = {};
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (row + i >= last) break;
        if (c < p.channels) {  // else what pads the sums
          x[i] = load(p.x.at(b, t, c));
          dy[i] = load(p.dy.at(b, t, c));
        }
        rstd[i] = *p.rstd.at(b, t);
        if (++t == p.time) t = 0, ++b;
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (row + i < last) total = fma(dy[i], x[i] * rstd[i], total);
    }
    p.sums[chunk * p.padded + c] = total;
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) finish(const Norm<S> p) {
  using T = Compute<S>;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; c < p.channels; c += threads) {
    T total(0);
#pragma unroll 8
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk) total = total + p.sums[chunk * p.padded + c];
    p.dweight.set(total, c);
  }
}

template <class S>
unsigned blocks(const Norm<S>& p) {
  constexpr int64_t rows = kThreads / kLanes;
  const int64_t row = most(1, p.channels * static_cast<int64_t>(sizeof(S)));
  return blocks_for(least(p.rows, rows * most(kLeastBlocks, kCached / (rows * row))), rows);
}

template <class S, class Args>
Norm<S> given(const Args& args) {
  Norm<S> p;
  p.x = Array<S, 3>(args.x);
  p.weight = Parameters<S, 1>(args.weight);
  p.rstd = Array<Compute<S>, 2>(args.rstd);
  p.rows = args.x.size[0] * args.x.size[1];
  p.time = args.x.size[1];
  p.channels = args.x.size[2];
  p.chunk = args.chunks().each;
  p.chunks = args.chunks().count();
  return p;
}

template <class S, class... V>
bool packed(const View<1>& weight, const V&... rows) {
  const bool weights = weight.dtype == DType::f32 ? aligned<Packed<float, kEach>>(weight)
                                                  : aligned<Packed<S, kEach>>(weight);
  return weights && weight.size[0] % kEach == 0 && (aligned<Packed<S, kEach>>(rows) && ...);
}

template <class S>
void launch(const RmsNorm& args, const Stream& stream) {
  Norm<S> p = given<S>(args);
  p.y = Array<S, 3>(args.y);
  p.eps = static_cast<Compute<S>>(args.eps);
  if (p.rows == 0) return;
  const bool all = packed<S>(args.weight, args.x, args.y);
  const auto rms_norm_forward = all ? forward<S, true> : forward<S, false>;
  RECURRA_LAUNCH(rms_norm_forward, blocks(p), kThreads, stream, p);
}

template <class S>
void launch(const RmsNormBackward& args, const Stream& stream) {
  Norm<S> p = given<S>(args);
  p.dy = Array<S, 3>(args.dy);
  p.y = Array<S, 3>(args.dx);
  p.dweight = Parameters<S, 1>(args.dweight);
  p.sums = static_cast<Compute<S>*>(args.sums);
  p.padded = args.padded();
  if (p.channels == 0) return;
  if (p.rows > 0) {
    const bool all = packed<S>(args.weight, args.x, args.dy, args.dx);
    const auto rms_norm_backward = all ? backward<S, true> : backward<S, false>;
    RECURRA_LAUNCH(rms_norm_backward, blocks(p), kThreads, stream, p);
    const auto rms_norm_chunk_sums = chunk_sums<S>;
    RECURRA_LAUNCH(rms_norm_chunk_sums, blocks_for(p.chunks * p.padded, kThreads), kThreads, stream,
                   p);
  }
  const auto rms_norm_finish = finish<S>;
  RECURRA_LAUNCH(rms_norm_finish, blocks_for(p.channels, kThreads), kThreads, stream, p);
}

template <class Args>
void launch_any(const Args& args, const Stream& stream) {
  switch (args.x.dtype) {
    case DType::f32: return launch<float>(args, stream);
    case DType::f64: return launch<double>(args, stream);
    case DType::bf16: return launch<BFloat16>(args, stream);
    case DType::f16: return launch<Half>(args, stream);
    default: throw std::runtime_error("rms_norm: no CUDA kernel for this dtype");
  }
}

}  // namespace rms_norm_detail
using namespace rms_norm_detail;

void rms_norm(const RmsNorm& args, const Stream& stream) { launch_any(args, stream); }
void rms_norm_backward(const RmsNormBackward& args, const Stream& stream) {
  launch_any(args, stream);
}

}  // namespace recurra::cuda
