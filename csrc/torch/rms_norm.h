// What the ops of rms_norm check and allocate on either device.
#pragma once
#include "rms_norm/rms_norm.h"

#include <tuple>

#include "torch/check.h"

namespace recurra::rms_norm_ops {

// (B, D) as (1, B, D), and (B, T, D) as it is; likewise rstd, whose rows are one number.
template <int N>
View<N> rows(const Tensor& t) {
  if (t.dim() == N) return view<N>(t);
  const View<N - 1> v = view<N - 1>(t);
  View<N> w{v.data, v.dtype, {1}, {0}};
  for (int n = 1; n < N; ++n) {
    w.size[n] = v.size[n - 1];
    w.stride[n] = v.stride[n - 1];
  }
  return w;
}

// Whether the first dimensions of t are all that it has and as large as those of x.
inline bool leads(const Tensor& t, const Tensor& x, int64_t dimensions) {
  if (t.dim() != dimensions) return false;
  for (int64_t n = 0; n < dimensions; ++n)
    if (t.size(n) != x.size(n)) return false;
  return true;
}

struct Forward {
  Tensor y, rstd;
  RmsNorm args;

  Forward(const Tensor& x, const Tensor& weight, double eps) : y(x), rstd(x) {
    check("_rms_norm", {{"x", x}, {"weight", weight}});
    const DType compute = state_dtype(dtype_of(x));
    y = empty_like(x);
    rstd =
        x.dim() == 2 ? empty(x, {x.size(0)}, compute) : empty(x, {x.size(0), x.size(1)}, compute);
    args.x = rows<3>(x);
    args.weight = view<1>(weight);
    args.eps = eps;
    args.y = rows<3>(y);
    args.rstd = rows<2>(rstd);
  }
};

struct Backward {
  Tensor dx, dweight, sums;
  RmsNormBackward args;

  Backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd)
      : dx(x), dweight(x), sums(x) {
    constexpr const char* op = "_rms_norm_backward";
    check(op, {{"x", x}, {"weight", weight}, {"dy", dy}, {"rstd", rstd}});
    if (!leads(dy, x, x.dim()))
      fail(op, "dy must have the shape of x, " + shape_of(x) + ", got " + shape_of(dy));
    if (!leads(rstd, x, x.dim() - 1))
      fail(op, "rstd must have the shape of x, " + shape_of(x) +
                   ", without its last dimension, got " + shape_of(rstd));
    args.dy = rows<3>(dy);
    args.x = rows<3>(x);
    args.weight = view<1>(weight);
    args.rstd = rows<2>(rstd);
    dx = empty_like(x), dweight = empty_like(weight);
    sums = scratch(x, {args.chunks().count(), args.padded()}, state_dtype(args.x.dtype));
    args.dx = rows<3>(dx);
    args.dweight = view<1>(dweight);
    args.sums = sums.data_ptr();
  }
};

}  // namespace recurra::rms_norm_ops
