// A model that AOTInductor compiled, in a program without Python.
//
//   aoti LIBRARY MODEL.pt2 D INPUT OUTPUT
//
// LIBRARY is the first of recurra.library_paths(); INPUT holds x (1, T, D), float32, of any T that
// the model was exported for, and what the model returns goes to OUTPUT, float32 one behind the
// other.
#include <ATen/ops/from_blob.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "sizes.h"

namespace {

void run(const char* model, int64_t D, const char* input, const char* output) {
  std::ifstream in(input, std::ios::binary);
  if (in.peek(); !in && !in.eof()) throw std::runtime_error(std::string(input) + " cannot be read");
  std::vector<char> bytes{std::istreambuf_iterator<char>(in), {}};
  const int64_t T = static_cast<int64_t>(bytes.size() / sizeof(float)) / D;
  if (T < 1 || bytes.size() != static_cast<size_t>(T * D) * sizeof(float))
    throw std::runtime_error(std::string(input) +
                             " has not whole steps of D = " + std::to_string(D));

  // The package names ops; that they are there already is why the library is loaded before.
  torch::inductor::AOTIModelPackageLoader loader(model);
  const at::Tensor x = at::from_blob(bytes.data(), {1, T, D}, at::kFloat);
  loader.run({x});
  const auto begin = std::chrono::steady_clock::now();
  const std::vector<at::Tensor> results = loader.run({x});
  const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;

  std::ofstream out(output, std::ios::binary);
  for (const at::Tensor& result : results) {
    const at::Tensor dense = result.contiguous();
    out.write(static_cast<const char*>(dense.const_data_ptr()),
              static_cast<std::streamsize>(dense.nbytes()));
  }
  if (!out.flush()) throw std::runtime_error(std::string(output) + " cannot be written");
  std::printf("T = %lld: %.3f ms\n", static_cast<long long>(T), took.count());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) {
    std::fprintf(stderr, "usage: aoti LIBRARY MODEL.pt2 D INPUT OUTPUT\n");
    return 2;
  }
  if (!dlopen(argv[1], RTLD_NOW)) {
    std::fprintf(stderr, "aoti: %s\n", dlerror());
    return 1;
  }
  try {
    run(argv[2], sizes_in({argv[3]}, 1)[0], argv[4], argv[5]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "aoti: %s\n", error.what());
    return 1;
  }
}
