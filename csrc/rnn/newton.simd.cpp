// Multiple shooting: the mathematics is in rnn.h.
//
// A stretch is `blocks` chunks of kRnnChunk steps, the last one of a sequence what is left of them;
// stretch k of a channel is lane k of that channel's rows. What is left of a sequence after its
// last whole chunk is walked sequentially. A task of a pass is a group of channels by a group of
// lanes; between two passes the starts move, channel by channel.
#include "rnn/converged.h"
#include "rnn/sequential.h"

namespace recurra::RECURRA_ISA {
namespace {

using namespace recurrent;

// Columns that keep a core busy, each waiting for its own step before; and of a task at most.
constexpr int64_t kBusy = 64, kColumns = 256;

// How a sequence is cut.
struct Stretches {
  int64_t chunks, blocks, count, lanes;  // lanes: count, rounded up to whole vectors

  Stretches(const RnnNewton& args, int64_t n) {
    chunks = args.sequences[n].length() / kRnnChunk;
    blocks = newton_blocks(args.chunk);
    count = newton_stretches(args.sequences[n].length(), args.chunk);
    lanes = newton_lanes(args.sequences[n].length(), args.chunk);
  }
  // Chunks of stretch k.
  int64_t length(int64_t k) const { return k + 1 < count ? blocks : chunks - k * blocks; }
};

// What is kept of the stretches of one channel: a row of lanes for each state's start, end and
// size before the end, and for each entry of the product.
template <class T>
struct Shots {
  T* data;
  int64_t states, lanes;

  T* start(int64_t s) const { return data + s * lanes; }
  T* end(int64_t s) const { return data + (states + s) * lanes; }
  T* size(int64_t s) const { return data + (2 * states + s) * lanes; }
  T* product(int64_t i) const { return data + (3 * states + i) * lanes; }
};
template <class T>
Shots<T> shots(const RnnNewton& args, const CellRows<T>& cell, int64_t n, int64_t channel) {
  const int64_t lanes = Stretches(args, n).lanes, rows = newton_rows(cell.states);
  T* const all = static_cast<T*>(args.workspace) + args.lanes_before[n] * args.x.size[3] * rows;
  return {all + channel * rows * lanes, cell.states, lanes};
}

enum class Pass { warm_up, newton };

// How channels and their lanes are cut into tasks, and where lane k of channel c of a task stands.
// Where there are channels enough for vectors, they are neighbours and rows are read as they lie;
// where there are few, lanes are neighbours, and one task has all channels, so that all of a row is
// turned at once.
struct Columns {
  int64_t channels, group, lanes;

  explicit Columns(int64_t count) : channels(count) {
    const bool few = channels < kLanes;
    group = newton_group(channels);
    const int64_t columns = few ? group : whole_lanes(group);
    lanes = columns < kBusy ? kBusy / columns : 1;
    if (few) lanes = whole_lanes(lanes);
  }
  bool turned() const { return channels < kLanes; }
  int64_t groups() const { return (channels + group - 1) / group; }
  int64_t size(int64_t g) const {
    return channels - g * group < group ? channels - g * group : group;
  }
};

// Channels c0 .. c0 + nc - 1 of sequence n by lanes k0 .. k0 + lw - 1 of each.
template <class T>
struct LaneTask {
  const RnnNewton& args;
  const CellRows<T>& cell;
  const Sequence seq;
  const Stretches cut;
  const bool turned;
  const int64_t n, c0, nc, k0, lw, width;

  T params[kMostParams * kColumns] __attribute__((aligned(64)));
  T h[kMostStates * kColumns] __attribute__((aligned(64)));
  T size[kMostStates * kColumns] __attribute__((aligned(64)));
  T product[kMostStates * kMostStates * kColumns] __attribute__((aligned(64)));
  T x[kRnnChunk * kMostInputs * kColumns] __attribute__((aligned(64)));
  T y[kRnnChunk * kMostStates * kColumns] __attribute__((aligned(64)));

  LaneTask(const RnnNewton& a, const CellRows<T>& cells, const Columns& columns, int64_t sequence,
           int64_t group, int64_t lane, int64_t lanes)
      : args(a),
        cell(cells),
        seq(a.sequences[sequence]),
        cut(a, sequence),
        turned(columns.turned()),
        n(sequence),
        c0(group * columns.group),
        nc(columns.size(group)),
        k0(lane),
        lw(lanes),
        width(turned ? nc * lw : whole_lanes(nc) * lw) {
    clear_rows(params, cell.params, width, width);
    for (int p = 0; p < cell.params; ++p)
      for (int64_t c = 0; c < nc; ++c) {
        const T value = load_element<T>(args.params.at(p, c0 + c), args.params.dtype);
        for (int64_t k = 0; k < lw; ++k) params[p * width + column(c, k)] = value;
      }
  }

