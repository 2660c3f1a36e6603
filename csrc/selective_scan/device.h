// What the CUDA kernels of selective_scan share: the numbers that states are, their inputs, the
// channels of a block and the parts of time.
#pragma once
#include <stdexcept>

#include "cuda/complex.h"
#include "cuda/silu.h"
#include "cuda/split.h"
#include "math/functions.h"
#include "selective_scan/selective_scan.h"

namespace recurra::cuda {
namespace selective_scan_detail {

constexpr int kThreads = 128;
constexpr int kChunk = static_cast<int>(kScanChunk);

// The number of a state beside activations of storage S, real or complex as A is, with the types of
// tensors of states and of A. In rows of T its parts are `apart` elements from each other.
template <class S_>
struct Real {
  using S = S_;
  using T = Compute<S>;
  using State = T;
  using Stored = T;
  using Rates = Parameters<S, 2>;
  static constexpr int parts = 1, f = 1;  // f: before the readout
  static constexpr int readout = 8;  // states whose products with C are summed before they join y
  static RECURRA_FN State load(const T* p, int64_t) { return *p; }
  static RECURRA_FN void store(T* p, int64_t, State s) { *p = s; }
  static RECURRA_FN T part(State s, int) { return s; }
};

template <class S_>
struct Cplx {
  using S = S_;
  using T = Compute<S>;
  using State = Complex<T>;
  using Stored = Pair<T>;
  using Rates = Array<Stored, 2>;
  static constexpr int parts = 2, f = 2;
  static constexpr int readout = 1;
  static RECURRA_FN State load(const T* p, int64_t apart) { return {p[0], p[apart]}; }
  static RECURRA_FN void store(T* p, int64_t apart, State s) { p[0] = s.re, p[apart] = s.im; }
  static RECURRA_FN T part(State s, int i) { return i == 0 ? s.re : s.im; }
};

// B or C: where states are complex it may be too.
template <class K>
struct Projection {
  using S = typename K::S;
  using State = typename K::State;
  using Stored = typename K::Stored;
  // As it is read ahead.
  using Raw = typename Either<K::parts == 1, S, State>::type;

  const void* data = nullptr;
  int64_t step[4] = {};
  bool complex = false;

  explicit Projection(const View<4>& v) : data(v.data), complex(is_complex(v.dtype)) {
    for (int n = 0; n < 4; ++n) step[n] = v.step(n);
  }
  // Where the rows of a group begin at a step, and a number from there: strides stay parameters of
  // the kernel, for which there are no registers.
  RECURRA_FN const void* rows(int64_t batch, int64_t t, int64_t group) const {
    return element(data, batch * step[0] + t * step[1] + group * step[2]);
  }
  RECURRA_FN Raw at(const void* rows, int64_t t, int64_t state) const {
    const void* const from = element(rows, t * step[1] + state * step[3]);
    if constexpr (K::parts == 1)
      return *static_cast<const S*>(from);
    else if (complex)
      return load(static_cast<const Stored*>(from));
    else
      return {load(static_cast<const S*>(from)), 0};
  }
  static RECURRA_FN State value(const Raw& raw) {
    if constexpr (K::parts == 1)
      return load(&raw);
    else
      return raw;
  }

 private:
  RECURRA_FN const void* element(const void* from, int64_t offset) const {
    if (K::parts > 1 && complex) return static_cast<const Stored*>(from) + offset;
    return static_cast<const S*>(from) + offset;
  }
};

// The channels of one block, neighbours in one group; `lane` is where they are in padded rows.
struct Channels {
  int64_t group, first, count, lane;
};

// Spans on the device, of `width` channels each.
struct Blocks {
  int64_t count = 0, per_group = 0, group_channels = 0, group_lanes = 0, padded = 0, width = 0;

