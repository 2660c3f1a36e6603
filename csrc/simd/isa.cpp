#include "simd/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace recurra {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512"};

bool supports(const char* first, const char* last) {
  bool all = true, inside = false;
  for (const CpuFlag& flag : cpu_flags()) {
    inside |= std::strcmp(flag.name, first) == 0;
    if (inside) all &= flag.present;
    if (std::strcmp(flag.name, last) == 0) break;
  }
  return inside && all;
}

Isa detect() {
  if (supports("avx2", "avx512dq")) return Isa::avx512;
  return supports("avx2", "f16c") ? Isa::avx2 : Isa::scalar;
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

std::vector<CpuFlag> cpu_flags() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#define RECURRA_FLAG(NAME) {NAME, __builtin_cpu_supports(NAME) != 0}
  return {RECURRA_FLAG("avx2"),    RECURRA_FLAG("fma"),      RECURRA_FLAG("f16c"),
          RECURRA_FLAG("avx512f"), RECURRA_FLAG("avx512bw"), RECURRA_FLAG("avx512vl"),
          RECURRA_FLAG("avx512dq")};
#undef RECURRA_FLAG
#else
  return {};
#endif
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

void cap_isa(const char* name) {
  chosen.store(static_cast<int>(capped(name)), std::memory_order_relaxed);
}

}  // namespace recurra
