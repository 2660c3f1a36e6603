// The cases of rnn. Its oracle is in Python; here its instruction sets are compared.
#pragma once
#include <memory>

#include "case.h"
#include "cells/evaluate.h"
#include "rnn/rnn.h"

namespace recurra::test {

// A cell of the list, and how many rows it has of each kind.
struct CellOf {
  int index = 0;
  int64_t inputs = 0, states = 0, params = 0;

  explicit CellOf(Random& random) {
    const auto names = cell_names();
    index = static_cast<int>(random.below(static_cast<int64_t>(names.size())));
    const CellInfo& info = *cell_info(names[static_cast<size_t>(index)]);
    inputs = static_cast<int64_t>(info.inputs.size());
    states = static_cast<int64_t>(info.states.size());
    params = static_cast<int64_t>(info.params.size());
  }
};

inline void rnn_inputs(Case& c, RnnInputs& in, const CellOf& cell, DType dtype, const Shape& s) {
  in.cell = cell.index;
  in.sequences = c.sequences(s.batch, s.time);
  in.x = c.input<4>("x", dtype, {s.batch, s.time, cell.inputs, s.channels}, {-2, 2});
  in.params = c.input<2>("params", parameter(c.random, dtype), {cell.params, s.channels});
  if (c.random.chance(60))
    in.h0 = c.input<3>("h0", state_of(dtype), {in.sequences.count, cell.states, s.channels});
  if (c.random.chance(30)) {
    // One byte each: an index array of which every eighth byte is looked at.
    std::vector<int64_t> values(static_cast<size_t>(s.batch * s.time));
    for (int64_t& v : values) v = c.random.chance(10);
    in.reset.data = const_cast<int64_t*>(c.integers("reset", values));
    in.reset.dtype = DType::b8;
    const int64_t sizes[] = {s.batch, s.time}, strides[] = {8 * s.time, 8};
    std::copy(sizes, sizes + 2, in.reset.size);
    std::copy(strides, strides + 2, in.reset.stride);
  }
}

inline void rnn_outputs(Case& c, Rnn& args, const CellOf& cell, const Shape& s) {
  const DType dtype = args.x.dtype, state = state_of(dtype);
  const int64_t wanted = c.random.chance(40) ? cell.states : 1;
  args.y = c.output<4>("y", dtype, {s.batch, s.time, wanted, s.channels});
  args.h_last = c.output<3>("h_last", state, {args.sequences.count, cell.states, s.channels});
  const int64_t rows = args.sequences.chunk_rows(kRnnChunk);
  if (c.random.chance(50))
    args.saved = c.output<3>("saved", state, {rows, cell.states, args.padded()}, true).data;
}

inline void rnn_case(Case& c, const Shape& s) {
  Rnn args;
  const CellOf cell(c.random);
  rnn_inputs(c, args, cell, activation(c.random), s);
  rnn_outputs(c, args, cell, s);
  c.run = [args] { rnn(args); };
}

inline void rnn_step_case(Case& c, const Shape& s) {
  Rnn args;
  const CellOf cell(c.random);
  const DType dtype = activation(c.random);
  const int64_t rows = s.time, states = rows + c.random.below(3), N = s.channels;
  if (states > rows || c.random.chance(50))
    args.slots = c.integers("slots", slots(c.random, rows, states));
  args.cell = cell.index;
  args.sequences = {rows, 1, nullptr};
  args.x = c.input<4>("x", dtype, {rows, 1, cell.inputs, N}, {-2, 2});
  args.params = c.input<2>("params", parameter(c.random, dtype), {cell.params, N});
  args.h0 = args.h_last = c.output<3>("h", state_of(dtype), {states, cell.states, N});
  args.y = c.output<4>("y", dtype, {rows, 1, 1, N});
  c.run = [args] { rnn(args); };
}

// What Newton's method writes besides, for each sequence and channel.
struct Reports {
  std::unique_ptr<int32_t[]> passes;
  std::unique_ptr<double[]> mismatch;
  std::unique_ptr<bool[]> converged, done;

