// CUDA in plain C++: the threads of a grid are fibers of one thread, which meet at barriers,
// shuffles and votes as they do on a GPU. A launch that breaks a rule throws a sentence:
//   - an element of a shared array that two threads access without a barrier between, one of them
//     writing, or that is read before anything is written to it (shared arrays begin as poison);
//   - a shuffle or vote whose mask lacks the lane that calls it, or one that not all lanes of its
//     mask reach, or that reads a lane outside of it;
//   - a barrier that some threads of the block never reach, and a wait without end.
// Fibers run in ascending, descending or seeded random order. Several blocks are there at a time,
// so that one may wait for another. What one block sees of another's writes is not modelled: here
// it is all of them, at once and in order.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline thread_local Dim3 gridDim, blockDim, blockIdx, threadIdx;  // those of the fiber that runs

// ---- the runtime
// ---------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess,
  cudaErrorNoKernelImageForDevice,
  cudaErrorInvalidDeviceFunction,
  cudaErrorUnsupportedPtxVersion,
  cudaErrorInsufficientDriver,
  cudaErrorMemoryAllocation
};
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "an error";
}

namespace recurra::cuda::emulator {

// What the runtime has of this thread. Devices have no memory of their own, but contexts.
struct Runtime {
  std::array<bool, 4> contexts = {};  // of which devices there are any
  bool* context = nullptr;            // the current one
  int device = 0;                     // where none is
  cudaError_t next = cudaSuccess;     // what the next call returns
  cudaError_t last = cudaSuccess;     // for cudaGetLastError
  cudaError_t code = cudaSuccess;     // what asking for the code of a kernel returns
  std::function<void()> meanwhile;    // what others do while this thread waits for the device

  cudaError_t returned() {
    const cudaError_t error = next;
    next = cudaSuccess;
    if (error != cudaSuccess) last = error;
    return error;
  }
  cudaError_t waited() {
    if (meanwhile) meanwhile();
    return returned();
  }
};
inline thread_local Runtime runtime;

}  // namespace recurra::cuda::emulator

namespace recurra::cuda {

inline void* current_context() { return emulator::runtime.context; }
inline void set_current_context(void* context) {
  emulator::runtime.context = static_cast<bool*>(context);
}

}  // namespace recurra::cuda

inline cudaError_t cudaGetLastError() {
  return std::exchange(recurra::cuda::emulator::runtime.last, cudaSuccess);
}
inline cudaError_t cudaGetDevice(int* device) {
  auto& here = recurra::cuda::emulator::runtime;
  *device = here.context ? static_cast<int>(here.context - here.contexts.data()) : here.device;
  return here.returned();
}
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  *value = what == cudaDevAttrComputeCapabilityMajor ? 7 : 5;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  auto& here = recurra::cuda::emulator::runtime;
  here.device = device;
  here.context = &here.contexts.at(static_cast<size_t>(device));
  *here.context = true;
  return here.returned();
}

// Streams, of which there is one, and memory, of which there is one kind.
using cudaStream_t = void*;
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(to, from, bytes);
  return recurra::cuda::emulator::runtime.returned();
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return recurra::cuda::emulator::runtime.returned();
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return recurra::cuda::emulator::runtime.waited();
}
inline cudaError_t cudaDeviceSynchronize() { return recurra::cuda::emulator::runtime.waited(); }
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed };
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}
struct cudaFuncAttributes {};
template <class... Arguments>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(Arguments...)) {
  auto& here = recurra::cuda::emulator::runtime;
  if (here.code != cudaSuccess) here.last = here.code;
  return here.code;
}
template <class T, size_t N>
cudaError_t cudaGetSymbolAddress(void** to, T (&symbol)[N]) {
  *to = symbol;
  return cudaSuccess;
}

// ---- the threads
// ---------------------------------------------------------------------------------

namespace recurra::cuda::emulator {

enum class Order { ascending, descending, random };
struct Schedule {
  Order order = Order::ascending;
  uint64_t seed = 0;
};
// Of all launches of this thread to come.
inline thread_local Schedule schedule;
// Calls f, which launches kernels, in ascending, descending and three random orders of threads.
template <class F>
void in_every_order(const F& f) {
#if !defined(__SANITIZE_THREAD__)  // which does not know fibers
  for (const Schedule& each :
       {Schedule{Order::ascending, 0}, Schedule{Order::descending, 0}, Schedule{Order::random, 1},
        Schedule{Order::random, 2}, Schedule{Order::random, 3}}) {
    schedule = each;
    f();
  }
#endif
}

constexpr int kWarp = 32;

// Runs `thread` in each thread of a grid; throws std::runtime_error when it breaks a rule.
void run(unsigned blocks, unsigned threads, const std::function<void()>& thread);

// Everything below is called by the threads of a grid.
[[noreturn]] void fail(const char* sentence);
// Lets others run before it goes on.
void yield();
void barrier();

enum class Collective { shuffle, vote, sync };
// The values of the lanes of a mask, when all of them are there.
std::array<uint64_t, kWarp> gather(Collective kind, unsigned mask, uint64_t value);
int lane();

// A shared array of the block: its memory, and what is checked of each element.
struct SharedMemory {
  char* data;
  void* accesses;
};
SharedMemory shared_memory(const void* key, int64_t count, int64_t item);
void check_access(void* accesses, int64_t index, bool writes);

template <class T>
class Shared {
 public:
  Shared(const void* key, int64_t count)
      : memory_(shared_memory(key, count, sizeof(T))), count_(count) {}

