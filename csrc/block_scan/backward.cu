// K threads walk one block of one sequence, or of a part of it, against the scan: each has a column
// of the matrix and of its gradient. That of a matrix that steps share is summed in registers,
// sixteen steps at a time, that of one that blocks share over the blocks of a warp; what is left is
// added by add_up.
#include "block_scan/device.h"
#include "cuda/sums.h"

namespace recurra::cuda {
namespace block_scan_detail {

constexpr int kGroup = 16;  // steps that are summed before they join a gradient

// The sums of the gradient of a matrix that is broadcast: (rows, steps, lanes, k, k) numbers.
struct GradientLayout {
  bool over_time, over_blocks, reduced;
  int64_t rows, steps, lanes, width;  // width: groups of a part of a sequence

  GradientLayout(const BlockScanBackward& args, int64_t parts) {
    const int64_t blocks = args.h.size[2];
    over_time = args.over_time();
    over_blocks = args.over_blocks();
    reduced = args.reduced();
    rows = over_time ? args.sequences.count * parts : args.h.size[0];
    steps = over_time ? 1 : args.h.size[1];
    lanes = width = blocks;
    if (!over_blocks) return;
    for_width(args.h.size[3], [&](auto K) {
      constexpr int64_t each = kWarp / decltype(K)::value;  // groups of a warp
      lanes = (blocks + each - 1) / each;
      width = lanes * each;
    });
  }
  int64_t size(int64_t k) const { return reduced ? rows * steps * lanes * k * k : 0; }
};

template <class S>
struct Backward {
  using T = Compute<S>;
  Cut cut;
  Array<S, 5> A, dA;
  Array<S, 4> h, dh, db;
  Array<T, 3> h0, dh_last, dh0;
  Array<double, 4> handed;  // to each part, where time is split
  T* partial = nullptr;
  bool over_time = false, over_blocks = false;
  int64_t lanes = 0;
};

// The sum over the same threads of all groups of a warp.
template <int K, class T>
__device__ __forceinline__ T sum_of_groups(T value) {
  for (int by = kWarp / 2; by >= K; by /= 2) value += __shfl_xor_sync(0xffffffffu, value, by);
  return value;
}

// Blocks that a multiprocessor must hold at a time; 1: no bound. Without one the walk with a
// constant matrix of four in float takes 176 registers, of which three blocks have room for 168;
// with it 96 do.
template <class S, int K, bool constant>
constexpr int kResident = constant && K == 4 && sizeof(Compute<S>) == 4 ? 3 : 1;

template <class S, int K, bool constant>
__global__ void __launch_bounds__(kThreads, (kResident<S, K, constant>))
    walk_back(const Backward<S> p) {
  using T = Compute<S>;
  constexpr int kSteps = constant ? 4 : K <= 2 ? 2 : 1;
  constexpr bool ahead = K <= 4;  // whether a step's matrix is read while the last one is used
  const int column = static_cast<int>(threadIdx.x) % K, k = p.cut.k;
  const unsigned mask = group_mask<K>();
  const int64_t groups = static_cast<int64_t>(gridDim.x) * (kThreads / K);
  int64_t group = static_cast<int64_t>(blockIdx.x) * (kThreads / K) + threadIdx.x / K;
  for (; group < p.cut.groups(); group += groups) {
    Track w = track_of(p.cut, group);
    // A warp sums its blocks, and a group without one walks the last with it.
    const bool counts = w.block < p.cut.blocks, real = column < k;
    const int64_t lane = p.over_blocks ? w.block / (kWarp / K) : w.block;
    if (!counts) w.block = p.cut.blocks - 1;
    const auto at = [&](const auto& v, int64_t step) {
      return v.data + w.batch * v.step[0] + (w.first + step * w.by) * v.step[1] +
             w.block * v.step[2];
    };
    T A[constant ? 1 : kSteps][K] = {}, h[kSteps], dh[kSteps];
    const auto load_A = [&](int64_t t, T(&into)[K]) {
      if (!real || t >= w.steps) return;
      const S* const from = at(p.A, t) + column * p.A.step[4];
      for_each_index<K>([&](auto i) {
        if (i < k) into[i] = load(from + i * p.A.step[3]);
      });
    };
    // The state before step t of the walk is that of the next one, and before the last comes h0.
    const auto load_vectors = [&](int64_t t, T& state, T& cotangent) {
      state = cotangent = T(0);
      if (!real || t >= w.steps) return;
      if (t + 1 < w.steps || !w.ends)
        state = load(at(p.h, t + 1) + column * p.h.step[3]);
      else if (p.h0.data)
        state = *p.h0.at(w.n, w.block, column);
      if (p.dh.data) cotangent = load(at(p.dh, t) + column * p.dh.step[3]);
    };
    if constexpr (constant)
      load_A(0, A[0]);
    else if constexpr (ahead)
      for_each_index<kSteps>([&](auto i) { load_A(i, A[i]); });
    for_each_index<kSteps>([&](auto i) { load_vectors(i, h[i], dh[i]); });
    T carry = T(0);
    if (real && p.handed.data)
      carry = static_cast<T>(p.handed.at(w.n, w.part, w.block)[column]);
    else if (real && p.dh_last.data)
      carry = *p.dh_last.at(w.n, w.block, column);
    T sixteen[constant ? K : 1] = {}, total[constant ? K : 1] = {};

    for (int64_t t = 0; t < w.steps; t += kSteps) {
      T next_A[constant ? 1 : kSteps][K] = {}, next_h[kSteps], next_dh[kSteps];
      if constexpr (!constant && !ahead) load_A(t, A[0]);
      if constexpr (!constant && ahead)
        for_each_index<kSteps>([&](auto i) { load_A(t + kSteps + i, next_A[i]); });
      for_each_index<kSteps>([&](auto i) { load_vectors(t + kSteps + i, next_h[i], next_dh[i]); });
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int64_t step = t + i;
        if (step >= w.steps) break;
        const T g = p.dh.data ? dh[i] + carry : carry;
        if (real && counts) store(at(p.db, step) + column * p.db.step[3], g);
        T all[K];
        exchange<K>(mask, g, all);
        const int64_t row =
            p.partial && !p.over_time ? w.batch * p.cut.time + w.first + step * w.by : 0;
        for_each_index<K>([&](auto r) {
          if (r >= k) return;
          if constexpr (constant) {
            if (p.over_time) {
              sixteen[r] = step % kGroup == 0 ? all[r] * h[i] : fma(all[r], h[i], sixteen[r]);
              return;
            }
          }
          T product = all[r] * h[i];
          if (!p.partial) {
            if (real) store(at(p.dA, step) + r * p.dA.step[3] + column * p.dA.step[4], product);
            return;
          }
          if (p.over_blocks) product = sum_of_groups<K>(counts ? product : T(0));
          if (real && (!p.over_blocks || threadIdx.x % kWarp < K))
            p.partial[((row * p.lanes + lane) * k + r) * k + column] = product;
        });
        if constexpr (constant)
          if (step % kGroup == kGroup - 1 || step == w.steps - 1)
            for_each_index<K>([&](auto r) { total[r] = total[r] + sixteen[r]; });
        const T(&gates)[K] = A[constant ? 0 : i];
        carry = gates[0] * all[0];
        for_each_index<K>([&](auto r) {
          if (r > 0 && r < k) carry = fma(gates[r], all[r], carry);
        });
      }
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        h[i] = next_h[i], dh[i] = next_dh[i];
        if constexpr (!constant && ahead)
          for_each_index<K>([&](auto j) { A[i][j] = next_A[i][j]; });
      }
    }
    if constexpr (constant)
      if (p.over_time) {
        const int64_t part = group / p.cut.width;  // of all sequences
        for_each_index<K>([&](auto r) {
          if (r >= k) return;
          const T sum = p.over_blocks ? sum_of_groups<K>(counts ? total[r] : T(0)) : total[r];
          if (real && (!p.over_blocks || threadIdx.x % kWarp < K))
            p.partial[((part * p.lanes + lane) * k + r) * k + column] = sum;
        });
      }
    if (real && counts && w.ends) *p.dh0.at(w.n, w.block, column) = carry;
  }
}