  int64_t column(int64_t c, int64_t k) const {
    return turned ? c * lw + k : k * whole_lanes(nc) + c;
  }

  // f(row in lanes, channel) for every channel.
  template <class F>
  void for_each_channel(const F& f) {
    for (int64_t c = 0; c < nc; ++c) f(shots(args, cell, n, c0 + c), c);
  }

  // Lanes whose stretch has a chunk j.
  int64_t active(int64_t j) const {
    int64_t k = j < cut.length(cut.count - 1) ? cut.count : cut.count - 1;
    k = k - k0 < lw ? k - k0 : lw;
    return k < 0 ? 0 : k;
  }
  // The last stretch ends before the others. Its lane goes on without inputs, from zeros, since
  // what decays would become subnormal.
  void keep_last(Pass pass) {
    const int64_t k = cut.count - 1;
    if (k < k0 || k >= k0 + lw) return;
    for_each_channel([&](const Shots<T>& to, int64_t c) {
      const auto take = [&](T* row) {
        T& from = row[column(c, k - k0)];
        const T last = from;
        from = T(0);
        return last;
      };
      for (int s = 0; s < cell.states; ++s) to.end(s)[k] = take(h + s * width);
      for (int s = 0; pass == Pass::newton && s < cell.states; ++s)
        to.size(s)[k] = take(size + s * width);
      for (int i = 0; pass == Pass::newton && i < cell.states * cell.states; ++i)
        to.product(i)[k] = take(product + i * width);
    });
  }
  void keep_ends(Pass pass) {
    const int64_t whole = cut.length(cut.count - 1) == cut.blocks ? cut.count : cut.count - 1;
    const int64_t count = whole - k0 < lw ? whole - k0 : lw;
    for_each_channel([&](const Shots<T>& to, int64_t c) {
      const auto keep = [&](const T* row, T* lane) {
        for (int64_t k = 0; k < count; ++k) lane[k0 + k] = row[column(c, k)];
      };
      for (int s = 0; s < cell.states; ++s) keep(h + s * width, to.end(s));
      for (int s = 0; pass == Pass::newton && s < cell.states; ++s)
        keep(size + s * width, to.size(s));
      for (int i = 0; pass == Pass::newton && i < cell.states * cell.states; ++i)
        keep(product + i * width, to.product(i));
    });
  }

  // Chunk j of lane k.
  Plane chunk_of(const View<4>& v, int64_t row, int64_t c, int64_t k, int64_t j) const {
    return plane(v, seq, row, c0 + c).at(((k0 + k) * cut.blocks + j) * kRnnChunk, 0);
  }
  // The same chunk of all lanes, channel and time as neighbours, turned: lanes are columns. False
  // where rows do not lie so.
  bool all_lanes(const View<4>& v, int64_t j, Plane& out) const {
    const bool dense = (nc == 1 || v.step(3) == 1) && (v.size[2] == 1 || v.step(2) == nc) &&
                       v.step(1) == nc * v.size[2];
    out = chunk_of(v, 0, 0, 0, j);
    out.stride_c = cut.blocks * kRnnChunk * v.step(1);
    out.stride_t = 1;
    return dense;
  }

