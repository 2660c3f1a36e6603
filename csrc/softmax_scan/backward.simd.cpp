// A task is one run of sequences by one span of channels, walked backwards in chunks: the states of
// a chunk are computed again from the one that was saved before it and kept, with their weights, in
// the second cache; then the chunk is walked backwards. Row by row, so that memory is read and
// written as it lies.
#include "partial_sums.h"
#include "softmax_scan/lanes.h"

namespace recurra::RECURRA_ISA {
namespace {

using namespace softmax;

// m, c and a after a step, and e^{-|x - s|}, with the sign of minus where s is above x.
constexpr int kHeld = kParts + 1;

template <class T>
struct Held {
  static constexpr int64_t kStride = kWidest<T> + kLanes;
  T x[kSoftmaxChunk][kHeld][kStride] __attribute__((aligned(64)));
};

// Rows of m, c and a, `apart` from each other.
template <class T>
struct StateRows {
  const T* m;
  int64_t apart;
  RECURRA_INLINE State<Vec<T>> at(int64_t c) const {
    return {Vec<T>::load(m + c), Vec<T>::load(m + apart + c), Vec<T>::load(m + 2 * apart + c)};
  }
};

// What a span has along the walk: its parameters and their gradients, and the cotangents of the
// state.
template <class T>
struct Span {
  Parameters<T> p;
  Row<T> excess, C, A;
  T *to_decay, *to_bonus;

  Span(const SoftmaxScanInputs& args, int64_t channel, int64_t channels, T* sums)
      : p(args, channel, channels),
        to_decay(args.decay ? sums : nullptr),
        to_bonus(sums + args.padded()) {}
  RECURRA_INLINE Cotangents<Vec<T>> at(int64_t c) const {
    return {Vec<T>::load(excess.x + c), Vec<T>::load(C.x + c), Vec<T>::load(A.x + c)};
  }
  // Whether any maximum has a cotangent of its own.
  bool any_excess(int64_t channels) const {
    for (int64_t c = 0; c < channels; c += kLanes)
      if (!all(Vec<T>::load(excess.x + c) == T(0))) return true;
    return false;
  }
};

// `later` is read when the chunk is walked backwards.
template <DType S, class T>
RECURRA_INLINE void recompute(const char* s, const char* v, const char* later, int64_t channels,
                              const Row<T>& decay, const StateRows<T>& before,
                              T (&held)[kHeld][Held<T>::kStride]) {
  constexpr int64_t item = item_size(S);
#pragma GCC unroll 2
  for (int64_t c = 0; c < channels; c += kLanes) {
    prefetch_lanes<S>(later + c * item);
    const State<Vec<T>> state = before.at(c);
    const Vec<T> score = load_stored<T, S>(s + c * item), value = load_stored<T, S>(v + c * item),
                 x = state.m - Vec<T>::load(decay.x + c), small = exp_minus_abs(x - score);
    const auto above = score > x;
    const State<Vec<T>> after = advance(state, x, weights_where(above, small), score, value);
    after.m.store(held[0] + c);
    after.c.store(held[1] + c);
    after.a.store(held[2] + c);
    select(above, -small, abs(small)).store(held[3] + c);
  }
}

// What a step against time reads and writes, and what the chunk that comes next reads.
struct StepRows {
  const char *s, *v, *d_o;
  char *ds, *dv;
  bool past;
  const char *next_s, *next_v;
};

// Sixteen channels of it. Unless `exact`, nothing is done where the weights of an output need an
// exponential of their own.
template <bool Bonus, bool exact, DType S, class T>
RECURRA_INLINE bool reverse_lanes(const StepRows& rows, int64_t c, bool has_excess,
                                  const StateRows<T>& before,
                                  const T (&held)[kHeld][Held<T>::kStride], Span<T>& span) {
  constexpr int64_t item = item_size(S);
  const Vec<T> zero(T(0));
  prefetch_lanes<S>(rows.next_s + c * item);
  prefetch_lanes<S>(rows.next_v + c * item);
  const Vec<T> value = load_stored<T, S>(rows.v + c * item), small = Vec<T>::load(held[3] + c);
  const Vec<T> cotangent = rows.d_o ? load_stored<T, S>(rows.d_o + c * item) : zero;
  const State<Vec<T>> state = before.at(c);
  const auto above = negative(small);
  const Weights<Vec<T>> w = weights_where(above, abs(small));
  Cotangents<Vec<T>> d = span.at(c);
  Gradients<Vec<T>> to{zero, zero, zero, zero};
  if constexpr (Bonus) {
    const Weights<Vec<T>> factors = span.p.factors_at(c);
    Weights<Vec<T>> read;
    if constexpr (exact) {
      read = output_weights(w, factors, state.m, load_stored<T, S>(rows.s + c * item),
                            Vec<T>::load(span.p.bonus.x + c));
    } else {
      read = output_weights(w, factors);
      if (!all(accurate(read))) [[unlikely]]
        return false;
    }
    to = reverse_output(read, state, value, cotangent);
    (Vec<T>::load(span.to_bonus + c) + to.s).store(span.to_bonus + c);
  } else {
    reverse_output(d, Vec<T>::load(held[1] + c), Vec<T>::load(held[2] + c), cotangent);
  }
  if (span.to_decay)
    add_to_decay(Vec<T>::load(span.to_decay + c), d, w, state).store(span.to_decay + c);
  reverse_state(d, w, value, to);
  if (has_excess) {
    const Vec<T> x = state.m - Vec<T>::load(span.p.decay.x + c);
    const auto equal = x == load_stored<T, S>(rows.s + c * item);
    const Vec<T> shared = select(equal, Vec<T>(T(0.5)) * d.excess, zero);
    const Vec<T> to_score = select(above, d.excess, shared);
    // Nothing is added where there is nothing, so that zeros keep their sign.
    to.s = select(to_score == zero, to.s, to.s + to_score);
    d.excess = select(above, zero, d.excess - shared);
    d.excess.store(span.excess.x + c);
    if (span.to_decay) {
      const Vec<T> sum = Vec<T>::load(span.to_decay + c);
      select(d.excess == zero, sum, sum - d.excess).store(span.to_decay + c);
    }
  }
  d.C.store(span.C.x + c);
  d.A.store(span.A.x + c);
  store_stored<T, S>(rows.ds + c * item, to.s, rows.past);
  store_stored<T, S>(rows.dv + c * item, to.v, rows.past);
  return true;
}
// Apart, and outside the inner loop below, so that this keeps nothing for it.
template <DType S, class T>
__attribute__((noinline)) void reverse_exact(const StepRows& rows, int64_t c, bool has_excess,
                                             const StateRows<T>& before,
                                             const T (&held)[kHeld][Held<T>::kStride],
                                             Span<T>& span) {
  reverse_lanes<true, true, S>(rows, c, has_excess, before, held, span);
}
template <bool Bonus, DType S, class T>
RECURRA_INLINE void reverse(const StepRows& rows, int64_t channels, bool has_excess,
                            const StateRows<T>& before, const T (&held)[kHeld][Held<T>::kStride],
                            Span<T>& span) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    for (; c < channels && !(Bonus && span.p.exact[c / kLanes]); c += kLanes)
      if (!reverse_lanes<Bonus, false, S>(rows, c, has_excess, before, held, span)) break;
    if (Bonus && c < channels) reverse_exact<S>(rows, c, has_excess, before, held, span);
  }
}