  explicit Reports(size_t count)
      : passes(std::make_unique<int32_t[]>(count)),
        mismatch(std::make_unique<double[]>(count)),
        converged(std::make_unique<bool[]>(count)),
        done(std::make_unique<bool[]>(count)) {}
  NewtonReport view() const { return {passes.get(), mismatch.get(), converged.get()}; }
};

inline void rnn_newton_case(Case& c, const Shape& given) {
  // Long enough for several stretches.
  const Shape s = {given.batch, 5 * given.time, std::min<int64_t>(given.channels, 70)};
  RnnNewton args;
  const CellOf cell(c.random);
  rnn_inputs(c, args, cell, activation(c.random), s);
  rnn_outputs(c, args, cell, s);
  args.chunk = c.random.pick<int64_t>({1, 32, 33, 64, 100});
  args.warm_up = c.random.pick<int64_t>({0, 32, 64});
  args.max_passes = c.random.pick<int64_t>({1, 3, 16});
  std::vector<int64_t> before(static_cast<size_t>(args.sequences.count) + 1);
  for (int64_t n = 0; n < args.sequences.count; ++n)
    before[static_cast<size_t>(n) + 1] =
        before[static_cast<size_t>(n)] + newton_lanes(args.sequences[n].length(), args.chunk);
  const int64_t rows = before.back() * s.channels * newton_rows(cell.states);
  args.workspace = c.output<1>("workspace", state_of(args.x.dtype), {rows}, true).data;
  args.lanes_before = c.integers("lanes_before", before);
  auto reports = std::make_shared<Reports>(static_cast<size_t>(args.sequences.count * s.channels));
  c.run = [args, reports]() mutable {
    args.report = reports->view();
    args.done = reports->done.get();
    rnn_newton(args);
  };
}

inline void rnn_global_newton_case(Case& c, const Shape& s) {
  RnnGlobalNewton args;
  const CellOf cell(c.random);
  rnn_inputs(c, args, cell, activation(c.random), s);
  rnn_outputs(c, args, cell, s);
  args.max_passes = c.random.pick<int64_t>({1, 3, 16});
  const int64_t size[] = {s.batch, s.time, cell.states, args.padded()};
  args.workspace = c.output<4>("workspace", state_of(args.x.dtype), size, true).data;
  auto reports = std::make_shared<Reports>(static_cast<size_t>(args.sequences.count * s.channels));
  c.run = [args, reports]() mutable {
    args.report = reports->view();
    rnn_global_newton(args);
  };
}

inline void rnn_backward_case(Case& c, const Shape& s) {
  RnnBackward args;
  const CellOf cell(c.random);
  const DType dtype = activation(c.random), state = state_of(dtype);
  rnn_inputs(c, args, cell, dtype, s);
  const int64_t count = args.sequences.count, wanted = c.random.chance(40) ? cell.states : 1;
  const int64_t states[] = {count, cell.states, s.channels};
  if (c.random.chance(80)) args.dy = c.input<4>("dy", dtype, {s.batch, s.time, wanted, s.channels});
  if (c.random.chance(60)) args.dh_last = c.input<3>("dh_last", state, states);
  args.dx = c.output<4>("dx", dtype, {s.batch, s.time, cell.inputs, s.channels});
  args.dparams = c.output<2>("dparams", args.params.dtype, {cell.params, s.channels});
  args.dh0 = c.output<3>("dh0", state, states);
  args.parts = std::clamp<int64_t>(count, 1, 8);
  const int64_t rows = args.sequences.chunk_rows(kRnnChunk), padded = args.padded();
  args.saved = c.output<3>("saved", state, {rows, cell.states, padded}, true).data;
  args.sums = c.output<3>("sums", state, {args.parts, cell.params, padded}, true).data;
  c.run = [args] { rnn_backward(args); };
}

}  // namespace recurra::test