  // Inputs of chunk j: row t * inputs + g.
  void load(int64_t j, int64_t lanes) {
    const View<4>& v = args.x;
    const int64_t G = cell.inputs;
    const auto fill = [&](const Plane& p, int64_t rows, int64_t columns, T* to, int64_t apart) {
      const Tile<T> tile = load_tile<T>(p, rows, columns, to, apart);
      for (int64_t i = 0; tile.data != to && i < rows; ++i)
        for (int64_t c = 0; c < columns; c += kLanes)
          Vec<T>::load(tile.row(i) + c).store(to + i * apart + c);
    };
    if (!turned) {
      for (int64_t k = 0; k < lanes; ++k)
        for (int64_t g = 0; g < G; ++g) {
          fill(chunk_of(v, g, 0, k, j), kRnnChunk, nc, x + g * width + column(0, k), G * width);
          // No machine foresees the next one after those of the other lanes.
          prefetch_tile(chunk_of(v, g, 0, k, j + 1), kRnnChunk, nc);
        }
      return;
    }
    Plane turns;
    if (whole_lanes(lanes) < lw) clear_rows(x, kRnnChunk * G * nc, lw, lw);
    if (all_lanes(v, j, turns)) return fill(turns, kRnnChunk * G * nc, lanes, x, lw);
    for (int64_t g = 0; g < G; ++g)
      for (int64_t c = 0; c < nc; ++c) {
        Plane p = chunk_of(v, g, c, 0, j);
        p.stride_c = cut.blocks * kRnnChunk * v.step(1);
        fill(p, kRnnChunk, lanes, x + g * width + c * lw, G * width);
      }
  }
  // Outputs of chunk j: row t * wanted + s.
  void store(int64_t j, int64_t lanes) {
    const View<4>& v = args.y;
    const int64_t S = v.size[2];
    if (!turned) {
      for (int64_t k = 0; k < lanes; ++k)
        for (int64_t s = 0; s < S; ++s)
          store_tile<T>(chunk_of(v, s, 0, k, j), kRnnChunk, nc, y + s * width + column(0, k),
                        S * width, false);
      return;
    }
    Plane turns;
    if (all_lanes(v, j, turns))
      return store_tile<T>(turns, kRnnChunk * S * nc, lanes, y, lw, false);
    for (int64_t s = 0; s < S; ++s)
      for (int64_t c = 0; c < nc; ++c) {
        Plane p = chunk_of(v, s, c, 0, j);
        p.stride_c = cut.blocks * kRnnChunk * v.step(1);
        store_tile<T>(p, kRnnChunk, lanes, y + s * width + c * lw, S * width, false);
      }
  }
  void save(int64_t j, int64_t lanes) {
    const int64_t padded = args.padded();
    for (int64_t k = 0; k < lanes; ++k) {
      T* const to =
          static_cast<T*>(args.saved) +
          args.sequences.chunk_row(n, (k0 + k) * cut.blocks + j, kRnnChunk) * cell.states * padded +
          c0;
      for (int s = 0; s < cell.states; ++s)
        for (int64_t c = 0; c < nc; ++c) to[s * padded + c] = h[s * width + column(c, k)];
    }
  }

  // Empties the lanes that are reset before step t of chunk j; whether there are any.
  bool reset(int64_t j, int64_t t, int64_t lanes, bool apply) {
    bool any = false;
    for (int64_t k = 0; k < lanes; ++k) {
      if (!resets(args.reset, seq, ((k0 + k) * cut.blocks + j) * kRnnChunk + t)) continue;
      any = true;
      if (!apply) return true;
      for (int64_t c = 0; c < nc; ++c) {
        for (int s = 0; s < cell.states; ++s) h[s * width + column(c, k)] = T(0);
        for (int i = 0; i < cell.states * cell.states; ++i)
          product[i * width + column(c, k)] = T(0);
      }
    }
    return any;
  }

  // Of what they were before, this part counts still.
  void note_sizes(T part) {
    for (int64_t i = 0; i < cell.states * width; i += kLanes)
      max(abs(Vec<T>::load(h + i)), Vec<T>::load(size + i) * Vec<T>(part)).store(size + i);
  }

  // Whether anything is left of the products. What has decayed to nothing stays so, whatever
  // Jacobians follow, and most cells forget in a small part of a stretch.
  bool carries() const {
    Vec<T> sum(T(0));  // NaN where one is
    for (int64_t i = 0; i < cell.states * cell.states * width; i += kLanes)
      sum = sum + abs(Vec<T>::load(product + i));
    T lanes[kLanes];
    sum.store(lanes);
    for (const T lane : lanes)
      if (lane != T(0)) return true;
    return false;
  }

