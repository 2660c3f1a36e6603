// What a custom call of XLA is given, as far as ours reads it: the C interface of XLA's FFI, major
// version 0, as jax.ffi.include_dir() documents it (xla/ffi/api/c_api.h). Within a major version
// structs only grow at their ends, so that the version that a call comes with tells what may be
// read of them. tests/test_xla.py compares every offset here with the header of the jax that is
// installed.
#pragma once
#include <cstddef>
#include <cstdint>

namespace recurra::xla {

enum class ExtensionType : int { metadata = 1 };

struct Extension {
  size_t struct_size;
  ExtensionType type;
  Extension* next;
};

struct Version {
  size_t struct_size;
  Extension* extensions;
  int major, minor;
};
constexpr int kMajor = 0;
constexpr int kFirstMinor = 1;  // the first one with all of what is read here

// Asked for by a call that carries this extension instead of data.
struct Metadata {
  size_t struct_size;
  Version version;
  uint32_t traits;
};
struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

enum class ErrorCode : int { invalid_argument = 3, resource_exhausted = 8, internal = 13 };
struct Error;    // belongs to who is given it, and goes by being returned or destroyed
struct Context;  // of one call
struct ErrorCreate {
  size_t struct_size;
  Extension* extensions;
  const char* message;
  ErrorCode code;
};
struct ErrorMessage {
  size_t struct_size;
  Extension* extensions;
  Error* error;
  const char* message;  // out, as long as the error lives
};
struct ErrorDestroy {
  size_t struct_size;
  Extension* extensions;
  Error* error;
};

// What a call on a device asks for.
struct StreamGet {
  size_t struct_size;
  Extension* extensions;
  Context* context;
  void* stream;  // out
};
struct OrdinalGet {
  size_t struct_size;
  Extension* extensions;
  Context* context;
  int32_t ordinal;  // out
};
struct MemoryAllocate {
  size_t struct_size;
  Extension* extensions;
  Context* context;
  size_t size;
  size_t alignment;  // a power of two, at most 16; what comes is aligned to more
  void* data;        // out
};
struct MemoryFree {
  size_t struct_size;
  Extension* extensions;
  Context* context;
  size_t size;
  void* data;
};

struct Api {
  size_t struct_size;
  Extension* extensions;
  Version version;
  const void* internal;
  Error* (*error_create)(ErrorCreate* arguments);
  void (*error_message)(ErrorMessage* arguments);
  void (*error_destroy)(ErrorDestroy* arguments);
  void (*handler_register)();
  Error* (*stream_get)(StreamGet* arguments);
  void (*types_and_state[4])();
  Error* (*memory_allocate)(MemoryAllocate* arguments);
  Error* (*memory_free)(MemoryFree* arguments);
  void (*threads_and_futures[6])();
  Error* (*ordinal_get)(OrdinalGet* arguments);
};
// As much of it as calls on the CPU read.
constexpr size_t kCpuApi = offsetof(Api, error_message);

enum class DataType : int {
  pred = 1,
  s8 = 2,
  s16 = 3,
  s32 = 4,
  s64 = 5,
  u8 = 6,
  f16 = 10,
  f32 = 11,
  f64 = 12,
  c64 = 15,
  bf16 = 16,
  c128 = 18
};

// A dense array, its last dimension innermost.
struct Buffer {
  size_t struct_size;
  Extension* extensions;
  DataType dtype;
  void* data;
  int64_t rank;
  int64_t* dims;
};

struct Bytes {
  const char* data;
  size_t size;
};
struct Scalar {
  DataType dtype;
  void* value;
};

enum class AttributeType : int { array = 1, dictionary = 2, scalar = 3, string = 4 };

// Arguments, and likewise results; all that ours has are buffers, whose type is 1.
struct Buffers {
  size_t struct_size;
  Extension* extensions;
  int64_t size;
  int* types;
  Buffer** buffers;
};
struct Attributes {
  size_t struct_size;
  Extension* extensions;
  int64_t size;
  AttributeType* types;
  Bytes** names;
  void** values;  // Scalar or Bytes
};

enum class Stage : int { instantiate = 0, prepare = 1, initialize = 2, execute = 3 };

struct CallFrame {
  size_t struct_size;
  Extension* extensions;
  const Api* api;
  Context* context;
  Stage stage;
  Buffers arguments, results;
  Attributes attributes;
};

}  // namespace recurra::xla
