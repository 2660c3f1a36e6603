// A task is one run of sequences by one span of channels, walked backwards in chunks. The states
// of a chunk are recomputed from the one that was saved before it, four at a time, and kept with
// their gates in the first cache; then the chunk is walked backwards. dB and dC are summed over
// the channels in three fixed steps: in lanes over the vectors of the span, over the lanes by the
// tree, and over the spans at the end.
#include "selective_scan/lanes.h"

namespace recurra::RECURRA_ISA {
namespace {

// States whose recomputed values are held.
template <int Parts>
constexpr int kTogether = Parts == 1 ? 4 : 1;

// What the channels of a span need in a chunk, all (kScanChunk, kWidth).
template <class T>
struct ChunkRows {
  SpanRows<T> u, delta, z, dy;  // as given
  SpanRows<T> dt, dtu, Y;       // computed from those
  SpanRows<T> p, q, y;          // Re sum g conj(B), Re sum conj(A) q, y
};

// kTogether states of one vector of channels.
template <class T, int Parts>
struct Held {
  T h[kScanChunk][kTogether<Parts>][Parts][kLanes] __attribute__((aligned(64)));
  T a[kScanChunk][kTogether<Parts>][Parts][kLanes] __attribute__((aligned(64)));
};

// Sums of dB and dC in lanes over the vectors of a span.
template <class T, int Parts>
struct LaneSums {
  T x[2][kTogether<Parts>][Parts][kScanChunk][kLanes] __attribute__((aligned(64)));
};

template <class K, int Count, class T>
RECURRA_INLINE void recompute(int64_t steps, ChunkRows<T>& rows, int64_t lane, const T* A,
                              int64_t apart, int64_t padded, const StateRows<T>& B,
                              const StateRows<T>& C, int64_t n, const T* before,
                              Held<T, K::parts>& held, LaneSums<T, K::parts>& sums) {
  using State = typename K::State;
  constexpr int64_t other = kScanChunk * kStates, apart_sum = kScanChunk * kLanes;
  State h[Count], A2[Count];
#pragma GCC unroll 4
  for (int i = 0; i < Count; ++i) {
    h[i] = K::load(before + i * padded, apart);
    A2[i] = scaled(K::load(A + i * padded, apart), T(1.4426950408889634));
  }
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t at = t * kRow + lane;
    const Vec<T> step = Vec<T>::load(rows.dt.x + at), in = Vec<T>::load(rows.dtu.x + at),
                 Y = Vec<T>::load(rows.Y.x + at) * Vec<T>(K::weight);
    Vec<T> sum(T(0));
    const T* b = B.x[0] + t * kStates + n;
    const T* c = C.x[0] + t * kStates + n;
#pragma GCC unroll 4
    for (int i = 0; i < Count; ++i) {
      const State a = exp_scaled(A2[i] * step);
      h[i] = fma(a, h[i], K::broadcast(b + i, other) * in);
      sum = add_real(K::broadcast(c + i, other), h[i], sum);
      K::store(held.a[t][i][0], kLanes, a);
      K::store(held.h[t][i][0], kLanes, h[i]);
      T* dC = sums.x[1][i][0][t];
      K::store(dC, apart_sum, fma(conj(h[i]), Y, K::load(dC, apart_sum)));
    }
    T* const y = rows.y.x + at;
    fma(sum, Vec<T>(K::weight), Vec<T>::load(y)).store(y);
  }
}

template <class K, int Count, class T>
RECURRA_INLINE void reverse(int64_t steps, const ChunkRows<T>& rows, T* p, T* q, int64_t lane,
                            const T* A, int64_t apart, int64_t padded, const StateRows<T>& B,
                            const StateRows<T>& C, int64_t n, const T* before,
                            const Held<T, K::parts>& held, T* carry_rows, T* sum_A,
                            LaneSums<T, K::parts>& sums) {
  using State = typename K::State;
  constexpr int64_t other = kScanChunk * kStates, apart_sum = kScanChunk * kLanes;
  State carry[Count], dA[Count], A_n[Count];
#pragma GCC unroll 4
  for (int i = 0; i < Count; ++i) {
    carry[i] = K::load(carry_rows + i * padded, apart);
    dA[i] = K::load(sum_A + i * padded, apart);
    A_n[i] = conj(K::load(A + i * padded, apart));
  }
  for (int64_t t = steps - 1; t >= 0; --t) {
    const int64_t at = t * kRow + lane;
    const Vec<T> step = Vec<T>::load(rows.dt.x + at), in = Vec<T>::load(rows.dtu.x + at),
                 Y = Vec<T>::load(rows.Y.x + at) * Vec<T>(K::weight);
    Vec<T> sum_p = Vec<T>::load(p + at), sum_q = Vec<T>::load(q + at);
    const T* b = B.x[0] + t * kStates + n;
    const T* c = C.x[0] + t * kStates + n;
#pragma GCC unroll 4
    for (int i = 0; i < Count; ++i) {
      const State previous =
          t > 0 ? K::load(held.h[t - 1][i][0], kLanes) : K::load(before + i * padded, apart);
      const State g = fma(conj(K::broadcast(c + i, other)), Y, carry[i]);
      T* dB = sums.x[0][i][0][t];
      K::store(dB, apart_sum, fma(g, in, K::load(dB, apart_sum)));
      sum_p = add_real(g, conj(K::broadcast(b + i, other)), sum_p);
      carry[i] = conj(K::load(held.a[t][i][0], kLanes)) * g;
      const State turned = carry[i] * conj(previous);
      sum_q = add_real(A_n[i], turned, sum_q);
      dA[i] = fma(turned, step, dA[i]);
    }
    sum_p.store(p + at);
    sum_q.store(q + at);
  }
#pragma GCC unroll 4
  for (int i = 0; i < Count; ++i) {
    K::store(carry_rows + i * padded, apart, carry[i]);
    K::store(sum_A + i * padded, apart, dA[i]);
  }
}

// Sixteen rows of lanes -> their sums, each by the tree of sum().
template <class T>
RECURRA_INLINE Vec<T> sums_of(const T (*rows)[kLanes], int64_t count) {
  Vec<T> v[kLanes];
  for (int i = 0; i < kLanes; ++i) v[i] = i < count ? Vec<T>::load(rows[i]) : Vec<T>(T(0));
  transpose(v);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) v[i] = v[i] + v[i + half];
  return v[0];
}

