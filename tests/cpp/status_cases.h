// That kernels mark cu_seqlens and slots that they clamp, and no others; and that a GPU for which
// there is no code is known, and not taken for one that only lacks memory.
#pragma once
#include "case.h"
#include "cuda/status.h"
#include "linear_scan/linear_scan.h"

namespace recurra::test {

inline void status_case(Case& c, const Shape&) {
  constexpr int64_t time = 40, channels = 3;
  const bool step = c.random.chance(50);
  const View<1> told = c.output<1>("told", DType::f64, {1}, true);
  const View<3> a = c.input<3>("a", DType::f32, {1, time, channels});
  const View<3> b = c.input<3>("b", DType::f32, {1, time, channels});
  const View<3> h = c.scratch<3>("h", DType::f32, {1, time, channels});
  std::vector<int64_t> values;
  bool good = true;
  if (step) {
    values = slots(c.random, time, time);
    if (c.random.chance(50)) values[static_cast<size_t>(c.random.below(time))] = time, good = false;
  } else {
    values = c.random.pick<std::vector<int64_t>>({{0, 7, 7, 30, time},
                                                  {1, 7, 7, 30, time},
                                                  {0, 8, 7, 30, time},
                                                  {0, 7, 7, time + 1, time},
                                                  {0, 7, 7, 30, time - 1},
                                                  {-1, 7, 7, 30, time},
                                                  {0, time}});
    good = values[0] == 0 && values.back() == time && std::is_sorted(values.begin(), values.end());
  }
  const View<1> given = c.indices("indices", values.data(), static_cast<int64_t>(values.size()));
  c.oracle = [=] { set(told, good ? 0 : 1, 0); };
  const auto rows = [](const View<3>& v) {
    return View<2>{v.data, v.dtype, {time, channels}, {v.step(1), v.step(2)}};
  };
  LinearScan whole;
  whole.sequences = {static_cast<int64_t>(values.size()) - 1, time, nullptr};
  whole.a = a, whole.b = b, whole.h = h;
  whole.h_last = c.scratch<2>("h_last", DType::f32, {whole.sequences.count, channels});
  LinearScanStep one;
  one.a = rows(a), one.b = rows(b), one.out = rows(h);
  one.h = c.scratch<2>("states", DType::f32, {time, channels});
  c.emulated = [=] {
    const char *const op = step ? "linear_scan_step" : "_linear_scan_backward",
                      *const argument = step ? "slots" : "cu_seqlens";
    const cuda::Indices indices(given, cuda::status_word(op, argument, 0));
    step ? cuda::linear_scan_step(one, indices, {}) : cuda::linear_scan(whole, indices, {}, {});
    // Another stream has a kernel that marks something else while this thread waits.
    uint32_t* const other = cuda::status_word("rnn", "slots", 0);
    auto& meanwhile = cuda::emulator::runtime.meanwhile;
    meanwhile = [other, waits = 0]() mutable {
      if (++waits == 2) *other = 1;
    };
    const std::vector<std::string> said = cuda::take_status({});
    meanwhile = nullptr;
    const std::string want = step ? "slots of linear_scan_step" : "cu_seqlens of linear_scan";
    set(told, said == std::vector<std::string>{want} ? 1 : said.empty() ? 0 : 2, 0);
    if (cuda::take_status({}) != std::vector<std::string>{"slots of rnn_step"}) set(told, 3, 0);
    if (!cuda::take_status({}).empty()) set(told, 4, 0);
    if (!cuda::has_code(0)) set(told, 5, 0);
    cuda::emulator::runtime.code = cudaErrorNoKernelImageForDevice;
    if (cuda::has_code(0)) set(told, 6, 0);
    cuda::emulator::runtime.code = cudaErrorMemoryAllocation;
    try {
      cuda::has_code(0);
      set(told, 8, 0);
    } catch (const std::runtime_error&) {
    }
    cuda::emulator::runtime.code = cudaSuccess;
    cuda::emulator::runtime.next = cudaErrorInsufficientDriver;
    if (cuda::has_code(0)) set(told, 9, 0);
    if (cudaGetLastError() != cudaSuccess) set(told, 7, 0);
  };
}

}  // namespace recurra::test
