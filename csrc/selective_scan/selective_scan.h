// selective_scan (S6): Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State
// Spaces", section 3.2. For every channel d with its N states,
//   dt_t = softplus(delta_t + delta_bias)      (or without the softplus)
//   h_t  = exp(dt_t A) h_{t-1} + dt_t u_t B_t
//   y_t  = f Re(sum_n C_t h_t) + D u_t,  times silu(z_t)
// with f = 1, or 2 where A is complex (one of a conjugate pair stands for both). B and C are
// shared by the channels of a group.
//
// Backward, with Y_t the cotangent of y before the gate and a_t = exp(dt_t A):
//   g_t  = f Y_t conj(C_t) + conj(a_{t+1}) g_{t+1},  the last one has dh_last added
//   dC_t = f sum_d Y_t conj(h_t),  dB_t = sum_d g_t dt_t u_t
//   p_t  = Re sum_n g_t conj(B_t),  q_t = g_t conj(a_t h_{t-1})
//   dA   = sum_{b,t} dt_t q_t,  d(dt)_t = u_t p_t + Re sum_n conj(A) q_t
//   du_t = dt_t p_t + D Y_t,  dD = sum Y_t u_t,  dh_0 = conj(a_1) g_1
//   dz_t = dout_t y_t silu'(z_t)
// where q_t uses a_t h_{t-1} itself and not h_t minus the input, which would cancel.
#pragma once
#include "cuda/indices.h"
#include "cuda/stream.h"
#include "simd/isa.h"
#include "view.h"

namespace recurra {

// Steps between two saved states; a task holds this many at a time.
constexpr int64_t kScanChunk = 32;

// States that a task keeps on its stack.
constexpr int64_t kFewStates = 16;

// Channels in the order in which kernels hold them: group by group, each padded to whole vectors,
// in spans of at most kSpanBlocks vectors that do not cross a group.
struct Spans {
  static constexpr int64_t kLanes = 16, kSpanBlocks = 8;

  int64_t groups = 1, group_channels = 0, group_blocks = 0, per_group = 0, blocks = 0;

  Spans() = default;
  Spans(int64_t channels, int64_t group_count, int64_t blocks_per_span)
      : groups(group_count),
        group_channels(group_count ? channels / group_count : 0),
        group_blocks((group_channels + kLanes - 1) / kLanes),
        per_group((group_blocks + blocks_per_span - 1) / blocks_per_span),
        blocks(blocks_per_span) {}

  int64_t count() const { return groups * per_group; }
  int64_t padded() const { return groups * group_blocks * kLanes; }
  int64_t group(int64_t span) const { return span / per_group; }
  int64_t first_in_group(int64_t span) const { return span % per_group * blocks * kLanes; }
  int64_t first(int64_t span) const { return group(span) * group_channels + first_in_group(span); }
  int64_t channels(int64_t span) const {
    const int64_t left = group_channels - first_in_group(span);
    return left < blocks * kLanes ? left : blocks * kLanes;
  }
  // Where the span's lanes start in padded order.
  int64_t lane(int64_t span) const {
    return group(span) * group_blocks * kLanes + first_in_group(span);
  }
};

// The real or imaginary numbers of a view that may be complex; nothing for the imaginary part of
// a real one.
template <int N>
RECURRA_EVERYWHERE View<N> part(const View<N>& v, int i) {
  if (!v || !is_complex(v.dtype)) return i == 0 ? v : View<N>();
  View<N> p = v;
  p.dtype = v.dtype == DType::c128 ? DType::f64 : DType::f32;
  p.data = static_cast<char*>(v.data) + i * item_size(p.dtype);
  for (int n = 0; n < N; ++n) p.stride[n] *= 2;
  return p;
}

// What forward and backward are both given.
struct SelectiveScanInputs {
  View<3> u, delta, z;  // (B, T, D)
  View<2> A;            // (D, N)
  View<4> B, C;         // (B, T, G or 1, N)
  View<1> D, delta_bias;
  bool delta_softplus = false;
  bool complex = false;  // whether A is
  Sequences sequences;
  Spans spans;

