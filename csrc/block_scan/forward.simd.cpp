// A task is one sequence by one span of blocks and walks along time. A block of k numbers brings
// k k + 2 k numbers from and to memory and as many multiply-adds as entries, so the memory is the
// limit; a matrix that all steps share is brought in once.
#include "block_scan/by_time.h"
#include "block_scan/fours.h"

namespace recurra::RECURRA_ISA {
namespace {

using namespace blocks;

template <class T>
void run(const BlockScan& args) {
  const int64_t blocks = args.b.size[2], k = args.b.size[3], apart = apart_of(args.b);
  const Cut shape = cut(args.b, apart, args.sequences.count);
  const bool constant = args.A.size[1] == 1;
  const int64_t count = args.b.size[0] * args.b.size[1] * blocks * k;
  const bool stream = count * item_size(args.h.dtype) >= kStreamFrom;
  const bool by_fours = fours::served(args), by_sixteen_steps = by_time::served(args);

  parallel_unless(count * k < kSerialBelow, args.sequences.count * shape.spans, [&](int64_t task) {
    const int64_t n = task / shape.spans, first = task % shape.spans * shape.width;
    const int64_t width = blocks - first < shape.width ? blocks - first : shape.width;
    const int64_t slot = args.slots ? args.slots[n] : n;
    const Sequence seq = args.sequences[n];
    const Vectors b = vectors(args.b, seq, args.reverse), h = vectors(args.h, seq, args.reverse);
    const Matrices A = matrices(args.A, seq, args.reverse);
    Rows<T, kSpanVectors> states[2];
    Rows<T, kSpanMatrices> held;
    Entries<T> of_unit[kSpanUnits];
    Rows<T, kUnitVectors> inputs;
    T *state = states[0].x, *next = states[1].x;
    const auto each_unit = [&](auto f) { for_units(first, width, apart, f); };
    const auto rows_of = [&](T* rows, const Unit& u) { return rows + u.row * k * kLanes; };

    if (slot < 0) {
      each_unit([&](const Unit& u) {
        load_state<T>({}, u, k, state);
        for (int64_t t = 0; t < seq.length(); ++t) store<T>(h.at(t), u, k, state, false);
      });
      return;
    }
    if constexpr (kHasFours<T>)
      if (by_fours) {
        fours::walk<T>(args, seq, slot, first, width, stream);
        if (stream) fence();
        return;
      }
    if (by_sixteen_steps) {
      by_time::walk<T>(args, seq, slot, first, width, stream);
      if (stream) fence();
      return;
    }
    int64_t units = 0;
    each_unit([&](const Unit& u) {
      load_state(vectors(args.h0, slot), u, k, rows_of(state, u));
      if (constant && seq.length() > 0)
        of_unit[units++] = load(A, u, k, held.x + u.row * k * k * kLanes);
    });
    const int64_t ahead = steps_ahead(args.b.dtype, width, constant ? k : k * k);
    for (int64_t t = 0; t < seq.length(); ++t) {
      const bool more = t + ahead < seq.length();
      int64_t unit = 0;
      each_unit([&](const Unit& u) {
        const Matrices now = A.at(t), later = A.at(t + ahead);
        const Vectors inputs_later = b.at(t + ahead);
        const bool one_by_one = !constant && by_group(now, u, k);
        const Entries<T> entries = constant     ? of_unit[unit++]
                                   : one_by_one ? Entries<T>{}
                                                : load(now, u, k, held.x);
        const Tile<T> source = load(b.at(t), u, k, inputs.x);
        const T* x = rows_of(state, u);
        T* out = rows_of(next, u);
        for (int64_t g = 0; g < u.apart; ++g) {
          if (more) {
            if (!constant) prefetch(later, u, k, g);
            prefetch(inputs_later, u, k, g);
          }
          const Tile<T> start{source.row(g * k), source.stride};
          multiply(one_by_one ? load_group(now, u, k, g, held.x) : entries.at(g), k,
                   x + g * k * kLanes, &start, out + g * k * kLanes);
        }
        store(h.at(t), u, k, out, stream);
      });
      T* const before = state;
      state = next;
      next = before;
    }
    each_unit(
        [&](const Unit& u) { store(vectors(args.h_last, slot), u, k, rows_of(state, u), false); });
    if (stream) fence();
  });
}

}  // namespace

void block_scan(const BlockScan& args) {
  computes_in_double(args.b.dtype) ? run<double>(args) : run<float>(args);
}

}  // namespace recurra::RECURRA_ISA
