// A task is one run of sequences by one span of channels, walked backwards in chunks: the steps of
// a chunk are computed again from the state that was saved before it, each leaving its derivatives
// in the second cache; what then walks backwards is linear.
#include "rnn/sequential.h"

namespace recurra::RECURRA_ISA {
namespace {

using namespace recurrent;

constexpr int64_t kHeldBytes = 384 << 10;

template <class T>
struct HeldRows {
  T x[kHeldBytes / sizeof(T)] __attribute__((aligned(64)));
};

// The widest span whose derivatives fit.
template <class T>
int64_t widest(const CellRows<T>& cell) {
  const int64_t fit = static_cast<int64_t>(kHeldBytes / sizeof(T)) / (kRnnChunk * cell.held);
  const int64_t lanes = (fit - kLanes) / kLanes * kLanes;
  return lanes < kTiled<T> ? lanes : kTiled<T>;
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
  int64_t c0, nc, apart;
  bool stream;

  HeldRows<T> held;
  TileRows<T> x_rows[kMostInputs], dx_rows[kMostInputs], dy_rows[kMostStates];
  T params[kMostParams * kTileApart<T>] __attribute__((aligned(64)));
  T h[kMostStates * kTileApart<T>] __attribute__((aligned(64)));
  T mu[kMostStates * kTileApart<T>] __attribute__((aligned(64)));
  T dparams[kMostParams * kTileApart<T>] __attribute__((aligned(64)));

  // What the arrays hold is written before it is read.
  Task(const RnnBackward& a, const CellRows<T>& cells, int64_t channel, int64_t channels,
       int64_t width, bool past)
      : args(a), cell(cells), c0(channel), nc(channels), apart(width + kLanes), stream(past) {}

  void chunk(const Sequence& seq, int64_t n, int64_t k, T* sums) {
    const int64_t t0 = k * kRnnChunk, left = seq.length() - t0, padded = args.padded();
    const int64_t steps = left < kRnnChunk ? left : kRnnChunk, width = whole_lanes(nc);
    const bool x_in_place = is_rows<T>(args.x), dx_in_place = is_rows<T>(args.dx);
    const bool dy_in_place = is_rows<T>(args.dy), all = args.dy.size[2] > 1;
    Block<T> b;
    b.width = width;
    b.apart = apart;
    b.params = params;
    b.h = h;
    b.mu = mu;
    b.dparams = dparams;
    Rows<T> x[kMostInputs], dx[kMostInputs], dy[kMostStates];
    Plane to[kMostInputs];
    b.past = stream && dx_in_place;
    for (int g = 0; g < cell.inputs; ++g) {
      x[g] = read_rows(plane(args.x, seq, g, c0), x_in_place, t0, steps, nc, x_rows[g]);
      to[g] = plane(args.dx, seq, g, c0).at(t0, 0);
      dx[g] = dx_in_place ? Rows<T>{reinterpret_cast<T*>(to[g].data), to[g].stride_t}
                          : Rows<T>{dx_rows[g].x, kTileApart<T>};
      b.past = b.past && may_stream<T>(to[g]);
    }
    if (x_in_place && dy_in_place) b.ahead = -kRnnChunk;
    for (int s = 0; s < cell.states; ++s)
      if (all || s == cell.output)
        dy[s] =
            read_rows(plane(args.dy, seq, all ? s : 0, c0), dy_in_place, t0, steps, nc, dy_rows[s]);
    b.x_stride = x[0].stride;
    b.dx_stride = dx[0].stride;
    const T* const saved = static_cast<const T*>(args.saved) +
                           args.sequences.chunk_row(n, k, kRnnChunk) * cell.states * padded + c0;
    for (int s = 0; s < cell.states; ++s)
      for (int64_t c = 0; c < width; c += kLanes)
        Vec<T>::load(saved + s * padded + c).store(h + s * apart + c);
    // Runs between resets, whose states and cotangents do not meet.
    int64_t begin[kRnnChunk + 1], runs = 0;
    for (int64_t t = 0; t < steps; t += run_length(args.reset, seq, t0 + t, steps - t))
      begin[runs++] = t;
    begin[runs] = steps;
    const auto at = [&](int64_t run) {
      const int64_t t = begin[run];
      b.steps = begin[run + 1] - t;
      b.held = held.x + t * cell.held * apart;
      for (int g = 0; g < cell.inputs; ++g) {
        b.x[g] = x[g].data + t * x[g].stride;
        b.dx[g] = dx[g].data + t * dx[g].stride;
      }
      for (int s = 0; s < cell.states; ++s) {
        b.dy[s] = dy[s].data ? dy[s].data + t * dy[s].stride : nullptr;
        if (dy[s].data) b.dy_stride = dy[s].stride;
      }
      return resets(args.reset, seq, t0 + t);
    };
    for (int64_t run = 0; run < runs; ++run) {
      if (at(run)) clear_rows(h, cell.states, apart, width);
      cell.linearise(b);
    }
    clear_rows(dparams, cell.params, apart, width);
    for (int64_t run = runs - 1; run >= 0; --run) {
      const bool emptied = at(run);
      cell.reverse(b);
      if (emptied) clear_rows(mu, cell.states, apart, width);
    }
    flush_rows(mu, cell.states, apart, width);
    for (int p = 0; p < cell.params; ++p)
      for (int64_t c = 0; c < width; c += kLanes)
        (Vec<T>::load(sums + p * padded + c) + Vec<T>::load(dparams + p * apart + c))
            .store(sums + p * padded + c);
    if (!dx_in_place)
      for (int g = 0; g < cell.inputs; ++g)
        store_tile<T>(to[g], steps, nc, dx_rows[g].x, kTileApart<T>, stream);
  }

  void run(int64_t first, int64_t last, T* sums) {
    const auto row = [&](T* rows, int64_t i) { return rows + i * apart; };
    for (int p = 0; p < cell.params; ++p)
      load_row(Plane{args.params.at(p, c0), args.params.dtype, 0, args.params.step(1)}, nc,
               row(params, p), apart);
    for (int64_t n = first; n < last; ++n) {
      const Sequence seq = args.sequences[n];
      for (int s = 0; s < cell.states; ++s)
        load_row(state_plane(args.dh_last, n, s, c0), nc, row(mu, s), apart);
      for (int64_t k = (seq.length() + kRnnChunk - 1) / kRnnChunk - 1; k >= 0; --k)
        chunk(seq, n, k, sums);
      for (int s = 0; s < cell.states; ++s)
        store_tile<T>(state_plane(args.dh0, n, s, c0), 1, nc, row(mu, s), apart, false);
    }
  }
};

template <class T>
void run(const RnnBackward& args) {
  const int64_t channels = args.x.size[3], padded = args.padded();
  const CellRows<T>& cell = cell_rows<T>(args.cell);
  const Cut shape = cut(channels, widest(cell), args.parts);
  const int64_t count = args.dx.size[0] * args.dx.size[1] * args.dx.size[2] * channels;
  const bool stream = count * item_size(args.dx.dtype) >= kStreamFrom;
  parallel_unless(count < 1 << 12, args.parts * shape.spans, [&](int64_t task) {
    const int64_t part = task / shape.spans, c0 = task % shape.spans * shape.width;
    const int64_t nc = channels - c0 < shape.width ? channels - c0 : shape.width;
    Task<T> work(args, cell, c0, nc, shape.width, stream);
    work.run(part * args.sequences.count / args.parts,
             (part + 1) * args.sequences.count / args.parts,
             static_cast<T*>(args.sums) + part * cell.params * padded + c0);
    if (stream) fence();
  });
  write_parameters<T>(args);
}

}  // namespace

void rnn_backward(const RnnBackward& args) {
  computes_in_double(args.x.dtype) ? run<double>(args) : run<float>(args);
}

}  // namespace recurra::RECURRA_ISA
