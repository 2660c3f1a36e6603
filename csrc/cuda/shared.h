// What threads share: arrays of a block, and words by which blocks tell one another. Through this
// header alone, so that tests/cpp/cuda_emulator.h can stand in for the device. Barriers, shuffles
// and votes have CUDA's own names.
#pragma once
#include "integers.h"

// RECURRA_SHARED(T, name, count): an array of a block, T name[count].
#if defined(RECURRA_CUDA_EMULATOR)
#include "cuda_emulator.h"
#define RECURRA_SHARED(T, NAME, COUNT) \
  static const char NAME##_key = 0;    \
  const ::recurra::cuda::emulator::Shared<T> NAME(&NAME##_key, COUNT)
#else
#define RECURRA_SHARED(T, NAME, COUNT) __shared__ T NAME[COUNT]
#endif

namespace recurra::cuda {

// A word of another block: whoever reads what store_release wrote sees all that its thread wrote
// before. A loop that waits for one must read it by load_acquire.
#if defined(RECURRA_CUDA_EMULATOR)
inline uint32_t load_acquire(const uint32_t* from) {
  emulator::yield();
  return *from;
}
inline void store_release(uint32_t* to, uint32_t value) { *to = value; }
#elif defined(__CUDACC__)
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ void store_release(uint32_t* to, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
#endif

}  // namespace recurra::cuda
