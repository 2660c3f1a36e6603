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

// Steps and lanes of a tile: whole rows of few steps where channels are contiguous, and few
// channels of as many steps as fill lines where they are not. A chunk is whole tiles.
struct TileShape {
  int64_t steps, widest;
  int64_t apart() const { return widest + kLanes; }
};
template <class T>
constexpr TileShape kRowTile = {8, kWidest<T>};
constexpr TileShape kColumnTile = {kRnnChunk, 64};

template <class T, class... V>
TileShape tile_shape(const V&... views) {
  if ((... && (!views || is_rows<T>(views)))) return {kRnnChunk, kWidest<T>};
  return (... && (!views || views.step(3) == 1)) ? kRowTile<T> : kColumnTile;
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
template <class T>
Rows<T> read_rows(const Plane& p, bool in_place, int64_t t0, int64_t steps, int64_t channels,
                  TileRows<T>& rows, int64_t apart) {
  if (!p) return {};
  const Plane at = p.at(t0, 0);
  if (in_place) return {reinterpret_cast<T*>(at.data), p.stride_t};
  // A row in memory would have a stride of its own, where all inputs share one.
  const Tile<T> tile = load_tile<T>(at, steps, channels, rows.x, apart);
  if (tile.data != rows.x)
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t c = 0; c < channels; c += kLanes)
        Vec<T>::load(tile.row(t) + c).store(rows.x + t * apart + c);
  return {rows.x, apart};
}

// All of a span but its inputs and outputs.
template <class T>
struct Span {
  WideRows<T, kMostParams> params;
  WideRows<T, kMostStates> h;
};

template <class T>
void load_params(const View<2>& params, int64_t channel, int64_t channels,
                 WideRows<T, kMostParams>& rows) {
  for (int64_t p = 0; p < params.size[0]; ++p)
    load_row(Plane{params.at(p, channel), params.dtype, 0, params.step(1)}, channels, rows.row(p),
             kWidest<T>);
}
template <class T>
void load_states(const View<3>& h, int64_t n, int64_t states, int64_t channel, int64_t channels,
                 WideRows<T, kMostStates>& rows) {
  for (int64_t s = 0; s < states; ++s)
    load_row(state_plane(h, n, s, channel), channels, rows.row(s), kWidest<T>);
}
template <class T>
void store_states(const View<3>& h, int64_t n, int64_t states, int64_t channel, int64_t channels,
                  WideRows<T, kMostStates>& rows) {
  for (int64_t s = 0; s < states; ++s)
    store_tile<T>(state_plane(h, n, s, channel), 1, channels, rows.row(s), kWidest<T>, false);
}

RECURRA_INLINE int64_t whole_lanes(int64_t channels) {
  return (channels + kLanes - 1) / kLanes * kLanes;
}

// Where the outputs of a span go.
template <class T>
struct Outputs {
  Plane plane[kMostStates];  // of the states that are wanted
  bool in_place, past;

  Outputs(const Rnn& args, const CellRows<T>& cell, const Sequence& seq, int64_t channel,
          int64_t channels, bool stream)
      : in_place(is_rows<T>(args.y) && channels % kLanes == 0) {
    const bool all = args.y.size[2] > 1;
    for (int s = 0; s < cell.states; ++s)
      if (all || s == cell.output) plane[s] = recurrent::plane(args.y, seq, all ? s : 0, channel);
    past = in_place && stream;
    for (const Plane& p : plane) past = past && (!p || may_stream<T>(p));
  }
};

// Steps from `begin` on, from the states in span.h, which then are the last ones.
template <class T>
void walk_steps(const Rnn& args, const CellRows<T>& cell, int64_t n, int64_t begin, int64_t c0,
                int64_t nc, bool stream, Span<T>& span) {
  const Sequence seq = args.sequences[n];
  const int64_t padded = args.padded();
  TileRows<T> x_rows[kMostInputs], y_rows[kMostStates];
  const Outputs<T> out(args, cell, seq, c0, nc, stream);
  const bool in_place = is_rows<T>(args.x) && nc % kLanes == 0;
  const TileShape tile = tile_shape<T>(args.x, args.y);
  Plane inputs[kMostInputs];
  for (int g = 0; g < cell.inputs; ++g) inputs[g] = plane(args.x, seq, g, c0);

  for (int64_t t0 = begin; t0 < seq.length(); t0 += tile.steps) {
    const int64_t left = seq.length() - t0, steps = left < tile.steps ? left : tile.steps;
    if (args.saved && t0 % kRnnChunk == 0) {
      T* const to = static_cast<T*>(args.saved) +
                    args.sequences.chunk_row(n, t0 / kRnnChunk, kRnnChunk) * cell.states * padded +
                    c0;
      for (int s = 0; s < cell.states; ++s)
        for (int64_t c = 0; c < nc; c += kLanes)
          Vec<T>::load(span.h.row(s) + c).store(to + s * padded + c, at_most_lanes(nc - c));
    }
    Rows<T> x[kMostInputs], y[kMostStates];
    for (int g = 0; g < cell.inputs; ++g)
      x[g] = read_rows(inputs[g], in_place, t0, steps, nc, x_rows[g], tile.apart());
    for (int s = 0; s < cell.states; ++s)
      if (out.plane[s] && out.in_place)
        y[s] = {reinterpret_cast<T*>(out.plane[s].at(t0, 0).data), out.plane[s].stride_t};
      else if (out.plane[s])
        y[s] = {y_rows[s].x, tile.apart()};
    for (int64_t t = 0, run; t < steps; t += run) {
      run = run_length(args.reset, seq, t0 + t, steps - t);
      if (resets(args.reset, seq, t0 + t))
        clear_rows(span.h.x, cell.states, kApart<T>, whole_lanes(nc));
      Block<T> b;
      b.steps = run;
      b.width = whole_lanes(nc);
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
    if (!out.in_place)
      for (int s = 0; s < cell.states; ++s)
        store_tile<T>(out.plane[s] ? out.plane[s].at(t0, 0) : Plane{}, steps, nc, y_rows[s].x,
                      tile.apart(), stream);
  }
}

template <class T>
void write_zeros(const Rnn& args, const CellRows<T>& cell, int64_t n, int64_t c0, int64_t nc) {
  const Sequence seq = args.sequences[n];
  const Outputs<T> out(args, cell, seq, c0, nc, false);
  T zeros[kWidest<T>] = {};
  for (int64_t t = 0; t < seq.length(); ++t)
    for (const Plane& p : out.plane)
      if (p) store_tile<T>(p.at(t, 0), 1, nc, zeros, kWidest<T>, false);
}

template <class T>
void walk_span(const Rnn& args, const CellRows<T>& cell, int64_t n, int64_t c0, int64_t nc,
               bool stream) {
  const int64_t slot = args.slots ? args.slots[n] : n;
  if (slot < 0) return write_zeros(args, cell, n, c0, nc);
  Span<T> span;
  load_params(args.params, c0, nc, span.params);
  load_states(args.h0, slot, cell.states, c0, nc, span.h);
  walk_steps(args, cell, n, 0, c0, nc, stream, span);
  store_states(args.h_last, slot, cell.states, c0, nc, span.h);
}

}  // namespace recurra::RECURRA_ISA::recurrent
