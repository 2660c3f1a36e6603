// An array without torch, of the CPU or of a device. It has the members of torch's stable Tensor,
// and the functions below are those of torch/tensor.h, that the bindings of csrc/torch use, which
// so compile for either.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/stream.h"
#include "view.h"

namespace recurra {

// A CUDA device as one call sees it: where its kernels go, and what gives them memory.
class Device {
 public:
  cuda::Stream stream;

  // Memory that stays until the call is over; null where there is none, and why.
  virtual void* allocate(size_t bytes, std::string& why) = 0;
  // Behind what is on the stream.
  virtual void set_zero(void* data, size_t bytes) = 0;

 protected:
  ~Device() = default;
};

class Array {
 public:
  static constexpr int64_t kMostDims = 8;

  Array() = default;
  // Strides count elements. `memory` is what keeps the data alive, or nothing where a caller does.
  Array(void* data, DType dtype, int64_t dims, const int64_t* sizes, const int64_t* strides,
        std::shared_ptr<void> memory = {});

  int64_t dim() const { return dims_; }
  int64_t size(int64_t n) const { return sizes_[static_cast<size_t>(n)]; }
  int64_t stride(int64_t n) const { return strides_[static_cast<size_t>(n)]; }
  int64_t numel() const;
  void* data_ptr() const { return data_; }
  bool is_contiguous() const;
  bool is_cpu() const { return !device; }
  int get_device_index() const { return device->stream.device; }
  const std::shared_ptr<void>& memory() const { return memory_; }

  DType dtype = DType::f32;
  std::string unknown;       // the name of a dtype that no op takes, instead of `dtype`
  Device* device = nullptr;  // null: the CPU

 private:
  void* data_ = nullptr;
  int64_t dims_ = 0;
  std::array<int64_t, kMostDims> sizes_{}, strides_{};
  std::shared_ptr<void> memory_;
};

using Tensor = Array;
using OptionalTensor = std::optional<Array>;
// What bad input gets.
using Error = std::invalid_argument;

inline DType dtype_of(const Array& a) { return a.dtype; }
inline bool known_dtype(const Array& a) { return a.unknown.empty(); }
std::string dtype_name(const Array& a);
std::string device_name(const Array& a);
// What to do about an argument of a dtype that no op takes.
std::string advice(const std::string& argument);
void warn(const char* op, const std::string& message);

// Results: those that are to be written to, while there are Outputs, or else new memory.
Array empty_like(const Array& like);
Array empty(const Array& like, std::initializer_list<int64_t> sizes, DType dtype);
Array empty_ordered(const Array& like, const std::vector<int64_t>& sizes,
                    const std::vector<int>& order);
// Memory that an op works in.
Array scratch(const Array& like, std::initializer_list<int64_t> sizes, DType dtype);
Array zeros(const Array& like, std::initializer_list<int64_t> sizes, DType dtype);
void set_zero(const Array& a);

// As long as it lives, the ops that this thread calls write their results to these arrays, in the
// order in which they return them.
class Outputs {
 public:
  explicit Outputs(std::vector<Array> arrays);
  ~Outputs();
  Outputs(const Outputs&) = delete;
  Outputs& operator=(const Outputs&) = delete;

  // The next one; throws unless it has these sizes, strides and dtype.
  Array take(DType dtype, int64_t dims, const int64_t* sizes, const int64_t* strides);
  bool all_taken() const { return next_ == arrays_.size(); }

 private:
  std::vector<Array> arrays_;
  size_t next_ = 0;
};

}  // namespace recurra