// The sums of the runs, in order.
template <class T>
void write_parameters(const SoftmaxScanBackward& args) {
  const int64_t channels = args.v.size[2], padded = args.padded();
  T* const sums = static_cast<T*>(args.sums);
  for (int64_t part = 1; part < args.parts; ++part)
    for (int64_t i = 0; i < 2 * padded; i += kLanes)
      (Vec<T>::load(sums + i) + Vec<T>::load(sums + part * 2 * padded + i)).store(sums + i);
  const View<1>* views[] = {&args.ddecay, &args.dbonus};
  for (int i = 0; i < 2; ++i)
    if (*views[i]) {
      const Plane to{views[i]->at(0), views[i]->dtype, 0, views[i]->step(0)};
      store_tile<T>(to, 1, channels, sums + i * padded, padded, false);
    }
}

template <class T>
void run(const SoftmaxScanBackward& args) {
  const int64_t channels = args.v.size[2], padded = args.padded();
  const bool reduced = static_cast<bool>(args.partial);
  const bool in_place = !reduced && is_rows<T>(args.s) && is_rows<T>(args.v) &&
                        is_rows<T>(args.d_o) && is_rows<T>(args.ds) && is_rows<T>(args.dv);
  const Cut shape = cut<T>(args.v, in_place, args.parts);
  const int64_t count = args.dv.size[0] * args.dv.size[1] * channels;
  const bool stream = count * item_size(args.dv.dtype) >= kStreamFrom;

  parallel_unless(count < 1 << 14, args.parts * shape.spans, [&](int64_t task) {
    const int64_t part = task / shape.spans, c0 = task % shape.spans * shape.width;
    const int64_t nc = channels - c0 < shape.width ? channels - c0 : shape.width;
    TileRows<T> s_rows, v_rows, o_rows, ds_rows, dv_rows;
    Held<T> held;
    Span<T> span(args, c0, nc, static_cast<T*>(args.sums) + part * 2 * padded + c0);
    Row<T>* const carry[] = {&span.excess, &span.C, &span.A};

    const int64_t first = part * args.sequences.count / args.parts;
    const int64_t last = (part + 1) * args.sequences.count / args.parts;
    for (int64_t n = first; n < last; ++n) {
      const Sequence seq = args.sequences[n];
      const Plane s_plane = plane(args.s, seq, false, c0), v_plane = plane(args.v, seq, false, c0),
                  o_plane = plane(args.d_o, seq, false, c0), to_s = plane(args.ds, seq, false, c0),
                  to_v = plane(args.dv, seq, false, c0);
      const bool past = in_place && stream && may_stream<T>(to_s) && may_stream<T>(to_v);
      for (int i = 0; i < kParts; ++i)
        load_row(state_plane(args.dh_last, n, i, c0), nc, carry[i]->x, kWidest<T>);
      // The cotangent of the maximum, from what it has of its own or the other way. Equal terms
      // in both, so that a state carried from one call to the next brings nothing new.
      const auto exchange = [&](const StateRows<T>& state, bool own) {
        for (int64_t c = 0; c < nc; c += kLanes) {
          const Cotangents<Vec<T>> d = span.at(c);
          const Vec<T> shared = shared_part(d, state.at(c));
          (own ? d.excess - shared : shared + d.excess).store(span.excess.x + c);
        }
      };
      const int64_t chunks = (seq.length() + kSoftmaxChunk - 1) / kSoftmaxChunk;
      for (int64_t k = chunks - 1; k >= 0; --k) {
        const int64_t t0 = k * kSoftmaxChunk, left = seq.length() - t0;
        const int64_t steps = left < kSoftmaxChunk ? left : kSoftmaxChunk;
        const auto load = [&](const Plane& p, TileRows<T>& to) {
          return read_rows(p, in_place, t0, steps, nc, to);
        };
        const Rows s = load(s_plane, s_rows), v = load(v_plane, v_rows),
                   d_o = load(o_plane, o_rows), ds = write_rows(to_s, in_place, t0, ds_rows),
                   dv = write_rows(to_v, in_place, t0, dv_rows);
        const StateRows<T> saved{
            static_cast<const T*>(args.saved) +
                args.sequences.chunk_row(n, k, kSoftmaxChunk) * kParts * padded + c0,
            padded};
        const auto before = [&](int64_t t) {
          return t > 0 ? StateRows<T>{held.x[t - 1][0], Held<T>::kStride} : saved;
        };
        const int64_t back = in_place && k > 0 ? kSoftmaxChunk : 0;
        for_storage<T>(in_place ? to_v.dtype : kDType<T>, [&](auto dtype) RECURRA_LAMBDA {
          constexpr DType S = DType(dtype.value);
          for (int64_t t = 0; t < steps; ++t)
            recompute<S>(s.row(t), v.row(t), (d_o.data ? d_o : v).row(t), nc, span.p.decay,
                         before(t), held.x[t]);
          if (k == chunks - 1) exchange(before(steps), true);
          const bool has_excess = span.any_excess(nc);
          for (int64_t t = steps - 1; t >= 0; --t) {
            // Of the tiles that come next, a part with every step of these.
            const int64_t done = steps - 1 - t, from = done * nc / steps,
                          end = (done + 1) * nc / steps;
            if (!in_place && k > 0)
              for (const Plane* p : {&s_plane, &v_plane, &o_plane})
                if (*p) prefetch_tile(p->at(t0 - kSoftmaxChunk, from), kSoftmaxChunk, end - from);
            const StepRows rows{s.row(t),        v.row(t),       d_o.data ? d_o.row(t) : nullptr,
                                ds.row(t),       dv.row(t),      past,
                                s.row(t - back), v.row(t - back)};
            args.bonus ? reverse<true, S>(rows, nc, has_excess, before(t), held.x[t], span)
                       : reverse<false, S>(rows, nc, has_excess, before(t), held.x[t], span);
          }
        });
        if (k == 0) exchange(saved, false);
        if (in_place) continue;
        store_tile<T>(to_v.at(t0, 0), steps, nc, dv_rows.x, kRow<T>, stream);
        if (!reduced) {
          store_tile<T>(to_s.at(t0, 0), steps, nc, ds_rows.x, kRow<T>, stream);
          continue;
        }
        const int64_t block = args.s.size[2] == 1 ? c0 / kLanes : c0;
        accumulate<T>(args.s,
                      plane(args.partial, seq, false, 0).at(args.s.size[1] == 1 ? 0 : t0, block),
                      steps, nc, ds_rows.x, kRow<T>);
      }
      for (int i = 0; i < kParts; ++i)
        store_tile<T>(state_plane(args.dh0, n, i, c0), 1, nc, carry[i]->x, kWidest<T>, false);
    }
    if (stream) fence();
  });
  write_parameters<T>(args);
  if (reduced) write_sums<T>(args.partial, args.ds);
}

}  // namespace

void softmax_scan_backward(const SoftmaxScanBackward& args) {
  computes_in_double(args.v.dtype) ? run<double>(args) : run<float>(args);
}

}  // namespace recurra::RECURRA_ISA
