#include "cuda/sums.h"

#include "cuda/launch.h"
#include "cuda/shared.h"
#include "cuda/storage.h"

namespace recurra::cuda {
namespace sums_detail {

constexpr int kColumns = 32, kRows = 8, kThreads = kColumns * kRows;

// Numbers of any dtype.
struct Target {
  char* data;
  DType dtype;
  int64_t size[5], step[5];

  explicit Target(const View<5>& v) : data(static_cast<char*>(v.data)), dtype(v.dtype) {
    for (int n = 0; n < 5; ++n) size[n] = v.size[n], step[n] = v.step(n);
  }
  RECURRA_FN int64_t columns() const { return size[1] * size[2] * size[3] * size[4]; }
  RECURRA_FN int64_t count() const { return size[0] * columns(); }
  // Element i in the order of rows.
  template <class T>
  RECURRA_FN void put(int64_t i, T value) const {
    int64_t at = 0;
    for (int n = 4; n >= 0; --n) at += i % size[n] * step[n], i /= size[n];
    switch (dtype) {
      case DType::f64: reinterpret_cast<double*>(data)[at] = value; break;
      case DType::bf16:
        store(reinterpret_cast<BFloat16*>(data) + at, static_cast<float>(value));
        break;
      case DType::f16: store(reinterpret_cast<Half*>(data) + at, static_cast<float>(value)); break;
      default: reinterpret_cast<float*>(data)[at] = static_cast<float>(value);
    }
  }
};

// One number for each of 32 columns and eight rows in turn; then the eight are added in order. Of
// up to eight rows the sum is in order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    over_rows(const Target to, const T* from, int64_t rows, int64_t columns) {
  RECURRA_SHARED(T, sums, kThreads);
  const int column = static_cast<int>(threadIdx.x) % kColumns;
  const int row = static_cast<int>(threadIdx.x) / kColumns;
  const int64_t batches = to.size[0], across = (columns + kColumns - 1) / kColumns;
  for (int64_t task = blockIdx.x; task < batches * across; task += gridDim.x) {
    const int64_t b = task / across, c = task % across * kColumns + column;
    T sum = T(0);
    if (c < columns) {
      const T* const at = from + b * rows * columns + c;
#pragma unroll 4
      for (int64_t r = row; r < rows; r += kRows) sum += at[r * columns];
    }
    sums[static_cast<int>(threadIdx.x)] = sum;
    __syncthreads();
    if (row == 0 && c < columns) {
      for (int r = 1; r < kRows && r < rows; ++r)
        sum += static_cast<T>(sums[r * kColumns + column]);
      to.put(b * columns + c, sum);
    }
    __syncthreads();
  }
}

// A warp for each number.
template <class T>
__global__ void __launch_bounds__(kThreads)
    over_lanes(const Target to, const T* from, int64_t rows, int64_t columns, int64_t lanes) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t inner = to.size[3] * to.size[4];
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  int64_t task = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  for (; task < to.count(); task += warps) {
    const int64_t b = task / columns, c = task % columns;
    const T* const at = from + (b * rows * columns + c / inner * inner) * lanes + c % inner;
    T sum = T(0);
#pragma unroll 4
    for (int64_t i = lane; i < rows * lanes; i += 32)
      sum += at[i / lanes * columns * lanes + i % lanes * inner];
    for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
    if (lane == 0) to.put(task, sum);
  }
}

template <class T>
void launch(const Sums& sums, const Stream& stream) {
  const Target to(sums.to);
  const int64_t columns = to.columns();
  if (to.count() == 0) return;
  const T* const from = static_cast<const T*>(sums.from);
  if (sums.lanes == 1) {
    const auto add_rows = over_rows<T>;
    const int64_t blocks = to.size[0] * ((columns + kColumns - 1) / kColumns);
    RECURRA_LAUNCH(add_rows, blocks_for(blocks, 1), kThreads, stream, to, from, sums.rows, columns);
  } else {
    const auto add_lanes = over_lanes<T>;
    RECURRA_LAUNCH(add_lanes, blocks_for(to.count(), kThreads / 32), kThreads, stream, to, from,
                   sums.rows, columns, sums.lanes);
  }
}

}  // namespace sums_detail
using namespace sums_detail;

void add_up(const Sums& sums, const Stream& stream) {
  sums.wide ? launch<double>(sums, stream) : launch<float>(sums, stream);
}

}  // namespace recurra::cuda
