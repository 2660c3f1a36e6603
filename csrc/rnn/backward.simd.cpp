// A task is one run of sequences by one span of channels, walked backwards in chunks: the steps of
// a chunk are computed again from the state that was saved before it, each leaving its elementary
// functions in the second cache, and what then walks backwards has their derivatives from these.
#include "rnn/sequential.h"

namespace recurra::RECURRA_ISA {
namespace {

using namespace recurrent;

constexpr int64_t kHeldBytes = 256 << 10;
// Lanes of a span at most where rows are turned a chunk at a time because they do not lie in memory
// as they are worked on.
template <class T>
constexpr int64_t kTurnedWidest = 512 / sizeof(T);
template <class T>
struct ChunkRows {
  T x[kRnnChunk * (kTurnedWidest<T> + kLanes)] __attribute__((aligned(64)));
};

template <class T>
struct HeldRows {
  T x[kHeldBytes / sizeof(T)] __attribute__((aligned(64)));
};

// The widest span whose rows fit.
template <class T>
int64_t widest(const CellRows<T>& cell, const RnnBackward& args) {
  const int64_t fit = static_cast<int64_t>(kHeldBytes / sizeof(T)) / (kRnnChunk * cell.held);
  const int64_t lanes = (fit - kLanes) / kLanes * kLanes;
  const bool in_place = is_rows<T>(args.x) && is_rows<T>(args.dx) && is_rows<T>(args.dy);
  const int64_t most = in_place ? kWidest<T> : kTurnedWidest<T>;
  return lanes < most ? lanes : most;
}

// The sums of the runs, in order.
template <class T>
void write_parameters(const RnnBackward& args) {
  const int64_t channels = args.x.size[3], padded = args.padded(), params = args.params.size[0];
  T* const sums = static_cast<T*>(args.sums);
  for (int64_t part = 1; part < args.parts; ++part)
    for (int64_t i = 0; i < params * padded; i += kLanes)
      (Vec<T>::load(sums + i) + Vec<T>::load(sums + part * params * padded + i)).store(sums + i);
  for (int64_t p = 0; p < params; ++p)
    store_tile<T>({args.dparams.at(p, 0), args.dparams.dtype, 0, args.dparams.step(1)}, 1, channels,
                  sums + p * padded, padded, false);
}

template <class T>
struct Task {
  const RnnBackward& args;
  const CellRows<T>& cell;
  const int64_t apart;
  const bool x_in_place, dx_in_place, dy_in_place, stream;

  HeldRows<T> held;
  ChunkRows<T> x_rows[kMostInputs], dx_rows[kMostInputs], dy_rows[kMostStates];
  T params[kMostParams * kApart<T>] __attribute__((aligned(64)));
  T h[kMostStates * kApart<T>] __attribute__((aligned(64)));
  T mu[kMostStates * kApart<T>] __attribute__((aligned(64)));
  T dparams[kMostParams * kApart<T>] __attribute__((aligned(64)));

  // What the arrays hold is written before it is read.
  Task(const RnnBackward& a, const CellRows<T>& cells, int64_t width, bool past)
      : args(a),
        cell(cells),
        apart(width + kLanes),
        x_in_place(is_rows<T>(a.x)),
        dx_in_place(is_rows<T>(a.dx)),
        dy_in_place(is_rows<T>(a.dy)),
        stream(past) {}

