// The emulator itself: a scan over a grid that uses all it offers is right in every order of
// threads, and each rule that it breaks is told.
#define RECURRA_CUDA_EMULATOR
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/shared.h"

namespace {

enum class Fault {
  none,
  no_barrier,
  no_barrier_after,
  one_element,
  outside,
  own_mask,
  lanes_missing,
  other_mask,
  source,
  barrier_in_branch,
  no_release
};

constexpr unsigned kBlocks = 7, kThreads = 96, kAll = 0xffffffff;

// Inclusive sums of `in`. Each block takes the next tile and adds the totals of those before it.
template <Fault fault>
__global__ void scan(const int* in, int* out, uint32_t* ticket, int* totals, uint32_t* ready) {
  RECURRA_SHARED(uint32_t, tile, 1);
  RECURRA_SHARED(int, sums, kThreads / 32);
  RECURRA_SHARED(int, base, 1);
  const unsigned t = threadIdx.x, lane = t % 32, warp = t / 32;
  if (t == 0) tile[0] = atomicAdd(ticket, 1u);
  if (fault != Fault::no_barrier) __syncthreads();
  const uint32_t mine = tile[0];
  const unsigned at = mine * blockDim.x + t;

  int sum = in[at];
  for (unsigned by = 1; by < 32; by *= 2) {
    if (fault == Fault::lanes_missing && by == 8 && lane >= 16) break;
    const unsigned mask = fault == Fault::own_mask && lane == 3     ? kAll ^ 8
                          : fault == Fault::other_mask && lane == 5 ? kAll >> 1
                                                                    : kAll;
    const int other = __shfl_up_sync(mask, sum, by);
    if (lane >= by) sum += other;
  }
  if (fault == Fault::source && lane < 16) __shfl_sync(0xffff, sum, 20);
  if (!__any_sync(kAll, sum == in[at]) || __ballot_sync(kAll, lane < 4) != 15) sum = -1;
  if (lane == 31 || fault == Fault::one_element) sums[fault == Fault::outside ? 3 : warp] = sum;
  if (fault == Fault::barrier_in_branch && warp == 1) __syncthreads();
  __syncthreads();

  int before = 0;
  for (unsigned w = 0; w < warp; ++w) before += sums[w];
  if (fault == Fault::no_barrier_after && t == 0) sums[0] = 0;
  if (t == blockDim.x - 1) {
    totals[mine] = before + sum;
    if (fault != Fault::no_release || mine != 2) recurra::cuda::store_release(ready + mine, 1);
    int others = 0;
    for (uint32_t i = 0; i < mine; ++i) {
      while (!recurra::cuda::load_acquire(ready + i)) {
      }
      others += totals[i];
    }
    base[0] = others;
  }
  __syncthreads();
  out[at] = base[0] + before + sum;
}

// The sums in one order of threads, or what is wrong.
template <Fault fault>
std::string try_scan() {
  std::vector<int> in(kBlocks * kThreads), out(in.size()), wanted(in.size()), totals(kBlocks);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i * 37 % 11) - 3;
  std::partial_sum(in.begin(), in.end(), wanted.begin());
  uint32_t ticket = 0;
  std::vector<uint32_t> ready(kBlocks);
  try {
    recurra::cuda::emulate(scan<fault>, kBlocks, kThreads, in.data(), out.data(), &ticket,
                           totals.data(), ready.data());
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return out == wanted ? "right" : "wrong";
}

template <Fault fault>
void expect(const char* said) {
  recurra::cuda::emulator::in_every_order([&] {
    const std::string got = try_scan<fault>();
    CHECK(got.find(said) != std::string::npos, "'%s' expected, got '%s'", said, got.c_str());
  });
}

// Lanes of one warp that write and read, with __syncwarp between or not.
template <bool synchronised>
__global__ void exchange(int* out) {
  RECURRA_SHARED(float, values, 40);
  const unsigned t = threadIdx.x;
  values[t] = static_cast<float>(t);
  if (synchronised) __syncwarp();
  // The last eight threads are a warp of their own.
  out[t] = static_cast<int>(values[t ^ 1]);
}

}  // namespace

int main() {
  expect<Fault::none>("right");
  expect<Fault::no_barrier>("shared memory");
  expect<Fault::no_barrier_after>("without a barrier between");
  expect<Fault::one_element>("writes shared memory that another thread writes");
  expect<Fault::outside>("is outside of a shared array");
  expect<Fault::own_mask>("is not in the mask of its own shuffle");
  expect<Fault::lanes_missing>("of the mask ffffffff, which never come");
  expect<Fault::other_mask>("which never come");
  expect<Fault::source>("reads a lane outside of the mask");
  expect<Fault::barrier_in_branch>("of 96 threads reach a barrier");
  expect<Fault::no_release>("waits without end");

  std::vector<int> out(40);
  recurra::cuda::emulate(exchange<true>, 1u, 40u, out.data());
  for (int i = 0; i < 40; ++i) CHECK(out[static_cast<size_t>(i)] == (i ^ 1), "lane %d", i);
  try {
    recurra::cuda::emulate(exchange<false>, 1u, 40u, out.data());
    CHECK(false, "no barrier between lanes was noticed");
  } catch (const std::runtime_error& error) {
    CHECK(std::strstr(error.what(), "shared memory"), "%s", error.what());
  }
  return failures != 0;
}
