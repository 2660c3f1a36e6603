// linear_step: y = x W^T + b for the few rows of x of a decoding step. A weight serves one product
// a row, so reading the weights once from memory is the whole cost.
//
// Sixteen sums of each y_bn, lane l over the columns l, l + 16, ... in ascending order, one fused
// multiply-add each; these added by the tree of sum(); then the bias.
#pragma once
#include "cuda/stream.h"
#include "simd/isa.h"
#include "view.h"

namespace recurra {

struct LinearStep {
  View<2> x, weight;  // (B, K), (N, K)
  View<1> bias;       // (N)
  View<2> y;          // (B, N)
  // Where copies_x() says so: room for x in the compute type, (B, K rounded up to sixteens), rows
  // contiguous.
  View<2> copy;

  // Whether the rows of x are not yet whole vectors of the compute type.
  RECURRA_EVERYWHERE bool copies_x() const {
    return item_size(x.dtype) == 2 || x.size[1] % 16 != 0 || x.step(1) != 1;
  }
};

}  // namespace recurra

RECURRA_KERNEL(linear_step, LinearStep)

namespace recurra::cuda {
// In another order: a warp's lanes take columns, and a tree adds them. There is no copy.
void linear_step(const LinearStep& args, const Stream& stream);
}  // namespace recurra::cuda
