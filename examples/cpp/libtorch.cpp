// An op of recurra through torch's dispatcher, without Python: the program is linked to libtorch
// and loads the op libraries, which recurra.library_paths() names.
//
//   libtorch LIBRARY... B T D [INPUT OUTPUT]
//
// INPUT holds a and b (B, T, D), float32 one behind the other; h and h_last go to OUTPUT. Of
// torch's headers only those of the stable ABI are used, so the program runs with later versions of
// torch too. From torch 2.13 on an exception has the sentence of the op; before, torch prints it.
#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "sizes.h"

using torch::stable::Tensor;
namespace stack = torch::stable::detail;  // values as the dispatcher passes them

namespace {

// The arguments in the order of the op's schema, which torch.ops.recurra.linear_scan prints;
// results come back in their places.
std::pair<Tensor, Tensor> linear_scan(const Tensor& a, const Tensor& b) {
  const std::optional<Tensor> none;
  std::array<StableIValue, 6> values{stack::from(a),     stack::from(b),     stack::from(none),
                                     stack::from(false), stack::from(false), stack::from(none)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("recurra::linear_scan", "", values.data(), TORCH_ABI_VERSION));
  return {stack::to<Tensor>(values[0]), stack::to<Tensor>(values[1])};
}

// A tensor over memory of the program's own, which must outlive it.
Tensor tensor_of(std::vector<float>& values, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t n = sizes.size() - 1; n > 0; --n) strides[n - 1] = strides[n] * sizes[n];
  return torch::stable::from_blob(values.data(), sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  torch::headeronly::ScalarType::Float);
}

void run(int64_t B, int64_t T, int64_t D, const char* input, const char* output) {
  const auto count = static_cast<size_t>(B * T * D);
  const auto size = static_cast<std::streamsize>(count * sizeof(float));
  std::vector<float> a(count, 0.5f), b(count, 1.0f);
  if (input) {
    std::ifstream file(input, std::ios::binary);
    for (auto* x : {&a, &b}) file.read(reinterpret_cast<char*>(x->data()), size);
    if (!file || file.peek() != EOF)
      throw std::runtime_error(std::string(input) + " has not a and b of these sizes");
  }
  const Tensor ta = tensor_of(a, {B, T, D}), tb = tensor_of(b, {B, T, D});
  const auto [h, h_last] = linear_scan(ta, tb);
  if (output) {
    std::ofstream file(output, std::ios::binary);
    for (const Tensor& x : {h, h_last})
      file.write(static_cast<const char*>(x.data_ptr()),
                 x.numel() * static_cast<std::streamsize>(sizeof(float)));
    if (!file.flush()) throw std::runtime_error(std::string(output) + " cannot be written");
    return;
  }
  const auto begin = std::chrono::steady_clock::now();
  linear_scan(ta, tb);
  const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;
  std::printf("recurra::linear_scan: %.3f ms\n", took.count());

  // What an op refuses is an exception with the sentence that Python has.
  try {
    linear_scan(tensor_of(a, {B, T, D}), tensor_of(b, {B, T * D}));
  } catch (const std::exception& error) {
    std::printf("refused: %s\n", error.what());
  }
}

}  // namespace

int main(int argc, char** argv) {
  // Libraries first; the CPU one defines the ops, so it stands before that of CUDA.
  int next = 1;
  for (; next < argc && std::string(argv[next]).ends_with(".so"); ++next)
    if (!dlopen(argv[next], RTLD_NOW)) {
      std::fprintf(stderr, "libtorch: %s\n", dlerror());
      return 1;
    }
  const int left = argc - next;
  if (next == 1 || (left != 3 && left != 5)) {
    std::fprintf(stderr, "usage: libtorch LIBRARY... B T D [INPUT OUTPUT]\n");
    return 2;
  }
  char** rest = argv + next;
  try {
    const std::vector<int64_t> sizes = sizes_in({rest[0], rest[1], rest[2]});
    run(sizes[0], sizes[1], sizes[2], left == 5 ? rest[3] : nullptr, left == 5 ? rest[4] : nullptr);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "libtorch: %s\n", error.what());
    return 1;
  }
}
