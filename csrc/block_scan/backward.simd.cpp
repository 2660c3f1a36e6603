// A task is one run of sequences by one span of blocks, walked against the scan. The gradient of a
// matrix that steps share is summed where it is computed, sixteen steps at a time, and leaves the
// task once; one that only sequences or blocks share joins its sums step by step. No sum depends on
// how blocks are cut.
#include "block_scan/by_time.h"
#include "block_scan/fours.h"

namespace recurra::RECURRA_ISA {
namespace {

using namespace blocks;

constexpr int64_t kGroup = 16;  // steps that are summed before they join a gradient

// Adds rows of lanes to as many others.
template <class T>
RECURRA_INLINE void add_rows(int64_t count, const T* from, T* to) {
  for (int64_t i = 0; i < count * kLanes; i += kLanes)
    (Vec<T>::load(to + i) + Vec<T>::load(from + i)).store(to + i);
}

// The sums of a gradient along time, `runs` of them in order, into dA.
template <class T>
void write_time_sums(const BlockScanBackward& args, int64_t apart) {
  const int64_t blocks = args.h.size[2], k = args.h.size[3], run = args.groups() * k * k * kLanes;
  T* const sums = static_cast<T*>(args.partial);
  parallel(args.dA.size[0], [&](int64_t b) {
    const bool shared = args.dA.size[0] == 1;
    T* const first = sums + (shared ? 0 : b) * run;
    const int64_t runs = shared ? args.runs() : 1;
    const Matrices to = matrices(args.dA, {b, 0, 1}, false);
    T total[16 * 16 * kLanes] __attribute__((aligned(64))) = {};
    const Entries<T> entry = entries(to, {0, 1, 1, 0}, k, total);
    for_units(0, blocks, apart, [&](const Unit& u) {
      const int64_t count = u.apart * k * k;
      T* const at = first + u.row * k * k * kLanes;
      for (int64_t r = 1; r < runs; ++r) add_rows(count, at + r * run, at);
      if (args.over_blocks())
        add_rows(count, at, total);  // apart is 1
      else
        store(to, u, k, at, false);
    });
    if (args.over_blocks())
      for (int64_t e = 0; e < k * k; ++e)
        store_element<T>(args.dA.at(b, 0, 0, e / k, e % k), args.dA.dtype,
                         sum(Vec<T>::load(entry.at(e / k, e % k))));
  });
}

// The same of one that steps have of their own.
template <class T>
void write_step_sums(const BlockScanBackward& args) {
  const int64_t blocks = args.h.size[2], k = args.h.size[3], groups = args.groups();
  const int64_t lanes = args.over_blocks() ? 1 : kLanes, steps = args.dA.size[1];
  T* const sums = static_cast<T*>(args.partial);
  parallel(args.dA.size[0] * steps, [&](int64_t row) {
    const int64_t b = row / steps, t = row % steps;
    T* const first = sums + row * groups * k * k * lanes;
    const Matrices to = matrices(args.dA, {b, t, t + 1}, false);
    if (!args.over_blocks())
      return for_units(0, blocks, 1, [&](const Unit& u) {
        store(to, u, k, first + u.row * k * k * kLanes, false);
      });
    const bool turned = to.is_turned(k, 1);
    for (int64_t e = 0; e < k * k; ++e) {
      T total = T(0);
      for (int64_t g = 0; g < (blocks + kLanes - 1) / kLanes; ++g) total += first[g * k * k + e];
      const int64_t i = turned ? e % k : e / k, j = turned ? e / k : e % k;
      store_element<T>(args.dA.at(b, t, 0, i, j), args.dA.dtype, total);
    }
  });
}

template <class T>
void run(const BlockScanBackward& args) {
  const int64_t blocks = args.h.size[2], k = args.h.size[3], runs = args.runs();
  const bool over_time = args.over_time(), over_blocks = args.over_blocks();
  const bool by_step = args.reduced() && !over_time;
  // Lanes that are added to each other are neighbours, whatever the layout.
  const int64_t apart = over_blocks || by_step ? 1 : apart_of(args.h);
  const Cut shape = cut(args.h, apart, runs);
  const bool constant = args.A.size[1] == 1;
  const int64_t count = args.h.size[0] * args.h.size[1] * blocks * k;
  const bool stream = count * item_size(args.h.dtype) >= kStreamFrom;
  const bool back = !args.reverse;  // the walk is against the scan
  const bool by_fours = fours::served(args), by_sixteen_steps = by_time::served(args);

  parallel_unless(count * k < kSerialBelow, runs * shape.spans, [&](int64_t task) {
    const int64_t run = task / shape.spans, first = task % shape.spans * shape.width;
    const int64_t width = blocks - first < shape.width ? blocks - first : shape.width;
    // Where nothing is summed, a run is one sequence.
    if constexpr (kHasFours<T>)
      if (by_fours) {
        fours::walk_back<T>(args, run, first, width, stream);
        if (stream) fence();
        return;
      }
    if (by_sixteen_steps) {
      by_time::walk_back<T>(args, run, first, width, stream);
      if (stream) fence();
      return;
    }
    const int64_t entries_of_span = shape.width / kLanes * k * k * kLanes;
    Rows<T, kSpanVectors> carry;
    Rows<T, kSpanMatrices> held, sixteen, total;
    Rows<T, kUnitMatrices> products;
    Rows<T, kUnitVectors> states, cotangents, g_rows;
    Entries<T> of_unit[kSpanUnits];
    const auto each_unit = [&](auto f) { for_units(first, width, apart, f); };
    const auto rows_of = [&](const Unit& u) { return carry.x + u.row * k * kLanes; };

    if (over_time)
      each_unit([&](const Unit& u) {
        T* const at = total.x + u.row * k * k * kLanes;
        for (int64_t i = 0; i < u.apart * k * k; ++i) Vec<T>(T(0)).store(at + i * kLanes);
      });
    const int64_t begin = run * args.sequences.count / runs;
    const int64_t end = (run + 1) * args.sequences.count / runs;
    for (int64_t n = begin; n < end; ++n) {
      const Sequence seq = args.sequences[n];
      const int64_t steps = seq.length();
      const Vectors h = vectors(args.h, seq, back), dh = vectors(args.dh, seq, back),
                    db = vectors(args.db, seq, back);
      const Matrices A = matrices(args.A, seq, back), dA = matrices(args.dA, seq, back);
      int64_t units = 0;
      each_unit([&](const Unit& u) {
        load_state(vectors(args.dh_last, n), u, k, rows_of(u));
        if (constant && steps > 0)
          of_unit[units++] = load(A, u, k, held.x + u.row * k * k * kLanes);
      });
      const int64_t ahead = steps_ahead(args.h.dtype, width, constant ? k : k * k);
      for (int64_t t = 0; t < steps; ++t) {
        const bool more = t + ahead + 1 < steps;
        // The state before a step is the next one of the walk; before the last comes h0.
        const Vectors before = t == steps - 1 ? vectors(args.h0, n) : h.at(t + 1);
        int64_t unit = 0;
        each_unit([&](const Unit& u) {
          const int64_t numbers = u.apart * k, entry = u.row * k * k * kLanes;
          T* const carried = rows_of(u);
          const Matrices now = A.at(t), later = A.at(t + ahead);
          const Vectors before_later = h.at(t + ahead + 1);
          const bool one_by_one = !constant && by_group(now, u, k);
          const Entries<T> gates = constant     ? of_unit[unit++]
                                   : one_by_one ? Entries<T>{}
                                                : load(now, u, k, held.x);
          Tile<T> x{states.x, kLanes};
          before ? void(x = load(before, u, k, states.x)) : load_state({}, u, k, states.x);
          const Tile<T> given = dh ? load(dh.at(t), u, k, cotangents.x) : Tile<T>{nullptr, 0};
          for (int64_t i = 0; i < numbers; ++i) {
            Vec<T> g = Vec<T>::load(carried + i * kLanes);
            if (dh) g = Vec<T>::load(given.row(i)) + g;
            g.store(g_rows.x + i * kLanes);
          }
          const Entries<T> to = entries(dA, u, k, over_time ? sixteen.x + entry : products.x);
          for (int64_t g = 0; g < u.apart; ++g) {
            if (more) {
              if (!constant) prefetch(later, u, k, g);
              prefetch(before_later, u, k, g);
              if (dh) prefetch(dh.at(t + ahead), u, k, g);
            }
            const T* const rows = g_rows.x + g * k * kLanes;
            outer(to.at(g), k, rows, {x.row(g * k), x.stride}, over_time && t % kGroup != 0);
            const Entries<T> gate = one_by_one ? load_group(now, u, k, g, held.x) : gates.at(g);
            multiply<T>(gate.turned(), k, rows, nullptr, carried + g * k * kLanes);
          }
          store(db.at(t), u, k, g_rows.x, stream);
          if (over_time) {
            if (t % kGroup == kGroup - 1 || t == steps - 1)
              add_rows(numbers * k, sixteen.x + entry, total.x + entry);
          } else if (by_step) {
            const int64_t at = back ? seq.end - 1 - t : seq.begin + t;
            const int64_t row = (args.A.size[0] == 1 ? 0 : seq.batch) * args.A.size[1] + at;
            const int64_t group = (row * args.groups() + first / kLanes + u.row) * k * k;
            T* const sums = static_cast<T*>(args.partial) + group * (over_blocks ? 1 : kLanes);
            for (int64_t e = 0; e < k * k; ++e) {
              const Vec<T> v = Vec<T>::load(products.x + e * kLanes);
              if (over_blocks)
                sums[e] += sum(v);
              else
                (Vec<T>::load(sums + e * kLanes) + v).store(sums + e * kLanes);
            }
          } else {
            store(dA.at(t), u, k, products.x, stream);
          }
        });
      }
      each_unit([&](const Unit& u) { store(vectors(args.dh0, n), u, k, rows_of(u), false); });
    }
    if (over_time) {
      T* const sums = static_cast<T*>(args.partial) + run * args.groups() * k * k * kLanes +
                      task % shape.spans * entries_of_span;
      each_unit([&](const Unit& u) {
        const int64_t entry = u.row * k * k * kLanes;
        add_rows(u.apart * k * k, total.x + entry, sums + entry);
      });
    }
    if (stream) fence();
  });
  if (over_time)
    write_time_sums<T>(args, apart);
  else if (by_step)
    write_step_sums<T>(args);
}

}  // namespace

void block_scan_backward(const BlockScanBackward& args) {
  computes_in_double(args.h.dtype) ? run<double>(args) : run<float>(args);
}

}  // namespace recurra::RECURRA_ISA
