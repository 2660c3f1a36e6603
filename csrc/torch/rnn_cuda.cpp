#include <algorithm>
#include <tuple>

#include "cuda/wait.h"
#include "torch/device.h"
#include "torch/rnn.h"

namespace recurra {
namespace {

using Optional = const OptionalTensor&;

// What a call leaves of its passes, as tensors on the device, of which the first two are results.
// Kernels write them, where any start.
struct Report {
  Tensor passes, mismatch, failures;

  Report(const Tensor& x, bool written)
      : passes(empty(x, {}, DType::i32)),
        mismatch(empty(x, {}, state_dtype(dtype_of(x)))),
        failures(passes) {
    if (written) return;
    set_zero(passes);
    set_zero(mismatch);
  }
  cuda::NewtonSummary view() const {
    return {static_cast<int32_t*>(passes.data_ptr()), mismatch.data_ptr(),
            static_cast<int32_t*>(failures.data_ptr())};
  }
};

void newton(const char* op, const Rnn& base, const RnnOptions& options, const Tensor& x,
            Optional cu_seqlens, int64_t steps, Report& report, const cuda::Stream& stream) {
  RnnNewton args;
  static_cast<Rnn&>(args) = base;
  const Sequences& all = args.sequences;
  const int64_t channels = args.x.size[3], states = args.h_last.size[1];
  const int64_t chains = all.count * channels;
  const NewtonShape shape = cuda::newton_shape(chains, steps);
  args.chunk = std::min(options.chunk.value_or(shape.chunk), all.time + kRnnChunk);
  args.warm_up = shape.warm_up;
  args.max_passes = most_passes(options);
  const int64_t rows = cuda::newton_rows_on_device(all, cu_seqlens.has_value(), args.chunk);
  Tensor workspace = scratch(x, {rows * channels * newton_rows(states)}, state_dtype(dtype_of(x)));
  Tensor passes = scratch(x, {chains}, DType::i32), mismatch = scratch(x, {chains}, DType::f64);
  Tensor converged = scratch(x, {chains}, DType::b8), done = scratch(x, {chains}, DType::b8);
  Tensor taken = scratch(x, {chains}, DType::i64);
  args.workspace = workspace.data_ptr();
  args.report = {static_cast<int32_t*>(passes.data_ptr()),
                 static_cast<double*>(mismatch.data_ptr()),
                 static_cast<bool*>(converged.data_ptr())};
  args.done = static_cast<bool*>(done.data_ptr());
  report.failures = scratch(x, {}, DType::i32);
  cuda::rnn_newton(args, indices(op, "cu_seqlens", cu_seqlens),
                   static_cast<int64_t*>(taken.data_ptr()), report.view(), stream);
}

// Waits for the device.
void report_failures(const char* op, const RnnOptions& options, const Report& report,
                     int64_t chains, const cuda::Stream& stream) {
  const auto read = [&](const Tensor& t, auto into) {
    cuda::read_back(&into, t.data_ptr(), sizeof into, stream);
    return into;
  };
  const int32_t failed = read(report.failures, int32_t{});
  if (failed == 0) return;
  const double mismatch = dtype_of(report.mismatch) == DType::f64
                              ? read(report.mismatch, double{})
                              : static_cast<double>(read(report.mismatch, float{}));
  const std::string text =
      failure_text(options, failed, chains, read(report.passes, int32_t{}), mismatch);
  if (options.on_fail == "raise") fail(op, text);
  warn("rnn", text + kInstead);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const char* op, bool save,
                                                           const Tensor& x, const Tensor& params,
                                                           Optional h0,
                                                           const std::string& cell_name,
                                                           RnnOptions options, bool return_states,
                                                           Optional reset, Optional cu_seqlens) {
  check(op,
        {{"x", x}, {"params", params}, {"h0", h0}, {"reset", reset}, {"cu_seqlens", cu_seqlens}});
  const Cell cell = find_cell(op, cell_name);
  check_cell(op, cell.info, x, params, "h0", h0);
  check_options(op, options);
  const Sequences all = sequences_of(x, cu_seqlens);
  const cuda::Stream stream = stream_of(x);
  const int64_t chains = all.count * x.size(3);
  const int64_t steps = all.count ? x.size(0) * x.size(1) / all.count : 0;
  if (options.algorithm == "auto")
    options.algorithm =
        cuda::prefers_newton(chains, steps, dtype_of(x), states_of(cell)) ? "newton" : "sequential";
  if (options.algorithm == "newton-global")
    fail(op,
         "algorithm must be \"auto\", \"sequential\" or \"newton\" on a CUDA device, got "
         "\"newton-global\"");
  const bool solves = options.algorithm == "newton" && chains > 0;
  const bool waits = solves && options.on_fail != "sequential";
  if (waits && cuda::is_captured(stream))
    fail(op,
         "on_fail must be \"sequential\" while a CUDA graph is captured, since anything else waits "
         "for the device, got \"" +
             options.on_fail + "\"");
  RnnCall call(cell, all, x, params, h0, reset, return_states);
  Report report(x, chains > 0);
  call.save(save, rnn_chunk_rows(all, cu_seqlens.has_value()));
  if (solves)
    newton(op, call.args, options, x, cu_seqlens, steps, report, stream);
  else
    cuda::rnn(call.args, indices(op, "cu_seqlens", cu_seqlens), {}, report.view(), stream);
  if (waits) report_failures(op, options, report, chains, stream);
  return {call.y, call.h_last, report.passes, report.mismatch, call.saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rnn_cuda(
    Tensor x, Tensor params, OptionalTensor h0, std::string cell, std::string algorithm,
    std::optional<int64_t> chunk, std::optional<int64_t> max_passes, std::string on_fail,
    bool return_states, OptionalTensor reset, OptionalTensor cu_seqlens) {
  auto [y, h_last, passes, mismatch, saved] =
      forward("rnn", false, x, params, h0, cell, {algorithm, on_fail, chunk, max_passes},
              return_states, reset, cu_seqlens);
  return {y, h_last, passes, mismatch};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_save_cuda(
    Tensor x, Tensor params, OptionalTensor h0, std::string cell, std::string algorithm,
    std::optional<int64_t> chunk, std::optional<int64_t> max_passes, std::string on_fail,
    bool return_states, OptionalTensor reset, OptionalTensor cu_seqlens) {
  return forward("_rnn_save", true, x, params, h0, cell, {algorithm, on_fail, chunk, max_passes},
                 return_states, reset, cu_seqlens);
}

std::tuple<Tensor, Tensor, Tensor> rnn_backward_cuda(OptionalTensor dy, OptionalTensor dh_last,
                                                     Tensor saved, Tensor x, Tensor params,
                                                     OptionalTensor h0, std::string cell_name,
                                                     bool return_states, OptionalTensor reset,
                                                     OptionalTensor cu_seqlens) {
  constexpr const char* op = "_rnn_backward";
  const RnnGiven given{dy, dh_last, saved, x, params, h0, reset, cu_seqlens, return_states};
  const Cell cell = check_backward(op, given, cell_name);
  const Sequences all = sequences_of(x, cu_seqlens);
  const int64_t chunk_rows = rnn_chunk_rows(all, cu_seqlens.has_value());
  check_saved(op, saved, cell, x, chunk_rows);
  const RnnBackwardCall call(given, cell, all);
  Tensor chunk_sums =
      scratch(x, {chunk_rows, params.size(0), padded_channels(x)}, state_dtype(dtype_of(x)));
  cuda::rnn_backward(call.args, indices(op, "cu_seqlens", cu_seqlens), chunk_sums.data_ptr(),
                     stream_of(x));
  return {call.dx, call.dparams, call.dh0};
}

Tensor rnn_step_cuda(Tensor h, Tensor x, Tensor params, std::string cell_name,
                     OptionalTensor slots) {
  constexpr const char* op = "rnn_step";
  check(op, {{"h", h}, {"x", x}, {"params", params}, {"slots", slots}});
  const Cell cell = find_cell(op, cell_name);
  check_cell(op, cell.info, x, params, "h", h);
  check_written(op, h, slots, 1, {{"x", x}}, {{"params", params}});
  check_states(op, x.size(0), h, slots);
  const RnnStepCall call(cell, h, x, params);
  cuda::rnn(call.args, {}, indices(op, "slots", slots), {}, stream_of(x));
  return call.y;
}

}  // namespace
}  // namespace recurra

RECURRA_CUDA_OPS(m) {
  m.impl("rnn", RECURRA_BOX(&recurra::rnn_cuda));
  m.impl("_rnn_save", RECURRA_BOX(&recurra::rnn_save_cuda));
  m.impl("_rnn_backward", RECURRA_BOX(&recurra::rnn_backward_cuda));
  m.impl("rnn_step", RECURRA_BOX(&recurra::rnn_step_cuda));
}
