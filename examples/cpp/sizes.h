// Sizes from the words of a command line.
#pragma once
#include <algorithm>
#include <charconv>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

// Whole numbers from `least`. Their product is at most 2^40, with 1 in the place of 0, so that no
// count of elements or bytes that a program makes of them overflows.
inline std::vector<int64_t> sizes_in(std::initializer_list<const char*> words, int64_t least = 0) {
  std::vector<int64_t> sizes;
  int64_t left = int64_t{1} << 40;
  for (const std::string word : words) {
    int64_t size = 0;
    const char* end = word.data() + word.size();
    const auto [stop, error] = std::from_chars(word.data(), end, size);
    if (error != std::errc() || stop != end || size < least || size > left)
      throw std::runtime_error("sizes must be whole numbers from " + std::to_string(least) +
                               " with a product of at most 2^40, got " + word);
    left /= std::max<int64_t>(size, 1);
    sizes.push_back(size);
  }
  return sizes;
}
