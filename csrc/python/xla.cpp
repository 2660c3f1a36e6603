#include "python/xla.h"

#include <new>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "python/op.h"

namespace recurra {
namespace {

Array array_of(const xla::Buffer& buffer, Device* device, int64_t* strides) {
  int64_t next = 1;
  for (int64_t n = buffer.rank - 1; n >= 0; --n) {
    strides[n] = next;
    next *= buffer.dims[n];
  }
  DType dtype = DType::f32;
  const char* unknown = "";
  switch (buffer.dtype) {
    case xla::DataType::pred: dtype = DType::b8; break;
    case xla::DataType::s32: dtype = DType::i32; break;
    case xla::DataType::s64: dtype = DType::i64; break;
    case xla::DataType::f16: dtype = DType::f16; break;
    case xla::DataType::bf16: dtype = DType::bf16; break;
    case xla::DataType::f32: dtype = DType::f32; break;
    case xla::DataType::f64: dtype = DType::f64; break;
    case xla::DataType::c64: dtype = DType::c64; break;
    case xla::DataType::c128: dtype = DType::c128; break;
    case xla::DataType::s8: unknown = "int8"; break;
    case xla::DataType::s16: unknown = "int16"; break;
    case xla::DataType::u8: unknown = "uint8"; break;
    default: unknown = "another dtype"; break;
  }
  Array a(buffer.data, dtype, buffer.rank, buffer.dims, strides);
  a.unknown = unknown;
  a.device = device;
  return a;
}

Array array_of(const xla::Buffer& buffer, Device* device) {
  int64_t strides[Array::kMostDims];
  if (buffer.rank > Array::kMostDims)
    throw Error("recurra: arrays have at most 8 dimensions, got " + std::to_string(buffer.rank));
  return array_of(buffer, device, strides);
}

// The value of an attribute; null where there is none of that name and type.
const void* attribute(const xla::Attributes& all, std::string_view name, xla::AttributeType type) {
  for (int64_t i = 0; i < all.size; ++i)
    if (all.types[i] == type && std::string_view(all.names[i]->data, all.names[i]->size) == name)
      return all.values[i];
  return nullptr;
}

template <class T>
const T* scalar(const xla::Attributes& all, std::string_view name, xla::DataType dtype) {
  const auto* s = static_cast<const xla::Scalar*>(attribute(all, name, xla::AttributeType::scalar));
  return s && s->dtype == dtype ? static_cast<const T*>(s->value) : nullptr;
}

std::optional<std::string> text(const xla::Attributes& all, std::string_view name) {
  const auto* s = static_cast<const xla::Bytes*>(attribute(all, name, xla::AttributeType::string));
  if (!s) return {};
  return std::string(s->data, s->size);
}

Value option(const xla::Attributes& all, const Parameter& p) {
  switch (p.kind) {
    case Kind::boolean:
      if (const bool* v = scalar<bool>(all, p.name, xla::DataType::pred)) return *v;
      break;
    case Kind::integer:
      if (const int64_t* v = scalar<int64_t>(all, p.name, xla::DataType::s64)) return *v;
      break;
    case Kind::number:
      if (const double* v = scalar<double>(all, p.name, xla::DataType::f64)) return *v;
      break;
    default:
      if (auto v = text(all, p.name)) return *std::move(v);
  }
  if (!p.optional) throw Error("recurra: a custom call lacks " + p.name);
  return {};
}

xla::Error* error(const xla::CallFrame& frame, xla::ErrorCode code, const char* message) {
  xla::ErrorCreate arguments{sizeof(xla::ErrorCreate), nullptr, message, code};
  return frame.api->error_create(&arguments);
}

}  // namespace

void run_xla(const xla::CallFrame& frame, Platform platform, Device* device) {
  const CallableOp& op = callable_op(platform, text(frame.attributes, "op").value_or(""));
  const std::string given = text(frame.attributes, "given").value_or("");
  std::vector<Value> values;
  values.reserve(op.parameters.size());
  size_t arrays = 0;
  int64_t next = 0;
  for (const Parameter& p : op.parameters) {
    if (p.written) {
      throw Error(op.name + ": what XLA holds is not written in place");
    } else if (p.kind != Kind::array) {
      values.push_back(option(frame.attributes, p));
    } else if (arrays >= given.size() || (given[arrays] == '1' && next >= frame.arguments.size)) {
      throw Error("recurra: a custom call lacks " + p.name);
    } else if (given[arrays++] == '1') {
      values.push_back(array_of(*frame.arguments.buffers[next++], device));
    } else {
      values.emplace_back();
    }
  }
  if (next != frame.arguments.size) throw Error("recurra: a custom call has too many arrays");
  std::vector<Array> results;
  for (int64_t i = 0; i < frame.results.size; ++i)
    results.push_back(array_of(*frame.results.buffers[i], device));
  const Outputs outputs(std::move(results));
  op.function(values);
  if (!outputs.all_taken()) throw Error("recurra: a custom call has too many results");
}

xla::Error* handle_xla(xla::CallFrame* frame, size_t api_size,
                       void (*execute)(const xla::CallFrame& frame)) {
  for (auto* e = frame->extensions; e; e = e->next)
    if (e->type == xla::ExtensionType::metadata) {  // such a call may have no api
      xla::Metadata& metadata = *reinterpret_cast<xla::MetadataExtension*>(e)->metadata;
      metadata.version.major = xla::kMajor;
      metadata.version.minor = frame->api ? frame->api->version.minor : xla::kFirstMinor;
      // Not for CUDA graphs: the memory that a call works in is XLA's again when it returns.
      metadata.traits = 0;
      return nullptr;
    }
  if (frame->api->version.major != xla::kMajor || frame->struct_size < sizeof(xla::CallFrame))
    return error(*frame, xla::ErrorCode::internal,
                 "recurra: this version of jaxlib calls custom calls in another way; install a "
                 "newer recurra");
  if (frame->api->struct_size < api_size)
    return error(*frame, xla::ErrorCode::internal,
                 "recurra: this version of jaxlib does not tell a custom call its device; install "
                 "a newer one");
  if (frame->stage != xla::Stage::execute) return nullptr;
  try {
    execute(*frame);
    return nullptr;
  } catch (const Error& e) {
    return error(*frame, xla::ErrorCode::invalid_argument, e.what());
  } catch (const std::bad_alloc& e) {
    return error(*frame, xla::ErrorCode::resource_exhausted, e.what());
  } catch (const std::exception& e) {
    return error(*frame, xla::ErrorCode::internal, e.what());
  }
}

}  // namespace recurra
