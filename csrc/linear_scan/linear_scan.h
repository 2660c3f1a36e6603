// linear_scan: h_t = a_t * h_{t-1} + b_t, elementwise, h_0 given; with `reverse` time runs from
// the last step to the first. Blelloch 1990 names the recurrence; Martin & Cundy 2018 (ICLR)
// its use in recurrent networks.
//
// Backward, for the cotangents dh of h and dh_last of the last state:
//   g_t = dh_t + a_{t+1} g_{t+1},  g_T has dh_last added
//   db_t = g_t,  da_t = g_t h_{t-1},  dh_0 = a_1 g_1
// and, where the gate came as a logarithm, da_t = g_t a_t h_{t-1}. Of complex numbers a_{t+1}, a_1
// and h_{t-1}, with a_t before it, are conjugate there: gradients are torch's.
#pragma once
#include "cuda/indices.h"
#include "cuda/stream.h"
#include "simd/isa.h"
#include "view.h"

namespace recurra {

struct LinearScan {
  View<3> a, b, h;  // (B, T, D); any dimension of a may be 1
  View<2> h0, h_last;
  Sequences sequences;
  bool log_a = false, reverse = false;
};

struct LinearScanBackward {
  View<3> a, h, dh;
  View<2> h0, dh_last;
  View<3> da, db;
  View<2> dh0;
  // For a broadcast `a`: partial sums in the compute type, (B, T, D) of a, except that a D of 1
  // becomes ceil(D / 16) of h, one sum for each sixteen channels, and where a has neither batch nor
  // time every sequence has sums of its own.
  View<3> partial;
  Sequences sequences;
  bool log_a = false, reverse = false;

  // Whether one `a` serves all sequences at all times.
  RECURRA_EVERYWHERE bool constant() const { return a.size[0] == 1 && a.size[1] == 1; }
  // Where the partial sums of a sequence are.
  RECURRA_EVERYWHERE Sequence sums_of(int64_t n) const {
    return constant() ? Sequence{n, 0, 1} : sequences[n];
  }
  // Sequences that a task walks in order: all that add into the same sums.
  RECURRA_EVERYWHERE int64_t owned() const {
    const bool shared =
        partial && sequences.count > 1 && !constant() && !sequences.offsets && a.size[0] == 1;
    return shared ? sequences.count : 1;
  }
};

struct LinearScanStep {
  View<2> h, a, b, out;            // h (slots, D); a, b, out (B, D)
  const int64_t* slots = nullptr;  // state of each row; negative: skip and return zeros
  bool log_a = false;
};

}  // namespace recurra

RECURRA_KERNEL(linear_scan, LinearScan)
RECURRA_KERNEL(linear_scan_backward, LinearScanBackward)
RECURRA_KERNEL(linear_scan_step, LinearScanStep)
// The same of complex numbers.
RECURRA_KERNEL(complex_scan, LinearScan)
RECURRA_KERNEL(complex_scan_backward, LinearScanBackward)
RECURRA_KERNEL(complex_scan_step, LinearScanStep)

// On the device: the sequences have no offsets and the step no slots, these are in cu_seqlens and
// slots there, null views for none.
namespace recurra::cuda {

// Where time is split: the product of the gates of each part, in double, and the state before it,
// in the compute type, both (S, parts, D); null views otherwise.
struct ScanParts {
  View<3> products, states;
};
// How many parts each of the sequences, of `steps` together, has for the kernels; 1: time is not
// split.
int64_t linear_scan_parts(int64_t sequences, int64_t steps, int64_t channels, DType dtype);

// The first dimension of the partial sums here, the others are as on the CPU: each part of each
// sequence has sums of its own where `a` has no time, and each batch row otherwise.
int64_t linear_scan_sums(const LinearScanBackward& args, int64_t parts);

void linear_scan(const LinearScan& args, const Indices& cu_seqlens, const ScanParts& parts,
                 const Stream& stream);
void linear_scan_backward(const LinearScanBackward& args, const Indices& cu_seqlens,
                          const ScanParts& parts, const Stream& stream);
void linear_scan_step(const LinearScanStep& args, const Indices& slots, const Stream& stream);

namespace linear_scan_detail {
void combine_parts(const View<2>& first, const ScanParts& parts, const Stream& stream);
}
}  // namespace recurra::cuda