template <class S, int K>
void launch(const BlockScanBackward& args, const Indices& cu_seqlens, void* scratch,
            const BlockScanParts& parts, const Stream& stream) {
  using T = Compute<S>;
  const GradientLayout layout(args, parts.count());
  Backward<S> p;
  p.cut = Cut(args.sequences, cu_seqlens, args.h, parts.count(), !args.reverse);
  if (p.cut.parts > 1 && p.cut.groups() > 0)
    reduce_parts(args.A, args.dh, args.dh_last, p.cut, true, parts, stream);
  p.cut.width = layout.width;
  p.A = Array<S, 5>(args.A);
  p.dA = Array<S, 5>(args.dA);
  p.h = Array<S, 4>(args.h);
  p.dh = Array<S, 4>(args.dh);
  p.db = Array<S, 4>(args.db);
  p.h0 = Array<T, 3>(args.h0);
  p.dh_last = Array<T, 3>(args.dh_last);
  p.dh0 = Array<T, 3>(args.dh0);
  p.handed = Array<double, 4>(parts.states);
  p.partial = layout.reduced ? static_cast<T*>(scratch) : nullptr;
  p.over_time = layout.over_time;
  p.over_blocks = layout.over_blocks;
  p.lanes = layout.lanes;
  const int64_t tasks = p.cut.groups() * K;
  if (tasks > 0 && args.A.size[1] == 1) {
    const auto block_scan_constant = walk_back<S, K, true>;
    RECURRA_LAUNCH(block_scan_constant, blocks_for(tasks, kThreads), kThreads, stream, p);
  } else if (tasks > 0) {
    const auto block_scan_backward = walk_back<S, K, false>;
    RECURRA_LAUNCH(block_scan_backward, blocks_for(tasks, kThreads), kThreads, stream, p);
  }
  if (layout.reduced)
    add_up({args.dA, scratch, args.h.dtype == DType::f64,
            args.dA.size[0] ? layout.rows / args.dA.size[0] : 0,
            layout.over_blocks ? layout.lanes : 1},
           stream);
}

template <class S>
void launch(const BlockScanBackward& args, const Indices& cu_seqlens, void* scratch,
            const BlockScanParts& parts, const Stream& stream) {
  for_width(args.h.size[3], [&](auto K) {
    launch<S, decltype(K)::value>(args, cu_seqlens, scratch, parts, stream);
  });
}

}  // namespace block_scan_detail
using namespace block_scan_detail;

int64_t block_scan_backward_scratch(const BlockScanBackward& args, int64_t parts) {
  return GradientLayout(args, parts).size(args.h.size[3]);
}

void block_scan_backward(const BlockScanBackward& args, const Indices& cu_seqlens, void* scratch,
                         const BlockScanParts& parts, const Stream& stream) {
  switch (args.h.dtype) {
    case DType::f32: return launch<float>(args, cu_seqlens, scratch, parts, stream);
    case DType::f64: return launch<double>(args, cu_seqlens, scratch, parts, stream);
    case DType::bf16: return launch<BFloat16>(args, cu_seqlens, scratch, parts, stream);
    case DType::f16: return launch<Half>(args, cu_seqlens, scratch, parts, stream);
    default: throw std::runtime_error("block_scan: no CUDA kernel for this dtype");
  }
}

}  // namespace recurra::cuda