// Everything of a chunk but its states: dt, dt u, Y = dy silu(z) and y = D u.
template <class T>
void prepare(const SelectiveScanBackward& args, ChunkRows<T>& rows, int64_t steps, int64_t nc,
             const Tile<T>& u, const Tile<T>& delta, const Tile<T>& z, const Tile<T>& dy,
             const T* bias, const T* skip) {
  for (int64_t t = 0; t < steps; ++t)
    for (int64_t c = 0; c < nc; c += kLanes) {
      Vec<T> d = Vec<T>::load(delta.row(t) + c) + Vec<T>::load(bias + c);
      if (args.delta_softplus) d = softplus(d);
      const Vec<T> x = Vec<T>::load(u.row(t) + c);
      Vec<T> Y = args.dy ? Vec<T>::load(dy.row(t) + c) : Vec<T>(T(0));
      if (args.z) Y = Y * silu(Vec<T>::load(z.row(t) + c));
      d.store(rows.dt.at(t, c));
      (d * x).store(rows.dtu.at(t, c));
      Y.store(rows.Y.at(t, c));
      (args.D ? x * Vec<T>::load(skip + c) : Vec<T>(T(0))).store(rows.y.at(t, c));
      Vec<T>(T(0)).store(rows.p.at(t, c));
      Vec<T>(T(0)).store(rows.q.at(t, c));
    }
}

