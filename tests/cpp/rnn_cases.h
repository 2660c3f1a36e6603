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

// What a packed call on the device reads.
inline View<1> device_offsets(Case& c, const Sequences& sequences) {
  if (!sequences.offsets) return {};
  return c.indices("cu_seqlens", sequences.offsets, sequences.count + 1);
}
// The columns between the channels and whole vectors hold anything.
inline void clear_padding(const RnnInputs& args, void* saved, int64_t states) {
  const int64_t rows = saved ? args.sequences.chunk_rows(kRnnChunk) * states : 0;
  const int64_t N = args.x.size[3], item = item_size(state_of(args.x.dtype));
  for (int64_t i = 0; i < rows; ++i)
    std::memset(static_cast<char*>(saved) + (i * args.padded() + N) * item, 0,
                static_cast<size_t>((args.padded() - N) * item));
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
  c.run = [args, cell] {
    rnn(args);
    clear_padding(args, args.saved, cell.states);
  };
  const View<1> offsets = device_offsets(c, args.sequences);
  // The passes and the mismatch of a sequential call, which are zero.
  const View<1> reported = c.output<1>("reported", DType::f64, {2}, true);
  c.emulated = [args, offsets, reported]() mutable {
    args.sequences.offsets = nullptr;
    const int before = args.sequences.count * args.x.size[3] > 0;
    const bool wide = args.h_last.dtype == DType::f64;
    int32_t passes = before;
    double in_double = before;
    float in_float = static_cast<float>(before);
    void* const mismatch = wide ? static_cast<void*>(&in_double) : &in_float;
    cuda::rnn(args, offsets, {}, {&passes, mismatch, nullptr}, {});
    set(reported, passes, 0);
    set(reported, wide ? in_double : static_cast<double>(in_float), 1);
  };
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
  View<1> device_slots;
  if (args.slots) device_slots = c.indices("device_slots", args.slots, rows);
  c.emulated = [args, device_slots]() mutable {
    args.slots = nullptr;
    cuda::rnn(args, {}, device_slots, {}, {});
  };
}

