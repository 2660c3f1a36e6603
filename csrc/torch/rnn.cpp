#include "rnn/rnn.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <sstream>
#include <tuple>

#include "rnn/choose.h"
#include "torch/cells.h"
#include "torch/check.h"

namespace recurra {
namespace {

using Optional = const OptionalTensor&;

struct Options {
  std::string algorithm, on_fail;
  std::optional<int64_t> chunk, max_passes;
};

void check_options(const char* op, const Options& options) {
  const auto one_of = [&](const char* name, const std::string& got,
                          std::initializer_list<const char*> known) {
    std::string all;
    for (const char* k : known) {
      if (got == k) return;
      all += (all.empty() ? "\"" : ", \"") + std::string(k) + "\"";
    }
    fail(op, std::string(name) + " must be one of " + all + ", got \"" + got + "\"");
  };
  one_of("algorithm", options.algorithm, {"auto", "sequential", "newton", "newton-global"});
  one_of("on_fail", options.on_fail, {"sequential", "raise", "warn"});
  const auto positive = [&](const char* name, std::optional<int64_t> got) {
    if (got && *got < 1)
      fail(op, std::string(name) + " must be at least 1, got " + std::to_string(*got));
  };
  positive("chunk", options.chunk);
  positive("max_passes", options.max_passes);
}

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

void report_failures(const char* op, const Options& options, const Reports& reports) {
  const size_t failed = reports.failures();
  if (failed == 0 || options.on_fail == "sequential") return;
  std::ostringstream text;
  text << options.algorithm << " did not converge for " << failed << " of " << reports.passes.size()
       << " sequences by channels in " << reports.most_passes()
       << " passes, the largest mismatch is " << reports.largest_mismatch();
  if (options.on_fail == "raise") fail(op, text.str());
  text << "; they were computed sequentially";
  aoti_torch_warn("rnn", "rnn.cpp", __LINE__, ("rnn: " + text.str()).c_str());
}

int64_t most_passes(const Options& options) {
  return std::min<int64_t>(options.max_passes.value_or(kMaxPasses), INT32_MAX);
}

void newton(const Rnn& base, const Options& options, const Tensor& x, int64_t states,
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

void global_newton(const Rnn& base, const Options& options, const Tensor& x, int64_t states,
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

Tensor scalar(const Tensor& like, DType dtype, double value) {
  Tensor t = empty(like, {}, dtype);
  if (dtype == DType::i32)
    *static_cast<int32_t*>(t.data_ptr()) = static_cast<int32_t>(value);
  else if (dtype == DType::f64)
    *static_cast<double*>(t.data_ptr()) = value;
  else
    *static_cast<float*>(t.data_ptr()) = static_cast<float>(value);
  return t;
}

// (B, T, N) as (B, T, 1, N).
View<4> with_states(const Tensor& t) {
  if (t.dim() == 4) return view<4>(t);
  const View<3> v = view<3>(t);
  View<4> out;
  out.data = v.data;
  out.dtype = v.dtype;
  for (int n = 0; n < 4; ++n) {
    out.size[n] = n == 2 ? 1 : v.size[n < 2 ? n : n - 1];
    out.stride[n] = n == 2 ? 0 : v.stride[n < 2 ? n : n - 1];
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const char* op, bool save, const Tensor& x, const Tensor& params, Optional h0,
    const std::string& cell_name, const Options& options, bool return_states, Optional reset,
    Optional cu_seqlens) {
  check(op,
        {{"x", x}, {"params", params}, {"h0", h0}, {"reset", reset}, {"cu_seqlens", cu_seqlens}});
  const Cell cell = find_cell(op, cell_name);
  check_cell(op, cell.info, x, params, "h0", h0);
  check_options(op, options);
  std::vector<int64_t> offsets;
  Rnn args;
  args.cell = cell.index;
  args.sequences = sequences(op, x.size(0), x.size(1), cu_seqlens, offsets);
  args.x = view<4>(x);
  args.params = view<2>(params);
  args.h0 = view<3>(h0);
  args.reset = view<2>(reset);
  const int64_t states = static_cast<int64_t>(cell.info.states.size()), channels = x.size(3);
  const DType compute = state_dtype(dtype_of(x));
  std::vector<int> order = memory_order(x);
  std::vector<int64_t> sizes{x.size(0), x.size(1), states, channels};
  if (!return_states) {
    order.erase(std::find(order.begin(), order.end(), 2));
    std::replace(order.begin(), order.end(), 3, 2);
    sizes.erase(sizes.begin() + 2);
  }
  Tensor y = empty_ordered(x, sizes, order);
  Tensor h_last = empty(x, {args.sequences.count, states, channels}, compute);
  Tensor saved =
      empty(x, {save ? args.sequences.chunk_rows(kRnnChunk) : 0, states, args.padded()}, compute);
  args.y = with_states(y);
  args.h_last = view<3>(h_last);
  args.saved = save ? saved.data_ptr() : nullptr;

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
  return {y, h_last, scalar(x, DType::i32, reports.most_passes()),
          scalar(x, compute, reports.largest_mismatch()), saved};
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
  check(op, {{"dy", dy},
             {"dh_last", dh_last},
             {"x", x},
             {"params", params},
             {"h0", h0},
             {"reset", reset},
             {"cu_seqlens", cu_seqlens}});
  const Cell cell = find_cell(op, cell_name);
  check_cell(op, cell.info, x, params, "h0", h0);
  const int64_t states = static_cast<int64_t>(cell.info.states.size()), channels = x.size(3);
  if (dy && (dy->dim() == 4) != return_states) fail(op, "dy must have as many dimensions as y");
  if (dy && return_states)
    check_size(op, cell.info.name, "dy", *dy, 2, "K", "states", cell.info.states);
  if (dh_last)
    check_size(op, cell.info.name, "dh_last", *dh_last, 1, "K", "states", cell.info.states);
  std::vector<int64_t> offsets;
  RnnBackward args;
  args.cell = cell.index;
  args.sequences = sequences(op, x.size(0), x.size(1), cu_seqlens, offsets);
  args.x = view<4>(x);
  args.params = view<2>(params);
  args.reset = view<2>(reset);
  if (dy) args.dy = with_states(*dy);
  args.dh_last = view<3>(dh_last);
  const int64_t count = args.sequences.count, padded = args.padded();
  const DType compute = state_dtype(dtype_of(x));
  if (saved.dim() != 3 || saved.size(0) != args.sequences.chunk_rows(kRnnChunk) ||
      saved.size(1) != states || saved.size(2) != padded || dtype_of(saved) != compute ||
      !saved.is_contiguous())
    fail(op, "saved must be what _rnn_save returned");
  args.parts = rnn_parts(args);
  Tensor dx = empty_like(x), dparams = empty_like(params);
  Tensor dh0 = h0 ? empty_like(*h0) : empty(x, {count, states, channels}, compute);
  Tensor sums = zeros(x, {args.parts, params.size(0), padded}, compute);
  args.saved = saved.data_ptr();
  args.dx = view<4>(dx);
  args.dparams = view<2>(dparams);
  args.dh0 = view<3>(dh0);
  args.sums = sums.data_ptr();
  rnn_backward(args);
  return {dx, dparams, dh0};
}

Tensor rnn_step_cpu(Tensor h, Tensor x, Tensor params, std::string cell_name,
                    OptionalTensor slots) {
  constexpr const char* op = "rnn_step";
  check(op, {{"h", h}, {"x", x}, {"params", params}, {"slots", slots}});
  const Cell cell = find_cell(op, cell_name);
  check_cell(op, cell.info, x, params, "h", h);
  std::vector<int64_t> storage;
  Rnn args;
  args.cell = cell.index;
  args.slots = slot_indices(op, x.size(0), h, slots, storage);
  args.sequences = {x.size(0), 1, nullptr};
  args.x = one_step(view<3>(x));
  args.params = view<2>(params);
  args.h0 = args.h_last = view<3>(h);
  std::vector<int> order = memory_order(x);
  order.erase(std::find(order.begin(), order.end(), 1));
  std::replace(order.begin(), order.end(), 2, 1);
  Tensor y = empty_ordered(x, {x.size(0), x.size(2)}, order);
  const View<2> out = view<2>(y);
  args.y.data = out.data;
  args.y.dtype = out.dtype;
  const int64_t sizes[] = {out.size[0], 1, 1, out.size[1]};
  const int64_t strides[] = {out.stride[0], 0, 0, out.stride[1]};
  std::copy(sizes, sizes + 4, args.y.size);
  std::copy(strides, strides + 4, args.y.stride);
  rnn(args);
  return y;
}

}  // namespace
}  // namespace recurra

STABLE_TORCH_LIBRARY_IMPL(recurra, CPU, m) {
  m.impl("rnn", TORCH_BOX(&recurra::rnn_cpu));
  m.impl("_rnn_save", TORCH_BOX(&recurra::rnn_save_cpu));
  m.impl("_rnn_backward", TORCH_BOX(&recurra::rnn_backward_cpu));
  m.impl("rnn_step", TORCH_BOX(&recurra::rnn_step_cpu));
}
