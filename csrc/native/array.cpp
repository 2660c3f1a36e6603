#include "native/array.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "native/dtype_name.h"
#include "native/huge_pages.h"
#include "native/memory_order.h"

namespace recurra {
namespace {

using Dims = std::array<int64_t, Array::kMostDims>;

thread_local Outputs* outputs = nullptr;

class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string text) : text_(std::move(text)) {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

[[noreturn]] void out_of_memory(DType dtype, int64_t dims, const int64_t* sizes,
                                const std::string& why = "") {
  std::string shape;
  for (int64_t n = 0; n < dims; ++n) shape += (n ? ", " : "") + std::to_string(sizes[n]);
  throw OutOfMemory("recurra: there is no memory for an array of shape (" + shape +
                    (dims == 1 ? ",)" : ")") + " and dtype " + dtype_name(dtype) +
                    (why.empty() ? "" : ": " + why));
}

// Broadcasting makes shapes of any size of a few bytes, so that no product may be trusted.
int64_t bytes_of(DType dtype, int64_t dims, const int64_t* sizes) {
  constexpr int64_t most = INT64_MAX - 128;  // what aligning adds
  int64_t bytes = item_size(dtype);
  if (std::find(sizes, sizes + dims, 0) != sizes + dims) return 0;
  for (int64_t n = 0; n < dims; ++n) {
    if (sizes[n] > most / bytes) out_of_memory(dtype, dims, sizes);
    bytes *= sizes[n];
  }
  return bytes;
}

// New memory where `like` is, on the CPU aligned for vectors, as torch aligns it.
Array allocate(const Array& like, DType dtype, int64_t dims, const int64_t* sizes,
               const int64_t* strides) {
  const int64_t bytes = bytes_of(dtype, dims, sizes);
  if (like.device) {
    std::string why;
    void* data = bytes ? like.device->allocate(static_cast<size_t>(bytes), why) : nullptr;
    if (bytes && !data) out_of_memory(dtype, dims, sizes, why);
    Array a(data, dtype, dims, sizes, strides);
    a.device = like.device;
    return a;
  }
  void* data = std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64 + 64));
  if (!data) out_of_memory(dtype, dims, sizes);
  wish_huge_pages(data, bytes);
  return {data, dtype, dims, sizes, strides, std::shared_ptr<void>(data, std::free)};
}

// The strides of an array that lies densely in that order, from the outermost dimension in. They
// wrap around where the array is without elements or is refused when it is allocated.
void set_strides(int64_t dims, const int64_t* sizes, const int* order, int64_t* strides) {
  uint64_t next = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    const int n = order[i];
    strides[n] = static_cast<int64_t>(next);
    next *= static_cast<uint64_t>(std::max<int64_t>(sizes[n], 1));
  }
}

Array result(const Array& like, DType dtype, int64_t dims, const int64_t* sizes,
             const int64_t* strides) {
  return outputs ? outputs->take(dtype, dims, sizes, strides)
                 : allocate(like, dtype, dims, sizes, strides);
}

Array contiguous(const Array& like, std::initializer_list<int64_t> sizes, DType dtype,
                 decltype(&result) make) {
  const int64_t dims = static_cast<int64_t>(sizes.size());
  Dims strides{};
  constexpr int order[Array::kMostDims] = {0, 1, 2, 3, 4, 5, 6, 7};
  set_strides(dims, sizes.begin(), order, strides.data());
  return make(like, dtype, dims, sizes.begin(), strides.data());
}

// Whether elements and places are one to one.
bool is_dense(const Array& a) {
  int64_t next = 1, left = 0;
  for (int64_t n = 0; n < a.dim(); ++n) left += a.size(n) > 1;
  for (; left > 0; --left) {
    int64_t n = 0;
    while (n < a.dim() && (a.size(n) < 2 || a.stride(n) != next)) ++n;
    if (n == a.dim()) return false;
    if (__builtin_mul_overflow(next, a.size(n), &next)) return false;
  }
  return true;
}

}  // namespace

