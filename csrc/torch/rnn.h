// What the CPU and the CUDA binding of rnn have in common: the checks, what is returned, and the
// arguments of the kernels but for their sequences and slots.
#pragma once
#include <algorithm>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "rnn/choose.h"
#include "rnn/rnn.h"
#include "torch/cells.h"
#include "torch/check.h"

namespace recurra {

struct RnnOptions {
  std::string algorithm, on_fail;
  std::optional<int64_t> chunk, max_passes;
};

inline void check_options(const char* op, const RnnOptions& options) {
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

inline int64_t most_passes(const RnnOptions& options) {
  return std::min<int64_t>(options.max_passes.value_or(kMaxPasses), INT32_MAX);
}
// What on_fail "raise" and "warn" say.
inline std::string failure_text(const RnnOptions& options, int64_t failed, int64_t chains,
                                int32_t passes, double mismatch) {
  std::ostringstream text;
  text << options.algorithm << " did not converge for " << failed << " of " << chains
       << " sequences by channels in " << passes << " passes, the largest mismatch is " << mismatch;
  return text.str();
}

constexpr const char* kInstead = "; they were computed sequentially";

// (B, T, N) as (B, T, 1, N).
inline View<4> with_states(const Tensor& t) {
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

// The inputs of a checked call.
inline void set_inputs(RnnInputs& args, const Cell& cell, const Sequences& sequences,
                       const Tensor& x, const Tensor& params, const OptionalTensor& reset) {
  args.cell = cell.index;
  args.sequences = sequences;
  args.x = view<4>(x);
  args.params = view<2>(params);
  args.reset = view<2>(reset);
}
inline int64_t states_of(const Cell& cell) { return static_cast<int64_t>(cell.info.states.size()); }
inline int64_t padded_channels(const Tensor& x) { return (x.size(3) + 15) / 16 * 16; }

// x without its dimension `dim`, in its memory order.
inline Tensor empty_without(const Tensor& x, int dim) {
  std::vector<int> order = memory_order(x);
  order.erase(std::find(order.begin(), order.end(), dim));
  std::vector<int64_t> sizes;
  for (int n = 0; n < x.dim(); ++n)
    if (n != dim) sizes.push_back(x.size(n));
  for (int& n : order) n -= n > dim;
  return empty_ordered(x, sizes, order);
}

struct RnnCall {
  Rnn args;
  Tensor y, h_last, saved;

  RnnCall(const Cell& cell, const Sequences& sequences, const Tensor& x, const Tensor& params,
          const OptionalTensor& h0, const OptionalTensor& reset, bool return_states)
      : y(return_states ? empty_ordered(x, {x.size(0), x.size(1), states_of(cell), x.size(3)},
                                        memory_order(x))
                        : empty_without(x, 2)),
        h_last(empty(x, {sequences.count, states_of(cell), x.size(3)}, state_dtype(dtype_of(x)))),
        saved(h_last) {
    set_inputs(args, cell, sequences, x, params, reset);
    args.h0 = view<3>(h0);
    args.y = with_states(y);
    args.h_last = view<3>(h_last);
  }

  // Makes `saved`, the last result, with that many states for the backward, or with none.
  void save(bool wanted, int64_t chunk_rows) {
    const int64_t states = args.h_last.size[1], padded = args.padded();
    const DType dtype = args.h_last.dtype;
    saved = wanted ? empty(h_last, {chunk_rows, states, padded}, dtype)
                   : scratch(h_last, {0, states, padded}, dtype);
    args.saved = wanted ? saved.data_ptr() : nullptr;
  }
};

struct RnnStepCall {
  Rnn args;
  Tensor y;

  RnnStepCall(const Cell& cell, const Tensor& h, const Tensor& x, const Tensor& params)
      : y(empty_without(x, 1)) {
    args.cell = cell.index;
    args.sequences = {x.size(0), 1, nullptr};
    args.x = one_step(view<3>(x));
    args.params = view<2>(params);
    args.h0 = args.h_last = view<3>(h);
    args.y = one_step(one_step(view<2>(y)));
  }
};

// What the backward is given, checked together.
struct RnnGiven {
  const OptionalTensor &dy, &dh_last;
  const Tensor &saved, &x, &params;
  const OptionalTensor &h0, &reset, &cu_seqlens;
  bool return_states;
};
inline Cell check_backward(const char* op, const RnnGiven& in, const std::string& cell_name) {
  check(op, {{"dy", in.dy},
             {"dh_last", in.dh_last},
             {"x", in.x},
             {"params", in.params},
             {"h0", in.h0},
             {"reset", in.reset},
             {"cu_seqlens", in.cu_seqlens}});
  const Cell cell = find_cell(op, cell_name);
  check_cell(op, cell.info, in.x, in.params, "h0", in.h0);
  if (in.dy && (in.dy->dim() == 4) != in.return_states)
    fail(op, "dy must have as many dimensions as y");
  if (in.dy && in.return_states)
    check_size(op, cell.info.name, "dy", *in.dy, 2, "K", "states", cell.info.states);
  if (in.dh_last)
    check_size(op, cell.info.name, "dh_last", *in.dh_last, 1, "K", "states", cell.info.states);
  return cell;
}

inline void check_saved(const char* op, const Tensor& saved, const Cell& cell, const Tensor& x,
                        int64_t chunk_rows) {
  if (saved.dim() != 3 || saved.size(0) != chunk_rows || saved.size(1) != states_of(cell) ||
      saved.size(2) != padded_channels(x) || dtype_of(saved) != state_dtype(dtype_of(x)) ||
      !saved.is_contiguous())
    fail(op, "saved must be what _rnn_save returned");
}

// All but what the parameters are summed in.
struct RnnBackwardCall {
  RnnBackward args;
  Tensor dx, dparams, dh0;

  RnnBackwardCall(const RnnGiven& in, const Cell& cell, const Sequences& sequences)
      : dx(empty_like(in.x)),
        dparams(empty_like(in.params)),
        dh0(in.h0 ? empty_like(*in.h0)
                  : empty(in.x, {sequences.count, states_of(cell), in.x.size(3)},
                          state_dtype(dtype_of(in.x)))) {
    set_inputs(args, cell, sequences, in.x, in.params, in.reset);
    args.parts = rnn_parts(args, in.cu_seqlens.has_value());
    if (in.dy) args.dy = with_states(*in.dy);
    args.dh_last = view<3>(in.dh_last);
    args.saved = in.saved.data_ptr();
    args.dx = view<4>(dx);
    args.dparams = view<2>(dparams);
    args.dh0 = view<3>(dh0);
  }
};

}  // namespace recurra
