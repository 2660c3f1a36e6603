// parallel.h over std::thread instead of OpenMP, whose runtime ThreadSanitizer cannot see into: a
// build with -fsanitize=thread links this, so that tasks of one call really race if they can.
#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "parallel.h"

namespace recurra {
namespace {

std::atomic<int (*)()> thread_source{nullptr};

}  // namespace

void set_thread_source(int (*source)()) { thread_source.store(source); }

int thread_count() {
  auto source = thread_source.load();
  return source ? source() : 4;
}

void parallel_run(int64_t n, void (*fn)(void* context, int64_t i), void* context) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) fn(context, i);
  };
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < std::min<int64_t>(n, thread_count()); ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}

}  // namespace recurra