// du, ddelta and dz into rows.p, rows.q and rows.y; dD and ddelta_bias into their sums.
template <class T>
void conclude(const SelectiveScanBackward& args, ChunkRows<T>& rows, int64_t steps, int64_t nc,
              const Tile<T>& u, const Tile<T>& delta, const Tile<T>& z, const Tile<T>& dy,
              const T* bias, const T* skip, T* dD, T* dbias) {
  for (int64_t c = 0; c < nc; c += kLanes) {
    Vec<T> sum_D = Vec<T>::load(dD + c), sum_bias = Vec<T>::load(dbias + c);
    for (int64_t t = steps - 1; t >= 0; --t) {
      const Vec<T> x = Vec<T>::load(u.row(t) + c), p = Vec<T>::load(rows.p.at(t, c)),
                   Y = Vec<T>::load(rows.Y.at(t, c));
      Vec<T> du = Vec<T>::load(rows.dt.at(t, c)) * p;
      if (args.D) du = fma(Vec<T>::load(skip + c), Y, du);
      Vec<T> d = fma(x, p, Vec<T>::load(rows.q.at(t, c)));
      if (args.delta_softplus)
        d = d * sigmoid(Vec<T>::load(delta.row(t) + c) + Vec<T>::load(bias + c));
      sum_D = fma(Y, x, sum_D);
      sum_bias = sum_bias + d;
      du.store(rows.p.at(t, c));
      d.store(rows.q.at(t, c));
      if (args.z) {
        const Vec<T> out = args.dy ? Vec<T>::load(dy.row(t) + c) : Vec<T>(T(0));
        (out * Vec<T>::load(rows.y.at(t, c)) * silu_slope(Vec<T>::load(z.row(t) + c)).slope)
            .store(rows.y.at(t, c));
      }
    }
    sum_D.store(dD + c);
    sum_bias.store(dbias + c);
  }
}

// Adds up what the tasks left, in order, and writes it: lane rows -> a (D, N) view.
template <class T>
void finish_channels(const SelectiveScanBackward& args) {
  const Spans& spans = args.spans;
  const int64_t padded = spans.padded(), states = args.states(), rows = args.rows();
  T* const A = static_cast<T*>(args.sum_A);
  T* const D = static_cast<T*>(args.sum_D);
  parallel(spans.count(), [&](int64_t span) {
    const int64_t lane0 = spans.lane(span), nc = spans.channels(span), c0 = spans.first(span);
    for (int64_t part = 1; part < args.parts; ++part) {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = lane0; c < lane0 + nc; c += kLanes)
          (Vec<T>::load(A + i * padded + c) + Vec<T>::load(A + (part * rows + i) * padded + c))
              .store(A + i * padded + c);
      for (int64_t i = 0; i < 2; ++i)
        for (int64_t c = lane0; c < lane0 + nc; c += kLanes)
          (Vec<T>::load(D + i * padded + c) + Vec<T>::load(D + (part * 2 + i) * padded + c))
              .store(D + i * padded + c);
    }
    for (int i = 0; i < (args.complex ? 2 : 1); ++i)
      store_tile<T>(state_plane(part(args.dA, i), c0), states, nc, A + i * states * padded + lane0,
                    padded, false);
    const View<1>* vectors[] = {&args.dD, &args.ddelta_bias};
    for (int i = 0; i < 2; ++i)
      if (*vectors[i]) {
        const Plane to{vectors[i]->at(c0), vectors[i]->dtype, 0, vectors[i]->step(0)};
        store_tile<T>(to, 1, nc, D + i * padded + lane0, padded, false);
      }
  });
}