Array::Array(void* data, DType type, int64_t dims, const int64_t* sizes, const int64_t* strides,
             std::shared_ptr<void> memory)
    : dtype(type), data_(data), dims_(dims), memory_(std::move(memory)) {
  if (dims > kMostDims) throw Error("recurra: an array has at most 8 dimensions");
  std::copy(sizes, sizes + dims, sizes_.begin());
  std::copy(strides, strides + dims, strides_.begin());
}

int64_t Array::numel() const {
  uint64_t count = 1;  // of an expanded array it may wrap around
  for (int64_t n = 0; n < dims_; ++n) count *= static_cast<uint64_t>(size(n));
  return static_cast<int64_t>(count);
}

bool Array::is_contiguous() const {
  if (numel() == 0) return true;
  int64_t next = 1;
  for (int64_t n = dims_ - 1; n >= 0; --n) {
    if (size(n) == 1) continue;
    if (stride(n) != next || __builtin_mul_overflow(next, size(n), &next)) return false;
  }
  return true;
}

std::string dtype_name(const Array& a) {
  return a.unknown.empty() ? dtype_name(a.dtype) : a.unknown;
}

std::string device_name(const Array& a) {
  return a.device ? "cuda:" + std::to_string(a.get_device_index()) : "cpu";
}

std::string advice(const std::string& argument) {
  return ": pass " + argument + ".astype(\"float32\")";
}

void warn(const char* op, const std::string& message) {
  std::fprintf(stderr, "Warning: %s: %s\n", op, message.c_str());
}

Array empty_like(const Array& like) {
  Dims sizes{}, strides{};
  for (int64_t n = 0; n < like.dim(); ++n) {
    sizes[static_cast<size_t>(n)] = like.size(n);
    strides[static_cast<size_t>(n)] = like.stride(n);
  }
  if (!is_dense(like))
    set_strides(like.dim(), sizes.data(), memory_order(like).data(), strides.data());
  return result(like, like.dtype, like.dim(), sizes.data(), strides.data());
}

Array empty(const Array& like, std::initializer_list<int64_t> sizes, DType dtype) {
  return contiguous(like, sizes, dtype, result);
}

Array empty_ordered(const Array& like, const std::vector<int64_t>& sizes,
                    const std::vector<int>& order) {
  Dims strides{};
  const int64_t dims = static_cast<int64_t>(sizes.size());
  set_strides(dims, sizes.data(), order.data(), strides.data());
  return result(like, like.dtype, dims, sizes.data(), strides.data());
}

Array scratch(const Array& like, std::initializer_list<int64_t> sizes, DType dtype) {
  return contiguous(like, sizes, dtype, allocate);
}

Array zeros(const Array& like, std::initializer_list<int64_t> sizes, DType dtype) {
  Array a = scratch(like, sizes, dtype);
  set_zero(a);
  return a;
}

void set_zero(const Array& a) {
  const size_t bytes = static_cast<size_t>(a.numel() * item_size(a.dtype));
  if (bytes == 0) return;
  if (a.device)
    a.device->set_zero(a.data_ptr(), bytes);
  else
    std::memset(a.data_ptr(), 0, bytes);
}

Outputs::Outputs(std::vector<Array> arrays) : arrays_(std::move(arrays)) { outputs = this; }

Outputs::~Outputs() { outputs = nullptr; }

Array Outputs::take(DType dtype, int64_t dims, const int64_t* sizes, const int64_t* strides) {
  bool good = next_ < arrays_.size();
  if (good) {
    const Array& a = arrays_[next_];
    const bool none = a.numel() == 0;
    good = a.dtype == dtype && a.dim() == dims;
    for (int64_t n = 0; good && n < dims; ++n)
      good = a.size(n) == sizes[n] && (none || sizes[n] == 1 || a.stride(n) == strides[n]);
  }
  if (!good)
    throw Error("recurra: output " + std::to_string(next_) + " is not what the op returns");
  Array& a = arrays_[next_++];
  if (!a.device) wish_huge_pages(a.data_ptr(), a.numel() * item_size(dtype));
  return a;
}

}  // namespace recurra
