// A task is one sequence by a block of channels and walks along time, row by row, so that memory is
// read and written as it lies. 12 bytes per float32 element forward and 20 backward: the memory is
// the limit, so rows are as long as they are in memory where that leaves enough tasks, what lies
// row by row is not copied, and large outputs are written past the caches. Other layouts and
// broadcast gates go through tiles. Neither the width nor the tile changes a bit.
#include "linear_scan/linear_scan.h"

#include "math/functions.h"
#include "partial_sums.h"

namespace recurra::RECURRA_ISA {
namespace {

constexpr int64_t kTile = 4096;            // elements of a tile
constexpr int64_t kWidest = 1024;          // channels of a row
constexpr int64_t kAhead = 16;             // rows by which parts of rows are prefetched
constexpr int64_t kColumnsAhead = 32;      // steps by which columns are prefetched
constexpr int64_t kStreamFrom = 8 << 20;   // bytes of output that no cache is asked to hold
constexpr int64_t kSerialBelow = 1 << 12;  // elements that threads would not make faster

template <class T>
using Buffer = T __attribute__((aligned(64)))[kTile];

struct Cut {
  int64_t width, steps, blocks;
};

bool by_row(const View<3>& v) { return v.step(2) == 1 || v.size[2] == 1; }

// Rows that need no tile may be long: every stream then is one that the machine sees coming.
// Otherwise wide tiles where channels are contiguous, tall ones where time is. Some eight tasks
// saturate the memory, and two do so sooner with rows of 512 bytes than four with 256.
Cut cut(const View<3>& lead, int64_t sequences, bool tiled) {
  const bool time_first = lead.step(2) != 1 && (lead.step(1) == 1 || lead.step(1) == -1);
  int64_t width = !tiled ? kWidest : time_first ? 64 : 256;
  const int64_t channels = lead.size[2];
  const auto blocks = [&] { return (channels + width - 1) / width; };
  while (width > (time_first ? 16 : 64) &&
         sequences * blocks() < (time_first || width > 128 ? 8 : 2))
    width /= 2;
  return {width, kTile / width, blocks()};
}

bool streams(const View<3>& out) {
  return out.size[0] * out.size[1] * out.size[2] * item_size(out.dtype) >= kStreamFrom;
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

// h and the state, where every tensor lies row by row. The machine foresees what it will read where
// that is one ascending stream.
template <class T, DType S>
void forward_rows(const Plane& a, const Plane& b, const Plane& h, bool log_a, int64_t steps,
                  int64_t channels, bool foreseen, bool stream, T* state) {
  constexpr int64_t item = item_size(S);
  const bool past = stream && may_stream<T>(h);
  for (int64_t t = 0; t < steps; ++t) {
    if (!foreseen && t + kAhead < steps) {
      prefetch_row(a, t + kAhead, channels);
      prefetch_row(b, t + kAhead, channels);
    }
    const char* gates = a.data + t * a.stride_t * item;
    const char* inputs = b.data + t * b.stride_t * item;
    char* to = h.data + t * h.stride_t * item;
    for (int64_t c = 0; c < channels; c += kLanes) {
      Vec<T> gate = load_stored<T, S>(gates + c * item);
      if (log_a) gate = exp(gate);
      const Vec<T> v = fma(gate, Vec<T>::load(state + c), load_stored<T, S>(inputs + c * item));
      v.store(state + c);
      store_stored<T, S>(to + c * item, v, past);
    }
  }
}

// Whether a plane is T's own numbers with time contiguous, in either direction.
template <class T>
bool by_time(const Plane& p) {
  return p.dtype == kDType<T> && (p.stride_t == 1 || p.stride_t == -1);
}

// Sixteen steps of sixteen channels where time is contiguous: rows[i] becomes the i-th step in
// memory. The lines that come `ahead` numbers later in the walk are asked for.
template <class T>
RECURRA_INLINE void load_block(const T* from, int64_t stride, int64_t ahead,
                               Vec<T> (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) prefetch<2>(from + i * stride + ahead);
  for (int i = 0; i < kLanes; ++i) rows[i] = Vec<T>::load(from + i * stride);
  transpose(rows);
}

// The first steps of h, where time is contiguous in every tensor and may be walked backwards, in
// all of them: as many blocks of sixteen as there are, transposed in registers. Returns how many
// steps these are.
template <class T>
int64_t forward_columns(const Plane& a, const Plane& b, const Plane& h, bool log_a, int64_t steps,
                        int64_t channels, bool stream, T* state) {
  if (!by_time<T>(a) || !by_time<T>(b) || !by_time<T>(h) || channels % kLanes != 0) return 0;
  if (a.stride_t != b.stride_t || a.stride_t != h.stride_t) return 0;
  const int64_t blocks = steps / kLanes, back = a.stride_t < 0 ? kLanes - 1 : 0;
  for (int64_t c = 0; c < channels; c += kLanes) {
    Vec<T> v = Vec<T>::load(state + c);
    for (int64_t n = 0; n < blocks; ++n) {
      // Where the block starts in memory.
      const int64_t t = n * kLanes + back;
      T* to = reinterpret_cast<T*>(h.at(t, c).data);
      const bool past = stream && reinterpret_cast<uintptr_t>(to) % 64 == 0 &&
                        h.stride_c * static_cast<int64_t>(sizeof(T)) % 64 == 0;
      Vec<T> gates[kLanes], inputs[kLanes];
      load_block(reinterpret_cast<T*>(a.at(t, c).data), a.stride_c, a.stride_t * kColumnsAhead,
                 gates);
      load_block(reinterpret_cast<T*>(b.at(t, c).data), b.stride_c, b.stride_t * kColumnsAhead,
                 inputs);
      for (int i = 0; i < kLanes; ++i) {
        const int64_t row = i ^ back;
        v = fma(log_a ? exp(gates[row]) : gates[row], v, inputs[row]);
        inputs[row] = v;
      }
      transpose(inputs);
      for (int i = 0; i < kLanes; ++i)
        past ? inputs[i].stream(to + i * h.stride_c) : inputs[i].store(to + i * h.stride_c);
    }
    v.store(state + c);
  }
  return blocks * kLanes;
}

template <class T>
void forward(const LinearScan& args) {
  const int64_t channels = args.b.size[2];
  const bool tiled = !(by_row(args.a) && by_row(args.b) && by_row(args.h)) ||
                     args.a.size[2] != channels || channels % kLanes != 0;
  const Cut shape = cut(args.b, args.sequences.count, tiled);
  const bool stream = streams(args.h);
  const bool serial = args.b.size[0] * args.b.size[1] * channels < kSerialBelow;
  parallel_unless(serial, args.sequences.count * shape.blocks, [&](int64_t task) {
    const int64_t n = task / shape.blocks, c0 = task % shape.blocks * shape.width;
    const int64_t nc = channels - c0 < shape.width ? channels - c0 : shape.width;
    const Sequence s = args.sequences[n];
    const Plane a = plane(args.a, s, args.reverse, c0), b = plane(args.b, s, args.reverse, c0),
                h = plane(args.h, s, args.reverse, c0);
    Buffer<T> buffer_a, buffer_b, out;
    T state[kWidest] __attribute__((aligned(64)));
    load_row<T>(plane(args.h0, n, c0), nc, state, shape.width);
    if (!tiled)
      for_storage<T>(b.dtype, [&](auto dtype) RECURRA_LAMBDA {
        forward_rows<T, DType(dtype.value)>(a, b, h, args.log_a, s.length(), nc,
                                            nc == channels && b.stride_t > 0, stream, state);
      });
    const int64_t done =
        !tiled ? s.length()
        : args.a.size[2] != channels
            ? 0
            : forward_columns<T>(a, b, h, args.log_a, s.length(), nc, stream, state);
    for (int64_t t0 = done; t0 < s.length(); t0 += shape.steps) {
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

// da, db and the carried gradient, where every tensor lies row by row; `first` is h0.
template <class T, DType S>
void backward_rows(const Plane& a, const Plane& h, const Plane& dh, const Plane& da,
                   const Plane& db, bool log_a, int64_t steps, int64_t channels, bool stream,
                   const T* first, T* carry) {
  constexpr int64_t item = item_size(S);
  const bool past = stream && may_stream<T>(da) && may_stream<T>(db);
  for (int64_t t = 0; t < steps; ++t) {
    if (t + kAhead + 1 < steps) {
      prefetch_row(a, t + kAhead, channels);
      prefetch_row(h, t + kAhead + 1, channels);
      if (dh) prefetch_row(dh, t + kAhead, channels);
    }
    const bool last = t == steps - 1;
    const char* gates = a.data + t * a.stride_t * item;
    const char* before = h.data + (t + 1) * h.stride_t * item;
    const char* from = dh.data + t * dh.stride_t * item;
    char* to_a = da.data + t * da.stride_t * item;
    char* to_b = db.data + t * db.stride_t * item;
    for (int64_t c = 0; c < channels; c += kLanes) {
      Vec<T> g = Vec<T>::load(carry + c), gate = load_stored<T, S>(gates + c * item);
      if (dh) g = load_stored<T, S>(from + c * item) + g;
      if (log_a) gate = exp(gate);
      const Vec<T> ag = gate * g;
      const Vec<T> state = last ? Vec<T>::load(first + c) : load_stored<T, S>(before + c * item);
      ag.store(carry + c);
      store_stored<T, S>(to_b + c * item, g, past);
      store_stored<T, S>(to_a + c * item, (log_a ? ag : g) * state, past);
    }
  }
}

template <class T>
void backward(const LinearScanBackward& args) {
  const int64_t channels = args.h.size[2];
  const bool reduced = static_cast<bool>(args.partial);
  const bool tiled = reduced || channels % kLanes != 0 || !by_row(args.a) || !by_row(args.h) ||
                     !by_row(args.da) || !by_row(args.db) || (args.dh && !by_row(args.dh));
  const Cut shape = cut(args.h, args.sequences.count, tiled);
  const bool stream = streams(args.db);
  const int64_t owned = args.owned();
  const int64_t tasks = args.sequences.count / owned * shape.blocks;
  const bool back = !args.reverse;  // the walk is against the scan
  const bool serial = args.h.size[0] * args.h.size[1] * channels < kSerialBelow;
  parallel_unless(serial, tasks, [&](int64_t task) {
    const int64_t c0 = task % shape.blocks * shape.width;
    const int64_t nc = channels - c0 < shape.width ? channels - c0 : shape.width;
    Buffer<T> buffer_a, buffer_h, buffer_d, out_a, out_b;
    T carry[kWidest] __attribute__((aligned(64))), first[kWidest] __attribute__((aligned(64)));
    for (int64_t n = task / shape.blocks * owned, end = n + owned; n < end; ++n) {
      const Sequence s = args.sequences[n];
      const Plane a = plane(args.a, s, back, c0), h = plane(args.h, s, back, c0),
                  dh = plane(args.dh, s, back, c0), da = plane(args.da, s, back, c0),
                  db = plane(args.db, s, back, c0);
      Plane sums;
      if (reduced) {
        const bool over_channels = args.a.size[2] == 1;
        sums = plane(args.partial, args.sums_of(n), back, 0);
        sums = sums.at(0, over_channels ? c0 / kLanes : c0);
      }
      load_row<T>(plane(args.dh_last, n, c0), nc, carry, shape.width);
      load_row<T>(plane(args.h0, n, c0), nc, first, shape.width);
      if (!tiled)
        for_storage<T>(h.dtype, [&](auto dtype) RECURRA_LAMBDA {
          backward_rows<T, DType(dtype.value)>(a, h, dh, da, db, args.log_a, s.length(), nc, stream,
                                               first, carry);
        });
      for (int64_t t0 = tiled ? 0 : s.length(); t0 < s.length(); t0 += shape.steps) {
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
  if (reduced) write_sums<T>(args.partial, args.da);
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
