// What a dtype is called in a message.
#pragma once
#include "view.h"

namespace recurra {

constexpr const char* dtype_name(DType d) {
  switch (d) {
    case DType::f32: return "float32";
    case DType::f64: return "float64";
    case DType::bf16: return "bfloat16";
    case DType::f16: return "float16";
    case DType::c64: return "complex64";
    case DType::c128: return "complex128";
    case DType::i32: return "int32";
    case DType::i64: return "int64";
    case DType::b8: return "bool";
  }
  return "";
}

}  // namespace recurra
