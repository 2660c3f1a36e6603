#include "causal_conv1d/tiles.h"

namespace recurra::RECURRA_ISA {
namespace {

using namespace conv;

template <class T>
void step(const CausalConv1dStep& args) {
  constexpr int64_t kWidth = 128, kRows = 16;
  const int64_t rows = args.x.size[0], channels = args.x.size[1], W = args.weight.size[1];
  const int64_t blocks = (channels + kWidth - 1) / kWidth, groups = (rows + kRows - 1) / kRows;
  const auto one = [&](int64_t task) {
    const int64_t c0 = task % blocks * kWidth, nc = least(kWidth, channels - c0);
    Scratch<T> scratch((2 * W + 2) * kWidth);
    T *weight_buffer = scratch.take(W * kWidth), *bias_buffer = scratch.take(kWidth),
      *inputs = scratch.take(W * kWidth), *out = scratch.take(kWidth);
    const Parameters<T> p =
        load_parameters<T>(args.weight, args.bias, c0, nc, weight_buffer, bias_buffer, kWidth);
    const auto load_rows = [&](const Plane& from, int64_t count, T* to) {
      const Tile<T> tile = load_tile<T>(from, count, nc, to, kWidth);
      if (tile.data == to) return;
      for (int64_t j = 0; j < count; ++j)
        __builtin_memcpy(to + j * kWidth, tile.row(j), nc * sizeof(T));
    };
    for (int64_t n = task / blocks * kRows; n < least(rows, (task / blocks + 1) * kRows); ++n) {
      const int64_t slot = args.slots ? args.slots[n] : n;
      if (slot < 0) {
        for (int64_t c = 0; c < kWidth; ++c) out[c] = T(0);
      } else {
        const Plane all = plane(args.h, {slot, 0, args.h.size[1]}, false, c0);
        load_rows(plane(args.x, n, c0), 1, inputs + (W - 1) * kWidth);  // which may lie in h
        const int64_t older = args.h.size[1] - (W - 1);                 // than what this step sees
        for (int64_t j = 0; j < older; ++j) {
          load_rows(all.at(j + 1, 0), 1, inputs);
          store_tile<T>(all.at(j, 0), 1, nc, inputs, kWidth, false);
        }
        const Plane h = all.at(older, 0);
        load_rows(h, W - 1, inputs);
        for (int64_t c = 0; c < nc; c += kLanes) {
          Vec<T> v = Vec<T>::load(p.bias.data + c);
          for (int64_t j = 0; j < W; ++j)
            v = fma(Vec<T>::load(p.weight.row(j) + c), Vec<T>::load(inputs + j * kWidth + c), v);
          if (args.silu) v = silu(v);
          v.store(out + c);
        }
        store_tile<T>(h, W - 1, nc, inputs + kWidth, kWidth, false);
      }
      store_tile<T>(plane(args.out, n, c0), 1, nc, out, kWidth, false);
    }
  };
  // Threads cost more than they save below some tens of thousands of elements.
  if (rows * channels < 1 << 16)
    for (int64_t task = 0; task < groups * blocks; ++task) one(task);
  else
    parallel(groups * blocks, one);
}

}  // namespace

void causal_conv1d_step(const CausalConv1dStep& args) {
  computes_in_double(args.x.dtype) ? step<double>(args) : step<float>(args);
}

}  // namespace recurra::RECURRA_ISA
