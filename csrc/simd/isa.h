// Which instruction set this process uses, and how a kernel compiled once per set is called.
#pragma once
#if !defined(__CUDACC_RTC__)
#include <vector>

namespace recurra {

enum class Isa : int { scalar, avx2, avx512 };

// The best instruction set of this machine, capped by RECURRA_ISA (scalar, avx2 or avx512).
Isa isa();
// The best one, whatever the cap.
Isa best_isa();
const char* isa_name(Isa isa);

// The processor's answer for each feature that the choice asks for.
struct CpuFlag {
  const char* name;
  bool present;
};
std::vector<CpuFlag> cpu_flags();

// Caps the choice from now on, as RECURRA_ISA does at the start; throws on an unknown name.
void cap_isa(const char* name);

}  // namespace recurra
#endif

// Declares NAME(const ARGS&) in each instruction set's namespace, and recurra::NAME, which calls
// the chosen one. A kernel file defines NAME in recurra::RECURRA_ISA and is compiled once per set.
// Who is linked to librecurra.so finds recurra::NAME in it.
// clang-format off
#if !defined(RECURRA_CHOOSER)
#define RECURRA_CHOOSER inline
#endif
#if defined(__CUDACC_RTC__)  // the device alone
#define RECURRA_KERNEL(NAME, ARGS)
#elif defined(RECURRA_SHARED)
#define RECURRA_KERNEL(NAME, ARGS) namespace recurra { void NAME(const ARGS& args); }
#elif defined(__x86_64__)
#define RECURRA_KERNEL(NAME, ARGS)                      \
  namespace recurra {                                   \
  namespace scalar { void NAME(const ARGS& args); }     \
  namespace avx2 { void NAME(const ARGS& args); }       \
  namespace avx512 { void NAME(const ARGS& args); }     \
  RECURRA_CHOOSER void NAME(const ARGS& args) {         \
    switch (isa()) {                                    \
      case Isa::avx512: return avx512::NAME(args);      \
      case Isa::avx2: return avx2::NAME(args);          \
      default: return scalar::NAME(args);               \
    }                                                   \
  }                                                     \
  }
#else
#define RECURRA_KERNEL(NAME, ARGS)                      \
  namespace recurra {                                   \
  namespace scalar { void NAME(const ARGS& args); }     \
  RECURRA_CHOOSER void NAME(const ARGS& args) { scalar::NAME(args); } \
  }
#endif
// clang-format on