// On the device the values of cu_seqlens and slots are not checked: none may lead out of the
// arrays, though sequences that overlap, or share a state, write the same elements.
inline int64_t hostile(Case& c, int64_t size) {
  return c.random.pick<int64_t>({0, -1, size, size + 1, c.random.below(size + 1),
                                 static_cast<int64_t>(c.random.next()), INT64_MIN, INT64_MAX});
}
inline View<1> hostile_offsets(Case& c, RnnInputs& in, int64_t time) {
  std::vector<int64_t> ends(static_cast<size_t>(1 + c.random.below(6)));
  for (int64_t& end : ends) end = hostile(c, time);
  in.sequences = {static_cast<int64_t>(ends.size()) - 1, time, nullptr};
  return c.indices("cu_seqlens", ends.data(), in.sequences.count + 1);
}
inline void rnn_hostile_case(Case& c, const Shape& s) {
  Rnn args;
  c.raced = true;
  const CellOf cell(c.random);
  const DType dtype = activation(c.random);
  args.cell = cell.index;
  const int64_t N = s.channels;
  View<1> offsets, slots;
  if (c.random.chance(50)) {
    offsets = hostile_offsets(c, args, s.time);
    args.x = c.input<4>("x", dtype, {1, s.time, cell.inputs, N});
    args.y = c.output<4>("y", dtype, {1, s.time, 1, N});
    args.h_last = c.output<3>("h", state_of(dtype), {args.sequences.count, cell.states, N});
    const int64_t rows = rnn_chunk_rows(args.sequences, true);
    args.saved =
        c.output<3>("saved", state_of(dtype), {rows, cell.states, args.padded()}, true).data;
  } else {
    const int64_t rows = s.time, states = c.random.below(4);
    std::vector<int64_t> values(static_cast<size_t>(rows));
    for (int64_t& value : values) value = hostile(c, states);
    slots = c.indices("slots", values.data(), rows);
    args.sequences = {rows, 1, nullptr};
    args.x = c.input<4>("x", dtype, {rows, 1, cell.inputs, N});
    args.y = c.output<4>("y", dtype, {rows, 1, 1, N});
    args.h0 = args.h_last = c.output<3>("h", state_of(dtype), {states, cell.states, N});
  }
  args.params = c.input<2>("params", parameter(c.random, dtype), {cell.params, N});
  c.emulated = [args, offsets, slots] { cuda::rnn(args, offsets, slots, {}, {}); };
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

// The memory of Newton's method on the device, and its report as numbers that are compared.
struct OnDevice {
  RnnNewton args;
  View<1> offsets, passes, mismatch, failures;
  int64_t* taken = nullptr;

  OnDevice(Case& c, const RnnNewton& given, const CellOf& cell, const View<1>& cu_seqlens)
      : args(given), offsets(cu_seqlens) {
    const DType state = state_of(args.x.dtype);
    const int64_t chains = args.sequences.count * args.x.size[3];
    const int64_t rows =
        cuda::newton_rows_on_device(args.sequences, static_cast<bool>(offsets), args.chunk);
    args.sequences.offsets = nullptr;
    args.workspace = c.scratch(args.x.size[3] * newton_rows(cell.states) * rows * item_size(state));
    args.report = {static_cast<int32_t*>(c.scratch(chains * 4)),
                   static_cast<double*>(c.scratch(chains * 8)),
                   static_cast<bool*>(c.scratch(chains))};
    args.done = static_cast<bool*>(c.scratch(chains));
    taken = static_cast<int64_t*>(c.scratch(chains * 8));
    passes = c.output<1>("passes", DType::f64, {1}, true);
    mismatch = c.output<1>("mismatch", state, {1}, true);
    failures = c.output<1>("failures", DType::f64, {1}, true);
  }
  void run() const {
    if (args.sequences.count * args.x.size[3] == 0) return cuda::rnn(args, offsets, {}, {}, {});
    int32_t most = 0, failed = 0;
    cuda::rnn_newton(args, offsets, taken, {&most, mismatch.data, &failed}, {});
    set(passes, most, 0);
    set(failures, failed, 0);
  }
  // What the CPU reports, in the same places.
  void summarise(const Reports& reports) const {
    int32_t most = 0, failed = 0;
    double largest = 0;
    for (int64_t i = 0; i < args.sequences.count * args.x.size[3]; ++i) {
      const double m = reports.mismatch[i];
      most = std::max(most, reports.passes[i]);
      failed += !reports.converged[i];
      if (m > largest || m != m) largest = largest != largest ? largest : m;
    }
    set(passes, most, 0);
    set(mismatch, largest, 0);
    set(failures, failed, 0);
  }
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
  args.workspace = c.scratch<1>("workspace", state_of(args.x.dtype), {rows}).data;
  args.lanes_before = c.integers("lanes_before", before);
  const auto chains = static_cast<size_t>(args.sequences.count * s.channels);
  const auto reports = std::make_shared<Reports>(chains);
  const OnDevice device(c, args, cell, device_offsets(c, args.sequences));
  c.run = [args, cell, reports, device, chains]() mutable {
    *reports = Reports(chains);
    args.report = reports->view();
    args.done = reports->done.get();
    rnn_newton(args);
    clear_padding(args, args.saved, cell.states);
    device.summarise(*reports);
  };
  c.emulated = [device] { device.run(); };
}

inline void rnn_newton_hostile_case(Case& c, const Shape& given) {
  const Shape s{1, 2 * given.time, std::min<int64_t>(given.channels, 40)};
  RnnNewton args;
  c.raced = true;
  const CellOf cell(c.random);
  const DType dtype = activation(c.random);
  args.cell = cell.index;
  const View<1> offsets = hostile_offsets(c, args, s.time);
  args.x = c.input<4>("x", dtype, {1, s.time, cell.inputs, s.channels});
  args.params = c.input<2>("params", parameter(c.random, dtype), {cell.params, s.channels});
  args.y = c.output<4>("y", dtype, {1, s.time, 1, s.channels});
  args.h_last = c.output<3>("h", state_of(dtype), {args.sequences.count, cell.states, s.channels});
  const int64_t saved[] = {rnn_chunk_rows(args.sequences, true), cell.states, args.padded()};
  args.saved = c.output<3>("saved", state_of(dtype), saved, true).data;
  args.chunk = c.random.pick<int64_t>({1, 33});
  args.warm_up = 32;
  args.max_passes = 3;
  const OnDevice device(c, args, cell, offsets);
  c.emulated = [device] { device.run(); };
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

// States of a chunk each: of the channels, zeros between them and whole vectors.
inline void fill_saved(Case& c, const RnnInputs& args, void* saved, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < args.x.size[3]; ++d) {
      const DType state = state_of(args.x.dtype);
      store(static_cast<char*>(saved) + (i * args.padded() + d) * item_size(state), state,
            static_cast<float>(c.random.uniform(-1, 1)));
    }
}
// What a backward is given and writes, but for its sequences.
inline void rnn_backward_arrays(Case& c, RnnBackward& args, const CellOf& cell, const Shape& s,
                                int64_t rows) {
  const DType dtype = args.x.dtype, state = state_of(dtype);
  const int64_t count = args.sequences.count, wanted = c.random.chance(40) ? cell.states : 1;
  const int64_t states[] = {count, cell.states, s.channels};
  if (c.random.chance(80)) args.dy = c.input<4>("dy", dtype, {s.batch, s.time, wanted, s.channels});
  if (c.random.chance(60)) args.dh_last = c.input<3>("dh_last", state, states);
  args.dx = c.output<4>("dx", dtype, {s.batch, s.time, cell.inputs, s.channels});
  args.dparams = c.output<2>("dparams", args.params.dtype, {cell.params, s.channels});
  args.dh0 = c.output<3>("dh0", state, states);
  args.parts = 1 + c.random.below(std::clamp<int64_t>(count, 1, kRnnMostParts));
  void* const saved = c.output<3>("saved", state, {rows, cell.states, args.padded()}, true).data;
  fill_saved(c, args, saved, rows * cell.states);
  args.saved = saved;
}

inline void rnn_backward_case(Case& c, const Shape& s) {
  RnnBackward args;
  const CellOf cell(c.random);
  rnn_inputs(c, args, cell, activation(c.random), s);
  const int64_t rows = args.sequences.chunk_rows(kRnnChunk), padded = args.padded();
  rnn_backward_arrays(c, args, cell, s, rows);
  const DType state = state_of(args.x.dtype);
  const View<3> sums = c.output<3>("sums", state, {args.parts, cell.params, padded}, true);
  const View<3> chunk_sums = c.output<3>("chunk_sums", state, {rows, cell.params, padded}, true);
  args.sums = sums.data;
  const auto clear = [](const View<3>& v) {
    std::memset(v.data, 0,
                static_cast<size_t>(v.size[0] * v.size[1] * v.size[2] * item_size(v.dtype)));
  };
  c.run = [=] {
    rnn_backward(args);
    clear(sums);
  };
  const View<1> offsets = device_offsets(c, args.sequences);
  c.emulated = [=]() mutable {
    args.sequences.offsets = nullptr;
    cuda::rnn_backward(args, offsets, chunk_sums.data, {});
    clear(chunk_sums);
  };
}

inline void rnn_hostile_backward_case(Case& c, const Shape& given) {
  const Shape s{1, given.time, given.channels};
  RnnBackward args;
  c.raced = true;
  const CellOf cell(c.random);
  const DType dtype = activation(c.random);
  args.cell = cell.index;
  const View<1> offsets = hostile_offsets(c, args, s.time);
  args.x = c.input<4>("x", dtype, {1, s.time, cell.inputs, s.channels});
  args.params = c.input<2>("params", parameter(c.random, dtype), {cell.params, s.channels});
  const int64_t rows = rnn_chunk_rows(args.sequences, true);
  rnn_backward_arrays(c, args, cell, s, rows);
  const int64_t sums[] = {rows, cell.params, args.padded()};
  const View<3> chunk_sums = c.output<3>("chunk_sums", state_of(dtype), sums, true);
  c.emulated = [=] { cuda::rnn_backward(args, offsets, chunk_sums.data, {}); };
}

}  // namespace recurra::test
