// linear_scan and its gradients on arrays of a program's own.
//
//   linear_scan B T D              on random numbers; prints how long it takes
//   linear_scan B T D INPUT OUTPUT reads a, b, dh (B, T, D) and h0 (B, D), float32 one behind the
//                                  other, and writes h, h_last, da, db and dh0
#include <recurra/dense.h>
#include <recurra/linear_scan/linear_scan.h>
#include <recurra/parallel.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "sizes.h"

using recurra::dense;

namespace {

// Memory in huge pages, where the system has them: a scan is bound by memory, and in pages of 4 KiB
// its time is that of looking them up.
class Floats {
 public:
  explicit Floats(int64_t count) : count_(count) {
    constexpr size_t kPage = size_t{2} << 20;
    const size_t bytes = (static_cast<size_t>(count) * sizeof(float) / kPage + 1) * kPage;
    data_ = static_cast<float*>(std::aligned_alloc(kPage, bytes));
    if (!data_) throw std::bad_alloc();
    madvise(data_, bytes, MADV_HUGEPAGE);
  }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  ~Floats() { std::free(data_); }

  float* data() const { return data_; }
  int64_t count() const { return count_; }
  char* bytes() const { return reinterpret_cast<char*>(data_); }
  std::streamsize size() const { return count_ * static_cast<std::streamsize>(sizeof(float)); }

 private:
  float* data_;
  int64_t count_;
};

// The median and the least milliseconds of 30 calls.
void time_calls(const char* what, double bytes, const std::function<void()>& call) {
  std::vector<double> times;
  for (int n = 0; n < 33; ++n) {
    const auto begin = std::chrono::steady_clock::now();
    call();
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;
    if (n >= 3) times.push_back(took.count());
  }
  std::sort(times.begin(), times.end());
  const double median = times[times.size() / 2];
  std::printf("%-8s median %.3f ms, %.1f GB/s; least %.3f ms\n", what, median, bytes / median / 1e6,
              times[0]);
}

void run(int64_t B, int64_t T, int64_t D, const char* input, const char* output) {
  Floats a(B * T * D), b(B * T * D), dh(B * T * D), h0(B * D);
  if (input) {
    std::ifstream file(input, std::ios::binary);
    for (const Floats* x : {&a, &b, &dh, &h0}) file.read(x->bytes(), x->size());
    if (!file || file.peek() != EOF)
      throw std::runtime_error(std::string(input) + " has not a, b, dh and h0 of these sizes");
  } else {
    std::mt19937 random(0);
    for (int64_t i = 0; i < a.count(); ++i) {
      a.data()[i] = static_cast<float>(random() >> 8) * 0x1p-24f;
      b.data()[i] = static_cast<float>(random() >> 8) * 0x1p-24f - 0.5f;
      dh.data()[i] = static_cast<float>(random() >> 8) * 0x1p-24f - 0.5f;
    }
    std::fill_n(h0.data(), h0.count(), 0.0f);
  }

  // What the kernel is given, and where it writes. Sizes are not checked: they are part of the
  // call.
  Floats h(B * T * D), h_last(B * D);
  recurra::LinearScan forward;
  forward.a = dense(a.data(), B, T, D);
  forward.b = dense(b.data(), B, T, D);
  forward.h0 = dense(h0.data(), B, D);
  forward.h = dense(h.data(), B, T, D);
  forward.h_last = dense(h_last.data(), B, D);
  forward.sequences = {B, T};
  recurra::linear_scan(forward);

  Floats da(B * T * D), db(B * T * D), dh0(B * D);
  recurra::LinearScanBackward backward;
  backward.a = forward.a;
  backward.h = forward.h;
  backward.h0 = forward.h0;
  backward.dh = dense(dh.data(), B, T, D);
  backward.da = dense(da.data(), B, T, D);
  backward.db = dense(db.data(), B, T, D);
  backward.dh0 = dense(dh0.data(), B, D);
  backward.sequences = forward.sequences;
  recurra::linear_scan_backward(backward);

  if (output) {
    std::ofstream file(output, std::ios::binary);
    for (const Floats* x : {&h, &h_last, &da, &db, &dh0}) file.write(x->bytes(), x->size());
    if (!file.flush()) throw std::runtime_error(std::string(output) + " cannot be written");
    return;
  }
  std::printf("(%lld, %lld, %lld) float32, %s, %d threads\n", static_cast<long long>(B),
              static_cast<long long>(T), static_cast<long long>(D),
              recurra::isa_name(recurra::isa()), recurra::thread_count());
  const double elements = static_cast<double>(B * T * D);
  time_calls("forward", 12 * elements, [&] { recurra::linear_scan(forward); });
  time_calls("backward", 20 * elements, [&] { recurra::linear_scan_backward(backward); });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4 && argc != 6) {
    std::fprintf(stderr, "usage: linear_scan B T D [INPUT OUTPUT]\n");
    return 2;
  }
  try {
    const std::vector<int64_t> sizes = sizes_in({argv[1], argv[2], argv[3]});
    run(sizes[0], sizes[1], sizes[2], argc == 6 ? argv[4] : nullptr, argc == 6 ? argv[5] : nullptr);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "linear_scan: %s\n", error.what());
    return 1;
  }
}
