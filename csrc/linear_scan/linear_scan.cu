// One thread walks one channel of one sequence, or of a part of it: neighbouring threads read
// neighbouring channels, and memory is the limit.
#include "linear_scan/device.h"

namespace recurra::cuda {
namespace linear_scan_detail {

template <class S>
struct Forward {
  Array<S, 3> a, b, h;
  Array<State<S>, 2> h0, h_last;
  Array<State<S>, 3> states;  // before each part, where time is split
  Walks walks;
  bool log_a;
};

template <class S, bool kConstant>
__global__ void __launch_bounds__(kThreads) forward(const Forward<S> p) {
  using V = Value<S>;
  constexpr int N = kAhead<S>;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t tasks = p.walks.sequences * p.walks.parts * p.walks.channels;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < tasks; task += threads) {
    const Walk w = walk_of(p.walks, task, p.walks.channels, p.walks.parts);
    Ahead<S, N> a(p.a, w, kConstant ? 0 : w.length), b(p.b, w, w.length);
    S* to = p.h.at(w.batch, w.first, w.c);
    const int64_t step = w.by * p.h.step[1];
    V gate[N] = {}, h = {};
    if (p.states.data)
      h = load(p.states.at(w.n, w.part, w.c));
    else if (p.h0.data)
      h = load(p.h0.at(w.n, w.c));
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
            h = fma(gate[i], h, load(&b.item[batch.value][i]));
            store(to, h);
            to += step;
          }
        },
        [&](auto batch) {
          if constexpr (!kConstant) a.template read<batch.value>();
          b.template read<batch.value>();
        });
    if (w.ends) store(p.h_last.at(w.n, w.c), h);
  }
}

template <class S>
void launch(const LinearScan& args, const Indices& cu_seqlens, const ScanParts& parts,
            const Stream& stream) {
  Forward<S> p;
  p.walks = walks_of(args.sequences, cu_seqlens, args.b.size[2], parts, args.reverse);
  const int64_t tasks = p.walks.sequences * p.walks.parts * p.walks.channels;
  if (tasks == 0) return;
  if (p.walks.parts > 1)
    reduce_parts<S, false>(args.a, args.b, args.h0, args.log_a, p.walks, parts, stream);
  p.a = Array<S, 3>(args.a);
  p.b = Array<S, 3>(args.b);
  p.h = Array<S, 3>(args.h);
  p.h0 = Array<State<S>, 2>(args.h0);
  p.h_last = Array<State<S>, 2>(args.h_last);
  p.states = Array<State<S>, 3>(parts.states);
  p.log_a = args.log_a;
  const auto linear_scan_forward = args.a.step(1) == 0 ? forward<S, true> : forward<S, false>;
  RECURRA_LAUNCH(linear_scan_forward, blocks_for(tasks, kThreads), kThreads, stream, p);
}

// In the place of the state after each part from zeros comes the state before it.
template <class S>
struct Combine {
  Array<State<S>, 2> first;
  Array<Product<S>, 3> products;
  Array<State<S>, 3> states;
  int64_t sequences, channels, parts;
};
template <class S>
__global__ void __launch_bounds__(kThreads) combine(const Combine<S> p) {
  using V = Value<S>;
  constexpr int N = kAhead<S>;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < p.sequences * p.channels; task += threads) {
    Walk w = {};
    w.batch = task / p.channels, w.c = task % p.channels, w.by = 1;
    // Of the last part nothing is known, nor needed.
    Ahead<Product<S>, N> products(p.products, w, p.parts - 1);
    Ahead<State<S>, N> states(p.states, w, p.parts - 1);
    V carry = p.first.data ? load(p.first.at(w.batch, w.c)) : V{};
    auto exact = widened(carry);
    along<N>(
        p.parts,
        [&](auto batch, int64_t t, int count) {
#pragma unroll
          for (int i = 0; i < N; ++i) {
            if (i >= count) continue;
            narrow(exact, carry);
            store(p.states.at(w.batch, t + i, w.c), carry);
            exact = after_part(carry, exact, load(&products.item[batch.value][i]),
                               widened(load(&states.item[batch.value][i])));
          }
        },
        [&](auto batch) {
          products.template read<batch.value>();
          states.template read<batch.value>();
        });
  }
}

