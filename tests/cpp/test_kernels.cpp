// Every kernel on random shapes, dtypes and layouts, some with more than 2^31 elements between
// neighbours: no byte outside an output is written, every instruction set gives the same bits, and
// these are the equations' where they define the bits.
//
//   test_kernels                       the quick tier, of which a quarter runs on CUDA's emulator,
//                                      or all with RECURRA_TEST_TIER=nightly
//   test_kernels --seconds 600         fuzzing: other seeds, numbers of random bytes
//   test_kernels --concurrent          many calls at once, for ThreadSanitizer
//   test_kernels --isa scalar          this instruction set alone, for Valgrind: without fibers
//   test_kernels --part 0/4            every fourth op, for several processes to share
//   test_kernels --op NAME --seed N --cases 1   repeats one case that failed
//
// To add an op, write its cases in OP_cases.h and name them in kOps.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>

#include "block_scan_cases.h"
#include "case.h"
#include "causal_conv1d_cases.h"
#include "cuda_emulator.h"
#include "linear_scan_cases.h"
#include "linear_step_cases.h"
#include "parallel.h"
#include "rms_norm_cases.h"
#include "rnn_cases.h"
#include "rtrl_cases.h"
#include "selective_scan_cases.h"
#include "softmax_scan_cases.h"
#include "status_cases.h"

