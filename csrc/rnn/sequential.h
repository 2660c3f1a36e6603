// One span of channels of one sequence, walked step by step.
#pragma once
#include "rnn/cell_rows.h"
#include "rnn/rnn.h"

namespace recurra::RECURRA_ISA::recurrent {

// Lanes of a span at most: rows of 2 KiB.
template <class T>
constexpr int64_t kWidest = 2048 / sizeof(T);
// One vector more than a power of two, so that columns do not crowd into a part of the first cache.
template <class T>
constexpr int64_t kApart = kWidest<T> + kLanes;
constexpr int64_t kAhead = 4;             // steps
constexpr int64_t kStreamFrom = 8 << 20;  // bytes of output that no cache should hold

// Steps and lanes of a tile: whole rows of few steps where channels are contiguous and many, and
// few channels of as many steps as fill lines where they are not. A chunk is whole tiles.
struct TileShape {
  int64_t steps, widest;
  int64_t apart() const { return widest + kLanes; }
};
template <class T>
constexpr TileShape kRowTile = {8, kWidest<T>};
constexpr TileShape kColumnTile = {kRnnChunk, kRnnColumns};

template <class T>
TileShape tile_shape(const View<4>& x, const View<4>& y) {
  if (is_rows<T>(x) && is_rows<T>(y)) return {kRnnChunk, kWidest<T>};
  const bool wide = x.step(3) == 1 && y.step(3) == 1 && x.size[3] > kRnnColumns;
  return wide ? kRowTile<T> : kColumnTile;
}

template <class T>
struct TileRows {
  static constexpr int64_t size(const TileShape& s) { return s.steps * (s.widest + kLanes); }
  static constexpr int64_t row = size(kRowTile<T>), column = size(kColumnTile);
  T x[row > column ? row : column] __attribute__((aligned(64)));
};
template <class T, int count>
struct WideRows {
  T x[count * kApart<T>] __attribute__((aligned(64)));
  RECURRA_INLINE T* row(int64_t i) { return x + i * kApart<T>; }
};

// How channels are cut.
struct Cut {
  int64_t width, spans;
};
RECURRA_INLINE Cut cut(int64_t channels, int64_t widest, int64_t runs) {
  int64_t width = widest;
  const auto spans = [&] { return (channels + width - 1) / width; };
  while (width > 64 && runs * spans() < 2) width = (width / 2 + kLanes - 1) / kLanes * kLanes;
  return {width, spans()};
}

// Steps t0 .. t0 + steps - 1 of inputs, outputs or their cotangents as rows: in memory or in tiles.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;
};
// The columns of a span: channels c0 .. c0 + nc - 1 of sequence n, or all channels of `count`
// sequences of one length beside one another.
struct Part {
  int64_t n, count, c0, nc;
  int64_t columns() const { return count * nc; }
};

// f(plane, channels, column) for the planes of row g of the sequences of a part.
template <class F>
RECURRA_INLINE void for_each_plane(const View<4>& v, const Sequences& sequences, const Part& part,
                                   int64_t g, const F& f) {
  if (!v) return;
  if (part.nc == 1 && part.count > 1) {  // what lies between sequences is what lies between columns
    Plane p = plane(v, sequences[part.n], g, part.c0);
    p.stride_c = v.step(0);
    return f(p, part.count, int64_t{0});
  }
  for (int64_t i = 0; i < part.count; ++i)
    f(plane(v, sequences[part.n + i], g, part.c0), part.nc, i * part.nc);
}

