// A task is one sequence by a block of channels and walks along time in tiles, row by row, so that
// memory is read and written as it lies. 12 bytes per float32 element forward and 20 backward:
// the memory is the limit, so large outputs are written past the caches.
#include "linear_scan/linear_scan.h"

#include "math/functions.h"
#include "tile.h"

namespace recurra::RECURRA_ISA {
namespace {

constexpr int64_t kTile = 4096;           // elements of a tile
constexpr int64_t kGroup = 16;            // steps that are summed before they join a gradient
constexpr int64_t kStreamFrom = 8 << 20;  // bytes of output that no cache is asked to hold

template <class T>
using Buffer = T __attribute__((aligned(64)))[kTile];

struct Cut {
  int64_t width, steps, blocks;
};

// Wide rows where channels are contiguous, tall tiles where time is; enough blocks to share out.
Cut cut(const View<3>& lead, int64_t sequences) {
  const bool time_first = lead.step(2) != 1 && (lead.step(1) == 1 || lead.step(1) == -1);
  int64_t width = time_first ? 32 : 256;
  const int64_t channels = lead.size[2];
  const auto blocks = [&] { return (channels + width - 1) / width; };
  while (width > (time_first ? 16 : 64) && sequences * blocks() < 16) width /= 2;
  return {width, kTile / width, blocks()};
}

bool streams(const View<3>& out) {
  return out.size[0] * out.size[1] * out.size[2] * item_size(out.dtype) >= kStreamFrom;
}

template <class T>
void load_row(const Plane& p, int64_t channels, T* row, int64_t width) {
  if (!p) {
    for (int64_t c = 0; c < width; ++c) row[c] = T(0);
    return;
  }
  const Tile<T> tile = load_tile<T>(p, 1, channels, row, width);
  if (tile.data != row)
    for (int64_t c = 0; c < channels; ++c) row[c] = tile.data[c];
}

// The gate: as it lies, or the exponential of its logarithm.
template <class T>
Tile<T> load_gate(const Plane& p, bool log_a, int64_t steps, int64_t channels, T* buffer,
                  int64_t width) {
  const Tile<T> tile = load_tile<T>(p, steps, channels, buffer, width);
  if (!log_a) return tile;
  for (int64_t t = 0; t < steps; ++t)
    for (int64_t c = 0; c < channels; c += kLanes)
      exp(Vec<T>::load(tile.row(t) + c)).store(buffer + t * width + c);
  return {buffer, width};
}

template <class T>
void forward(const LinearScan& args) {
  const int64_t channels = args.b.size[2];
  const Cut shape = cut(args.b, args.sequences.count);
  const bool stream = streams(args.h);
  parallel(args.sequences.count * shape.blocks, [&](int64_t task) {
    const int64_t n = task / shape.blocks, c0 = task % shape.blocks * shape.width;
    const int64_t nc = channels - c0 < shape.width ? channels - c0 : shape.width;
    const Sequence s = args.sequences[n];
    const Plane a = plane(args.a, s, args.reverse, c0), b = plane(args.b, s, args.reverse, c0),
                h = plane(args.h, s, args.reverse, c0);
    Buffer<T> buffer_a, buffer_b, out;
    T state[256] __attribute__((aligned(64)));
    load_row<T>(plane(args.h0, n, c0), nc, state, shape.width);
    for (int64_t t0 = 0; t0 < s.length(); t0 += shape.steps) {
      const int64_t steps = s.length() - t0 < shape.steps ? s.length() - t0 : shape.steps;
      const Tile<T> ta = load_gate<T>(a.at(t0, 0), args.log_a, steps, nc, buffer_a, shape.width);
      const Tile<T> tb = load_tile<T>(b.at(t0, 0), steps, nc, buffer_b, shape.width);
      const T* previous = state;
      for (int64_t t = 0; t < steps; ++t) {
        T* row = out + t * shape.width;
        for (int64_t c = 0; c < nc; c += kLanes)
          fma(Vec<T>::load(ta.row(t) + c), Vec<T>::load(previous + c), Vec<T>::load(tb.row(t) + c))
              .store(row + c);
        previous = row;
      }
      for (int64_t c = 0; c < nc; c += kLanes) Vec<T>::load(previous + c).store(state + c);
      store_tile<T>(h.at(t0, 0), steps, nc, out, shape.width, stream);
    }
    store_tile<T>(plane(args.h_last, n, c0), 1, nc, state, shape.width, false);
    if (stream) fence();
  });
}

// Adds a tile of gate gradients into the partial sums: over time in groups of kGroup steps, over
// the lanes of sixteen channels by the fixed tree. Both orders are those of the walk, whatever
// the layout and the tile.
template <class T>
void accumulate(const View<3>& a, const Plane& to, int64_t steps, int64_t channels, const T* rows,
                int64_t width) {
  const bool over_time = a.size[1] == 1, over_channels = a.size[2] == 1;
  for (int64_t t = 0; t < steps; t += kGroup) {
    const int64_t group = over_time ? (steps - t < kGroup ? steps - t : kGroup) : 1;
    const int64_t end = over_time ? t + 1 : (steps - t < kGroup ? steps : t + kGroup);
    for (int64_t first = t; first < end; ++first)
      for (int64_t c = 0; c < channels; c += kLanes) {
        Vec<T> v = Vec<T>::load(rows + first * width + c);
        for (int64_t i = 1; i < group; ++i) v = v + Vec<T>::load(rows + (first + i) * width + c);
        T* at = reinterpret_cast<T*>(to.at(over_time ? 0 : first, 0).data);
        if (over_channels) {
          at[c / kLanes] += sum(v);
        } else {
          const int lanes = at_most_lanes(channels - c);
          (Vec<T>::load(at + c, lanes) + v).store(at + c, lanes);
        }
      }
  }
}

// da = the partial sums, over the blocks of sixteen channels in order where D was broadcast.
template <class T>
void finish(const View<3>& partial, const View<3>& da) {
  const int64_t rows = da.size[2] ? da.size[0] * da.size[1] : 0;
  const int64_t blocks = rows ? partial.size[2] / da.size[2] : 0;
  parallel((rows + 255) / 256, [&](int64_t task) {
    for (int64_t row = task * 256; row < rows && row < task * 256 + 256; ++row) {
      const int64_t b = row / da.size[1], t = row % da.size[1];
      if (da.size[2] > 1 || blocks == 1) {
        for (int64_t d = 0; d < da.size[2]; ++d)
          store_element<T>(da.at(b, t, d), da.dtype,
                           *reinterpret_cast<const T*>(partial.at(b, t, d)));
        continue;
      }
      T total = T(0);
      for (int64_t i = 0; i < blocks; ++i)
        total += *reinterpret_cast<const T*>(partial.at(b, t, i));
      store_element<T>(da.at(b, t, 0), da.dtype, total);
    }
  });
}

template <class T>
void backward(const LinearScanBackward& args) {
  const int64_t channels = args.h.size[2];
  const Cut shape = cut(args.h, args.sequences.count);
  const bool stream = streams(args.db);
  const bool reduced = static_cast<bool>(args.partial);
  // Sequences that add into the same sums are walked by one task, in order.
  const bool shared = reduced && args.sequences.count > 1 &&
                      (args.sequences.offsets ? args.a.size[1] == 1 : args.a.size[0] == 1);
  const int64_t owned = shared ? args.sequences.count : 1;
  const int64_t tasks = args.sequences.count / (owned ? owned : 1) * shape.blocks;
  const bool back = !args.reverse;  // the walk is against the scan
  parallel(tasks, [&](int64_t task) {
    const int64_t c0 = task % shape.blocks * shape.width;
    const int64_t nc = channels - c0 < shape.width ? channels - c0 : shape.width;
    Buffer<T> buffer_a, buffer_h, buffer_d, out_a, out_b;
    T carry[256] __attribute__((aligned(64))), first[256] __attribute__((aligned(64)));
    for (int64_t n = task / shape.blocks * owned, end = n + owned; n < end; ++n) {
      const Sequence s = args.sequences[n];
      const Plane a = plane(args.a, s, back, c0), h = plane(args.h, s, back, c0),
                  dh = plane(args.dh, s, back, c0), da = plane(args.da, s, back, c0),
                  db = plane(args.db, s, back, c0);
      Plane sums;
      if (reduced) {
        const bool over_channels = args.a.size[2] == 1;
        sums = plane(args.partial, s, back, 0);
        sums = sums.at(0, over_channels ? c0 / kLanes : c0);
      }
      load_row<T>(plane(args.dh_last, n, c0), nc, carry, shape.width);
      load_row<T>(plane(args.h0, n, c0), nc, first, shape.width);
      for (int64_t t0 = 0; t0 < s.length(); t0 += shape.steps) {
        const int64_t steps = s.length() - t0 < shape.steps ? s.length() - t0 : shape.steps;
        const bool last = t0 + steps == s.length();
        const Tile<T> ta = load_gate<T>(a.at(t0, 0), args.log_a, steps, nc, buffer_a, shape.width);
        // Row t of the previous states is the next one of the walk; the last is h0.
        const Tile<T> th =
            load_tile<T>(h.at(t0 + 1, 0), last ? steps - 1 : steps, nc, buffer_h, shape.width);
        Tile<T> td{nullptr, 0};
        if (dh) td = load_tile<T>(dh.at(t0, 0), steps, nc, buffer_d, shape.width);
        for (int64_t t = 0; t < steps; ++t) {
          const T* before = last && t == steps - 1 ? first : th.row(t);
          for (int64_t c = 0; c < nc; c += kLanes) {
            Vec<T> g = Vec<T>::load(carry + c);
            if (dh) g = Vec<T>::load(td.row(t) + c) + g;
            const Vec<T> gate = Vec<T>::load(ta.row(t) + c), ag = gate * g;
            g.store(out_b + t * shape.width + c);
            ((args.log_a ? ag : g) * Vec<T>::load(before + c)).store(out_a + t * shape.width + c);
            ag.store(carry + c);
          }
        }
        store_tile<T>(db.at(t0, 0), steps, nc, out_b, shape.width, stream);
        if (reduced)
          accumulate<T>(args.a, sums.at(args.a.size[1] == 1 ? 0 : t0, 0), steps, nc, out_a,
                        shape.width);
        else
          store_tile<T>(da.at(t0, 0), steps, nc, out_a, shape.width, stream);
      }
      store_tile<T>(plane(args.dh0, n, c0), 1, nc, carry, shape.width, false);
    }
    if (stream) fence();
  });
  if (reduced) finish<T>(args.partial, args.da);
}

template <class T>
void step(const LinearScanStep& args) {
  const int64_t rows = args.b.size[0], channels = args.b.size[1];
  const int64_t blocks = (channels + 255) / 256;
  const auto one = [&](int64_t task) {
    const int64_t n = task / blocks, c0 = task % blocks * 256;
    const int64_t nc = channels - c0 < 256 ? channels - c0 : 256;
    T a[256], b[256], state[256];
    const int64_t slot = args.slots ? args.slots[n] : n;
    const Plane out = plane(args.out, n, c0);
    if (slot < 0) {
      load_row<T>({}, nc, state, 256);
      return store_tile<T>(out, 1, nc, state, 256, false);
    }
    const Plane h = plane(args.h, slot, c0);
    load_row<T>(h, nc, state, 256);
    const Tile<T> ta = load_gate<T>(plane(args.a, n, c0), args.log_a, 1, nc, a, 256);
    const Tile<T> tb = load_tile<T>(plane(args.b, n, c0), 1, nc, b, 256);
    for (int64_t c = 0; c < nc; c += kLanes)
      fma(Vec<T>::load(ta.data + c), Vec<T>::load(state + c), Vec<T>::load(tb.data + c))
          .store(state + c);
    store_tile<T>(h, 1, nc, state, 256, false);
    store_tile<T>(out, 1, nc, state, 256, false);
  };
  // Threads cost more than they save below some tens of thousands of elements.
  if (rows * channels < 1 << 16)
    for (int64_t task = 0; task < rows * blocks; ++task) one(task);
  else
    parallel(rows * blocks, one);
}

}  // namespace

void linear_scan(const LinearScan& args) {
  computes_in_double(args.b.dtype) ? forward<double>(args) : forward<float>(args);
}

void linear_scan_backward(const LinearScanBackward& args) {
  computes_in_double(args.h.dtype) ? backward<double>(args) : backward<float>(args);
}

void linear_scan_step(const LinearScanStep& args) {
  computes_in_double(args.b.dtype) ? step<double>(args) : step<float>(args);
}

}  // namespace recurra::RECURRA_ISA
