// S of the weights is one matrix product for each sample and input, of which a block of threads has
// a tile: each thread a few channels by eight columns, whose sums stay in registers while time goes
// by, so that S is read and written once. Sums are those of update.simd.cpp, to the bit.
#include "cuda/launch.h"
#include "cuda/shared.h"
#include "math/functions.h"
#include "rtrl/numbers.h"
#include "rtrl/rtrl.h"

namespace recurra::cuda {
namespace rtrl_detail {

constexpr int kThreadsBits = 7, kThreads = 1 << kThreadsBits;
constexpr int kSteps = 16;                       // that are in shared memory at a time
constexpr int kAhead = 8;                        // that are read ahead where each is used once
constexpr int kMostDown = 32, kMostAcross = 16;  // threads of a tile, down and across

// Columns of a thread, of which V lie together; what is read one by one needs more registers.
template <int V>
constexpr int kColumns = V > 1 ? 8 : 4;

// Channels of a thread: eight floats of sums for each column, or four doubles.
template <class T, int K>
constexpr int kRows = 32 / sizeof(T) / K > 1 ? 32 / sizeof(T) / K : 1;

template <class T>
struct Update {
  T *weight, *bias, *params;
  const T *u, *decay, *factors, *direct;
  int64_t batch, time, inputs, channels, width, rows;  // rows: P
  int64_t u_step[2], decay_step[3], factor_step[4], direct_step[3];
  int64_t row_tiles, column_tiles, tiles;
  int across_bits;  // threads of a tile along columns: 2 to this power
};

__device__ __forceinline__ int least_of(int64_t a, int b) {
  return a < b ? static_cast<int>(a) : b;
}

// The decays of a channel; false where all are 0. A NaN is not.
template <int K, class T>
__device__ __forceinline__ bool load_decay(const Update<T>& p, int64_t b, int64_t n,
                                           T (&decay)[K][K]) {
  bool keep = false;
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int j = 0; j < K; ++j) {
      decay[k][j] = p.decay[k * p.decay_step[0] + b * p.decay_step[1] + j * p.decay_step[2] + n];
      keep |= decay[k][j] != T(0);
    }
  return keep;
}
// Number k of P S.
template <int K, class T>
__device__ __forceinline__ T moved(const T (&decay)[K][K], const T (&old)[K], int k) {
  T sum = old[0] * decay[k][0];
#pragma unroll
  for (int j = 1; j < K; ++j) sum = fma(old[j], decay[k][j], sum);
  return sum;
}

// V columns of a row lie together; whole 16 bytes, or one number.
template <class T, int K, int V>
__global__ void __launch_bounds__(kThreads, 3) update_weights(const Update<T> p) {
  constexpr int R = kRows<T, K>, N = kColumns<V>, C = N / V;
  constexpr int F = R < kMostNumbers<T> ? R : kMostNumbers<T>;
  using Columns = Numbers<T, V>;
  using Rows = Numbers<T, F>;
  RECURRA_SHARED(Columns, us, kSteps * kMostAcross * C);
  RECURRA_SHARED(Rows, fs, kSteps * K * kMostDown * (R / F));
  const int across_bits = p.across_bits, across = 1 << across_bits, down = kThreads >> across_bits;
  const int thread = static_cast<int>(threadIdx.x);
  const int x = thread & (across - 1), y = thread >> across_bits;
  for (int64_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    const int64_t d0 = tile % p.column_tiles * across * N;
    const int64_t n0 = tile / p.column_tiles % p.row_tiles * down * R, first = n0 + y * R;
    const int64_t bg = tile / p.column_tiles / p.row_tiles, b = bg / p.inputs, g = bg % p.inputs;
    const int64_t apart = p.inputs * p.channels * p.width;  // of two states
    T* const s = p.weight + b * K * apart + (g * p.channels + first) * p.width + d0 + x * V;
    // Of this thread, those of the tile that are past the last one not counted.
    const int rows = least_of(p.channels - first, R);
    const int columns = least_of(p.width - d0 - x * V, across * N);
    const auto there = [&](int r, int c) { return r < rows && c * across * V < columns; };
    const auto at = [&](int k, int r, int c) {
      return s + k * apart + r * p.width + c * across * V;
    };

    T sums[K][R][N] = {};
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int c = 0; c < C; ++c)
          if (there(r, c)) {
            const Columns old = load_numbers<V>(at(k, r, c));
#pragma unroll
            for (int v = 0; v < V; ++v) sums[k][r][c * V + v] = old.v[v];
          }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      T decay[K][K] = {};
      const bool keep = r < rows && load_decay(p, b, first + r, decay);
#pragma unroll
      for (int d = 0; d < N; ++d) {
        T old[K];
#pragma unroll
        for (int k = 0; k < K; ++k) old[k] = keep ? sums[k][r][d] : T(0);
#pragma unroll
        for (int k = 0; k < K; ++k) sums[k][r][d] = moved(decay, old, k);
      }
    }

