#include "simd/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace recurra {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512"};

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::scalar;
}

Isa capped(const char* name) {
  const Isa best = detect();
  for (int i = 0; i < 3; ++i)
    if (std::strcmp(name, kNames[i]) == 0) return i < static_cast<int>(best) ? Isa(i) : best;
  throw std::runtime_error(std::string("RECURRA_ISA must be scalar, avx2 or avx512, got ") + name);
}

std::atomic<int> chosen{-1};

}  // namespace

Isa isa() {
  int value = chosen.load(std::memory_order_relaxed);
  if (value < 0) {
    const char* cap = std::getenv("RECURRA_ISA");
    value = static_cast<int>(cap && *cap ? capped(cap) : detect());
    chosen.store(value, std::memory_order_relaxed);
  }
  return Isa(value);
}

Isa best_isa() { return detect(); }

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

void cap_isa(const char* name) {
  chosen.store(static_cast<int>(capped(name)), std::memory_order_relaxed);
}

}  // namespace recurra
