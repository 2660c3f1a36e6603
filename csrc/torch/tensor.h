// The tensor that the bindings are written on: torch's, through its stable ABI, or, where
// RECURRA_WITHOUT_TORCH is defined, the array of csrc/native, which has the same members. The
// bindings are compiled for both, so that a call says and computes the same with and without torch.
#pragma once
#ifdef RECURRA_WITHOUT_TORCH
#include "native/array.h"
#include "native/registry.h"
#else
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "view.h"

namespace recurra {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
// What bad input gets.
using Error = std::runtime_error;

DType dtype_of(const Tensor& t);
bool known_dtype(const Tensor& t);
std::string dtype_name(const Tensor& t);
std::string device_name(const Tensor& t);
inline std::string advice(const std::string&) { return ""; }
void warn(const char* op, const std::string& message);

// Uninitialised tensors on the device of `like`: what an op returns, in the order in which it
// returns them, since elsewhere the caller has their memory already. empty_like also takes the
// memory order of `like`, empty_ordered the one that is given (native/memory_order.h).
Tensor empty_like(const Tensor& like);
Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, DType dtype);
Tensor empty_ordered(const Tensor& like, const std::vector<int64_t>& sizes,
                     const std::vector<int>& order);
// Memory that an op works in.
inline Tensor scratch(const Tensor& like, std::initializer_list<int64_t> sizes, DType dtype) {
  return empty(like, sizes, dtype);
}
Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes, DType dtype);
void set_zero(const Tensor& t);

// RECURRA_CPU_OPS(m) { m.impl("name", RECURRA_BOX(&function)); } once a file, and RECURRA_CUDA_OPS.
#define RECURRA_BOX(...) TORCH_BOX(__VA_ARGS__)
#define RECURRA_CPU_OPS(m) STABLE_TORCH_LIBRARY_IMPL(recurra, CPU, m)
#define RECURRA_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(recurra, CUDA, m)

}  // namespace recurra
#endif
