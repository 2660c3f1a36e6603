// A task is one sequence by one span of channels. It walks along time in chunks: first dt, dt u
// and D u of the whole span, then, sixteen states and one vector of channels at a time, the
// recurrence with the states in registers. The exponential is most of the work.
#include "selective_scan/lanes.h"

namespace recurra::RECURRA_ISA {
namespace {

// `steps` steps of Count states of one vector of channels; y gains f Re(C h).
template <class K, int Count, class T>
RECURRA_INLINE void advance(int64_t steps, const T* dt, const T* dtu, T* y, const T* A,
                            int64_t apart, int64_t padded, const StateRows<T>& B,
                            const StateRows<T>& C, int64_t n, T* h_rows, int64_t h_apart,
                            int64_t h_row) {
  using State = typename K::State;
  constexpr int64_t other = kScanChunk * kStates;
  State h[Count], a[Count];
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i) {
    h[i] = K::load(h_rows + i * h_row, h_apart);
    a[i] = scaled(K::load(A + i * padded, apart), T(1.4426950408889634));
  }
  for (int64_t t = 0; t < steps; ++t) {
    const Vec<T> step = Vec<T>::load(dt + t * kRow), in = Vec<T>::load(dtu + t * kRow);
    Vec<T> sum(T(0));
    const T* b = B.x[0] + t * kStates + n;
    const T* c = C.x[0] + t * kStates + n;
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i) {
      h[i] = fma(exp_scaled(a[i] * step), h[i], K::broadcast(b + i, other) * in);
      sum = add_real(K::broadcast(c + i, other), h[i], sum);
    }
    fma(sum, Vec<T>(K::weight), Vec<T>::load(y + t * kRow)).store(y + t * kRow);
  }
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i) K::store(h_rows + i * h_row, h_apart, h[i]);
}

