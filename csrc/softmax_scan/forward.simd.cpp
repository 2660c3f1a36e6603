// A task is one sequence by one span of channels and walks along time, row by row, so that memory
// is read and written as it lies. An exponential and a division an element take about as long as
// two threads wait for the memory.
#include "softmax_scan/lanes.h"

namespace recurra::RECURRA_ISA {
namespace {

using namespace softmax;

// What a step reads and writes, and what a later one reads.
struct StepRows {
  const char *s, *v;
  char* o;
  bool past;
  const char *later_s, *later_v;
};

// Sixteen channels of it, whose numbers are stored as S. Unless `exact`, nothing is done where the
// weights of an output need an exponential of their own.
template <bool Bonus, bool exact, DType S, class T>
RECURRA_INLINE bool step(const StepRows& rows, int64_t c, const Parameters<T>& p, States<T>& h) {
  constexpr int64_t item = item_size(S);
  prefetch_lanes<S>(rows.later_s + c * item);
  prefetch_lanes<S>(rows.later_v + c * item);
  const Vec<T> score = load_stored<T, S>(rows.s + c * item),
               value = load_stored<T, S>(rows.v + c * item);
  State<Vec<T>> state = h.at(c);
  const Vec<T> x = state.m - Vec<T>::load(p.decay.x + c);
  const Weights<Vec<T>> w = weights(x, score);
  Vec<T> den, num;
  if constexpr (Bonus) {
    const Weights<Vec<T>> factors = p.factors_at(c);
    Weights<Vec<T>> read;
    if constexpr (exact) {
      read = output_weights(w, factors, state.m, score, Vec<T>::load(p.bonus.x + c));
    } else {
      read = output_weights(w, factors);
      if (!all(accurate(read))) [[unlikely]]
        return false;
    }
    den = fma(read.x, state.c, read.y);
    num = fma(read.x, state.a, read.y * value);
  }
  state = advance(state, x, w, score, value);
  if (!Bonus) {
    den = state.c;
    num = state.a;
  }
  h.put(c, state);
  store_stored<T, S>(rows.o + c * item, select(den == Vec<T>(T(0)), T(0), num / den), rows.past);
  return true;
}
// Apart, and outside the inner loop below, so that this keeps nothing for it.
template <DType S, class T>
__attribute__((noinline)) void exact_step(const StepRows& rows, int64_t c, const Parameters<T>& p,
                                          States<T>& h) {
  step<true, true, S>(rows, c, p, h);
}
template <bool Bonus, DType S, class T>
RECURRA_INLINE void walk(const StepRows& rows, int64_t channels, const Parameters<T>& p,
                         States<T>& h) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    for (; c < channels && !(Bonus && p.exact[c / kLanes]); c += kLanes)
      if (!step<Bonus, false, S>(rows, c, p, h)) break;
    if (Bonus && c < channels) exact_step<S>(rows, c, p, h);
  }
}

template <class T>
void run(const SoftmaxScan& args) {
  const int64_t channels = args.v.size[2], padded = args.padded();
  const bool in_place = is_rows<T>(args.s) && is_rows<T>(args.v) && is_rows<T>(args.o);
  const Cut shape = cut<T>(args.v, in_place, args.sequences.count);
  const int64_t count = args.o.size[0] * args.o.size[1] * channels;
  const bool stream = count * item_size(args.o.dtype) >= kStreamFrom;

  // Threads cost more than they save below some tens of thousands of elements.
  parallel_unless(count < 1 << 14, args.sequences.count * shape.spans, [&](int64_t task) {
    const int64_t n = task / shape.spans, c0 = task % shape.spans * shape.width;
    const int64_t nc = channels - c0 < shape.width ? channels - c0 : shape.width;
    const int64_t slot = args.slots ? args.slots[n] : n;
    const Sequence seq = args.sequences[n];
    const Plane s_plane = plane(args.s, seq, false, c0), v_plane = plane(args.v, seq, false, c0),
                out = plane(args.o, seq, false, c0);
    TileRows<T> s_rows, v_rows, o_rows;
    if (slot < 0) {
      for (int64_t t = 0; t < seq.length(); ++t) {
        load_row<T>({}, nc, o_rows.x, kRow<T>);
        for (int64_t c = 0; c < nc; c += kTiled<T>)
          store_tile<T>(out.at(t, c), 1, nc - c < kTiled<T> ? nc - c : kTiled<T>, o_rows.x, kRow<T>,
                        false);
      }
      return;
    }
    const Parameters<T> parameters(args, c0, nc);
    States<T> h;
    for (int i = 0; i < kParts; ++i)
      load_row(state_plane(args.h0, slot, i, c0), nc, h.part[i].x, kWidest<T>);
    const Vec<T> empty{kEmpty<T>};
    for (int64_t c = 0; c < nc; c += kLanes)
      (args.h0 ? at_least(empty, Vec<T>::load(h.part[0].x + c)) : empty).store(h.part[0].x + c);

    const bool past = in_place && stream && may_stream<T>(out);
    for (int64_t t0 = 0; t0 < seq.length(); t0 += kSoftmaxChunk) {
      const int64_t left = seq.length() - t0;
      const int64_t steps = left < kSoftmaxChunk ? left : kSoftmaxChunk;
      if (args.saved) {
        const int64_t row = args.sequences.chunk_row(n, t0 / kSoftmaxChunk, kSoftmaxChunk);
        for (int i = 0; i < kParts; ++i)
          for (int64_t c = 0; c < nc; c += kLanes)
            Vec<T>::load(h.part[i].x + c)
                .store(static_cast<T*>(args.saved) + (row * kParts + i) * padded + c0 + c);
      }
      const Rows s = read_rows(s_plane, in_place, t0, steps, nc, s_rows),
                 v = read_rows(v_plane, in_place, t0, steps, nc, v_rows),
                 o = write_rows(out, in_place, t0, o_rows);
      for_storage<T>(in_place ? out.dtype : kDType<T>, [&](auto dtype) RECURRA_LAMBDA {
        constexpr DType S = DType(dtype.value);
        for (int64_t t = 0; t < steps; ++t) {
          const int64_t later = in_place && t + kAhead < left ? t + kAhead : t;
          const StepRows rows{s.row(t), v.row(t), o.row(t), past, s.row(later), v.row(later)};
          args.bonus ? walk<true, S>(rows, nc, parameters, h)
                     : walk<false, S>(rows, nc, parameters, h);
        }
      });
      if (!in_place) store_tile<T>(out.at(t0, 0), steps, nc, o_rows.x, kRow<T>, stream);
    }
    for (int i = 0; i < kParts; ++i)
      store_tile<T>(state_plane(args.h_last, slot, i, c0), 1, nc, h.part[i].x, kWidest<T>, false);
    if (stream) fence();
  });
}

}  // namespace

void softmax_scan(const SoftmaxScan& args) {
  computes_in_double(args.v.dtype) ? run<double>(args) : run<float>(args);
}

}  // namespace recurra::RECURRA_ISA