    for (int64_t t0 = 0; t0 < p.time; t0 += kSteps) {
      const int steps = p.time - t0 < kSteps ? static_cast<int>(p.time - t0) : kSteps;
      const int packs = down * (R / F);
      __syncthreads();  // the steps before have been read
#pragma unroll 2
      for (int i = thread; i < steps * across * C; i += kThreads) {
        const int t = (i >> across_bits) / C;
        const int64_t d = d0 + (i - t * (across * C)) * V;
        Columns numbers = {};
        if (d < p.width)
          numbers = load_numbers<V>(p.u + b * p.u_step[0] + (t0 + t) * p.u_step[1] + d);
        us[i] = numbers;
      }
#pragma unroll 1
      for (int i = thread; i < steps * K * packs; i += kThreads) {
        const int tk = i / (R / F) << across_bits >> kThreadsBits;
        const int t = tk / K, k = tk % K;
        const int64_t n = n0 + (i - tk * packs) * F;
        const T* const from = p.factors + k * p.factor_step[0] + b * p.factor_step[1] +
                              (t0 + t) * p.factor_step[2] + g * p.factor_step[3];
        Rows numbers = {};
#pragma unroll
        for (int f = 0; f < F; ++f)
          if (n + f < p.channels) numbers.v[f] = from[n + f];
        fs[i] = numbers;
      }
      __syncthreads();
#pragma unroll 2
      for (int t = 0; t < steps; ++t) {
        Columns u[C];
#pragma unroll
        for (int c = 0; c < C; ++c) u[c] = us[(t * C + c) * across + x];
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
          for (int f = 0; f < R / F; ++f) {
            const Rows factors = fs[(t * K + k) * packs + y * (R / F) + f];
#pragma unroll
            for (int i = 0; i < F; ++i)
#pragma unroll
              for (int d = 0; d < N; ++d) {
                T& sum = sums[k][f * F + i][d];
                sum = fma(factors.v[i], u[d / V].v[d % V], sum);
              }
          }
      }
    }

#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int c = 0; c < C; ++c)
          if (there(r, c)) {
            Columns sum;
#pragma unroll
            for (int v = 0; v < V; ++v) sum.v[v] = sums[k][r][c * V + v];
            store_numbers(at(k, r, c), sum);
          }
  }
}

// The rows of N numbers: a thread has one of the bias, whose factors it adds up, or of the
// parameters.
template <class T, int K>
__global__ void __launch_bounds__(kThreads) update_rows(const Update<T> p) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t rows = p.inputs + p.rows, tasks = p.batch * rows * p.channels;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < tasks; task += threads) {
    const int64_t n = task % p.channels, row = task / p.channels % rows;
    const int64_t b = task / p.channels / rows, g = row - p.rows;
    const int64_t apart = (g < 0 ? p.rows : p.inputs) * p.channels;
    T* const s =
        (g < 0 ? p.params + row * p.channels : p.bias + g * p.channels) + b * K * apart + n;
    T decay[K][K], old[K], sums[K];
    const bool keep = load_decay(p, b, n, decay);
#pragma unroll
    for (int k = 0; k < K; ++k) old[k] = keep ? s[k * apart] : T(0);
#pragma unroll
    for (int k = 0; k < K; ++k) sums[k] = moved(decay, old, k);
    if (g < 0) {
#pragma unroll
      for (int k = 0; k < K; ++k)
        s[k * apart] =
            sums[k] +
            p.direct[k * p.direct_step[0] + b * p.direct_step[1] + row * p.direct_step[2] + n];
      continue;
    }
    const T* const from = p.factors + b * p.factor_step[1] + g * p.factor_step[3] + n;
    int64_t t = 0;
    for (; t + kAhead <= p.time; t += kAhead) {
      T next[kAhead][K];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
#pragma unroll
        for (int k = 0; k < K; ++k)
          next[i][k] = from[k * p.factor_step[0] + (t + i) * p.factor_step[2]];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
#pragma unroll
        for (int k = 0; k < K; ++k) sums[k] = sums[k] + next[i][k];
    }
    for (; t < p.time; ++t)
#pragma unroll
      for (int k = 0; k < K; ++k)
        sums[k] = sums[k] + from[k * p.factor_step[0] + t * p.factor_step[2]];
#pragma unroll
    for (int k = 0; k < K; ++k) s[k * apart] = sums[k];
  }
}

