// K threads walk one block of one sequence, or of a part of it: each has a row of the matrix, whose
// next steps it reads while it computes the last ones. A matrix that all steps share is read once.
#include "block_scan/device.h"
#include "cuda/launch.h"

namespace recurra::cuda {
namespace block_scan_detail {

template <class S>
struct Forward {
  using T = Compute<S>;
  Cut cut;
  Array<S, 5> A;
  Array<S, 4> b, h;
  Array<T, 3> h0, h_last;
  Array<double, 4> before;  // each part, where time is split
  Integers slots;
  int64_t states = 0;
  bool packed = false;
};

template <class S, int K, bool constant>
__global__ void __launch_bounds__(kThreads, 1) walk(const Forward<S> p) {
  using T = Compute<S>;
  constexpr int kSteps = kAhead<K, constant>;
  const int row = static_cast<int>(threadIdx.x) % K, k = p.cut.k;
  const unsigned mask = group_mask<K>();
  const int64_t groups = static_cast<int64_t>(gridDim.x) * (kThreads / K);
  int64_t group = static_cast<int64_t>(blockIdx.x) * (kThreads / K) + threadIdx.x / K;
  for (; group < p.cut.groups(); group += groups) {
    const Track w = track_of(p.cut, group);
    const int64_t slot = slot_of(p.slots, w.n, p.states);
    const bool real = row < k;
    const S *const from_A = start_of(p.A, w, row), *const from_b = start_of(p.b, w, row);
    S* const to = start_of(p.h, w, row);
    const int64_t step_A = w.by * p.A.step[1], step_b = w.by * p.b.step[1],
                  step_h = w.by * p.h.step[1];
    if (slot < 0) {
      for (int64_t t = 0; real && t < w.steps; ++t) store(to + t * step_h, T(0));
      continue;
    }
    T A[constant ? 1 : kSteps][K] = {}, b[kSteps];
    const auto load_A = [&](int64_t t, T(&into)[K]) {
      if (real && t < w.steps) Row<S, K>::load(from_A + t * step_A, p.A.step[4], k, p.packed, into);
    };
    const auto load_b = [&](int64_t t, T& into) {
      into = real && t < w.steps ? load(from_b + t * step_b) : T(0);
    };
    if constexpr (constant)
      load_A(0, A[0]);
    else
      for_each_index<kSteps>([&](auto i) { load_A(i, A[i]); });
    for_each_index<kSteps>([&](auto i) { load_b(i, b[i]); });
    T h = T(0);
    if (real && p.before.data)
      h = static_cast<T>(p.before.at(w.n, w.part, w.block)[row]);
    else if (real && p.h0.data)
      h = *p.h0.at(slot, w.block, row);
    for (int64_t t = 0; t < w.steps; t += kSteps) {
      T next_A[constant ? 1 : kSteps][K] = {}, next_b[kSteps];
      if constexpr (!constant)
        for_each_index<kSteps>([&](auto i) { load_A(t + kSteps + i, next_A[i]); });
      for_each_index<kSteps>([&](auto i) { load_b(t + kSteps + i, next_b[i]); });
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (t + i >= w.steps) break;
        T all[K], sum = b[i];
        exchange<K>(mask, h, all);
        for_each_index<K>([&](auto j) {
          if (j < k) sum = fma(A[constant ? 0 : i][j], all[j], sum);
        });
        h = sum;
        if (real) store(to + (t + i) * step_h, h);
      }
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        b[i] = next_b[i];
        if constexpr (!constant) for_each_index<K>([&](auto j) { A[i][j] = next_A[i][j]; });
      }
    }
    if (real && w.ends) *p.h_last.at(slot, w.block, row) = h;
  }
}

template <class S, int K>
void launch(const BlockScan& args, const Indices& cu_seqlens, const Indices& slots,
            const BlockScanParts& parts, const Stream& stream) {
  using T = Compute<S>;
  Forward<S> p;
  p.cut = Cut(args.sequences, cu_seqlens, args.b, parts.count(), args.reverse);
  p.A = Array<S, 5>(args.A);
  p.b = Array<S, 4>(args.b);
  p.h = Array<S, 4>(args.h);
  p.h0 = Array<T, 3>(args.h0);
  p.h_last = Array<T, 3>(args.h_last);
  p.before = Array<double, 4>(parts.states);
  p.slots = Integers(slots);
  p.states = args.h_last.size[0];
  p.packed = Row<S, K>::packs(args.A);
  const int64_t tasks = p.cut.groups() * K;
  if (tasks == 0) return;
  if (p.cut.parts > 1) reduce_parts(args.A, args.b, args.h0, p.cut, false, parts, stream);
  if (p.A.step[1] == 0) {
    const auto block_scan_constant = walk<S, K, true>;
    RECURRA_LAUNCH(block_scan_constant, blocks_for(tasks, kThreads), kThreads, stream, p);
  } else {
    const auto block_scan_forward = walk<S, K, false>;
    RECURRA_LAUNCH(block_scan_forward, blocks_for(tasks, kThreads), kThreads, stream, p);
  }
}

template <class S>
void launch(const BlockScan& args, const Indices& cu_seqlens, const Indices& slots,
            const BlockScanParts& parts, const Stream& stream) {
  for_width(args.b.size[3],
            [&](auto K) { launch<S, decltype(K)::value>(args, cu_seqlens, slots, parts, stream); });
}

}  // namespace block_scan_detail
using namespace block_scan_detail;

void block_scan(const BlockScan& args, const Indices& cu_seqlens, const Indices& slots,
                const BlockScanParts& parts, const Stream& stream) {
  switch (args.b.dtype) {
    case DType::f32: return launch<float>(args, cu_seqlens, slots, parts, stream);
    case DType::f64: return launch<double>(args, cu_seqlens, slots, parts, stream);
    case DType::bf16: return launch<BFloat16>(args, cu_seqlens, slots, parts, stream);
    case DType::f16: return launch<Half>(args, cu_seqlens, slots, parts, stream);
    default: throw std::runtime_error("block_scan: no CUDA kernel for this dtype");
  }
}

}  // namespace recurra::cuda
