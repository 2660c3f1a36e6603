// What the CUDA kernels of linear_scan share: elements that may be complex, walks along time that
// read ahead, and the reduction of parts of time.
#pragma once
#include "cuda/carry.h"
#include "cuda/complex.h"
#include "cuda/launch.h"
#include "cuda/split.h"
#include "linear_scan/linear_scan.h"

namespace recurra::cuda {
// Named, because nvcc names what is in an unnamed one after the path of its file.
namespace linear_scan_detail {

constexpr int kThreads = 128;

// Of elements of storage S: how states and sums are stored, and how the product of the gates of a
// part is: in double, whose range holds it wherever states are finite.
template <class S>
struct Types {
  using State = Compute<S>;
  using Product = double;
};
template <class T>
struct Types<Pair<T>> {
  using State = Pair<T>;
  using Product = Pair<double>;
};
template <class S>
using Value = Compute<S>;
template <class S>
using State = typename Types<S>::State;
template <class S>
using Product = typename Types<S>::Product;

// The exponential, of complex numbers too. Of floats it is exp, bit for bit, without the branch of
// scale2, which would have one element wait for another.
RECURRA_FN double power(double x) { return exp(x); }
RECURRA_FN float power(float x) {
  const Reduced<float> e = reduce_ln2(at_least(-105.0f, at_most(89.0f, x)));
  const int n = static_cast<int>(e.n == e.n ? e.n : 0.0f);
  const int last = n < -126 ? -126 : n > 127 ? 127 : n;  // the only factor that may round
  return exp_reduced(e.r) * power2<float>(n - last) * power2<float>(last);
}
template <class T>
RECURRA_FN Complex<T> power(Complex<T> x) {
  const T r = power(x.re);
  const SinCos<T> turn = sincos(x.im);
  return {r * turn.cos, r * turn.sin};
}

// The sequences, each cut into `parts`, and the direction in which they are walked.
struct Walks {
  Integers cu_seqlens;
  int64_t sequences = 0, time = 0, channels = 0, parts = 1;
  bool backwards = false;
};

// What one thread walks: a channel of a part of a sequence. `first` is where its first step lies,
// `start` how many steps of the sequence, which has `total`, come before. `ends`: it has the last
// of them, or is the first part of none: the parts behind it, which have no step, are not asked,
// since an infinite state times one need not be that state.
struct Walk {
  int64_t n, part, c, batch, first, start, length, total, by;
  bool ends;
};
// Of threads for `width` channels and `parts` parts.
RECURRA_FN Walk walk_of(const Walks& all, int64_t task, int64_t width, int64_t parts) {
  Walk w;
  w.c = task % width;
  w.part = task / width % parts;
  w.n = task / width / parts;
  const Extent e = extent(all.cu_seqlens, w.n, all.time);
  w.batch = e.batch;
  w.total = e.end - e.begin;
  const Part part = part_of(0, w.total, w.part, all.parts);
  w.start = part.begin;
  w.length = part.end - part.begin;
  w.ends = part.end == w.total && (w.length > 0 || w.part == 0);
  w.by = all.backwards ? -1 : 1;
  w.first = w.length == 0 ? 0 : all.backwards ? e.end - 1 - w.start : e.begin + w.start;
  return w;
}

// The steps of one array in the order of a walk, read a batch of N ahead of the one that is
// computed: while that is, one to two batches are on their way.
template <class S, int N>
struct Ahead {
  const S* at = nullptr;
  int64_t step = 0, left = 0;
  S item[2][N] = {};

  Ahead() = default;
  // From `skip` steps after the first one on; none of a null array.
  __device__ __forceinline__ Ahead(const Array<S, 3>& from, const Walk& w, int64_t steps,
                                   int64_t skip = 0)
      : step(w.by * from.step[1]), left(from.data ? steps : 0) {
    if (left > 0) at = from.at(w.batch, w.first, w.c) + skip * step;
    read<0>();
    read<1>();
  }
  template <int kBatch>
  __device__ __forceinline__ void read() {
    const int count = left < N ? static_cast<int>(left) : N;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i >= count) continue;
      item[kBatch][i] = *at;
      at += step;
    }
    left -= N;
  }
};

// compute(batch, t, count) for each batch of a walk, and read(batch) once it is done.
template <int N, class F, class G>
__device__ __forceinline__ void along(int64_t length, F compute, G read) {
  for (int64_t t = 0; t < length; t += 2 * N) {
    const int64_t left = length - t;
    compute(Index<0>{}, t, left < N ? static_cast<int>(left) : N);
    read(Index<0>{});
    if (left <= N) break;
    compute(Index<1>{}, t + N, left < 2 * N ? static_cast<int>(left) - N : N);
    read(Index<1>{});
  }
}