template <class T>
Rows<T> read_rows(const View<4>& v, const Sequences& sequences, const Part& part, int64_t g,
                  bool in_place, int64_t t0, int64_t steps, T* rows, int64_t apart) {
  if (!v) return {};
  if (in_place) {
    const Plane p = plane(v, sequences[part.n], g, part.c0).at(t0, 0);
    return {reinterpret_cast<T*>(p.data), p.stride_t};
  }
  for_each_plane(v, sequences, part, g, [&](const Plane& p, int64_t channels, int64_t column) {
    T* const to = rows + column;
    // A row in memory would have a stride of its own, where all inputs share one.
    const Tile<T> tile = load_tile<T>(p.at(t0, 0), steps, channels, to, apart);
    if (tile.data != to)
      for (int64_t t = 0; t < steps; ++t)
        for (int64_t c = 0; c < channels; c += kLanes)
          Vec<T>::load(tile.row(t) + c).store(to + t * apart + c);
  });
  return {rows, apart};
}
template <class T>
void write_rows(const View<4>& v, const Sequences& sequences, const Part& part, int64_t g,
                int64_t t0, int64_t steps, const T* rows, int64_t apart, bool stream) {
  for_each_plane(v, sequences, part, g, [&](const Plane& p, int64_t channels, int64_t column) {
    store_tile<T>(p.at(t0, 0), steps, channels, rows + column, apart, stream);
  });
}

// All of a span but its inputs and outputs.
template <class T>
struct Span {
  WideRows<T, kMostParams> params;
  WideRows<T, kMostStates> h;
};

template <class T>
void load_params(const View<2>& params, const Part& part, T* rows, int64_t apart) {
  for (int64_t p = 0; p < params.size[0]; ++p)
    for (int64_t i = 0; i < part.count; ++i)
      load_row(Plane{params.at(p, part.c0), params.dtype, 0, params.step(1)}, part.nc,
               rows + p * apart + i * part.nc, apart);
}
// `slot` instead of the sequence's own.
template <class T>
void load_states(const View<3>& h, const Part& part, int64_t slot, int64_t states, T* rows,
                 int64_t apart) {
  if (!h) return clear_rows(rows, states, apart, apart);
  for (int64_t s = 0; s < states; ++s)
    for (int64_t i = 0; i < part.count; ++i)
      load_row(state_plane(h, slot + i, s, part.c0), part.nc, rows + s * apart + i * part.nc,
               apart);
}
template <class T>
void store_states(const View<3>& h, const Part& part, int64_t slot, int64_t states, T* rows,
                  int64_t apart) {
  for (int64_t s = 0; s < states; ++s)
    for (int64_t i = 0; i < part.count; ++i)
      store_tile<T>(state_plane(h, slot + i, s, part.c0), 1, part.nc,
                    rows + s * apart + i * part.nc, apart, false);
}

RECURRA_INLINE int64_t whole_lanes(int64_t channels) {
  return (channels + kLanes - 1) / kLanes * kLanes;
}

// Which states a span writes, and whether as they lie in memory, or past the caches.
template <class T>
struct Outputs {
  bool wanted[kMostStates] = {};
  bool in_place, past;

  Outputs(const Rnn& args, const CellRows<T>& cell, const Part& part, bool stream)
      : in_place(is_rows<T>(args.y) && part.nc % kLanes == 0), past(in_place && stream) {
    for (int s = 0; s < cell.states; ++s) {
      wanted[s] = args.y.size[2] > 1 || s == cell.output;
      past = past && (!wanted[s] || may_stream<T>(plane(args, s, part)));
    }
  }
  // State s of the first sequence.
  static Plane plane(const Rnn& args, int64_t s, const Part& part) {
    return recurrent::plane(args.y, args.sequences[part.n], row(args, s), part.c0);
  }
  static int64_t row(const Rnn& args, int64_t s) { return args.y.size[2] > 1 ? s : 0; }
};

// The states before chunk k, to where the backward finds them, or from there.
template <class T, class F>
RECURRA_INLINE void for_each_saved(const RnnInputs& args, void* saved, const Part& part, int64_t k,
                                   int64_t states, const F& f) {
  const int64_t padded = args.padded();
  for (int64_t i = 0; i < part.count; ++i) {
    T* const at = static_cast<T*>(saved) +
                  args.sequences.chunk_row(part.n + i, k, kRnnChunk) * states * padded + part.c0;
    for (int64_t s = 0; s < states; ++s)
      for (int64_t c = 0; c < part.nc; c += kLanes)
        f(at + s * padded + c, s, i * part.nc + c, at_most_lanes(part.nc - c));
  }
}

