// What the CUDA kernels of selective_scan share: their inputs and the channels of a block.
#pragma once
#include <stdexcept>

#include "cuda/storage.h"
#include "math/functions.h"
#include "selective_scan/selective_scan.h"

namespace recurra::cuda {
namespace selective_scan_detail {

constexpr int kThreads = 128;
constexpr int kStates = 16;  // states of a channel that a block holds at a time
constexpr int kChunk = static_cast<int>(kScanChunk);

// A parameter, (D) or (D, N), in the storage type of the activations or in float.
template <class S>
struct Parameter {
  const void* data = nullptr;
  int64_t step[2] = {};
  bool plain = false;  // float

  Parameter() = default;
  template <int N>
  explicit Parameter(const View<N>& v) : data(v.data), plain(v.dtype == DType::f32) {
    for (int n = 0; n < N; ++n) step[n] = v.step(n);
  }
  RECURRA_FN Compute<S> at(int64_t i, int64_t j = 0) const {
    const int64_t n = i * step[0] + j * step[1];
    return plain ? static_cast<Compute<S>>(static_cast<const float*>(data)[n])
                 : load(static_cast<const S*>(data) + n);
  }
  RECURRA_FN void put(int64_t i, int64_t j, Compute<S> value) const {
    const int64_t n = i * step[0] + j * step[1];
    void* const to = const_cast<void*>(data);
    if (plain)
      static_cast<float*>(to)[n] = static_cast<float>(value);
    else
      store(static_cast<S*>(to) + n, value);
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

template <class S>
struct Inputs {
  Array<S, 3> u, delta, z;
  Array<S, 4> B, C;
  Parameter<S> A, D, bias;
  Integers cu_seqlens;
  Blocks blocks;
  int64_t sequences, time, u_rows, channels, states;  // u_rows: B T
  bool softplus;

  Inputs(const SelectiveScanInputs& args, const Indices& offsets, int64_t width)
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
        softplus(args.delta_softplus) {}

  // Sixteen states at a time; one pass that does nothing where there are none.
  RECURRA_FN int64_t passes() const {
    return states > kStates ? (states + kStates - 1) / kStates : 1;
  }
  RECURRA_FN Compute<S> bias_of(int64_t c) const { return bias.data ? bias.at(c) : Compute<S>(0); }
  RECURRA_FN Compute<S> skip_of(int64_t c) const { return D.data ? D.at(c) : Compute<S>(0); }
  // The row of the states saved before step t of a sequence, as Sequences::chunk_row has it.
  RECURRA_FN int64_t saved_row(int64_t n, const Extent& s, int64_t t) const {
    const int64_t before =
        cu_seqlens.data ? s.begin / kScanChunk + n : n * ((time + kScanChunk - 1) / kScanChunk);
    return before + t / kScanChunk;
  }
};

// Calls f with a value of the storage type.
template <class F>
void with_storage(DType dtype, const char* failure, F f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::bf16: return f(BFloat16{});
    case DType::f16: return f(Half{});
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

}  // namespace selective_scan_detail
}  // namespace recurra::cuda
