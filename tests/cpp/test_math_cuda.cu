// The float functions of csrc/math on the GPU against those of the CPU, for all 2^32 inputs: every
// bit the same, any NaN being like any other, but for exp2_fast, which the GPU has of its own.
// Prints of each the inputs that differ, the largest difference in ulp and the seconds. Over
// cuda_emulator.h a few inputs show that the program itself works. The CPU's side takes half a
// minute on sixteen cores where the compiler may use their vectors, and minutes where not.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "bits.h"
#include "cuda/launch.h"
#include "math_functions.h"

namespace test_math_cuda {

#if defined(RECURRA_CUDA_EMULATOR)
constexpr int64_t kChunk = 256, kOneIn = int64_t{1} << 20;
#else
constexpr int64_t kChunk = 1 << 24, kOneIn = 1;
#endif
constexpr int kThreads = 128;
constexpr int64_t kBlock = 256;

// Number i of those that are looked at: anywhere among the kOneIn that it stands for.
RECURRA_FN float input(int64_t i) {
  const auto n = static_cast<uint64_t>(i), each = static_cast<uint64_t>(kOneIn);
  const uint64_t among = (n * 0x9e3779b1 >> 16) & (each - 1);
  return __builtin_bit_cast(float, static_cast<uint32_t>(n * each + among));
}

template <class F>
__global__ void __launch_bounds__(kThreads) evaluate(int64_t first, float* out) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i < kChunk; i += threads) out[i] = F::f(input(first + i));
}

// What the device wrote, there and here. Copies to memory that the system may move are slow.
class Results {
 public:
#if defined(RECURRA_CUDA_EMULATOR)
  Results() : here_(new float[kChunk]), there_(here_) {}
  ~Results() { delete[] here_; }
#else
  Results() {
    recurra::cuda::check(cudaMallocHost(&here_, kBytes), "cudaMallocHost");
    recurra::cuda::check(cudaMalloc(&there_, kBytes), "cudaMalloc");
  }
  ~Results() {
    cudaFree(there_);
    cudaFreeHost(here_);
  }
#endif
  Results(const Results&) = delete;
  Results& operator=(const Results&) = delete;

  float* there() { return there_; }
  const float* fetch() {
#if !defined(RECURRA_CUDA_EMULATOR)
    recurra::cuda::check(cudaMemcpy(here_, there_, kBytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
#endif
    return here_;
  }

 private:
  static constexpr size_t kBytes = static_cast<size_t>(kChunk) * sizeof(float);
  float *here_ = nullptr, *there_ = nullptr;
};

// The steps from one number to another; as many as there can be where one of them is a NaN.
inline int64_t apart(float a, float b) {
  if (same(a, b)) return 0;
  if (a != a || b != b) return int64_t{1} << 32;
  const auto place = [](float x) {
    const int64_t size = bits<uint32_t>(x) & 0x7fffffff;
    return bits<uint32_t>(x) >> 31 ? -size : size;
  };
  const int64_t distance = place(a) - place(b);
  return distance < 0 ? -distance : distance > 0 ? distance : 1;  // zeros of two signs
}

struct Difference {
  int64_t count = 0, worst = 0, at = 0;
  void add(const Difference& other) {
    count += other.count;
    if (other.worst > worst) worst = other.worst, at = other.at;
  }
};

template <class F>
Difference compare(int64_t first, const float* found) {
  const auto workers = static_cast<int64_t>(std::max(1u, std::thread::hardware_concurrency()));
  std::vector<Difference> each(static_cast<size_t>(workers));
  std::vector<std::thread> threads;
  for (int64_t n = 0; n < workers; ++n)
    threads.emplace_back([&, n] {
      Difference d;
      // Evaluated apart from what looks at the results, so that the compiler takes vectors for it.
      float own[kBlock];
      for (int64_t k = n; k < kChunk / kBlock; k += workers) {
        const int64_t from = k * kBlock;
        for (int64_t i = 0; i < kBlock; ++i) own[i] = F::f(input(first + from + i));
        for (int64_t i = 0; i < kBlock; ++i)
          if (const int64_t steps = apart(own[i], found[from + i]); steps > 0)
            d.add({1, steps, first + from + i});
      }
      each[static_cast<size_t>(n)] = d;
    });
  Difference all;
  for (size_t n = 0; n < threads.size(); ++n) threads[n].join(), all.add(each[n]);
  return all;
}

// False where results differ by more than `within` steps.
template <class F>
bool check(const char* name, int64_t within, Results& results) {
  const auto start = std::chrono::steady_clock::now();
  const auto math_evaluate = evaluate<F>;
  Difference all;
  for (int64_t first = 0; first < (int64_t{1} << 32) / kOneIn; first += kChunk) {
    RECURRA_LAUNCH(math_evaluate, recurra::cuda::blocks_for(kChunk, kThreads), kThreads,
                   recurra::cuda::Stream{}, first, results.there());
    all.add(compare<F>(first, results.fetch()));
  }
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  std::printf("%-10s %10lld differ, at most %lld ulp, at %a, %.1f s\n", name,
              static_cast<long long>(all.count), static_cast<long long>(all.worst),
              static_cast<double>(input(all.at)), taken.count());
  return all.worst <= within;
}

FUNCTION(Sin, r::sincos(x).sin, std::sin(x))
FUNCTION(Cos, r::sincos(x).cos, std::cos(x))
FUNCTION(SiluSlope, r::silu_slope(x).slope, x)

inline int main() {
#if !defined(RECURRA_CUDA_EMULATOR)
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) {
    std::printf("skipped: no GPU (%s)\n", cudaGetErrorString(error));
    return 77;
  }
#endif
  using namespace math_functions;
  Results results;
  bool good = true;
  good &= check<Exp>("exp", 0, results);
  good &= check<Exp2>("exp2", 0, results);
  good &= check<Exp2Fast>("exp2_fast", 4, results);  // either is within 2 ulp of the exact one
  good &= check<Expm1>("expm1", 0, results);
  good &= check<Log1p>("log1p", 0, results);
  good &= check<Sigmoid>("sigmoid", 0, results);
  good &= check<Tanh>("tanh", 0, results);
  good &= check<Softplus>("softplus", 0, results);
  good &= check<Silu>("silu", 0, results);
  good &= check<Sin>("sin", 0, results);
  good &= check<Cos>("cos", 0, results);
  good &= check<ExpSlope>("exp'", 0, results);
  good &= check<Expm1Slope>("expm1'", 0, results);
  good &= check<Log1pSlope>("log1p'", 0, results);
  good &= check<SigmoidSlope>("sigmoid'", 0, results);
  good &= check<TanhSlope>("tanh'", 0, results);
  good &= check<SoftplusSlope>("softplus'", 0, results);
  good &= check<SiluSlope>("silu'", 0, results);
  std::printf(good ? "ok\n" : "FAILED\n");
  return good ? 0 : 1;
}

}  // namespace test_math_cuda

int main() { return test_math_cuda::main(); }
