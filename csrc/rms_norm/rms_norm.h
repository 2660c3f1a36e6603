// rms_norm: y = x rstd weight with rstd = 1 / sqrt(mean(x^2) + eps) over the channels of a row, and
// its gradients. With n = x rstd and g = dy weight,
//
//   dx = (g - n mean(g n)) rstd,   dweight = sum over the rows of dy n.
//
// A mean takes 64 sums, sum i over the channels i, i + 64, ... in ascending order, one fused
// multiply-add each, and adds them by the tree of sum(): i and i + 32, then 16, 8, 4, 2, 1.
// dweight is summed over the rows of a chunk in ascending order, one fused multiply-add each, and
// these sums are added in the order of the chunks.
#pragma once
#include "cuda/stream.h"
#include "simd/isa.h"
#include "view.h"

namespace recurra {

// How rows, B T of them, are cut into tasks, each with a sum of dweight: by shape alone.
struct NormChunks {
  static constexpr int64_t kSmallest = 1 << 14;  // numbers of a chunk, about,
  static constexpr int64_t kMost = 64;           // unless that makes more chunks

  int64_t rows = 0, each = 1;

  RECURRA_EVERYWHERE NormChunks(int64_t rows, int64_t channels) : rows(rows) {
    const int64_t wide = channels > 0 ? (kSmallest + channels - 1) / channels : kSmallest;
    const int64_t many = (rows + kMost - 1) / kMost;
    each = wide > many ? wide : many;
  }
  RECURRA_EVERYWHERE int64_t count() const { return (rows + each - 1) / each; }
};

struct RmsNorm {
  View<3> x;       // (B, T, D)
  View<1> weight;  // (D)
  double eps = 0;
  View<3> y;     // (B, T, D)
  View<2> rstd;  // (B, T), in the compute type

  RECURRA_EVERYWHERE NormChunks chunks() const {
    return NormChunks(x.size[0] * x.size[1], x.size[2]);
  }
};

struct RmsNormBackward {
  View<3> dy, x;         // (B, T, D)
  View<1> weight;        // (D)
  View<2> rstd;          // (B, T), in the compute type
  View<3> dx;            // (B, T, D)
  View<1> dweight;       // (D)
  void* sums = nullptr;  // (chunks().count(), padded()) of the compute type

  RECURRA_EVERYWHERE NormChunks chunks() const {
    return NormChunks(x.size[0] * x.size[1], x.size[2]);
  }
  RECURRA_EVERYWHERE int64_t padded() const { return (x.size[2] + 15) / 16 * 16; }
};

}  // namespace recurra

RECURRA_KERNEL(rms_norm, RmsNorm)
RECURRA_KERNEL(rms_norm_backward, RmsNormBackward)

namespace recurra::cuda {
void rms_norm(const RmsNorm& args, const Stream& stream);
void rms_norm_backward(const RmsNormBackward& args, const Stream& stream);
}  // namespace recurra::cuda