template <class T>
void finish_BC(const SelectiveScanBackward& args, const View<4>& out, const T* sums) {
  const Spans& spans = args.spans;
  const int64_t time = out.size[1], groups = out.size[2], states = args.states();
  const int64_t rows = args.rows(), steps = out.size[0] * time;
  // A group of the output is one group of the spans, or all of them.
  const int64_t per_group = groups == spans.groups ? spans.per_group : spans.count();
  parallel((steps + 63) / 64, [&](int64_t task) {
    for (int64_t step = task * 64; step < steps && step < task * 64 + 64; ++step)
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t n0 = 0; n0 < rows; n0 += kLanes) {
          const int lanes = at_most_lanes(rows - n0);
          const T* from = sums + (g * per_group * steps + step) * rows + n0;
          // Without channels there is nothing to read, not even a first span.
          Vec<T> total(T(0));
          if (per_group > 0) total = Vec<T>::load(from, lanes);
          for (int64_t span = 1; span < per_group; ++span)
            total = total + Vec<T>::load(from + span * steps * rows, lanes);
          if (!args.complex && out.step(3) == 1) {
            store_lanes<T>(out.at(step / time, step % time, g, n0), out.dtype, total, lanes);
            continue;
          }
          T values[kLanes];
          total.store(values);
          for (int i = 0; i < lanes; ++i) {
            const View<4> to = part(out, n0 + i < states ? 0 : 1);
            if (to)
              store_element<T>(to.at(step / time, step % time, g, (n0 + i) % states), to.dtype,
                               values[i]);
          }
        }
  });
}