template <class S>
void launch(const View<2>& first, const ScanParts& parts, const Stream& stream) {
  Combine<S> p;
  p.first = Array<State<S>, 2>(first);
  p.products = Array<Product<S>, 3>(parts.products);
  p.states = Array<State<S>, 3>(parts.states);
  p.sequences = parts.states.size[0];
  p.parts = parts.states.size[1];
  p.channels = parts.states.size[2];
  const auto linear_scan_combine = combine<S>;
  const unsigned blocks = blocks_for(p.sequences * p.channels, kThreads);
  RECURRA_LAUNCH(linear_scan_combine, blocks, kThreads, stream, p);
}

void combine_parts(const View<2>& first, const ScanParts& parts, const Stream& stream) {
  switch (parts.states.dtype) {
    case DType::f32: return launch<float>(first, parts, stream);
    case DType::f64: return launch<double>(first, parts, stream);
    case DType::c64: return launch<Pair<float>>(first, parts, stream);
    default: return launch<Pair<double>>(first, parts, stream);
  }
}

template <class S>
struct Step {
  Array<S, 2> a, b, out;
  Array<State<S>, 2> h;
  Integers slots;
  int64_t rows, channels, states;
  bool log_a;
};
template <class S>
__global__ void __launch_bounds__(kThreads) step(const Step<S> p) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; task < p.rows * p.channels; task += threads) {
    const int64_t n = task / p.channels, c = task % p.channels;
    const int64_t slot = slot_of(p.slots, n, p.states);
    Value<S> h = {};
    if (slot >= 0) {
      const Value<S> a = load(p.a.at(n, c));
      h = fma(p.log_a ? power(a) : a, load(p.h.at(slot, c)), load(p.b.at(n, c)));
      store(p.h.at(slot, c), h);
    }
    store(p.out.at(n, c), h);
  }
}

template <class S>
void launch(const LinearScanStep& args, const Indices& slots, const Stream& stream) {
  Step<S> p;
  p.a = Array<S, 2>(args.a);
  p.b = Array<S, 2>(args.b);
  p.out = Array<S, 2>(args.out);
  p.h = Array<State<S>, 2>(args.h);
  p.slots = Integers(slots);
  p.rows = args.b.size[0];
  p.channels = args.b.size[1];
  p.states = args.h.size[0];
  p.log_a = args.log_a;
  const int64_t tasks = p.rows * p.channels;
  if (tasks == 0) return;
  const auto linear_scan_step = step<S>;
  RECURRA_LAUNCH(linear_scan_step, blocks_for(tasks, kThreads), kThreads, stream, p);
}

}  // namespace linear_scan_detail
using namespace linear_scan_detail;

// A thread has some 2^8 bytes on their way, so that an eighth of the threads that fill a GPU loses
// less of the memory's speed than splitting does, which reads the inputs twice. More parts than are
// needed would only make it longer to combine them.
int64_t linear_scan_parts(int64_t sequences, int64_t steps, int64_t channels, DType dtype) {
  const int64_t walks = sequences * channels, item = item_size(dtype);
  if (walks * item * 4 > kThreadsToFill) return 1;
  const int64_t parts = time_parts(walks * (item < 4 ? 4 : item) / 2, sequences, steps);
  return parts < 4 ? 1 : parts;
}

void linear_scan(const LinearScan& args, const Indices& cu_seqlens, const ScanParts& parts,
                 const Stream& stream) {
  for_storage(args.b.dtype,
              [&](auto zero) { launch<decltype(zero)>(args, cu_seqlens, parts, stream); });
}

void linear_scan_step(const LinearScanStep& args, const Indices& slots, const Stream& stream) {
  for_storage(args.b.dtype, [&](auto zero) { launch<decltype(zero)>(args, slots, stream); });
}

}  // namespace recurra::cuda