  Blocks() = default;
  Blocks(int64_t channels, int64_t groups, int64_t each) : width(each) {
    const Spans spans(channels, groups, each / Spans::kLanes);
    count = spans.count();
    per_group = spans.per_group;
    group_channels = spans.group_channels;
    group_lanes = spans.group_blocks * Spans::kLanes;
    padded = spans.padded();
  }
  RECURRA_FN Channels at(int64_t span) const {
    const int64_t group = span / per_group, first = span % per_group * width;
    const int64_t left = group_channels - first;
    return {group, group * group_channels + first, left < width ? left : width,
            group * group_lanes + first};
  }
};

template <class K>
struct Inputs {
  using S = typename K::S;
  using T = typename K::T;

  Array<S, 3> u, delta, z;
  Projection<K> B, C;
  typename K::Rates A;
  Parameters<S, 1> D, bias;
  Integers cu_seqlens;
  Blocks blocks;
  int64_t sequences, time, u_rows, channels, states;  // u_rows: B T
  int64_t parts;                                      // of each sequence
  bool softplus;

  Inputs(const SelectiveScanInputs& args, const Indices& offsets, int64_t width, int64_t parts)
      : u(args.u),
        delta(args.delta),
        z(args.z),
        B(args.B),
        C(args.C),
        A(args.A),
        D(args.D),
        bias(args.delta_bias),
        cu_seqlens(offsets),
        blocks(args.u.size[2], args.spans.groups, width),
        sequences(args.sequences.count),
        time(args.sequences.time),
        u_rows(args.u.size[0] * args.u.size[1]),
        channels(args.u.size[2]),
        states(args.states()),
        parts(parts),
        softplus(args.delta_softplus) {}