template <class K, class T>
void run(const SelectiveScanBackward& args) {
  const Spans& spans = args.spans;
  const int64_t states = args.states(), padded = spans.padded(), apart = states * padded;
  const int64_t rows = K::parts * states, time = args.u.size[1], total = args.u.size[0] * time;
  T* const lanes_A = static_cast<T*>(args.lanes_A);
  load_A<T>(args, lanes_A);
  const bool stream = total * args.u.size[2] * item_size(args.u.dtype) >= kStreamFrom;
  T* const sum_BC[] = {static_cast<T*>(args.sum_BC),
                       static_cast<T*>(args.sum_BC) + spans.count() * total * rows};

  parallel(args.parts * spans.count(), [&](int64_t index) {
    const int64_t part_index = index / spans.count(), span = index % spans.count();
    const int64_t c0 = spans.first(span), nc = spans.channels(span), lane0 = spans.lane(span);
    const int64_t group = spans.group(span);
    ChunkRows<T> chunk;
    StateRows<T> B, C;
    Held<T, K::parts> held;
    LaneSums<T, K::parts> sums;
    T bias[kWidth] __attribute__((aligned(64))), skip[kWidth] __attribute__((aligned(64)));
    load_channels(args.delta_bias, c0, nc, bias);
    load_channels(args.D, c0, nc, skip);
    T* const carry = static_cast<T*>(args.carry) + part_index * rows * padded + lane0;
    T* const sum_A = static_cast<T*>(args.sum_A) + part_index * rows * padded + lane0;
    T* const dD = static_cast<T*>(args.sum_D) + part_index * 2 * padded + lane0;

    const int64_t first = part_index * args.sequences.count / args.parts;
    const int64_t last = (part_index + 1) * args.sequences.count / args.parts;
    for (int64_t n = first; n < last; ++n) {
      const Sequence s = args.sequences[n];
      for (int i = 0; i < K::parts; ++i)
        load_states<T>(state_plane(part(args.dh_last, i), n, c0), states, nc, carry + i * apart,
                       padded);
      const int64_t chunks = (s.length() + kScanChunk - 1) / kScanChunk;
      for (int64_t k = chunks - 1; k >= 0; --k) {
        const int64_t t0 = k * kScanChunk;
        const int64_t steps = s.length() - t0 < kScanChunk ? s.length() - t0 : kScanChunk;
        const auto load = [&](const View<3>& v, SpanRows<T>& to) {
          return v ? load_tile<T>(plane(v, s, false, c0).at(t0, 0), steps, nc, to.x, kRow)
                   : Tile<T>{to.x, kRow};
        };
        const Tile<T> u = load(args.u, chunk.u), delta = load(args.delta, chunk.delta),
                      z = load(args.z, chunk.z), dy = load(args.dy, chunk.dy);
        prepare(args, chunk, steps, nc, u, delta, z, dy, bias, skip);
        const T* before =
            static_cast<const T*>(args.saved) + args.chunk_row(n, k) * rows * padded + lane0;
        for (int64_t n0 = 0; n0 < states; n0 += kStates) {
          const int64_t count = states - n0 < kStates ? states - n0 : kStates;
          load_BC(args.B, s, t0, steps, group, n0, count, K::parts, B);
          load_BC(args.C, s, t0, steps, group, n0, count, K::parts, C);
          int64_t i = 0;
          const auto some = [&]<int Count>(Index<Count>) __attribute__((always_inline)) {
            for (int which = 0; which < 2; ++which)
              for (int j = 0; j < Count; ++j)
                for (int part = 0; part < K::parts; ++part)
                  zero_rows(sums.x[which][j][part][0], steps, kLanes, kLanes);
            for (int64_t c = 0; c < nc; c += kLanes) {
              if (n0 + i == 0 && k > 0)
                for (const View<3>* v : {&args.u, &args.delta, &args.z, &args.dy})
                  if (*v)
                    prefetch_tile(plane(*v, s, false, c0).at(t0 - kScanChunk, c), kScanChunk,
                                  at_most_lanes(nc - c));
              const int64_t row = (n0 + i) * padded + c;
              recompute<K, Count>(steps, chunk, c, lanes_A + lane0 + row, apart, padded, B, C, i,
                                  before + row, held, sums);
              reverse<K, Count>(steps, chunk, chunk.p.x, chunk.q.x, c, lanes_A + lane0 + row, apart,
                                padded, B, C, i, before + row, held, carry + row, sum_A + row,
                                sums);
            }
            const int64_t step0 = s.batch * time + s.begin + t0;
            for (int which = 0; which < 2; ++which)
              for (int j = 0; j < Count; ++j)
                for (int part = 0; part < K::parts; ++part)
                  for (int64_t t = 0; t < steps; t += kLanes) {
                    const int lanes = at_most_lanes(steps - t);
                    T values[kLanes];
                    sums_of<T>(sums.x[which][j][part] + t, lanes).store(values);
                    T* to = sum_BC[which] + (span * total + step0 + t) * rows + part * states + n0 +
                            i + j;
                    for (int lane = 0; lane < lanes; ++lane) to[lane * rows] = values[lane];
                  }
            i += Count;
          };
          while (count - i >= kTogether<K::parts>) some(Index<kTogether<K::parts>>());
          while (count - i >= 1) some(Index<1>());
        }
        conclude(args, chunk, steps, nc, u, delta, z, dy, bias, skip, dD, dD + padded);
        const auto store = [&](const View<3>& v, const SpanRows<T>& from) {
          store_tile<T>(plane(v, s, false, c0).at(t0, 0), steps, nc, from.x, kRow, stream);
        };
        store(args.du, chunk.p);
        store(args.ddelta, chunk.q);
        if (args.dz) store(args.dz, chunk.y);
      }
      for (int i = 0; i < K::parts; ++i)
        store_tile<T>(state_plane(part(args.dh0, i), n, c0), states, nc, carry + i * apart, padded,
                      false);
    }
    if (stream) fence();
  });
  finish_channels<T>(args);
  finish_BC<T>(args, args.dB, sum_BC[0]);
  finish_BC<T>(args, args.dC, sum_BC[1]);
}

}  // namespace

void selective_scan_backward(const SelectiveScanBackward& args) {
  if (computes_in_double(args.u.dtype))
    args.complex ? run<Cplx<double>, double>(args) : run<Real<double>, double>(args);
  else
    args.complex ? run<Cplx<float>, float>(args) : run<Real<float>, float>(args);
}

}  // namespace recurra::RECURRA_ISA