  void chunk(const Part& part, int64_t k, T* sums) {
    const Sequence seq = args.sequences[part.n];
    const int64_t t0 = k * kRnnChunk, left = seq.length() - t0, padded = args.padded();
    const int64_t steps = left < kRnnChunk ? left : kRnnChunk;
    const int64_t width = whole_lanes(part.columns());
    const bool all = args.dy.size[2] > 1;
    for_each_saved<T>(args, const_cast<void*>(args.saved), part, k, cell.states,
                      [&](const T* from, int64_t s, int64_t column, int) {
                        Vec<T>::load(from).store(h + s * apart + column);
                      });
    Rows<T> x[kMostInputs], dx[kMostInputs], dy[kMostStates];
    Block<T> b;
    b.width = width;
    b.apart = apart;
    b.params = params;
    b.h = h;
    b.mu = mu;
    b.dparams = dparams;
    b.held_rows = cell.held;
    b.past = stream && dx_in_place;
    for (int g = 0; g < cell.inputs; ++g) {
      x[g] = read_rows(args.x, args.sequences, part, g, x_in_place, t0, steps, x_rows[g].x, apart);
      const Plane to = plane(args.dx, seq, g, part.c0).at(t0, 0);
      dx[g] = dx_in_place ? Rows<T>{reinterpret_cast<T*>(to.data), to.stride_t}
                          : Rows<T>{dx_rows[g].x, apart};
      b.past = b.past && may_stream<T>(to);
    }
    b.x_stride = x[0].stride;
    b.dx_stride = dx[0].stride;
    for (int s = 0; s < cell.states; ++s) {
      if (all || s == cell.output)
        dy[s] = read_rows(args.dy, args.sequences, part, all ? s : 0, dy_in_place, t0, steps,
                          dy_rows[s].x, apart);
      if (dy[s].data) b.dy_stride = dy[s].stride;
    }

    // Runs of steps between resets, across which states and cotangents do not meet.
    int64_t begin[kRnnChunk + 1], runs = 0;
    for (int64_t t = 0; t < steps; t += run_length(args.reset, seq, t0 + t, steps - t))
      begin[runs++] = t;
    begin[runs] = steps;
    const auto emptied = [&](int64_t run) { return resets(args.reset, seq, t0 + begin[run]); };
    const auto enter = [&](int64_t run) {
      const int64_t t = begin[run];
      b.steps = begin[run + 1] - t;
      b.held = held.x + t * cell.held * apart;
      for (int g = 0; g < cell.inputs; ++g) {
        b.x[g] = x[g].data + t * b.x_stride;
        b.dx[g] = dx[g].data + t * b.dx_stride;
      }
      for (int s = 0; s < cell.states; ++s)
        b.dy[s] = dy[s].data ? dy[s].data + t * b.dy_stride : nullptr;
    };
    if (x_in_place && dy_in_place) b.ahead = -kRnnChunk;
    for (int64_t run = 0; run < runs; ++run) {
      enter(run);
      if (emptied(run)) clear_rows(h, cell.states, apart, width);
      cell.record(b);
    }
    clear_rows(dparams, cell.params, apart, width);
    for (int64_t run = runs - 1; run >= 0; --run) {
      enter(run);
      cell.reverse(b);
      if (emptied(run)) clear_rows(mu, cell.states, apart, width);
    }
    if (!dx_in_place)
      for (int g = 0; g < cell.inputs; ++g)
        write_rows(args.dx, args.sequences, part, g, t0, steps, dx_rows[g].x, apart, stream);
    flush_rows(mu, cell.states, apart, width);
    for (int p = 0; p < cell.params; ++p) {
      T *const to = sums + p * padded, *const from = dparams + p * apart;
      if (part.count == 1)
        for (int64_t c = 0; c < width; c += kLanes)
          (Vec<T>::load(to + c) + Vec<T>::load(from + c)).store(to + c);
      else
        for (int64_t i = 0; i < part.columns(); ++i) to[i % part.nc] += from[i];
    }
  }

  void run(const Part& part, T* sums) {
    const int64_t chunks = (args.sequences[part.n].length() + kRnnChunk - 1) / kRnnChunk;
    load_params(args.params, part, params, apart);
    load_states(args.dh_last, part, part.n, cell.states, mu, apart);
    for (int64_t k = chunks - 1; k >= 0; --k) chunk(part, k, sums);
    store_states(args.dh0, part, part.n, cell.states, mu, apart);
  }
};

template <class T>
void run(const RnnBackward& args) {
  const int64_t channels = args.x.size[3], padded = args.padded();
  const CellRows<T>& cell = cell_rows<T>(args.cell);
  const int64_t lanes = widest(cell, args);
  int64_t most = args.together();
  const Cut shape = most > 1 ? Cut{lanes, 1} : cut(channels, lanes, args.parts);
  if (most > 1 && most * channels > lanes) most = lanes / channels;
  const int64_t count = args.dx.size[0] * args.dx.size[1] * args.dx.size[2] * channels;
  const bool stream = count * item_size(args.dx.dtype) >= kStreamFrom;
  parallel_unless(count < 1 << 12, args.parts * shape.spans, [&](int64_t task) {
    const int64_t run = task / shape.spans, c0 = task % shape.spans * shape.width;
    const int64_t nc = channels - c0 < shape.width ? channels - c0 : shape.width;
    T* const sums = static_cast<T*>(args.sums) + run * cell.params * padded + c0;
    Task<T> work(args, cell, shape.width, stream);
    const int64_t last = (run + 1) * args.sequences.count / args.parts;
    for (int64_t n = run * args.sequences.count / args.parts; n < last; n += most)
      work.run({n, last - n < most ? last - n : most, c0, nc}, sums);
    if (stream) fence();
  });
  if (args.dparams) write_parameters<T>(args);
}

}  // namespace

void rnn_backward(const RnnBackward& args) {
  computes_in_double(args.x.dtype) ? run<double>(args) : run<float>(args);
}

}  // namespace recurra::RECURRA_ISA
