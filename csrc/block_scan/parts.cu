// Where blocks and sequences are too few for a GPU, time is cut into parts. What one does to any
// state is k + 1 columns that are walked as one state is: the product of its matrices, and the
// state after it from zeros before it. These are then combined in order. All of it is in double,
// whose range holds the products wherever states are finite, so that what comes before a part is as
// exact as if the time before it had been walked in double; it is rounded once, when the part is
// walked.
#include <utility>

#include "block_scan/device.h"

namespace recurra::cuda {
namespace block_scan_detail {

template <class S>
struct Reduce {
  Cut cut;
  Array<S, 5> A;  // transposed for a gradient
  Array<S, 4> source;
  Array<double, 5> products;
  Array<double, 4> states;
  bool packed = false, gradient = false;
};

// What is zero, or not finite, as a state stays so, though a double holds more.
RECURRA_FN double limited(double v, bool single) {
  const float rounded = static_cast<float>(v);
  return single && (rounded == 0 || rounded - rounded != 0) ? rounded : v;
}

// K threads have a row of each column's numbers each. A matrix that all steps share comes out of
// the cache again and again: what bounds this walk is the k (k + 1) shuffles of a step.
template <class S, int K>
__global__ void __launch_bounds__(kThreads, 1) reduce(const Reduce<S> p) {
  using T = Compute<S>;
  constexpr int kSteps = kAhead<K, false>;
  const int row = static_cast<int>(threadIdx.x) % K, k = p.cut.k;
  const unsigned mask = group_mask<K>();
  const int64_t groups = static_cast<int64_t>(gridDim.x) * (kThreads / K);
  int64_t group = static_cast<int64_t>(blockIdx.x) * (kThreads / K) + threadIdx.x / K;
  for (; group < p.cut.groups(); group += groups) {
    const Track w = track_of(p.cut, group);
    if (w.part == p.cut.parts - 1) continue;  // nobody comes after it
    const bool real = row < k;
    const S *const from_A = start_of(p.A, w, row), *const from_source = start_of(p.source, w, row);
    const int64_t step_A = w.by * p.A.step[1], step_source = w.by * p.source.step[1];
    const auto load_step = [&](int64_t t, T(&A)[K], T& x) {
      x = T(0);
      if (!real || t >= w.steps) return;
      Row<S, K>::load(from_A + t * step_A, p.A.step[4], k, p.packed, A);
      if (p.source.data) x = load(from_source + t * step_source);
    };
    T A[kSteps][K] = {}, x[kSteps];
    for_each_index<kSteps>([&](auto i) { load_step(i, A[i], x[i]); });
    double product[K], state = 0;
    for_each_index<K>([&](auto j) { product[j] = j == row ? 1 : 0; });
    for (int64_t t = 0; t < w.steps; t += kSteps) {
      T next_A[kSteps][K] = {}, next_x[kSteps];
      for_each_index<kSteps>([&](auto i) { load_step(t + kSteps + i, next_A[i], next_x[i]); });
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (t + i >= w.steps) break;
        double matrix[K], all[K];
        for_each_index<K>([&](auto j) { matrix[j] = A[i][j]; });
        const auto times = [&](double column, double sum) {
          exchange<K>(mask, column, all);
          for_each_index<K>([&](auto j) {
            if (j < k) sum = fma(matrix[j], all[j], sum);
          });
          return sum;
        };
        for_each_index<K>([&](auto j) {
          if (j < k) product[j] = times(product[j], 0);
        });
        const double given = x[i];
        state = p.gradient ? times(given + state, 0) : times(state, given);
        state = limited(state, sizeof(T) == sizeof(float));
      }
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        x[i] = next_x[i];
        for_each_index<K>([&](auto j) { A[i][j] = next_A[i][j]; });
      }
    }
    if (!real) continue;
    double* const to = p.products.at(w.n, w.part, w.block) + row * k;
    for_each_index<K>([&](auto j) {
      if (j < k) to[j] = product[j];
    });
    p.states.at(w.n, w.part, w.block)[row] = state;
  }
}

// In the place of the state after each part from zeros comes the state before it.
struct Combine {
  Parameters<double, 3> first;
  Array<double, 5> products;
  Array<double, 4> states;
  int64_t sequences, parts, blocks;
  int k;
  bool single;  // whether states are floats
};

