// rnn: any cell of csrc/cells along time, channel by channel, h_t = step(x_t, h_{t-1}, p).
//
// Sequentially, lanes are channels. By Newton's method lanes are stretches of time of one channel
// (multiple shooting): the unknowns are the states s_k at the starts of the stretches alone. A pass
// runs every stretch from its start, which gives its end e_k and the product P_k of the Jacobians
// along it, and the starts then move by
//   d_0 = 0,  d_{k+1} = e_k - s_{k+1} + P_k d_k,
// Newton's step for s_{k+1} = e_k. Inside a stretch nothing is approximate, and a mismatch
// e_k - s_{k+1} of 0 at every boundary means that the result is the sequential one, bit for bit.
// Keller 1968, "Numerical methods for two-point boundary-value problems"; Bock and Plitt 1984. The
// first starts are the ends of short runs from an empty state, since most cells forget.
//
// The textbook form (DEER, Lim et al. 2024; ParaRNN, Danieli et al. 2025) has all h_t as unknowns:
//   d_t = step(x_t, h_{t-1}, p) - h_t + J_t d_{t-1},  from h_t = step(x_t, 0, p).
//
// Backward, mu_t the cotangent of h_t, L = d step / d (x, h, p) at (x_t, h_{t-1}, p):
//   mu_t += dh_t,  (dx_t, mu_{t-1}, dp +=) = L' mu_t
#pragma once
#include "cuda/indices.h"
#include "cuda/stream.h"
#include "simd/isa.h"
#include "view.h"

namespace recurra {

// Steps between two saved states; the backward holds this many at a time.
constexpr int64_t kRnnChunk = 32;
// Runs of sequences that a backward sums by themselves, at most.
constexpr int64_t kRnnMostParts = 8;
// Columns of a span of sequences that share vectors.
constexpr int64_t kRnnColumns = 64;

// What forward and backward are both given.
struct RnnInputs {
  int cell = 0;    // its place in the list of csrc/cells/all.h
  View<4> x;       // (B, T, G, N)
  View<2> params;  // (P, N)
  View<3> h0;      // (S, states, N)
  View<2> reset;   // (B, T) of bool: the state before this step is zero
  Sequences sequences;

