// A stream through a cell, piece by piece: the state that one call leaves is where the next begins,
// and the bits are those of one call over the whole.
//
//   cell NAME                  on random numbers
//   cell NAME T N INPUT OUTPUT reads x (1, T, G, N) and params (P, N), float32 one behind the
//   other,
//                              and writes y (1, T, N) and h_last (1, S, N)
#include <recurra/cells/evaluate.h>
#include <recurra/dense.h>
#include <recurra/rnn/rnn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "sizes.h"

using recurra::dense;

namespace {

// The cell's place in the list, which is what kernels know of its name.
int index_of(const std::string& name) {
  std::string all;
  const std::vector<const char*> names = recurra::cell_names();
  for (size_t i = 0; i < names.size(); ++i) {
    if (name == names[i]) return static_cast<int>(i);
    all += (i ? ", " : "") + std::string(names[i]);
  }
  throw std::runtime_error("cell must be one of " + all + ", got \"" + name + "\"");
}

void run(const std::string& name, int64_t T, int64_t N, const char* input, const char* output) {
  const int index = index_of(name);
  const recurra::CellInfo& info = *recurra::cell_info(name.c_str());
  const auto G = static_cast<int64_t>(info.inputs.size());
  const auto S = static_cast<int64_t>(info.states.size());
  const auto P = static_cast<int64_t>(info.params.size());
  const auto floats = [](int64_t count) { return std::vector<float>(static_cast<size_t>(count)); };
  const auto bytes = [](std::vector<float>& x) { return reinterpret_cast<char*>(x.data()); };
  const auto size = [](const std::vector<float>& x) {
    return static_cast<std::streamsize>(x.size() * sizeof(float));
  };

  std::vector<float> x = floats(T * G * N), params = floats(P * N);
  if (input) {
    std::ifstream file(input, std::ios::binary);
    for (auto* values : {&x, &params}) file.read(bytes(*values), size(*values));
    if (!file || file.peek() != EOF)
      throw std::runtime_error(std::string(input) + " has not x and params of these sizes");
  } else {
    std::mt19937 random(0);
    for (auto* values : {&x, &params})
      for (float& value : *values) value = static_cast<float>(random() >> 8) * 0x1p-24f - 0.5f;
  }

  // Steps [begin, end) from the state h, which becomes the one after them.
  const auto steps = [&](int64_t begin, int64_t end, std::vector<float>& h, std::vector<float>& y) {
    std::vector<float> h_last = floats(S * N);
    recurra::Rnn call;
    call.cell = index;
    call.x = dense(x.data() + begin * G * N, 1, end - begin, G, N);
    call.params = dense(params.data(), P, N);
    call.h0 = dense(h.data(), 1, S, N);
    call.y = dense(y.data() + begin * N, 1, end - begin, 1, N);
    call.h_last = dense(h_last.data(), 1, S, N);
    call.sequences = {1, end - begin};
    recurra::rnn(call);
    h = h_last;
  };
  std::vector<float> h = floats(S * N), y = floats(T * N);
  steps(0, T, h, y);
  std::vector<float> h_pieces = floats(S * N), y_pieces = floats(T * N);
  for (int64_t begin = 0; begin < T; begin += 100)
    steps(begin, begin + 100 < T ? begin + 100 : T, h_pieces, y_pieces);
  const bool same = std::memcmp(y.data(), y_pieces.data(), static_cast<size_t>(size(y))) == 0 &&
                    std::memcmp(h.data(), h_pieces.data(), static_cast<size_t>(size(h))) == 0;
  if (!same) throw std::runtime_error("pieces do not give the bits of the whole");

  if (output) {
    std::ofstream file(output, std::ios::binary);
    for (auto* values : {&y, &h}) file.write(bytes(*values), size(*values));
    if (!file.flush()) throw std::runtime_error(std::string(output) + " cannot be written");
    return;
  }
  std::printf("%s: %lld steps of %lld channels, the same bits in pieces of 100\n", name.c_str(),
              static_cast<long long>(T), static_cast<long long>(N));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 && argc != 6) {
    std::fprintf(stderr, "usage: cell NAME [T N INPUT OUTPUT]\n");
    return 2;
  }
  try {
    const bool files = argc == 6;
    const std::vector<int64_t> sizes = sizes_in({files ? argv[2] : "1000", files ? argv[3] : "64"});
    run(argv[1], sizes[0], sizes[1], files ? argv[4] : nullptr, files ? argv[5] : nullptr);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cell: %s\n", error.what());
    return 1;
  }
}