template <int K>
__global__ void __launch_bounds__(kThreads, 1) combine(const Combine p) {
  constexpr int kSteps = kAhead<K, false>;
  const int row = static_cast<int>(threadIdx.x) % K, k = p.k;
  const unsigned mask = group_mask<K>();
  const int64_t groups = static_cast<int64_t>(gridDim.x) * (kThreads / K);
  int64_t group = static_cast<int64_t>(blockIdx.x) * (kThreads / K) + threadIdx.x / K;
  for (; group < p.sequences * p.blocks; group += groups) {
    const int64_t n = group / p.blocks, block = group % p.blocks;
    const bool real = row < k;
    double* const states = p.states.at(n, 0, block) + row;
    const double* const products = p.products.at(n, 0, block) + row * k;
    // Of the last part nothing is known, nor needed.
    const auto load_part = [&](int64_t part, double (&product)[K], double& after) {
      after = 0;
      if (!real || part >= p.parts - 1) return;
      for_each_index<K>([&](auto j) {
        if (j < k) product[j] = products[part * p.products.step[1] + j];
      });
      after = states[part * p.states.step[1]];
    };
    double product[kSteps][K] = {}, after[kSteps];
    for_each_index<kSteps>([&](auto i) { load_part(i, product[i], after[i]); });
    double state = real && p.first.data ? p.first.at(n, block, row) : 0;
    for (int64_t part = 0; part < p.parts; part += kSteps) {
      double next_product[kSteps][K] = {}, next_after[kSteps];
      for_each_index<kSteps>(
          [&](auto i) { load_part(part + kSteps + i, next_product[i], next_after[i]); });
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (part + i >= p.parts) break;
        if (real) states[(part + i) * p.states.step[1]] = state;
        double all[K], sum = after[i];
        exchange<K>(mask, state, all);
        // What is zero leaves the part's own end as it is, even where a product is infinite.
        for_each_index<K>([&](auto j) {
          if (j < k) sum = fma(all[j] == 0 ? 0 : product[i][j], all[j], sum);
        });
        state = limited(sum, p.single);
      }
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        after[i] = next_after[i];
        for_each_index<K>([&](auto j) { product[i][j] = next_product[i][j]; });
      }
    }
  }
}

template <int K>
void combine_parts(const View<3>& first, const Cut& cut, bool single, const BlockScanParts& parts,
                   const Stream& stream) {
  Combine p;
  p.first = Parameters<double, 3>(first);
  p.products = Array<double, 5>(parts.products);
  p.states = Array<double, 4>(parts.states);
  p.sequences = cut.sequences;
  p.parts = cut.parts;
  p.blocks = cut.blocks;
  p.k = cut.k;
  p.single = single;
  const auto block_scan_combine = combine<K>;
  const int64_t tasks = cut.sequences * cut.blocks * K;
  RECURRA_LAUNCH(block_scan_combine, blocks_for(tasks, kThreads), kThreads, stream, p);
}

template <class S>
void launch(const View<5>& A, const View<4>& source, const View<3>& first, const Cut& cut,
            bool gradient, const BlockScanParts& parts, const Stream& stream) {
  Reduce<S> p;
  p.cut = cut;
  p.A = Array<S, 5>(A);
  p.source = Array<S, 4>(source);
  p.products = Array<double, 5>(parts.products);
  p.states = Array<double, 4>(parts.states);
  p.gradient = gradient;
  for_width(cut.k, [&](auto width) {
    constexpr int K = decltype(width)::value;
    p.packed = Row<S, K>::packs(A);
    const auto block_scan_reduce = reduce<S, K>;
    const unsigned blocks = blocks_for(cut.groups() * K, kThreads);
    RECURRA_LAUNCH(block_scan_reduce, blocks, kThreads, stream, p);
    combine_parts<K>(first, cut, sizeof(Compute<S>) == sizeof(float), parts, stream);
  });
}

void reduce_parts(const View<5>& A, const View<4>& source, const View<3>& first, const Cut& cut,
                  bool gradient, const BlockScanParts& parts, const Stream& stream) {
  View<5> applied = A;
  if (gradient) std::swap(applied.stride[3], applied.stride[4]);
  switch (A.dtype) {
    case DType::f32: return launch<float>(applied, source, first, cut, gradient, parts, stream);
    case DType::f64: return launch<double>(applied, source, first, cut, gradient, parts, stream);
    case DType::bf16: return launch<BFloat16>(applied, source, first, cut, gradient, parts, stream);
    default: return launch<Half>(applied, source, first, cut, gradient, parts, stream);
  }
}

}  // namespace block_scan_detail
using namespace block_scan_detail;

// Threads have some sixteen numbers on their way, so that 2^17 bytes of these threads' numbers keep
// a GPU's memory busy. Reducing takes k + 1 times the arithmetic of the walk, which comes after it:
// together they are done sooner where there are more than k + 2 parts.
int64_t block_scan_parts(int64_t sequences, int64_t steps, int64_t blocks, int64_t k, DType dtype) {
  int64_t width = 1;
  for_width(k, [&](auto K) { width = K; });
  const int64_t threads = sequences * blocks * width;
  const int64_t parts = time_parts(threads * item_size(dtype) / 2, sequences, steps);
  return parts > width + 2 ? parts : 1;
}

}  // namespace recurra::cuda