template <class T, int K>
void launch_update(const RtrlUpdate& args, const Stream& stream) {
  Update<T> p;
  p.weight = static_cast<T*>(args.weight.data);
  p.bias = static_cast<T*>(args.bias.data);
  p.params = static_cast<T*>(args.params.data);
  p.u = static_cast<const T*>(args.u.data);
  p.decay = static_cast<const T*>(args.decay.data);
  p.factors = static_cast<const T*>(args.factors.data);
  p.direct = static_cast<const T*>(args.direct.data);
  p.batch = args.weight.size[0];
  p.inputs = args.weight.size[2];
  p.channels = args.weight.size[3];
  p.width = args.weight.size[4];
  p.time = args.u.size[1];
  p.rows = args.params.size[2];
  for (int i = 0; i < 2; ++i) p.u_step[i] = args.u.step(i);
  for (int i = 0; i < 3; ++i) p.decay_step[i] = args.decay.step(i);
  for (int i = 0; i < 4; ++i) p.factor_step[i] = args.factors.step(i);
  for (int i = 0; i < 3; ++i) p.direct_step[i] = args.direct.step(i);

  constexpr int V = kMostNumbers<T>;
  const bool whole = in_whole_numbers<T>(p.weight, p.width) && in_whole_numbers<T>(p.u, p.width) &&
                     p.u_step[0] % V == 0 && p.u_step[1] % V == 0;
  // Tiles as narrow as the width allows, of more channels then.
  const int64_t columns = whole ? kColumns<V> : kColumns<1>;
  p.across_bits = p.width <= 4 * columns ? 2 : p.width <= 8 * columns ? 3 : 4;
  const int64_t wide = columns << p.across_bits, high = (kThreads >> p.across_bits) * kRows<T, K>;
  p.column_tiles = (p.width + wide - 1) / wide;
  p.row_tiles = (p.channels + high - 1) / high;
  p.tiles = p.batch * p.inputs * p.row_tiles * p.column_tiles;
  const auto rtrl_update_weights = whole ? update_weights<T, K, V> : update_weights<T, K, 1>;
  if (p.tiles > 0) RECURRA_LAUNCH(rtrl_update_weights, blocks_for(p.tiles, 1), kThreads, stream, p);
  const int64_t tasks = p.batch * (p.inputs + p.rows) * p.channels;
  const auto rtrl_update_rows = update_rows<T, K>;
  if (tasks > 0) RECURRA_LAUNCH(rtrl_update_rows, blocks_for(tasks, kThreads), kThreads, stream, p);
}

template <class T>
void launch_update(const RtrlUpdate& args, const Stream& stream) {
  switch (args.weight.size[1]) {
    case 1: return launch_update<T, 1>(args, stream);
    case 2: return launch_update<T, 2>(args, stream);
    case 3: return launch_update<T, 3>(args, stream);
    default: return launch_update<T, 4>(args, stream);
  }
}

}  // namespace rtrl_detail

void rtrl_update(const RtrlUpdate& args, const Stream& stream) {
  args.weight.dtype == DType::f64 ? rtrl_detail::launch_update<double>(args, stream)
                                  : rtrl_detail::launch_update<float>(args, stream);
}

}  // namespace recurra::cuda