  // A of a channel, as `gate` takes it.
  RECURRA_FN typename K::State rate(int64_t c, int64_t state) const {
    const T log2e = T(1.4426950408889634);
    if constexpr (K::parts == 1)
      return A.at(c, state) * log2e;
    else
      return scaled(load(A.at(c, state)), log2e);
  }
  // Some states at a time; one pass that does nothing where there are none.
  RECURRA_FN int64_t passes(int64_t together) const {
    return states > together ? (states + together - 1) / together : 1;
  }
  RECURRA_FN T bias_of(int64_t c) const { return bias.data ? bias.at(c) : T(0); }
  RECURRA_FN T skip_of(int64_t c) const { return D.data ? D.at(c) : T(0); }
  // The parts of sequence n that have a step: the first ones.
  RECURRA_FN int64_t full_parts(int64_t n) const {
    const Extent s = extent(cu_seqlens, n, time);
    const int64_t chunks = (s.end - s.begin + kScanChunk - 1) / kScanChunk;
    const int64_t each = (chunks + parts - 1) / parts;
    return each > 0 ? (chunks + each - 1) / each : 0;
  }
  // Where a part of sequence n lies, which is whole chunks of it; the last parts may be empty.
  RECURRA_FN Extent part_at(int64_t n, int64_t part) const {
    const Extent s = extent(cu_seqlens, n, time);
    const Part chunks = part_of(0, (s.end - s.begin + kScanChunk - 1) / kScanChunk, part, parts);
    const int64_t begin = s.begin + chunks.begin * kScanChunk;
    const int64_t end = s.begin + chunks.end * kScanChunk;
    return {s.batch, begin < s.end ? begin : s.end, end < s.end ? end : s.end};
  }
  // The row of the states saved before step t of a part, as Sequences::chunk_row has it.
  RECURRA_FN int64_t saved_row(int64_t n, const Extent& s, int64_t t) const {
    const int64_t before = cu_seqlens.data ? n : n * ((time + kScanChunk - 1) / kScanChunk);
    return before + s.begin / kScanChunk + t / kScanChunk;
  }
};

// f(K()) for the storage of the activations and what states are.
template <class F>
void with_states(const SelectiveScanInputs& args, const char* failure, F f) {
  const auto either = [&](auto s) {
    using S = decltype(s);
    args.complex ? f(Cplx<S>{}) : f(Real<S>{});
  };
  switch (args.u.dtype) {
    case DType::f32: return either(float{});
    case DType::f64: return either(double{});
    case DType::bf16: return either(BFloat16{});
    case DType::f16: return either(Half{});
    default: throw std::runtime_error(failure);
  }
}

// 2^x, as exp2_fast, except that on the device a float below 2^-126 is zero: to the state it is a
// factor, beside which an input below 2^-126 of it would be as lost.
RECURRA_FN float gate(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2_fast(x);
#endif
}
RECURRA_FN double gate(double x) { return exp2_fast(x); }
template <class T>
RECURRA_FN Complex<T> gate(Complex<T> x) {
  const T size = gate(x.re);
  const SinCos<T> turn = sincos(x.im);
  return {size * turn.cos, size * turn.sin};
}

// exp(-|x|) with its bits in fewer instructions, where nothing underflows: there scaling by 2^n is
// one product, and rounding to an integer an addition.
RECURRA_FN float exp_minus_size(float x) {
  if (!(abs(x) < 64)) return exp_minus_abs(x);
  constexpr float big = 12582912;  // 1.5 2^23: its last bits count ones
  const float y = -abs(x), shifted = y * 1.4426950408889634f + big, n = shifted - big;
  const float r = fma(n, -1.42860682030941723212e-6f, fma(n, -0.693145751953125f, y));
  const uint32_t exponent = __builtin_bit_cast(uint32_t, shifted) << 23;
  return exp_reduced(r) * __builtin_bit_cast(float, exponent + 0x3f800000u);
}
RECURRA_FN double exp_minus_size(double x) { return exp_minus_abs(x); }

// softplus and its derivative, with their bits.
template <class T>
RECURRA_FN T step_size(T x) {
  return max(x, T(0)) + log1p_unit(exp_minus_size(x));
}
template <class T>
RECURRA_FN T step_slope(T x) {
  return sigmoid_slope_of(x, exp_minus_size(x)).value;
}

// silu, with its bits.
RECURRA_FN float output_gate(float z) {
  return silu_is_near(z) ? silu_slope_near(z).value : silu(z);
}
RECURRA_FN double output_gate(double z) { return silu(z); }

// How the threads of a block share the work of a walk out, 64 channels or 32 of complex states.
template <class K>
struct Tile {
  static constexpr int states = 16;                       // of a channel, at a time
  static constexpr int together = 8 / K::parts;           // states of a thread
  static constexpr int shares = states / together;        // threads of a channel
  static constexpr int channels = kThreads / shares;      // of a block
  static constexpr int steps = 16 / K::parts;             // of a piece, which divide kScanChunk
  static constexpr int items = steps / shares;            // steps of a thread in what all do
  static constexpr int rows = steps * states / kThreads;  // numbers of B, and of C, of a thread
  static constexpr int sums = states / K::readout;        // that join y
  static_assert(together % K::readout == 0 && kScanChunk % steps == 0);
};

// A block's part: its row among those of all sequences, where what it carries rests, which is in
// the result of the last part and else where it was found, and the row of its first saved state. In
// shared memory, since a walk needs all registers.
struct Place {
  int64_t row, rest, saved;
  bool last;
};

// The steps from t0 on that this thread reads, of which there are `steps`, and zeros past these.
template <int kShares, int N, class S>
__device__ __forceinline__ void fetch(const S* from, int64_t step, int64_t t0, int steps,
                                      S (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int t = i * kShares;
    to[i] = t < steps ? from[(t0 + t) * step] : S{};
  }
}

// Finds what stands before each part of a walk, of which `first` is before the first one, (S, D, N)
// or null: `backwards` the cotangents of the states, by dy, and else the states.
void reduce_parts(const SelectiveScanInputs& args, const View<3>& dy, const View<3>& first,
                  bool backwards, const Indices& cu_seqlens, const SelectiveScanParts& parts,
                  const Stream& stream);

}  // namespace selective_scan_detail
}  // namespace recurra::cuda