  void chunk(Pass pass, int64_t j, int64_t lanes) {
    load(j, lanes);
    const auto advance =
        pass == Pass::newton && carries() ? cell.advance_with_product : cell.advance;
    Block<T> b;
    b.width = turned ? width : column(0, lanes);
    b.apart = width;
    b.params = params;
    b.h = h;
    b.product = product;
    b.x_stride = cell.inputs * width;
    const int64_t wanted = args.y.size[2];
    for (int64_t t = 0, run; t < kRnnChunk; t += run) {
      run = kRnnChunk - t;
      if (args.reset) {
        reset(j, t, lanes, true);
        for (run = 1; t + run < kRnnChunk && !reset(j, t + run, lanes, false);) ++run;
      }
      b.steps = run;
      for (int g = 0; g < cell.inputs; ++g) b.x[g] = x + (t * cell.inputs + g) * width;
      for (int s = 0; pass == Pass::newton && s < cell.states; ++s)
        if (wanted > 1 || s == cell.output)
          b.y[s] = y + (t * wanted + (wanted > 1 ? s : 0)) * width;
      b.y_stride = wanted * width;
      advance(b);
    }
    if (pass == Pass::warm_up) return;
    note_sizes(T(0.5));
    flush_rows(product, cell.states * cell.states, width, width);
    store(j, lanes);
  }

  void run(Pass pass) {
    clear_rows(h, cell.states, width, width);
    int64_t first = 0;
    if (pass == Pass::warm_up) {
      const int64_t warm = (args.warm_up + kRnnChunk - 1) / kRnnChunk;
      first = warm < cut.blocks ? cut.blocks - warm : 0;
    } else {
      clear_rows(product, cell.states * cell.states, width, width);
      for (int s = 0; s < cell.states; ++s)
        for (int64_t i = 0; i < width; ++i) product[s * (cell.states + 1) * width + i] = T(1);
      for_each_channel([&](const Shots<T>& from, int64_t c) {
        for (int s = 0; s < cell.states; ++s)
          for (int64_t k = 0; k < lw; ++k) h[s * width + column(c, k)] = from.start(s)[k0 + k];
      });
      clear_rows(size, cell.states, width, width);
      note_sizes(T(0));
    }
    for (int64_t j = first; j < cut.blocks; ++j) {
      if (j == cut.length(cut.count - 1)) keep_last(pass);
      const int64_t lanes = active(j);
      if (lanes == 0) break;
      if (pass == Pass::newton && args.saved) save(j, lanes);
      chunk(pass, j, lanes);
    }
    keep_ends(pass);
  }
};

// Moves the starts of a channel by Newton's step; true where there is nothing to do any more.
template <class T>
bool move_starts(const RnnNewton& args, const CellRows<T>& cell, int64_t n, int64_t channel,
                 int32_t pass) {
  const int64_t count = Stretches(args, n).count, at = n * args.x.size[3] + channel;
  const Shots<T> shot = shots(args, cell, n, channel);
  const int S = cell.states;
  T largest[kMostStates] = {}, mismatch = 0;
  bool finite = true, near = true;
  for (int s = 0; s < S; ++s)
    for (int64_t k = 0; k < count; ++k) {
      const T size = absolute(shot.end(s)[k]);
      finite = finite && is_finite(size);
      if (size > largest[s]) largest[s] = size;
    }
  const auto walk = [&](bool move) {
    T d[kMostStates] = {};
    for (int64_t k = 0; k + 1 < count; ++k) {
      T next[kMostStates];
      bool usable = true;
      for (int s = 0; s < S; ++s) {
        next[s] = T(0);
        for (int i = 0; i < S; ++i) next[s] += shot.product(s * S + i)[k] * d[i];
        // A linear step that leaves the range of the states says nothing.
        usable = usable && absolute(next[s]) <= 2 * largest[s];
      }
      for (int s = 0; s < S; ++s) {
        const T end = shot.end(s)[k], gap = end - shot.start(s)[k + 1];
        if (absolute(gap) > mismatch) mismatch = absolute(gap);
        d[s] = gap + (usable ? next[s] : T(0));
        near = near && usable && absolute(d[s]) <= kConverged<T> * shot.size(s)[k];
        if (move) shot.start(s)[k + 1] = end + (usable ? next[s] : T(0));
      }
    }
  };
  if (finite) walk(false);
  const bool converged = finite && (near || mismatch == T(0));
  // Where it has, what another pass repeats for the sake of other channels stays what it is.
  if (finite && !converged) walk(true);
  const NewtonReport& report = args.report;
  report.passes[at] = pass;
  report.mismatch[at] = finite ? static_cast<double>(mismatch) : __builtin_nan("");
  report.converged[at] = converged;
  return converged || !finite;
}

template <class T>
struct Solver {
  const RnnNewton& args;
  const CellRows<T>& cell;
  const int64_t channels;
  const Columns columns;
  int64_t lane_groups = 0;