// Steps from `begin` on, from the states in span.h, which then are the last ones.
template <class T>
void walk_steps(const Rnn& args, const CellRows<T>& cell, const Part& part, int64_t begin,
                bool stream, Span<T>& span) {
  const Sequence seq = args.sequences[part.n];
  const int64_t width = whole_lanes(part.columns());
  TileRows<T> x_rows[kMostInputs], y_rows[kMostStates];
  const Outputs<T> out(args, cell, part, stream);
  const bool in_place = is_rows<T>(args.x) && part.nc % kLanes == 0;
  const TileShape tile = tile_shape<T>(args.x, args.y);

  for (int64_t t0 = begin; t0 < seq.length(); t0 += tile.steps) {
    const int64_t left = seq.length() - t0, steps = left < tile.steps ? left : tile.steps;
    if (args.saved && t0 % kRnnChunk == 0)
      for_each_saved<T>(args, args.saved, part, t0 / kRnnChunk, cell.states,
                        [&](T* to, int64_t s, int64_t column, int lanes) {
                          // Whole where the row is the span's own, for what reads whole ones.
                          const Vec<T> v = Vec<T>::load(span.h.row(s) + column);
                          part.count > 1 ? v.store(to, lanes) : v.store(to);
                        });
    Rows<T> x[kMostInputs], y[kMostStates];
    for (int g = 0; g < cell.inputs; ++g)
      x[g] = read_rows(args.x, args.sequences, part, g, in_place, t0, steps, x_rows[g].x,
                       tile.apart());
    for (int s = 0; s < cell.states; ++s) {
      if (!out.wanted[s]) continue;
      const Plane p = out.plane(args, s, part).at(t0, 0);
      y[s] = out.in_place ? Rows<T>{reinterpret_cast<T*>(p.data), p.stride_t}
                          : Rows<T>{y_rows[s].x, tile.apart()};
    }
    for (int64_t t = 0, run; t < steps; t += run) {
      run = run_length(args.reset, seq, t0 + t, steps - t);
      if (resets(args.reset, seq, t0 + t)) clear_rows(span.h.x, cell.states, kApart<T>, width);
      Block<T> b;
      b.steps = run;
      b.width = width;
      b.apart = kApart<T>;
      for (int g = 0; g < cell.inputs; ++g) b.x[g] = x[g].data + t * x[g].stride;
      b.x_stride = x[0].stride;
      b.params = span.params.x;
      b.h = span.h.x;
      for (int s = 0; s < cell.states; ++s)
        if (y[s].data) {
          b.y[s] = y[s].data + t * y[s].stride;
          b.y_stride = y[s].stride;
        }
      b.past = out.past;
      if (in_place) b.ahead = kAhead;
      cell.advance(b);
    }
    for (int s = 0; s < cell.states && !out.in_place; ++s)
      if (out.wanted[s])
        write_rows(args.y, args.sequences, part, out.row(args, s), t0, steps, y_rows[s].x,
                   tile.apart(), stream);
  }
}

template <class T>
void write_zeros(const Rnn& args, const CellRows<T>& cell, const Part& part) {
  const Outputs<T> out(args, cell, part, false);
  T zeros[kWidest<T>] = {};
  for (int s = 0; s < cell.states; ++s)
    for (int64_t t = 0; out.wanted[s] && t < args.sequences[part.n].length(); ++t)
      store_tile<T>(out.plane(args, s, part).at(t, 0), 1, part.nc, zeros, kWidest<T>, false);
}

template <class T>
void walk_span(const Rnn& args, const CellRows<T>& cell, const Part& part, bool stream) {
  const int64_t slot = args.slots ? args.slots[part.n] : part.n;
  if (slot < 0) return write_zeros(args, cell, part);
  Span<T> span;
  load_params(args.params, part, span.params.x, kApart<T>);
  load_states(args.h0, part, slot, cell.states, span.h.x, kApart<T>);
  walk_steps(args, cell, part, 0, stream, span);
  store_states(args.h_last, part, slot, cell.states, span.h.x, kApart<T>);
}

}  // namespace recurra::RECURRA_ISA::recurrent
