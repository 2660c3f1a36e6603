#include "torch/tensor.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <utility>

#include "native/huge_pages.h"

namespace recurra {
namespace {

using torch::headeronly::ScalarType;

constexpr ScalarType kScalarTypes[] = {
    ScalarType::Float, ScalarType::Double,       ScalarType::BFloat16,
    ScalarType::Half,  ScalarType::ComplexFloat, ScalarType::ComplexDouble,
    ScalarType::Int,   ScalarType::Long,         ScalarType::Bool};

Tensor with_huge_pages(Tensor t) {
  if (t.is_cpu()) wish_huge_pages(t.data_ptr(), t.numel() * item_size(dtype_of(t)));
  return t;
}

}  // namespace

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::ComplexFloat: return DType::c64;
    case ScalarType::ComplexDouble: return DType::c128;
    case ScalarType::Int: return DType::i32;
    case ScalarType::Long: return DType::i64;
    case ScalarType::Bool: return DType::b8;
    default: throw std::runtime_error("recurra: unsupported dtype");
  }
}

bool known_dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::BFloat16:
    case ScalarType::Half:
    case ScalarType::ComplexFloat:
    case ScalarType::ComplexDouble:
    case ScalarType::Int:
    case ScalarType::Long:
    case ScalarType::Bool: return true;
    default: return false;
  }
}

std::string dtype_name(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return "another device";
}

void warn(const char* op, const std::string& message) {
  aoti_torch_warn(op, "recurra", 0, (std::string(op) + ": " + message).c_str());
}

Tensor empty_like(const Tensor& like) { return with_huge_pages(torch::stable::empty_like(like)); }

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, DType dtype) {
  return with_huge_pages(torch::stable::new_empty(like, {sizes.begin(), sizes.size()},
                                                  kScalarTypes[static_cast<int>(dtype)]));
}

Tensor empty_ordered(const Tensor& like, const std::vector<int64_t>& sizes,
                     const std::vector<int>& order) {
  std::vector<int64_t> outer;
  for (int n : order) outer.push_back(sizes[static_cast<size_t>(n)]);
  Tensor t = with_huge_pages(torch::stable::new_empty(like, outer));
  // Dimension i of t is order[i]: brought to its place by swaps.
  std::vector<int> place = order;
  for (int n = 0; n < static_cast<int>(place.size()); ++n)
    while (place[static_cast<size_t>(n)] != n) {
      const int to = place[static_cast<size_t>(n)];
      t = torch::stable::transpose(t, n, to);
      std::swap(place[static_cast<size_t>(n)], place[static_cast<size_t>(to)]);
    }
  return t;
}

Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes, DType dtype) {
  Tensor t = empty(like, sizes, dtype);
  set_zero(t);
  return t;
}

void set_zero(const Tensor& t) {
  if (!t.is_cpu()) {
    Tensor same = t;
    torch::stable::zero_(same);
    return;
  }
  // torch fills large tensors with its threads, which in a forked child hangs.
  const size_t bytes = static_cast<size_t>(t.numel() * item_size(dtype_of(t)));
  if (bytes > 0) std::memset(t.data_ptr(), 0, bytes);
}

}  // namespace recurra