  Solver(const RnnNewton& a, const CellRows<T>& cells)
      : args(a), cell(cells), channels(a.x.size[3]), columns(channels) {
    for (int64_t n = 0; n < args.sequences.count; ++n) {
      const int64_t of_n = (Stretches(args, n).count + columns.lanes - 1) / columns.lanes;
      lane_groups = of_n > lane_groups ? of_n : lane_groups;
    }
  }
  bool shoots(int64_t n) const { return Stretches(args, n).count > 1; }
  bool done(int64_t n, int64_t g) const {
    bool all = true;
    for (int64_t c = 0; c < columns.size(g); ++c)
      all = all && args.done[n * channels + g * columns.group + c];
    return all;
  }

  void pass(Pass kind) {
    const int64_t groups = columns.groups();
    parallel(args.sequences.count * groups * lane_groups, [&](int64_t task) {
      const int64_t n = task / (groups * lane_groups), g = task / lane_groups % groups,
                    k0 = task % lane_groups * columns.lanes;
      const Stretches cut(args, n);
      if (k0 >= cut.count || done(n, g)) return;
      const int64_t left = (columns.turned() ? cut.lanes : cut.count) - k0;
      LaneTask<T>(args, cell, columns, n, g, k0, left < columns.lanes ? left : columns.lanes)
          .run(kind);
    });
  }

  void run() {
    const int64_t rows = args.sequences.count * channels;
    for (int64_t i = 0; i < rows; ++i) {
      args.done[i] = !shoots(i / channels);
      args.report.converged[i] = args.done[i];
    }
    pass(Pass::warm_up);
    for (int64_t i = 0; i < rows; ++i) {
      if (args.done[i]) continue;
      const Shots<T> shot = shots(args, cell, i / channels, i % channels);
      for (int s = 0; s < cell.states; ++s) {
        T* const start = shot.start(s);
        const Plane h0 = state_plane(args.h0, i / channels, s, i % channels);
        start[0] = h0 ? load_element<T>(h0.data, h0.dtype) : T(0);
        for (int64_t k = 1; k < shot.lanes; ++k)
          start[k] = k < Stretches(args, i / channels).count ? shot.end(s)[k - 1] : T(0);
      }
    }
    for (int32_t passes = 1; passes <= args.max_passes; ++passes) {
      bool all = true;
      for (int64_t i = 0; i < rows; ++i) all = all && args.done[i];
      if (all) break;
      pass(Pass::newton);
      for (int64_t i = 0; i < rows; ++i)
        if (!args.done[i])
          args.done[i] = move_starts(args, cell, i / channels, i % channels, passes);
    }
    finish();
  }

  // The steps behind the last whole chunk, and all of those where nothing else worked.
  void finish() {
    const int64_t groups = columns.groups();
    parallel(args.sequences.count * groups, [&](int64_t task) {
      const int64_t n = task / groups, g = task % groups, c0 = g * columns.group;
      const Part part = {n, 1, c0, columns.size(g)};
      bool good = shoots(n);
      for (int64_t c = 0; c < columns.size(g); ++c)
        good = good && args.report.converged[n * channels + c0 + c];
      if (!good) return walk_span<T>(args, cell, part, false);
      Span<T> span;
      load_params(args.params, part, span.params.x, kApart<T>);
      const Stretches cut(args, n);
      for (int s = 0; s < cell.states; ++s)
        for (int64_t c = 0; c < whole_lanes(columns.size(g)); ++c)
          span.h.row(s)[c] =
              c < columns.size(g) ? shots(args, cell, n, c0 + c).end(s)[cut.count - 1] : T(0);
      walk_steps<T>(args, cell, part, cut.chunks * kRnnChunk, false, span);
      store_states(args.h_last, part, n, cell.states, span.h.x, kApart<T>);
      for (int s = 0; s < cell.states; ++s)
        for (int64_t c = 0; c < part.nc; ++c)
          if (!is_finite(span.h.row(s)[c]))
            args.report.mismatch[n * channels + c0 + c] = __builtin_nan("");
    });
  }
};

template <class T>
void run(const RnnNewton& args) {
  if (args.x.size[3] > 0) Solver<T>(args, cell_rows<T>(args.cell)).run();
}

}  // namespace

void rnn_newton(const RnnNewton& args) {
  computes_in_double(args.x.dtype) ? run<double>(args) : run<float>(args);
}

}  // namespace recurra::RECURRA_ISA
