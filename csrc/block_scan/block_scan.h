// block_scan: h_t = A_t h_{t-1} + b_t, h_0 given, where the state is cut into blocks of k numbers
// and A_t is a k x k matrix for each; with `reverse` time runs from the last step to the first. The
// recurrence of LSSL (Gu et al. 2021) and of linear recurrences that compose permutations (Grazzi
// et al. 2025; Merrill et al. 2024), which no diagonal one can.
//
// Row i of a step adds to b the products of the row of A in order, a fused multiply-add each:
//   h_t[i] = fma(A_t[i, k-1], h_{t-1}[k-1], ... fma(A_t[i, 0], h_{t-1}[0], b_t[i]))
//
// Backward, for the cotangents dh of h and dh_last of the last state:
//   g_t = dh_t + A_{t+1}^T g_{t+1},  g_T has dh_last added
//   db_t = g_t,  dA_t = g_t h_{t-1}^T,  dh_0 = A_1^T g_1
#pragma once
#include "cuda/indices.h"
#include "cuda/stream.h"
#include "simd/isa.h"
#include "view.h"

namespace recurra {

// A step is one of them with sequences of one step and slots.
struct BlockScan {
  View<5> A;           // (B, T, N, k, k); any of the first three may be 1
  View<4> b, h;        // (B, T, N, k)
  View<3> h0, h_last;  // (S, N, k)
  Sequences sequences;
  const int64_t* slots = nullptr;  // state of each sequence; negative: skip and return zeros
  bool reverse = false;
};

struct BlockScanBackward {
  View<5> A, dA;
  View<4> h, dh, db;
  View<3> h0, dh_last, dh0;
  Sequences sequences;
  bool reverse = false;
  void* partial = nullptr;  // partial_size() zeros of the compute type

  bool over_batch() const { return A.size[0] != h.size[0]; }
  bool over_time() const { return A.size[1] == 1 && h.size[1] != 1; }
  bool over_blocks() const { return A.size[2] != h.size[2]; }
  bool reduced() const { return over_batch() || over_time() || over_blocks(); }

  // Runs of sequences that one task walks in order, because they add into the same sums.
  int64_t runs() const {
    const int64_t count = sequences.count;
    if (!over_time()) return over_batch() ? 1 : count;
    if (!over_batch() && !sequences.offsets) return count;
    return count < 1 ? 1 : count < 8 ? count : 8;
  }
  // Groups of sixteen blocks; some may be left over.
  int64_t groups() const { return h.size[2] / 16 + 17; }
  // Of a gradient over time: (runs, groups, k k, 16). Otherwise (B, T of A, groups, k k, 16), or of
  // 1 instead of 16 where blocks share their matrix.
  int64_t partial_size() const {
    if (!reduced()) return 0;
    const int64_t rows = over_time() ? runs() : A.size[0] * A.size[1];
    return rows * groups() * A.size[3] * A.size[4] * (over_time() || !over_blocks() ? 16 : 1);
  }
};

}  // namespace recurra

RECURRA_KERNEL(block_scan, BlockScan)
RECURRA_KERNEL(block_scan_backward, BlockScanBackward)

namespace recurra::cuda {

// Where time is split: the product of the matrices of each part, (S, parts, N, k, k), and the state
// before it, (S, parts, N, k), both in double; null views otherwise.
struct BlockScanParts {
  View<5> products;
  View<4> states;

  int64_t count() const { return products ? products.size[1] : 1; }
};
// How many parts each of the sequences, of `steps` together, has for the kernels; 1: time is not
// split.
int64_t block_scan_parts(int64_t sequences, int64_t steps, int64_t blocks, int64_t k, DType dtype);

// On the device: neither sequences nor slots are in the arguments but in cu_seqlens and slots
// there, null views for none. Only what has no slots may be split.
void block_scan(const BlockScan& args, const Indices& cu_seqlens, const Indices& slots,
                const BlockScanParts& parts, const Stream& stream);
// `partial` of the arguments is of the CPU alone, `scratch` has that many numbers of the compute
// type.
int64_t block_scan_backward_scratch(const BlockScanBackward& args, int64_t parts);
void block_scan_backward(const BlockScanBackward& args, const Indices& cu_seqlens, void* scratch,
                         const BlockScanParts& parts, const Stream& stream);
}  // namespace recurra::cuda