  class Element {
   public:
    Element(const Shared& array, int64_t index) : array_(array), index_(index) {}
    operator T() const { return array_.read(index_); }
    const Element& operator=(T value) const {
      array_.write(index_, value);
      return *this;
    }
    const Element& operator=(const Element& other) const { return *this = static_cast<T>(other); }
    const Element& operator+=(T value) const { return *this = static_cast<T>(*this) + value; }

   private:
    Shared array_;
    int64_t index_;
  };
  Element operator[](int64_t index) const { return {*this, index}; }

 private:
  T read(int64_t index) const {
    check(index, false);
    T value;
    std::memcpy(&value, memory_.data + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
  }
  void write(int64_t index, T value) const {
    check(index, true);
    std::memcpy(memory_.data + index * static_cast<int64_t>(sizeof(T)), &value, sizeof(T));
  }
  void check(int64_t index, bool writes) const {
    if (index < 0 || index >= count_) fail("is outside of a shared array");
    check_access(memory_.accesses, index, writes);
  }

  SharedMemory memory_;
  int64_t count_;
};

template <class T>
uint64_t bits_of(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

// The value of lane `source`, or of this one where that is outside of its segment.
template <class T, class Source>
T shuffle(unsigned mask, T value, int width, Source source_of) {
  const auto values = gather(Collective::shuffle, mask, bits_of(value));
  const int self = lane(), begin = self / width * width;
  int source = source_of(self, begin);
  if (source < begin || source >= begin + width) source = self;
  if (!(mask >> source & 1)) fail("reads a lane outside of the mask of its shuffle");
  T out;
  std::memcpy(&out, &values[static_cast<size_t>(source)], sizeof(T));
  return out;
}

inline unsigned ballot(unsigned mask, bool value) {
  const auto values = gather(Collective::vote, mask, value);
  unsigned out = 0;
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1 && values[static_cast<size_t>(i)]) out |= 1u << i;
  return out;
}

}  // namespace recurra::cuda::emulator

namespace recurra::cuda {

template <class Kernel, class... Arguments>
void emulate(Kernel kernel, unsigned blocks, unsigned threads, const Arguments&... arguments) {
  if (!emulator::runtime.context) cudaSetDevice(emulator::runtime.device);
  emulator::run(blocks, threads, [&] { kernel(arguments...); });
}

}  // namespace recurra::cuda

// CUDA's names for what threads say to one another.
inline void __syncthreads() { recurra::cuda::emulator::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffff) {
  recurra::cuda::emulator::gather(recurra::cuda::emulator::Collective::sync, mask, 0);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return recurra::cuda::emulator::shuffle(
      mask, value, width, [&](int, int begin) { return begin + (source & (width - 1)); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return recurra::cuda::emulator::shuffle(
      mask, value, width, [&](int self, int) { return self - static_cast<int>(by); });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return recurra::cuda::emulator::shuffle(
      mask, value, width, [&](int self, int) { return self + static_cast<int>(by); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32) {
  return recurra::cuda::emulator::shuffle(mask, value, width,
                                          [&](int self, int) { return self ^ by; });
}
inline unsigned __ballot_sync(unsigned mask, bool value) {
  return recurra::cuda::emulator::ballot(mask, value);
}
inline int __any_sync(unsigned mask, bool value) {
  return recurra::cuda::emulator::ballot(mask, value) != 0;
}
inline int __all_sync(unsigned mask, bool value) {
  return recurra::cuda::emulator::ballot(mask, value) == mask;
}
// Of integers alone: a sum of floats would depend on who comes first.
template <class T>
T atomicAdd(T* to, T value) {
  static_assert(std::is_integral_v<T>);
  const T before = *to;
  *to = static_cast<T>(before + value);
  return before;
}
template <class T>
T atomicExch(T* to, T value) {
  return std::exchange(*to, value);
}
