#include "cuda_emulator.h"

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace recurra::cuda::emulator {
namespace {

constexpr size_t kStack = 256 << 10;
constexpr unsigned kResident = 1024;      // threads that are there at a time, or one block
constexpr int kPassesWithoutEnd = 10000;  // in which all that could run waited for another block

struct Stack {
  Stack()
      : data(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    if (data == MAP_FAILED) throw std::runtime_error("no memory for the stack of a fiber");
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(data, kStack);  // of an earlier one at this address
#endif
  }
  ~Stack() { munmap(data, kStack); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  void* data;
  // Of each stack the first lines lie in other sets of the caches, or they would drive one another
  // out at every switch.
  size_t size = kStack - 64 * (made++ % 512);

 private:
  static inline thread_local size_t made = 0;
};

#if defined(__x86_64__)
// swapcontext enters the kernel at every switch, to keep the signal mask: most of the time of a
// test. Here what a call must preserve lies on the stack that is left.
asm(R"(
  .text
  .type recurra_switch_stack, @function
recurra_switch_stack:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size recurra_switch_stack, . - recurra_switch_stack
)");
extern "C" void recurra_switch_stack(void** from, void* to);

class Context {
 public:
  void prepare(const Stack& stack, void (*entry)()) {
    // Registers, where to return to, which is the entry, and where the entry would.
    constexpr size_t kRegisters = 6;
    auto** const top =
        reinterpret_cast<void**>(static_cast<char*>(stack.data) + stack.size) - kRegisters - 2;
    std::fill_n(top, kRegisters + 2, nullptr);
    top[kRegisters] = reinterpret_cast<void*>(entry);
    at_ = top;
  }
  void leave_for(Context& next) { recurra_switch_stack(&at_, next.at_); }

 private:
  void* at_ = nullptr;
};
#else
class Context {
 public:
  void prepare(const Stack& stack, void (*entry)()) {
    getcontext(&at_);
    at_.uc_stack.ss_sp = stack.data;
    at_.uc_stack.ss_size = stack.size;
    at_.uc_link = nullptr;
    makecontext(&at_, entry, 0);
  }
  void leave_for(Context& next) { swapcontext(&at_, &next.at_); }

 private:
  ucontext_t at_;
};
#endif

// When a thread did something: how many barriers its block, and how many full __syncwarp its warp
// had left behind.
struct Moment {
  unsigned thread, barriers, warp_syncs;
};

bool ordered(const Moment& before, const Moment& now) {
  const bool one_warp = before.thread / kWarp == now.thread / kWarp;
  return before.thread == now.thread || before.barriers != now.barriers ||
         (one_warp && before.warp_syncs != now.warp_syncs);
}

struct Access {
  bool written = false;
  Moment writer{};
  std::vector<Moment> readers;  // since it was written
};

struct SharedArray {
  std::vector<char> data;
  std::vector<Access> accesses;
};

// A shuffle or vote of some lanes.
struct Meeting {
  Collective kind;
  unsigned mask, arrived = 0, left = 0;
  std::array<uint64_t, kWarp> values{};
  bool complete() const { return arrived == mask; }
};

struct Warp {
  std::vector<std::unique_ptr<Meeting>> meetings;
  unsigned lanes = 0, syncs = 0;
};

struct Block {
  unsigned index, barriers = 0, at_barrier = 0, ended = 0;
  std::vector<Warp> warps;
  std::map<const void*, SharedArray> shared;
};

enum class State { ready, barrier, meeting, ended };

struct Fiber {
  Context context;
  Stack stack;
  Block* block = nullptr;
  unsigned thread = 0;
  State state = State::ready;
  Meeting* meeting = nullptr;
  void* fake_stack = nullptr;
};

// Fibers that have ended, for the next launches: making stacks would take most of the time.
thread_local std::vector<std::unique_ptr<Fiber>> spare;

std::string who(const Fiber& fiber) {
  return "block " + std::to_string(fiber.block->index) + ", thread " + std::to_string(fiber.thread);
}

class Grid {
 public:
  Grid(unsigned blocks, unsigned threads, const std::function<void()>& thread)
      : blocks_(blocks), threads_(threads), thread_(thread), random_(schedule.seed) {
    for (unsigned i = 0; i < blocks; ++i) waiting_.push_back(i);
    arrange(waiting_);
  }

  void run();
  Fiber& current() { return *current_; }
  Moment now() const {
    const Block& block = *current_->block;
    return {current_->thread, block.barriers, block.warps[current_->thread / kWarp].syncs};
  }
  unsigned threads() const { return threads_; }
  void leave(bool ends = false);
  // The stack of the thread that calls it is never gone back to.
  void stop(const char* sentence) {
    error_ = who(*current_) + " " + sentence;
    leave(true);
  }
  void waited() { ++waits_; }
  // Lets all threads of a block go on from a barrier.
  void release(const Block& block) {
    for (const auto& fiber : fibers_)
      if (fiber->block == &block && fiber->state == State::barrier) fiber->state = State::ready;
  }
  void begin();

 private:
  template <class V>
  void arrange(V& list) {
    if (schedule.order == Order::descending) std::reverse(list.begin(), list.end());
    if (schedule.order == Order::random) std::shuffle(list.begin(), list.end(), random_);
  }
  void start(unsigned index);
  void resume(Fiber& fiber);
  std::string stuck(bool all) const;

  unsigned blocks_, threads_;
  const std::function<void()>& thread_;
  std::mt19937_64 random_;
  std::vector<unsigned> waiting_;  // blocks that have not begun
  std::vector<std::unique_ptr<Block>> there_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Fiber* current_ = nullptr;
  Context own_;
  int64_t waits_ = 0;  // yields of threads that wait for another block
  std::string error_;
  const void* own_stack_ = nullptr;
  size_t own_size_ = 0;
  void* own_fake_stack_ = nullptr;

  friend struct Sanitizer;
};

thread_local Grid* grid = nullptr;

// AddressSanitizer is told which stack is in use.
struct Sanitizer {
#if defined(__SANITIZE_ADDRESS__)
  // What the outermost frames of an earlier fiber left on its stack, in which it ended; the others
  // have returned.
  static void forget(Fiber& f) {
    constexpr size_t kOutermost = 4096;
    __asan_unpoison_memory_region(static_cast<char*>(f.stack.data) + f.stack.size - kOutermost,
                                  kOutermost);
  }
  static void to(Grid& g, Fiber& f) {
    __sanitizer_start_switch_fiber(&g.own_fake_stack_, f.stack.data, f.stack.size);
  }
  static void from(Grid& g, Fiber& f, bool ends) {
    __sanitizer_start_switch_fiber(ends ? nullptr : &f.fake_stack, g.own_stack_, g.own_size_);
  }
  static void in_grid(Grid& g) {
    __sanitizer_finish_switch_fiber(g.own_fake_stack_, nullptr, nullptr);
  }
  static void in_fiber(Grid& g, Fiber& f) {
    __sanitizer_finish_switch_fiber(f.fake_stack, &g.own_stack_, &g.own_size_);
  }
#else
  static void forget(Fiber&) {}
  static void to(Grid&, Fiber&) {}
  static void from(Grid&, Fiber&, bool) {}
  static void in_grid(Grid&) {}
  static void in_fiber(Grid&, Fiber&) {}
#endif
};

void enter() {
  Sanitizer::in_fiber(*grid, grid->current());
  grid->begin();
}

void Grid::begin() {
  thread_();
  ++current_->block->ended;
  leave(true);
}

void Grid::start(unsigned index) {
  there_.push_back(std::make_unique<Block>());
  Block& block = *there_.back();
  block.index = index;
  block.warps.resize((threads_ + kWarp - 1) / kWarp);
  for (unsigned t = 0; t < threads_; ++t) {
    block.warps[t / kWarp].lanes |= 1u << t % kWarp;
    if (spare.empty()) spare.push_back(std::make_unique<Fiber>());
    fibers_.push_back(std::move(spare.back()));
    spare.pop_back();
    Fiber* const fiber = fibers_.back().get();
    Sanitizer::forget(*fiber);
    fiber->context.prepare(fiber->stack, enter);
    fiber->block = &block;
    fiber->thread = t;
    fiber->state = State::ready;
    fiber->meeting = nullptr;
    fiber->fake_stack = nullptr;
  }
}

void Grid::resume(Fiber& fiber) {
  current_ = &fiber;
  blockIdx.x = fiber.block->index;
  threadIdx.x = fiber.thread;
  Sanitizer::to(*this, fiber);
  own_.leave_for(fiber.context);
  Sanitizer::in_grid(*this);
}

void Grid::leave(bool ends) {
  Fiber& fiber = *current_;
  if (ends) fiber.state = State::ended;
  Sanitizer::from(*this, fiber, ends);
  fiber.context.leave_for(own_);
  Sanitizer::in_fiber(*this, fiber);
}

void Grid::run() {
  gridDim.x = blocks_;
  blockDim.x = threads_;
  Grid* const before = grid;
  grid = this;
  int idle = 0;
  while (error_.empty()) {
    while (!waiting_.empty() && (there_.empty() || fibers_.size() + threads_ <= kResident)) {
      start(waiting_.front());
      waiting_.erase(waiting_.begin());
    }
    if (there_.empty()) break;
    std::vector<Fiber*> pass;
    for (const auto& fiber : fibers_) pass.push_back(fiber.get());
    arrange(pass);
    int64_t ran = 0;
    waits_ = 0;
    for (Fiber* fiber : pass) {
      if (fiber->state == State::meeting && fiber->meeting->complete()) fiber->state = State::ready;
      if (fiber->state != State::ready) continue;
      ++ran;
      resume(*fiber);
      if (!error_.empty()) break;
    }
    idle = ran == waits_ ? idle + 1 : 0;
    if (error_.empty() && (ran == 0 || idle > kPassesWithoutEnd)) error_ = stuck(ran == 0);
    std::erase_if(fibers_, [&](auto& fiber) {
      if (fiber->state != State::ended) return false;
      spare.push_back(std::move(fiber));
      return true;
    });
    std::erase_if(there_, [&](const auto& block) { return block->ended == threads_; });
  }
  grid = before;
  if (!error_.empty()) throw std::runtime_error(error_);
}

// Why nothing goes on; unless `all` are held, some run in circles.
std::string Grid::stuck(bool all) const {
  for (const auto& fiber : fibers_) {
    if (!all && fiber->state == State::ready) return who(*fiber) + " waits without end";
    if (all && fiber->state == State::meeting) {
      char text[96];
      std::snprintf(text, sizeof text, " waits for lanes %08x of the mask %08x, which never come",
                    fiber->meeting->mask & ~fiber->meeting->arrived, fiber->meeting->mask);
      return who(*fiber) + text;
    }
  }
  const Block& block = *fibers_.front()->block;
  return "block " + std::to_string(block.index) + ": " + std::to_string(block.at_barrier) + " of " +
         std::to_string(threads_) + " threads reach a barrier";
}

}  // namespace

void run(unsigned blocks, unsigned threads, const std::function<void()>& thread) {
  Grid(blocks, threads, thread).run();
}

void fail(const char* sentence) {
  grid->stop(sentence);
  std::abort();  // never resumed
}

void yield() {
  grid->waited();
  grid->leave();
}

int lane() { return static_cast<int>(grid->current().thread % kWarp); }

void barrier() {
  Fiber& self = grid->current();
  Block& block = *self.block;
  self.state = State::barrier;
  if (++block.at_barrier < grid->threads()) return grid->leave();
  block.at_barrier = 0;
  ++block.barriers;
  grid->release(block);
}

std::array<uint64_t, kWarp> gather(Collective kind, unsigned mask, uint64_t value) {
  Fiber& self = grid->current();
  Warp& warp = self.block->warps[self.thread / kWarp];
  const unsigned bit = 1u << self.thread % kWarp;
  if (kind == Collective::sync) mask &= warp.lanes;
  if (!(mask & bit)) fail("is not in the mask of its own shuffle or vote");
  Meeting* meeting = nullptr;
  // Lanes may be elsewhere in between: who never comes is told when nothing else can go on.
  for (const auto& other : warp.meetings)
    if (other->mask == mask && other->kind == kind && !(other->arrived & bit))
      meeting = other.get();
  if (!meeting) {
    warp.meetings.push_back(std::make_unique<Meeting>(Meeting{kind, mask}));
    meeting = warp.meetings.back().get();
  }
  meeting->arrived |= bit;
  meeting->values[self.thread % kWarp] = value;
  if (meeting->complete()) {
    if (kind == Collective::sync && mask == warp.lanes) ++warp.syncs;
  } else {
    self.state = State::meeting;
    self.meeting = meeting;
    grid->leave();
  }
  const auto values = meeting->values;
  meeting->left |= bit;
  if (meeting->left == meeting->mask)
    std::erase_if(warp.meetings, [&](const auto& m) { return m.get() == meeting; });
  return values;
}

SharedMemory shared_memory(const void* key, int64_t count, int64_t item) {
  SharedArray& array = grid->current().block->shared[key];
  if (array.data.empty()) {
    array.data.assign(static_cast<size_t>(count * item), '\xff');  // NaN where it is floats
    array.accesses.resize(static_cast<size_t>(count));
  }
  return {array.data.data(), array.accesses.data()};
}

void check_access(void* accesses, int64_t index, bool writes) {
  Access& access = static_cast<Access*>(accesses)[index];
  const Moment now = grid->now();
  if (!writes && !access.written) fail("reads shared memory to which nothing was written");
  if (access.written && !ordered(access.writer, now))
    fail(writes ? "writes shared memory that another thread writes, without a barrier between"
                : "reads shared memory that another thread writes, without a barrier between");
  if (!writes) {
    // Those before the last barrier are ordered with all that is to come.
    std::erase_if(access.readers, [&](const Moment& r) {
      return r.thread == now.thread || r.barriers != now.barriers;
    });
    return access.readers.push_back(now);
  }
  for (const Moment& reader : access.readers)
    if (!ordered(reader, now))
      fail("writes shared memory that another thread reads, without a barrier between");
  access.written = true;
  access.writer = now;
  access.readers.clear();  // keeps its memory for the next ones
}

}  // namespace recurra::cuda::emulator
