// The only place that starts threads.
#pragma once
#include <cstdint>

namespace recurra {

// Calls fn(context, i) once for every i in [0, n), on as many threads as the process allows, and
// returns when all are done. Callers cut their work by shape, never by thread count, so results
// do not depend on it. Runs serially inside a parallel region and in a forked child, where the
// OpenMP runtime inherited from the parent would wait for threads that do not exist.
void parallel_run(int64_t n, void (*fn)(void* context, int64_t i), void* context);

// Threads that parallel_run would use now.
int thread_count();

// Where the thread count comes from; the torch binding names torch's own, so that
// torch.set_num_threads holds in every thread. Called once, when a library is loaded.
void set_thread_source(int (*source)());

}  // namespace recurra
