// The textbook form of Newton's method, for comparison: every state is an unknown, and a pass is
// one sweep over all of them, in which the solution of the linear recurrence follows the
// linearisation at the states of the pass before. A task is one sequence by one span of channels.
#include "rnn/converged.h"
#include "rnn/sequential.h"

namespace recurra::RECURRA_ISA {
namespace {

using namespace recurrent;

constexpr int64_t kLanesOfSpan = kColumnTile.widest;

template <class T>
struct Sweeps {
  const RnnGlobalNewton& args;
  const CellRows<T>& cell;
  const int64_t n, c0, nc;
  const Sequence seq;

  WideRows<T, kMostParams> params;
  WideRows<T, kMostStates> h0, h, step;
  WideRows<T, 3 * kMostStates> largest;  // see CellRows::newton
  TileRows<T> x_rows[kMostInputs];

  Sweeps(const RnnGlobalNewton& a, const CellRows<T>& cells, int64_t sequence, int64_t channel,
         int64_t channels)
      : args(a), cell(cells), n(sequence), c0(channel), nc(channels), seq(a.sequences[sequence]) {
    load_params(args.params, part(), params.x, kApart<T>);
    load_states(args.h0, part(), n, cell.states, h0.x, kApart<T>);
  }

  Part part() const { return {n, 1, c0, nc}; }
  T* states(int64_t t, int64_t s) const {
    const int64_t row = seq.batch * args.x.size[1] + seq.begin + t;
    return static_cast<T*>(args.workspace) + (row * cell.states + s) * args.padded() + c0;
  }
  void copy(T* from, int64_t from_apart, T* to, int64_t to_apart) const {
    for (int s = 0; s < cell.states; ++s)
      for (int64_t c = 0; c < nc; c += kLanes)
        Vec<T>::load(from + s * from_apart + c).store(to + s * to_apart + c);
  }

  // f(block, t) for every run of steps between resets, with its inputs, from the first on.
  template <class F>
  void walk(int64_t longest, const F& f) {
    for (int64_t t0 = 0; t0 < seq.length(); t0 += kRnnChunk) {
      const int64_t left = seq.length() - t0, steps = left < kRnnChunk ? left : kRnnChunk;
      Rows<T> x[kMostInputs];
      for (int g = 0; g < cell.inputs; ++g)
        x[g] = read_rows(args.x, args.sequences, part(), g, false, t0, steps, x_rows[g].x,
                         kColumnTile.apart());
      for (int64_t t = 0; t < steps; t += longest) {
        Block<T> b;
        const int64_t run = run_length(args.reset, seq, t0 + t, steps - t);
        b.steps = run < longest ? run : longest;
        b.width = whole_lanes(nc);
        b.apart = kApart<T>;
        for (int g = 0; g < cell.inputs; ++g) b.x[g] = x[g].data + t * x[g].stride;
        b.x_stride = x[0].stride;
        b.params = params.x;
        b.h = h.x;
        for (int s = 0; s < cell.states; ++s) b.y[s] = states(t0 + t, s);
        b.y_stride = cell.states * args.padded();
        f(b, t0 + t);
      }
    }
  }

  void guess() {
    walk(1, [&](const Block<T>& b, int64_t) {
      clear_rows(h.x, cell.states, kApart<T>, whole_lanes(nc));
      cell.advance(b);
    });
  }
  // Whether all channels have converged.
  bool sweep(int32_t pass) {
    const int64_t width = whole_lanes(nc);
    copy(h0.x, kApart<T>, h.x, kApart<T>);
    clear_rows(step.x, cell.states, kApart<T>, width);
    clear_rows(largest.x, 3 * cell.states, kApart<T>, width);
    walk(args.reset ? 1 : kRnnChunk, [&](Block<T> b, int64_t t) {
      if (resets(args.reset, seq, t)) {
        clear_rows(h.x, cell.states, kApart<T>, width);
        clear_rows(step.x, cell.states, kApart<T>, width);
      }
      flush_rows(step.x, cell.states, kApart<T>, width);
      b.mu = step.x;
      b.product = largest.x;
      cell.newton(b);
    });
    bool all = true;
    for (int64_t c = 0; c < nc; ++c) {
      const int64_t at = n * args.x.size[3] + c0 + c;
      bool near = true, finite = true;
      T residual = 0;
      for (int s = 0; s < cell.states; ++s) {
        const T excess = largest.row(s)[c], off = largest.row(cell.states + s)[c];
        finite = finite && is_finite(excess) && is_finite(off);
        near = near && excess <= 0;
        residual = off > residual ? off : residual;
      }
      args.report.passes[at] = pass;
      args.report.mismatch[at] = finite ? static_cast<double>(residual) : __builtin_nan("");
      args.report.converged[at] = finite && near;
      all = all && (near || !finite);
    }
    return all;
  }

  void run() {
    bool converged = true;
    for (int64_t c = 0; c < nc; ++c) args.report.converged[n * args.x.size[3] + c0 + c] = true;
    if (seq.length() > 0) {
      guess();
      for (int32_t pass = 1; pass <= args.max_passes; ++pass)
        if (sweep(pass)) break;
    }
    for (int64_t c = 0; c < nc; ++c)
      converged = converged && args.report.converged[n * args.x.size[3] + c0 + c];
    if (!converged) return walk_span<T>(args, cell, part(), false);
    write();
  }

  void write() {
    const Outputs<T> out(args, cell, part(), false);
    const int64_t length = seq.length(), padded = args.padded();
    for (int s = 0; s < cell.states && length > 0; ++s)
      if (out.wanted[s])
        store_tile<T>(out.plane(args, s, part()), length, nc, states(0, s), cell.states * padded,
                      false);
    T* last = length > 0 ? states(length - 1, 0) : h0.x;
    copy(last, length > 0 ? padded : kApart<T>, h.x, kApart<T>);
    store_states(args.h_last, part(), n, cell.states, h.x, kApart<T>);
    for (int64_t t = 0; args.saved && t < length; t += kRnnChunk) {
      T* const to = static_cast<T*>(args.saved) +
                    args.sequences.chunk_row(n, t / kRnnChunk, kRnnChunk) * cell.states * padded +
                    c0;
      copy(t > 0 ? states(t - 1, 0) : h0.x, t > 0 ? padded : kApart<T>, to, padded);
    }
  }
};

template <class T>
void run(const RnnGlobalNewton& args) {
  const int64_t channels = args.x.size[3];
  const CellRows<T>& cell = cell_rows<T>(args.cell);
  const int64_t spans = (channels + kLanesOfSpan - 1) / kLanesOfSpan;
  parallel(args.sequences.count * spans, [&](int64_t task) {
    const int64_t c0 = task % spans * kLanesOfSpan;
    const int64_t nc = channels - c0 < kLanesOfSpan ? channels - c0 : kLanesOfSpan;
    Sweeps<T>(args, cell, task / spans, c0, nc).run();
  });
}

}  // namespace

void rnn_global_newton(const RnnGlobalNewton& args) {
  computes_in_double(args.x.dtype) ? run<double>(args) : run<float>(args);
}

}  // namespace recurra::RECURRA_ISA