template <class K, class T>
void run(const SelectiveScan& args) {
  // A complex state has a chain of its own that is long enough to fill the units.
  constexpr int kTogether = K::parts == 1 ? kReadout : 1;
  const Spans& spans = args.spans;
  const int64_t states = args.states(), padded = spans.padded(), apart = states * padded;
  T* const lanes_A = static_cast<T*>(args.lanes_A);
  load_A<T>(args, lanes_A);
  const int64_t bytes = args.y.size[0] * args.y.size[1] * args.y.size[2] * item_size(args.y.dtype);
  const bool stream = bytes >= kStreamFrom;

  const auto task = [&](int64_t index) {
    const int64_t n = index / spans.count(), span = index % spans.count();
    const int64_t c0 = spans.first(span), nc = spans.channels(span), lane0 = spans.lane(span);
    const int64_t slot = args.slots ? args.slots[n] : n, group = spans.group(span);
    const Sequence s = args.sequences[n];
    const Plane out = plane(args.y, s, false, c0);
    SpanRows<T> u_rows, dt, dtu, y;
    if (slot < 0) {
      zero_rows(y.x, s.length(), whole(nc), kRow);
      return store_tile<T>(out, s.length(), nc, y.x, kRow, false);
    }
    const Plane u_plane = plane(args.u, s, false, c0),
                delta_plane = plane(args.delta, s, false, c0),
                z_plane = plane(args.z, s, false, c0);
    StateRows<T> B, C;
    T bias[kWidth] __attribute__((aligned(64))), skip[kWidth] __attribute__((aligned(64)));
    load_channels(args.delta_bias, c0, nc, bias);
    load_channels(args.D, c0, nc, skip);
    // Few states stay together on the stack; many have their rows in scratch.
    T few[kStates * K::parts * kWidth] __attribute__((aligned(64)));
    const bool together = !args.state;
    const int64_t row = together ? kWidth : padded, parts_apart = states * row;
    T* const h = together ? few : static_cast<T*>(args.state) + n * K::parts * apart + lane0;
    for (int i = 0; i < K::parts; ++i)
      load_states<T>(state_plane(part(args.h0, i), slot, c0), states, nc, h + i * parts_apart, row);

    for (int64_t t0 = 0; t0 < s.length(); t0 += kScanChunk) {
      const int64_t steps = s.length() - t0 < kScanChunk ? s.length() - t0 : kScanChunk;
      const int64_t next =
          s.length() - t0 - steps < kScanChunk ? s.length() - t0 - steps : kScanChunk;
      if (args.saved) {
        T* to = static_cast<T*>(args.saved) +
                args.chunk_row(n, t0 / kScanChunk) * K::parts * apart + lane0;
        for (int64_t i = 0; i < K::parts * states; ++i)
          for (int64_t c = 0; c < nc; c += kLanes)
            Vec<T>::load(h + i * row + c).store(to + i * padded + c);
      }
      const StoredRows<T> u = stored_rows<T>(u_plane.at(t0, 0), steps, nc, u_rows.x, kRow);
      const StoredRows<T> delta = stored_rows<T>(delta_plane.at(t0, 0), steps, nc, dt.x, kRow);
      for (int64_t t = 0; t < steps; ++t)
        for (int64_t c = 0; c < nc; c += kLanes) {
          const int lanes = at_most_lanes(nc - c);
          Vec<T> d = delta.at(t, c, lanes) + Vec<T>::load(bias + c);
          if (args.delta_softplus) d = softplus(d);
          const Vec<T> x = u.at(t, c, lanes);
          d.store(dt.at(t, c));
          (d * x).store(dtu.at(t, c));
          (args.D ? x * Vec<T>::load(skip + c) : Vec<T>(T(0))).store(y.at(t, c));
        }
      for (int64_t n0 = 0; n0 < states; n0 += kStates) {
        const int64_t count = states - n0 < kStates ? states - n0 : kStates;
        load_BC(args.B, s, t0, steps, group, n0, count, K::parts, B);
        load_BC(args.C, s, t0, steps, group, n0, count, K::parts, C);
        for (int64_t c = 0; c < nc; c += kLanes) {
          if (n0 == 0 && next > 0) {
            const int64_t lanes = at_most_lanes(nc - c);
            prefetch_tile(u_plane.at(t0 + steps, c), next, lanes);
            prefetch_tile(delta_plane.at(t0 + steps, c), next, lanes);
            prefetch_tile(z_plane.at(t0 + steps, c), next, lanes);
          }
          int64_t i = 0;
          const auto some = [&]<int Count>(Index<Count>) __attribute__((always_inline)) {
            advance<K, Count>(steps, dt.at(0, c), dtu.at(0, c), y.at(0, c),
                              lanes_A + lane0 + (n0 + i) * padded + c, apart, padded, B, C, i,
                              h + (n0 + i) * row + c, parts_apart, row);
            i += Count;
          };
          while (count - i >= kTogether) some(Index<kTogether>());
          while (count - i >= 1) some(Index<1>());
        }
      }
      if (args.z) {
        const StoredRows<T> z = stored_rows<T>(z_plane.at(t0, 0), steps, nc, u_rows.x, kRow);
        for (int64_t t = 0; t < steps; ++t)
          for (int64_t c = 0; c < nc; c += kLanes)
            (Vec<T>::load(y.at(t, c)) * silu(z.at(t, c, at_most_lanes(nc - c)))).store(y.at(t, c));
      }
      store_tile<T>(out.at(t0, 0), steps, nc, y.x, kRow, stream);
    }
    for (int i = 0; i < K::parts; ++i)
      store_tile<T>(state_plane(part(args.h_last, i), slot, c0), states, nc, h + i * parts_apart,
                    row, false);
    if (stream) fence();
  };

  run_tasks(args, task);
}

}  // namespace

void selective_scan(const SelectiveScan& args) {
  if (computes_in_double(args.u.dtype))
    args.complex ? run<Cplx<double>, double>(args) : run<Real<double>, double>(args);
  else
    args.complex ? run<Cplx<float>, float>(args) : run<Real<float>, float>(args);
}

}  // namespace recurra::RECURRA_ISA