namespace recurra::test {
namespace {

struct Op {
  const char* name;
  void (*make)(Case&, const Shape&);
  Shape large;          // outputs that a kernel writes past the caches
  uint64_t one_in = 1;  // of the quick cases, for what takes long
};
constexpr Op kOps[] = {
    {"linear_scan", linear_scan_case, {1, 700, 3072}},
    {"linear_scan_backward", linear_scan_backward_case, {1, 700, 3072}},
    {"linear_scan_step", linear_scan_step_case, {1, 300, 512}},
    {"block_scan", block_scan_case, {1, 600, 1100}},
    {"block_scan_backward", block_scan_backward_case, {1, 600, 1100}, 2},
    {"block_scan_step", block_scan_step_case, {1, 300, 512}},
    {"block_scan_hostile", hostile_block_scan_case, {1, 300, 512}, 4},
    {"causal_conv1d", causal_conv1d_case, {2, 1030, 1040}},
    {"causal_conv1d_backward", causal_conv1d_backward_case, {2, 1030, 1040}},
    {"causal_conv1d_step", causal_conv1d_step_case, {1, 300, 512}},
    {"selective_scan", selective_scan_case, {1, 1050, 2080}, 2},
    {"selective_scan_backward", selective_scan_backward_case, {1, 1050, 2080}, 4},
    {"selective_scan_step", selective_scan_step_case, {1, 300, 512}, 4},
    {"softmax_scan", softmax_scan_case, {1, 1050, 2080}},
    {"softmax_scan_backward", softmax_scan_backward_case, {1, 1050, 2080}},
    {"softmax_scan_step", softmax_scan_step_case, {1, 300, 512}},
    {"softmax_scan_hostile", hostile_softmax_scan_case, {1, 300, 512}},
    {"rnn", rnn_case, {1, 300, 520}, 10},
    {"rnn_step", rnn_step_case, {1, 300, 512}, 10},
    {"rnn_hostile", rnn_hostile_case, {1, 300, 512}, 10},
    {"rnn_newton", rnn_newton_case, {1, 300, 30}, 10},
    {"rnn_newton_hostile", rnn_newton_hostile_case, {1, 300, 30}, 10},
    {"rnn_global_newton", rnn_global_newton_case, {1, 300, 100}, 10},
    {"rnn_backward", rnn_backward_case, {1, 300, 520}, 10},
    {"rnn_hostile_backward", rnn_hostile_backward_case, {1, 300, 512}, 10},
    {"status", status_case, {1, 40, 3}, 4},
    {"linear_step", linear_step_case, {1, 700, 1040}},
    {"rms_norm", rms_norm_case, {3, 700, 300}},
    {"rms_norm_backward", rms_norm_backward_case, {3, 700, 300}},
    {"rtrl_update", rtrl_update_case, {2, 300, 130}, 5},
    {"rtrl_derivatives", rtrl_derivatives_case, {1, 100, 130}, 3},
    {"rtrl_gradient", rtrl_gradient_case, {5, 1, 700}, 3},
    {"hostile_causal_conv1d", hostile_causal_conv1d_case, {1, 300, 512}},
    {"hostile_causal_conv1d_backward", hostile_causal_conv1d_backward_case, {1, 300, 512}, 8},
    {"hostile_causal_conv1d_step", hostile_causal_conv1d_step_case, {1, 300, 512}},
    {"hostile_cu_seqlens", hostile_cu_seqlens_case, {1, 300, 512}},
    {"hostile_backward", hostile_backward_case, {1, 300, 512}},
    {"hostile_slots", hostile_slots_case, {1, 300, 512}},
    {"hostile_selective_scan", hostile_selective_scan_case, {1, 300, 512}},
    {"hostile_selective_scan_backward", hostile_selective_scan_backward_case, {1, 300, 512}, 4},
    {"infinite_linear_scan", infinite_linear_scan_case, {1, 96, 3}, 8},
    {"infinite_linear_scan_backward", infinite_linear_scan_backward_case, {1, 96, 3}, 8},
    {"infinite_block_scan", infinite_block_scan_case, {1, 40, 2}, 8},
    {"infinite_block_scan_backward", infinite_block_scan_backward_case, {1, 40, 2}, 8},
    {"infinite_selective_scan", infinite_selective_scan_case, {1, 96, 33}, 8},
    {"infinite_selective_scan_backward", infinite_selective_scan_backward_case, {1, 96, 33}, 8},
};

enum class Kind { quick, large, any_bytes, far };

// One case on every instruction set that may be chosen; `alone` when no other thread calls kernels.
void check(const Op& op, uint64_t seed, Kind kind, bool alone, const std::string& only = "",
           bool emulate = true) {
  Case c(seed * 31 + static_cast<uint64_t>(&op - kOps), kind == Kind::any_bytes);
  if (kind == Kind::far) c.far();
  op.make(c, kind == Kind::large ? op.large : shape(c.random));
  c.remember();
  using Results = std::vector<std::vector<char>>;
  Results wanted;
  // The first results are those that all others must be.
  const auto compare = [&](const char* who, Results& like, double within = 0) {
    try {
      c.check_untouched();
      if (!c.raced && !like.empty()) c.check_results(like, within);
    } catch (const std::exception& error) {
      throw std::runtime_error(std::string(op.name) + ", seed " + std::to_string(seed) +
                               (kind == Kind::any_bytes ? ", random bytes"
                                : kind == Kind::far     ? ", far apart"
                                                        : "") +
                               ", " + who + ": " + error.what());
    }
    if (like.empty()) like = c.results();
  };
  if (c.oracle) c.oracle(), compare("oracle", wanted), c.restore();
  if (c.run && !alone) return c.run(), compare(isa_name(isa()), wanted);
  if (c.run)
    for (const char* name : {"scalar", "avx2", "avx512"}) {
      if (!only.empty() && only != name) continue;
      cap_isa(name);
      if (std::strcmp(isa_name(isa()), name) == 0) c.run(), compare(name, wanted), c.restore();
    }
  if (!c.emulated || !emulate || !alone || !only.empty() || kind == Kind::large) return;
  Results first;
  cuda::emulator::in_every_order([&] {
    c.emulated();
    // Of random bytes sums in another order may be anything.
    if (c.emulated_within == 0)
      compare("emulated CUDA", wanted);
    else if (kind != Kind::any_bytes)
      compare("emulated CUDA", wanted, c.emulated_within);
    compare("emulated CUDA in another order", first);
    c.restore();
  });
}

int main(int argc, char** argv) {
  uint64_t seed = 1, cases = 400;
  double seconds = 0;
  bool concurrent = false;
  std::string only, isa_only;
  int part = 0, parts = 1;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    const char* value = i + 1 < argc ? argv[i + 1] : "";
    if (flag == "--concurrent") {
      concurrent = true;
      continue;
    }
    ++i;
    if (flag == "--seed") {
      seed = std::strtoull(value, nullptr, 10);
    } else if (flag == "--cases") {
      cases = std::strtoull(value, nullptr, 10);
    } else if (flag == "--seconds") {
      seconds = std::atof(value);
    } else if (flag == "--op") {
      only = value;
    } else if (flag == "--part" && std::sscanf(value, "%d/%d", &part, &parts) == 2 && parts > 0) {
    } else if (flag == "--isa") {
      isa_only = value;
    } else {
      std::fprintf(stderr, "unknown option %s\n", flag.c_str());
      return 2;
    }
  }
  const char* const tier = std::getenv("RECURRA_TEST_TIER");
  const bool emulate_all = cases == 1 || (tier && std::strcmp(tier, "nightly") == 0);
  const auto chosen = [&](const Op& op) {
    return (only.empty() || only == op.name) && (&op - kOps) % parts == part;
  };
  set_thread_source([] { return 1; });
  std::atomic<uint64_t> done{0};
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  if (concurrent) {
    std::atomic<bool> failed{false};
    std::vector<std::thread> threads;
    for (uint64_t n = 0; n < 4; ++n)
      threads.emplace_back([&, n] {
        try {
          for (uint64_t i = n; i < cases; i += 4)
            for (const Op& op : kOps)
              if (chosen(op)) check(op, seed + i, Kind::quick, false), ++done;
        } catch (const std::exception& error) {
          std::fprintf(stderr, "test_kernels: %s\n", error.what());
          failed = true;
        }
      });
    for (std::thread& thread : threads) thread.join();
    if (failed) return 1;
    // Tasks of one call on several threads, where this build starts them by std::thread.
    set_thread_source([] { return 4; });
  }
  try {
    for (const Op& op : kOps) {
      if (!chosen(op)) continue;
      for (uint64_t i = 0; i < cases; i += op.one_in) {
        // Five orders of fibers under a sanitizer take most of the time.
        const bool emulate = emulate_all || i / op.one_in % 4 == 0;
        check(op, seed + i, Kind::quick, true, isa_only, emulate);
        if (i % 4 == 0) check(op, seed + i, Kind::any_bytes, true, isa_only, emulate);
        // Valgrind has no room for them.
        if (isa_only.empty() && (cases == 1 || i / op.one_in % 8 == 4))
          check(op, seed + i, Kind::far, true, "", emulate);
        ++done;
      }
      if (cases > 1) check(op, seed, Kind::large, true, isa_only);
    }
    for (uint64_t i = cases; elapsed() < seconds; ++i, ++done)
      for (const Op& op : kOps)
        if (chosen(op)) check(op, seed + i, i % 2 ? Kind::any_bytes : Kind::quick, true, isa_only);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "test_kernels: %s\n", error.what());
    return 1;
  }
  std::printf("test_kernels: %llu cases passed in %.1f s\n",
              static_cast<unsigned long long>(done.load()), elapsed());
  return 0;
}

}  // namespace
}  // namespace recurra::test

int main(int argc, char** argv) { return recurra::test::main(argc, argv); }
