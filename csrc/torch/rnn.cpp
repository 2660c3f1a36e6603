#include "torch/rnn.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <tuple>

#include "rnn/choose.h"

namespace recurra {
namespace {

using Optional = const OptionalTensor&;

// What Newton's method reports, and where.
struct Reports {
  std::vector<int32_t> passes;
  std::vector<double> mismatch;
  std::unique_ptr<bool[]> converged;

  explicit Reports(size_t count)
      : passes(count), mismatch(count), converged(std::make_unique<bool[]>(count)) {}
  NewtonReport view() { return {passes.data(), mismatch.data(), converged.get()}; }

  int32_t most_passes() const {
    return passes.empty() ? 0 : *std::max_element(passes.begin(), passes.end());
  }
  double largest_mismatch() const {
    double largest = 0;
    for (double m : mismatch)
      if (m > largest || std::isnan(m)) largest = std::isnan(largest) ? largest : m;
    return largest;
  }
  size_t failures() const {
    size_t n = 0;
    for (size_t i = 0; i < passes.size(); ++i) n += !converged[i];
    return n;
  }
};

void report_failures(const char* op, const RnnOptions& options, const Reports& reports) {
  const size_t failed = reports.failures();
  if (failed == 0 || options.on_fail == "sequential") return;
  const auto chains = static_cast<int64_t>(reports.passes.size());
  const std::string text = failure_text(options, static_cast<int64_t>(failed), chains,
                                        reports.most_passes(), reports.largest_mismatch());
  if (options.on_fail == "raise") fail(op, text);
  warn("rnn", text + kInstead);
}

void newton(const Rnn& base, const RnnOptions& options, const Tensor& x, int64_t states,
            Reports& reports) {
  RnnNewton args;
  static_cast<Rnn&>(args) = base;
  const Sequences& all = args.sequences;
  const int64_t channels = args.x.size[3];
  const int64_t steps = all.count ? x.size(0) * x.size(1) / all.count : 0;
  const NewtonShape shape = newton_shape(channels, steps);
  args.chunk = std::min(options.chunk.value_or(shape.chunk), all.time + kRnnChunk);
  args.warm_up = shape.warm_up;
  args.max_passes = most_passes(options);
  args.report = reports.view();
  std::vector<int64_t> before(static_cast<size_t>(all.count) + 1);
  for (int64_t n = 0; n < all.count; ++n)
    before[static_cast<size_t>(n) + 1] =
        before[static_cast<size_t>(n)] + newton_lanes(all[n].length(), args.chunk);
  Tensor workspace =
      zeros(x, {before.back() * channels * newton_rows(states)}, state_dtype(dtype_of(x)));
  const auto done = std::make_unique<bool[]>(reports.passes.size());
  args.workspace = workspace.data_ptr();
  args.lanes_before = before.data();
  args.done = done.get();
  rnn_newton(args);
}

void global_newton(const Rnn& base, const RnnOptions& options, const Tensor& x, int64_t states,
                   Reports& reports) {
  RnnGlobalNewton args;
  static_cast<Rnn&>(args) = base;
  args.max_passes = most_passes(options);
  args.report = reports.view();
  Tensor workspace =
      zeros(x, {x.size(0), x.size(1), states, args.padded()}, state_dtype(dtype_of(x)));
  args.workspace = workspace.data_ptr();
  rnn_global_newton(args);
}

void set(const Tensor& scalar, double value) {
  const DType dtype = dtype_of(scalar);
  if (dtype == DType::i32)
    *static_cast<int32_t*>(scalar.data_ptr()) = static_cast<int32_t>(value);
  else if (dtype == DType::f64)
    *static_cast<double*>(scalar.data_ptr()) = value;
  else
    *static_cast<float*>(scalar.data_ptr()) = static_cast<float>(value);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const char* op, bool save, const Tensor& x, const Tensor& params, Optional h0,
    const std::string& cell_name, const RnnOptions& options, bool return_states, Optional reset,
    Optional cu_seqlens) {
  check(op,
        {{"x", x}, {"params", params}, {"h0", h0}, {"reset", reset}, {"cu_seqlens", cu_seqlens}});
  const Cell cell = find_cell(op, cell_name);
  check_cell(op, cell.info, x, params, "h0", h0);
  check_options(op, options);
  std::vector<int64_t> offsets;
  const Sequences all = sequences(op, x.size(0), x.size(1), cu_seqlens, offsets);
  RnnCall call(cell, all, x, params, h0, reset, return_states);
  Tensor passes = empty(x, {}, DType::i32), mismatch = empty(x, {}, state_dtype(dtype_of(x)));
  call.save(save, all.chunk_rows(kRnnChunk));
  const Rnn& args = call.args;
  const int64_t states = states_of(cell), channels = x.size(3);

  std::string algorithm = options.algorithm;
  if (algorithm == "auto")
    algorithm =
        prefers_newton(args.sequences.count * channels,
                       args.sequences.count ? x.size(0) * x.size(1) / args.sequences.count : 0,
                       dtype_of(x), states)
            ? "newton"
            : "sequential";
  const bool solves = algorithm != "sequential" && args.sequences.count * channels > 0;
  Reports reports(solves ? static_cast<size_t>(args.sequences.count * channels) : 0);
  if (!solves)
    rnn(args);
  else if (algorithm == "newton")
    newton(args, options, x, states, reports);
  else
    global_newton(args, options, x, states, reports);
  report_failures(op, options, reports);
  set(passes, reports.most_passes());
  set(mismatch, reports.largest_mismatch());
  return {call.y, call.h_last, passes, mismatch, call.saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rnn_cpu(
    Tensor x, Tensor params, OptionalTensor h0, std::string cell, std::string algorithm,
    std::optional<int64_t> chunk, std::optional<int64_t> max_passes, std::string on_fail,
    bool return_states, OptionalTensor reset, OptionalTensor cu_seqlens) {
  auto [y, h_last, passes, mismatch, saved] =
      forward("rnn", false, x, params, h0, cell, {algorithm, on_fail, chunk, max_passes},
              return_states, reset, cu_seqlens);
  return {y, h_last, passes, mismatch};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_save_cpu(
    Tensor x, Tensor params, OptionalTensor h0, std::string cell, std::string algorithm,
    std::optional<int64_t> chunk, std::optional<int64_t> max_passes, std::string on_fail,
    bool return_states, OptionalTensor reset, OptionalTensor cu_seqlens) {
  return forward("_rnn_save", true, x, params, h0, cell, {algorithm, on_fail, chunk, max_passes},
                 return_states, reset, cu_seqlens);
}

std::tuple<Tensor, Tensor, Tensor> rnn_backward_cpu(OptionalTensor dy, OptionalTensor dh_last,
                                                    Tensor saved, Tensor x, Tensor params,
                                                    OptionalTensor h0, std::string cell_name,
                                                    bool return_states, OptionalTensor reset,
                                                    OptionalTensor cu_seqlens) {
  constexpr const char* op = "_rnn_backward";
  const RnnGiven given{dy, dh_last, saved, x, params, h0, reset, cu_seqlens, return_states};
  const Cell cell = check_backward(op, given, cell_name);
  std::vector<int64_t> offsets;
  const Sequences all = sequences(op, x.size(0), x.size(1), cu_seqlens, offsets);
  check_saved(op, saved, cell, x, all.chunk_rows(kRnnChunk));
  RnnBackwardCall call(given, cell, all);
  Tensor sums =
      zeros(x, {call.args.parts, params.size(0), call.args.padded()}, state_dtype(dtype_of(x)));
  call.args.sums = sums.data_ptr();
  rnn_backward(call.args);
  return {call.dx, call.dparams, call.dh0};
}

Tensor rnn_step_cpu(Tensor h, Tensor x, Tensor params, std::string cell_name,
                    OptionalTensor slots) {
  constexpr const char* op = "rnn_step";
  check(op, {{"h", h}, {"x", x}, {"params", params}, {"slots", slots}});
  const Cell cell = find_cell(op, cell_name);
  check_cell(op, cell.info, x, params, "h", h);
  check_written(op, h, slots, 1, {{"x", x}}, {{"params", params}});
  std::vector<int64_t> storage;
  const int64_t* const slot_of_row = slot_indices(op, x.size(0), h, slots, storage);
  RnnStepCall call(cell, h, x, params);
  call.args.slots = slot_of_row;
  rnn(call.args);
  return call.y;
}

}  // namespace
}  // namespace recurra

RECURRA_CPU_OPS(m) {
  m.impl("rnn", RECURRA_BOX(&recurra::rnn_cpu));
  m.impl("_rnn_save", RECURRA_BOX(&recurra::rnn_save_cpu));
  m.impl("_rnn_backward", RECURRA_BOX(&recurra::rnn_backward_cpu));
  m.impl("rnn_step", RECURRA_BOX(&recurra::rnn_step_cpu));
}
