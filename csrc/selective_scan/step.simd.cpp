// One step of every sequence, where the states of a channel lie side by side, as they do in a
// decoding cache: the lanes are then states, sixteen of one channel, and only the new states are
// transposed, for the readout. The operations on each number and the order of every sum are those
// of the forward, so a step has its bits.
#include "selective_scan/lanes.h"

namespace recurra::RECURRA_ISA {
namespace {

// y + C h over `count` states of sixteen channels, row n of h being state n, in the groups in
// which the forward sums.
template <class T>
RECURRA_INLINE Vec<T> read_out(const Vec<T> (&h)[kLanes], const T* C, int64_t count, Vec<T> y) {
  int64_t n = 0;
  while (n < count) {
    const int64_t end = count - n >= kReadout ? n + kReadout : n + 1;
    Vec<T> sum(T(0));
    for (; n < end; ++n) sum = add_real(Vec<T>(C[n]), h[n], sum);
    y = fma(sum, Vec<T>(T(1)), y);
  }
  return y;
}

template <class T>
void run(const SelectiveScan& args) {
  const Spans& spans = args.spans;
  const int64_t states = args.states();
  const auto task = [&](int64_t index) {
    const int64_t n = index / spans.count(), span = index % spans.count();
    const int64_t c0 = spans.first(span), nc = spans.channels(span), group = spans.group(span);
    const int64_t slot = args.slots ? args.slots[n] : n;
    const Sequence s = args.sequences[n];
    T y_row[kWidth] __attribute__((aligned(64)));
    const Plane out = plane(args.y, s, false, c0);
    if (slot < 0) {
      zero_rows(y_row, 1, whole(nc), kWidth);
      return store_tile<T>(out, 1, nc, y_row, kWidth, false);
    }
    T u_row[kWidth] __attribute__((aligned(64))), delta_row[kWidth] __attribute__((aligned(64)));
    T z_row[kWidth] __attribute__((aligned(64)));
    T bias[kWidth] __attribute__((aligned(64))), skip[kWidth] __attribute__((aligned(64)));
    StateRows<T> B, C;
    load_channels(args.delta_bias, c0, nc, bias);
    load_channels(args.D, c0, nc, skip);
    const auto u = stored_rows<T>(plane(args.u, s, false, c0), 1, nc, u_row, kWidth);
    const auto delta = stored_rows<T>(plane(args.delta, s, false, c0), 1, nc, delta_row, kWidth);
    const auto z = stored_rows<T>(plane(args.z, s, false, c0), 1, nc, z_row, kWidth);
    T dt_row[kWidth] __attribute__((aligned(64))), dtu_row[kWidth] __attribute__((aligned(64)));
    for (int64_t c = 0; c < nc; c += kLanes) {
      const int lanes = at_most_lanes(nc - c);
      Vec<T> dt = delta.at(0, c, lanes) + Vec<T>::load(bias + c);
      if (args.delta_softplus) dt = softplus(dt);
      const Vec<T> x = u.at(0, c, lanes);
      dt.store(dt_row + c);
      (dt * x).store(dtu_row + c);
      (args.D ? x * Vec<T>::load(skip + c) : Vec<T>(T(0))).store(y_row + c);
    }
    for (int64_t n0 = 0; n0 < states; n0 += kStates) {
      const int count = at_most_lanes(states - n0);
      load_BC(args.B, s, 0, 1, group, n0, count, 1, B);
      load_BC(args.C, s, 0, 1, group, n0, count, 1, C);
      const Vec<T> b = Vec<T>::load(B.x[0]);
      for (int64_t c = 0; c < nc; c += kLanes) {
        const int lanes = at_most_lanes(nc - c);
        Vec<T> h[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          if (i >= lanes) {
            h[i] = Vec<T>(T(0));
            continue;
          }
          T* const at = reinterpret_cast<T*>(args.h_last.at(slot, c0 + c + i, n0));
          const Vec<T> a = load_lanes<T>(args.A.at(c0 + c + i, n0), kDType<T>, count);
          const Vec<T> gate = exp_scaled(scaled(a, T(1.4426950408889634)) * Vec<T>(dt_row[c + i]));
          h[i] = fma(gate, load_lanes<T>(reinterpret_cast<char*>(at), kDType<T>, count),
                     b * Vec<T>(dtu_row[c + i]));
          store_lanes<T>(reinterpret_cast<char*>(at), kDType<T>, h[i], count);
        }
        transpose(h);
        read_out(h, C.x[0], count, Vec<T>::load(y_row + c)).store(y_row + c);
      }
    }
    if (args.z)
      for (int64_t c = 0; c < nc; c += kLanes)
        (Vec<T>::load(y_row + c) * silu(z.at(0, c, at_most_lanes(nc - c)))).store(y_row + c);
    store_tile<T>(out, 1, nc, y_row, kWidth, false);
  };
  run_tasks(args, task);
}

template <class T>
bool side_by_side(const SelectiveScan& args) {
  const bool few = args.states() == 1;
  return !args.complex && args.A.dtype == kDType<T> && (few || args.A.stride[1] == 1) &&
         (few || args.h_last.stride[2] == 1);
}

}  // namespace

void selective_scan_step(const SelectiveScan& args) {
  const bool wide = computes_in_double(args.u.dtype);
  if (wide && side_by_side<double>(args)) return run<double>(args);
  if (!wide && side_by_side<float>(args)) return run<float>(args);
  RECURRA_ISA::selective_scan(args);
}

}  // namespace recurra::RECURRA_ISA
