#include "parallel.h"

#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <exception>

namespace recurra {
namespace {

std::atomic<bool> forked_child{false};
std::atomic<int (*)()> thread_source{nullptr};

// pthread_atfork handlers outlive a dlclose, but these libraries are never unloaded.
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { forked_child.store(true, std::memory_order_relaxed); });

}  // namespace

void set_thread_source(int (*source)()) { thread_source.store(source); }

int thread_count() {
  if (forked_child.load(std::memory_order_relaxed)) return 1;
  if (omp_in_parallel()) return 1;
  auto source = thread_source.load(std::memory_order_relaxed);
  return source ? source() : omp_get_max_threads();
}

void parallel_run(int64_t n, void (*fn)(void* context, int64_t i), void* context) {
  const int64_t available = n > 1 ? thread_count() : 1;
  const int threads = static_cast<int>(available < n ? available : n);
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) fn(context, i);
    return;
  }
  // An exception must not leave the region; the first one goes on behind it.
  std::exception_ptr failure;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) {
    try {
      fn(context, i);
    } catch (...) {
#pragma omp critical(recurra_failure)
      if (!failure) failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace recurra