  int64_t states() const { return A.size[1]; }
  int64_t rows() const { return (complex ? 2 : 1) * states(); }  // of lanes: parts times N
  // The row of saved states of chunk k of sequence n.
  int64_t chunk_row(int64_t n, int64_t k) const { return sequences.chunk_row(n, k, kScanChunk); }
  int64_t chunk_rows() const { return sequences.chunk_rows(kScanChunk); }
};

// Scratch is in the compute type and in lanes: the last dimension is spans.padded().
struct SelectiveScan : SelectiveScanInputs {
  View<3> h0, h_last;       // (S, D, N)
  View<3> y;                // (B, T, D)
  void* lanes_A = nullptr;  // (rows, padded)
  void* state = nullptr;    // (S, rows, padded); null where there are at most kFewStates
  void* saved = nullptr;    // (chunk_rows, rows, padded), the state before each chunk, or null
  const int64_t* slots = nullptr;  // state of each sequence; negative: skip and return zeros
};

struct SelectiveScanBackward : SelectiveScanInputs {
  View<3> dy, dh_last;
  const void* saved = nullptr;
  View<3> du, ddelta, dz, dh0;
  View<2> dA;
  View<4> dB, dC;
  View<1> dD, ddelta_bias;
  // Sequences are walked in `parts` runs, each with sums of its own.
  int64_t parts = 1;
  void* lanes_A = nullptr;  // (rows, padded)
  void* carry = nullptr;    // (parts, rows, padded)
  void* sum_A = nullptr;    // (parts, rows, padded), zeros
  void* sum_D = nullptr;    // (parts, 2, padded), zeros: dD, ddelta_bias
  void* sum_BC = nullptr;   // (2, span, B T, rows)
};

}  // namespace recurra

RECURRA_KERNEL(selective_scan, SelectiveScan)
// Sequences of one step with h0 and h_last the same view.
RECURRA_KERNEL(selective_scan_step, SelectiveScan)
RECURRA_KERNEL(selective_scan_backward, SelectiveScanBackward)

namespace recurra::cuda {
// On the device. The sequences have no offsets: these are in cu_seqlens there, as slots are in
// `slots`, a null view for none. Of the scratch only `saved` is used.

// The rows of `saved`, which chunk_rows cannot tell where the offsets are on the device.
inline int64_t saved_rows(const Sequences& sequences, bool packed) {
  if (packed) return sequences.time / kScanChunk + sequences.count;
  return sequences.chunk_rows(kScanChunk);
}

// Where time is split: the sum of the step sizes of each part, in double, (S parts, D), and the
// state before it, (S parts, D, N), as h_last is stored. Both are contiguous and uninitialised. The
// backward counts parts from the end and has what is handed to each from behind.
struct SelectiveScanParts {
  int64_t count = 1;  // of each sequence
  View<2> sums;
  View<3> states;
};
// The count for the kernels of either direction; 1: time is not split.
int64_t selective_scan_parts(const SelectiveScanInputs& args);

void selective_scan(const SelectiveScan& args, const Indices& cu_seqlens,
                    const SelectiveScanParts& parts, const Stream& stream);
void selective_scan_step(const SelectiveScan& args, const Indices& slots, const Stream& stream);

// Channels of a block of the backward. Its scratch, uninitialised, in the compute type:
//   sum_A (S parts, rows, D), sum_D (2, S parts, D), sum_BC (2, blocks, B T, rows)
constexpr int64_t backward_channels(DType d, bool complex) {
  return computes_in_double(d) || complex ? 32 : 64;
}
void selective_scan_backward(const SelectiveScanBackward& args, const Indices& cu_seqlens,
                             const SelectiveScanParts& parts, const Stream& stream);
}  // namespace recurra::cuda