  int64_t padded() const { return (x.size[3] + 15) / 16 * 16; }
  // Sequences whose channels are columns of one span, at most: several where a vector has room for
  // them and all have the same steps.
  int64_t together() const {
    const bool apart = sequences.offsets || reset || x.size[3] >= 16 || x.size[3] < 1;
    return apart ? 1 : kRnnColumns / x.size[3];
  }
};

// As Sequences::chunk_rows(kRnnChunk), where the offsets of packed sequences are on a device.
inline int64_t rnn_chunk_rows(const Sequences& s, bool packed) {
  return packed ? s.time / kRnnChunk + s.count : s.count * ((s.time + kRnnChunk - 1) / kRnnChunk);
}

struct Rnn : RnnInputs {
  View<3> h_last;
  View<4> y;              // (B, T, 1, N), or (B, T, states, N)
  void* saved = nullptr;  // (chunk rows, states, padded) in the compute type, the state before
                          // each chunk; or null
  const int64_t* slots = nullptr;  // state of each sequence; negative: skip and return zeros
};

// What Newton's method leaves, one for each sequence and channel: the passes that it took, the
// largest mismatch of the last one, and whether that is as good as the sequential result. Where it
// is not, the sequential result is what is returned.
struct NewtonReport {
  int32_t* passes = nullptr;
  double* mismatch = nullptr;
  bool* converged = nullptr;
};

struct RnnNewton : Rnn {
  int64_t chunk = 0;    // steps of a stretch
  int64_t warm_up = 0;  // steps of the runs that give the first starts
  int64_t max_passes = 0;
  NewtonReport report;
  // In the compute type, zeros: newton_rows(states) rows of lanes for each channel, those of
  // sequence n from its lanes_before on.
  void* workspace = nullptr;
  const int64_t* lanes_before = nullptr;  // (S + 1)
  bool* done = nullptr;                   // (S, N)
};

// A stretch is whole chunks, and a sequence's stretches are its whole chunks.
constexpr RECURRA_EVERYWHERE int64_t newton_blocks(int64_t chunk) {
  return (chunk + kRnnChunk - 1) / kRnnChunk;
}
constexpr RECURRA_EVERYWHERE int64_t newton_stretches(int64_t steps, int64_t chunk) {
  const int64_t blocks = newton_blocks(chunk);
  return (steps / kRnnChunk + blocks - 1) / blocks;
}
// Channels that are computed sequentially together, where one of them has not converged.
constexpr RECURRA_EVERYWHERE int64_t newton_group(int64_t channels) {
  return channels < 64 ? channels : 64;
}
// Lanes of a channel: one for each stretch, in whole vectors.
constexpr RECURRA_EVERYWHERE int64_t newton_lanes(int64_t steps, int64_t chunk) {
  return (newton_stretches(steps, chunk) + 15) / 16 * 16;
}
constexpr RECURRA_EVERYWHERE int64_t newton_rows(int64_t states) { return states * (3 + states); }

struct RnnGlobalNewton : Rnn {
  int64_t max_passes = 0;
  NewtonReport report;
  void* workspace = nullptr;  // (B, T, states, padded) in the compute type
};

struct RnnBackward : RnnInputs {
  View<4> dy;
  View<3> dh_last;
  const void* saved = nullptr;
  View<4> dx;
  View<2> dparams;  // or none, where the sums of the runs are what is wanted
  View<3> dh0;
  // Sequences are walked in `parts` runs, at most kRnnMostParts, each with sums of its own.
  int64_t parts = 1;
  void* sums = nullptr;  // (parts, P, padded) in the compute type, zeros
};

}  // namespace recurra

RECURRA_KERNEL(rnn, Rnn)
RECURRA_KERNEL(rnn_newton, RnnNewton)
RECURRA_KERNEL(rnn_global_newton, RnnGlobalNewton)
RECURRA_KERNEL(rnn_backward, RnnBackward)

namespace recurra::cuda {

// Where a call leaves its report, on the device: the largest number of passes, the largest
// mismatch, in the compute type, and how many sequences by channels were computed sequentially.
struct NewtonSummary {
  int32_t* passes = nullptr;
  void* mismatch = nullptr;
  int32_t* failures = nullptr;
};

// Sequentially. cu_seqlens (S + 1) and slots (S) lie on the device, with null `offsets` and `slots`
// in args; a slot past the states is skipped like a negative one. `summary` may be null, and gets
// no failures; without any channels of a sequence nothing starts and nothing is written.
void rnn(const Rnn& args, const Indices& cu_seqlens, const Indices& slots,
         const NewtonSummary& summary, const Stream& stream);

// Stretches of all sequences, at most.
inline int64_t newton_rows_on_device(const Sequences& s, bool packed, int64_t chunk) {
  const int64_t steps = newton_blocks(chunk) * kRnnChunk;
  return packed ? s.time / steps + s.count : s.count * ((s.time + steps - 1) / steps);
}
// args.report and args.done lie on the device, lanes_before is not used. The workspace is for
// newton_rows(states) rows for each channel, of a number for each of newton_rows_on_device, and
// `taken` (S, N) is one more. Kernels start for max_passes passes, whether they are needed or not.
void rnn_newton(const RnnNewton& args, const Indices& cu_seqlens, int64_t* taken,
                const NewtonSummary& summary, const Stream& stream);

// chunk_sums: (chunk rows, P, padded) in the compute type; args.sums is not used.
void rnn_backward(const RnnBackward& args, const Indices& cu_seqlens, void* chunk_sums,
                  const Stream& stream);

}  // namespace recurra::cuda