// The gates of a batch.
template <class S, int N>
__device__ __forceinline__ void gates_of(const S (&item)[N], bool log_a, Value<S> (&gate)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) gate[i] = load(&item[i]);
  if (!log_a) return;
#pragma unroll
  for (int i = 0; i < N; ++i) gate[i] = power(gate[i]);
}
template <class S>
RECURRA_FN Value<S> constant_gate(const Array<S, 3>& a, const Walk& w, bool log_a) {
  const Value<S> gate = w.length == 0 ? Value<S>{} : load(a.at(w.batch, w.first, w.c));
  return log_a ? power(gate) : gate;
}

// Steps that are read at a time, by bytes.
template <class S>
constexpr int kAhead = sizeof(S) <= 4   ? 16
                       : sizeof(S) == 8 ? 8
                                        : 4;

// Each part but the last of each sequence: the product of its gates, and the state after it from
// zeros before it; or, backwards in time, the gradient that it hands on, from none behind it.
template <class S>
struct Reduce {
  Array<S, 3> a, input;  // input: b, or dh, which may be null
  Array<Product<S>, 3> products;
  Array<State<S>, 3> states;
  Walks walks;
  bool log_a;
};
template <class S, bool kConstant, bool kGradient>
__global__ void __launch_bounds__(kThreads) reduce(const Reduce<S> p) {
  using V = Value<S>;
  constexpr int N = kAhead<S>;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t tasks = p.walks.sequences * (p.walks.parts - 1) * p.walks.channels;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < tasks; task += threads) {
    const Walk w = walk_of(p.walks, task, p.walks.channels, p.walks.parts - 1);
    Ahead<S, N> a(p.a, w, kConstant ? 0 : w.length), input(p.input, w, w.length);
    V gate[N] = {}, state = {};
    auto product = one(widened(V{}));
    if constexpr (kConstant) {
      const V same = constant_gate(p.a, w, p.log_a);
#pragma unroll
      for (int i = 0; i < N; ++i) gate[i] = same;
    }
    along<N>(
        w.length,
        [&](auto batch, int64_t, int count) {
          if constexpr (!kConstant) gates_of(a.item[batch.value], p.log_a, gate);
#pragma unroll
          for (int i = 0; i < N; ++i) {
            if (i >= count) continue;
            const V x = load(&input.item[batch.value][i]);
            if constexpr (kGradient) {
              state = conj(gate[i]) * (p.input.data ? x + state : state);
              product = widened(conj(gate[i])) * product;
            } else {
              state = fma(gate[i], state, x);
              product = widened(gate[i]) * product;
            }
          }
        },
        [&](auto batch) {
          if constexpr (!kConstant) a.template read<batch.value>();
          input.template read<batch.value>();
        });
    store(p.products.at(w.n, w.part, w.c), product);
    store(p.states.at(w.n, w.part, w.c), state);
  }
}

// f(S()) for the storage of a dtype.
template <class F>
void for_storage(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f(float());
    case DType::f64: return f(double());
    case DType::bf16: return f(BFloat16());
    case DType::f16: return f(Half());
    case DType::c64: return f(Pair<float>());
    case DType::c128: return f(Pair<double>());
    default: throw std::runtime_error("linear_scan: no CUDA kernel for this dtype");
  }
}

inline Walks walks_of(const Sequences& sequences, const Indices& cu_seqlens, int64_t channels,
                      const ScanParts& parts, bool backwards) {
  Walks w;
  w.cu_seqlens = Integers(cu_seqlens);
  w.sequences = sequences.count;
  w.time = sequences.time;
  w.channels = channels;
  w.parts = parts.products ? parts.products.size[1] : 1;
  w.backwards = backwards;
  return w;
}

// What stands before each part: reduces the parts and combines them in order. `first`: (S, D) or
// null, the state before the first one.
template <class S, bool kGradient>
void reduce_parts(const View<3>& a, const View<3>& input, const View<2>& first, bool log_a,
                  const Walks& walks, const ScanParts& parts, const Stream& stream) {
  Reduce<S> p;
  p.a = Array<S, 3>(a);
  p.input = Array<S, 3>(input);
  p.products = Array<Product<S>, 3>(parts.products);
  p.states = Array<State<S>, 3>(parts.states);
  p.walks = walks;
  p.log_a = log_a;
  const int64_t tasks = walks.sequences * (walks.parts - 1) * walks.channels;
  const auto linear_scan_reduce =
      a.step(1) == 0 ? reduce<S, true, kGradient> : reduce<S, false, kGradient>;
  RECURRA_LAUNCH(linear_scan_reduce, blocks_for(tasks, kThreads), kThreads, stream, p);
  combine_parts(first, parts, stream);
}

}  // namespace linear_scan_detail
}  // namespace recurra::cuda
