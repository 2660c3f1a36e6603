#include "bench/rates.h"

#include <chrono>
#include <cmath>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace recurra {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct Tasks {
  Loop loop;
  int64_t repeats;
  std::vector<int64_t> done;
};

// Seconds of one task on each thread, all at once.
double run_tasks(Tasks& tasks) {
  const auto start = std::chrono::steady_clock::now();
  parallel_run(
      static_cast<int64_t>(tasks.done.size()),
      [](void* context, int64_t i) {
        auto& t = *static_cast<Tasks*>(context);
        run_loop(LoopTask{t.loop, t.repeats, &t.done[static_cast<size_t>(i)]});
      },
      &tasks);
  return seconds_since(start);
}

}  // namespace

double loop_rate(Loop loop, int threads, double milliseconds) {
  // Several tasks a thread, so that one that the system interrupts does not hold up the others.
  constexpr int share = 4;
  Tasks tasks{loop, 1, std::vector<int64_t>(static_cast<size_t>(threads * share))};
  // The best of three, alone: an interruption here would leave the measurement too short.
  double alone = 1;
  const double wanted = milliseconds * 1e-3 / share;
  while (true) {
    alone = 1;
    for (int i = 0; i < 3; ++i) {
      const auto start = std::chrono::steady_clock::now();
      run_loop(LoopTask{loop, tasks.repeats, &tasks.done[0]});
      alone = std::fmin(alone, seconds_since(start));
    }
    if (alone > 0.1 * wanted) break;
    tasks.repeats *= 2;
  }
  tasks.repeats = static_cast<int64_t>(static_cast<double>(tasks.repeats) * wanted / alone) + 1;
  const double seconds = run_tasks(tasks);
  double done = 0;
  for (int64_t n : tasks.done) done += static_cast<double>(n);
  return done / seconds * 1e-9;
}

double stream_seconds(const Stream& stream) {
  const auto start = std::chrono::steady_clock::now();
  run_stream(stream);
  return seconds_since(start);
}

double exp2_max_ulp(float low, float high, int64_t count) {
  constexpr int64_t block = 4096;
  std::vector<float> x(block), y(block);
  double worst = 0;
  for (int64_t first = 0; first < count; first += block) {
    for (int64_t i = 0; i < block; ++i)
      x[static_cast<size_t>(i)] = static_cast<float>(
          low + (high - low) * static_cast<double>(first + i) / static_cast<double>(count));
    exp2_values(Exp2Values{x.data(), y.data(), block});
    for (size_t i = 0; i < block; ++i) {
      const double exact = std::exp2(static_cast<double>(x[i]));
      const double ulp = std::ldexp(1.0, std::ilogb(exact) - 23);
      worst = std::fmax(worst, std::fabs(y[i] - exact) / ulp);
    }
  }
  return worst;
}

}  // namespace recurra
