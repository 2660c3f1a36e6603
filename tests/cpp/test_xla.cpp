// The custom calls of XLA on CUDA, their kernels emulated: frames as XLA makes them, with a device
// that hands out memory, held against the custom calls on the CPU.
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "case.h"
#include "check.h"
#include "python/xla.h"

extern "C" recurra::xla::Error* recurra_xla_cuda(recurra::xla::CallFrame* frame);
extern "C" int recurra_cuda_status(int device, char* text, size_t size);

namespace recurra::test {
namespace {

xla::DataType xla_dtype(DType d) {
  switch (d) {
    case DType::f32: return xla::DataType::f32;
    case DType::f64: return xla::DataType::f64;
    case DType::bf16: return xla::DataType::bf16;
    case DType::f16: return xla::DataType::f16;
    case DType::c64: return xla::DataType::c64;
    case DType::c128: return xla::DataType::c128;
    case DType::i32: return xla::DataType::s32;
    case DType::i64: return xla::DataType::s64;
    case DType::b8: return xla::DataType::pred;
  }
  std::abort();
}

// A buffer of the exact size, for AddressSanitizer.
struct Numbers {
  DType dtype;
  std::vector<int64_t> dims;
  std::vector<char> bytes;

  Numbers(DType d, std::vector<int64_t> sizes) : dtype(d), dims(std::move(sizes)) {
    size_t count = static_cast<size_t>(item_size(d));
    for (int64_t n : dims) count *= static_cast<size_t>(n);
    bytes.assign(count, '\xff');  // not a number
    bytes.shrink_to_fit();
  }
  // A complex number is two.
  DType number() const {
    return dtype == DType::c64 ? DType::f32 : dtype == DType::c128 ? DType::f64 : dtype;
  }
  int64_t count() const { return static_cast<int64_t>(bytes.size()) / item_size(number()); }
  bool floating() const { return number() <= DType::f16; }
  double at(int64_t i) const { return load(bytes.data() + i * item_size(number()), number()); }
};

Numbers draw(uint64_t seed, DType dtype, std::vector<int64_t> dims, double low = -1,
             double high = 1) {
  Numbers x(dtype, std::move(dims));
  Random random(seed);
  for (int64_t i = 0; i < x.count(); ++i)
    store(x.bytes.data() + i * item_size(x.number()), x.number(),
          static_cast<float>(random.uniform(low, high)));
  return x;
}

Numbers integers_of(const std::vector<int32_t>& values) {
  Numbers x(DType::i32, {static_cast<int64_t>(values.size())});
  std::memcpy(x.bytes.data(), values.data(), x.bytes.size());
  return x;
}

}  // namespace
}  // namespace recurra::test

// What XLA keeps behind its pointers.
struct recurra::xla::Error {
  ErrorCode code;
  std::string text;
};
struct recurra::xla::Context {
  size_t left = SIZE_MAX;  // bytes that may be allocated at a time
  int allocations = 0;     // so far
  int errors = 0;          // that were made and not destroyed
  std::string broken;      // the function that fails
  std::map<void*, size_t> held;
};

namespace recurra::test {
namespace {

xla::Context* context = nullptr;  // of the call that runs

xla::Error* make_error(xla::ErrorCode code, const std::string& text) {
  ++context->errors;
  return new xla::Error{code, text};
}

xla::Api make_api() {
  xla::Api api{};
  api.struct_size = sizeof api;
  api.version = {sizeof api.version, nullptr, xla::kMajor, 3};
  api.error_create = [](xla::ErrorCreate* a) { return make_error(a->code, a->message); };
  api.error_message = [](xla::ErrorMessage* a) { a->message = a->error->text.c_str(); };
  api.error_destroy = [](xla::ErrorDestroy* a) {
    --context->errors;
    delete a->error;
  };
  api.stream_get = [](xla::StreamGet* a) -> xla::Error* {
    if (a->context->broken == "stream")
      return make_error(xla::ErrorCode::internal, "no stream is here");
    a->stream = &context;
    return nullptr;
  };
  api.ordinal_get = [](xla::OrdinalGet* a) -> xla::Error* {
    if (a->context->broken == "ordinal")
      return make_error(xla::ErrorCode::internal, "no ordinal is here");
    a->ordinal = 0;
    return nullptr;
  };
  api.memory_allocate = [](xla::MemoryAllocate* a) -> xla::Error* {
    CHECK(a->context == context && a->alignment == 16 && a->size > 0, "an allocation of %zu",
          a->size);
    if (a->size > a->context->left)
      return make_error(xla::ErrorCode::resource_exhausted, "the device is full");
    a->context->left -= a->size;
    ++a->context->allocations;
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, a->size) != 0) std::abort();
    std::memset(memory, 0xff, a->size);
    a->context->held[memory] = a->size;
    a->data = memory;
    return nullptr;
  };
  api.memory_free = [](xla::MemoryFree* a) -> xla::Error* {
    const auto found = a->context->held.find(a->data);
    CHECK(found != a->context->held.end() && found->second == a->size, "not what was allocated");
    a->context->left += a->size;
    a->context->held.erase(found);
    std::free(a->data);
    return nullptr;
  };
  return api;
}

using Handler = xla::Error* (*)(xla::CallFrame*);

xla::Error* on_cpu(xla::CallFrame* frame) {
  return handle_xla(frame, xla::kCpuApi,
                    [](const xla::CallFrame& each) { run_xla(each, Platform::cpu, nullptr); });
}

struct Answer {
  int code = 0;
  std::string text;
  std::vector<Numbers> results;
};

// One custom call.
class Call {
 public:
  explicit Call(std::string op) { option("op", std::move(op)); }

  // The next array of the schema, which may be absent.
  Call& array(Numbers x) {
    given_ += '1';
    arrays_.push_back(std::move(x));
    return *this;
  }
  Call& absent(int count = 1) {
    given_.append(static_cast<size_t>(count), '0');
    return *this;
  }
  Call& option(std::string name, std::variant<bool, int64_t, std::string> value) {
    options_.emplace_back(std::move(name), std::move(value));
    return *this;
  }
  Call& option(std::string name, const char* value) {
    return option(std::move(name), std::string(value));
  }
  Call& result(DType dtype, std::vector<int64_t> dims) {
    results_.emplace_back(dtype, std::move(dims));
    return *this;
  }
  xla::Api api = make_api();

  Answer run(Handler handler, xla::Context& on) const {
    Answer out;
    out.results = results_;
    std::vector<Numbers> arrays = arrays_;
    std::deque<xla::Buffer> buffers;
    std::vector<int> types(arrays.size() + results_.size(), 1);
    const auto pointers = [&](std::vector<Numbers>& all) {
      std::vector<xla::Buffer*> to;
      for (Numbers& x : all)
        to.push_back(
            &buffers.emplace_back(xla::Buffer{sizeof(xla::Buffer), nullptr, xla_dtype(x.dtype),
                                              x.bytes.empty() ? nullptr : x.bytes.data(),
                                              static_cast<int64_t>(x.dims.size()), x.dims.data()}));
      return to;
    };
    std::vector<xla::Buffer*> given = pointers(arrays), results = pointers(out.results);
    auto options = options_;
    options.emplace_back("given", given_);
    std::deque<xla::Bytes> bytes;
    std::deque<xla::Scalar> scalars;
    std::vector<xla::AttributeType> kinds;
    std::vector<xla::Bytes*> names;
    std::vector<void*> values;
    for (auto& [name, value] : options) {
      names.push_back(&bytes.emplace_back(xla::Bytes{name.data(), name.size()}));
      const auto* text = std::get_if<std::string>(&value);
      kinds.push_back(text ? xla::AttributeType::string : xla::AttributeType::scalar);
      if (text)
        values.push_back(&bytes.emplace_back(xla::Bytes{text->data(), text->size()}));
      else if (bool* flag = std::get_if<bool>(&value))
        values.push_back(&scalars.emplace_back(xla::Scalar{xla::DataType::pred, flag}));
      else
        values.push_back(
            &scalars.emplace_back(xla::Scalar{xla::DataType::s64, &std::get<int64_t>(value)}));
    }
    const auto count = [](const auto& all) { return static_cast<int64_t>(all.size()); };
    context = &on;
    xla::CallFrame frame{
        sizeof(xla::CallFrame),
        nullptr,
        &api,
        &on,
        xla::Stage::execute,
        {sizeof(xla::Buffers), nullptr, count(given), types.data(), given.data()},
        {sizeof(xla::Buffers), nullptr, count(results), types.data(), results.data()},
        {sizeof(xla::Attributes), nullptr, count(kinds), kinds.data(), names.data(),
         values.data()}};
    if (xla::Error* error = handler(&frame)) {
      out.code = static_cast<int>(error->code);
      out.text = error->text;
      --on.errors;
      delete error;
    }
    CHECK(on.errors == 0, "%s: an error was left", op());
    CHECK(on.held.empty(), "%s: memory was left", op());
    for (size_t i = 0; i < arrays.size(); ++i)
      CHECK(arrays[i].bytes == arrays_[i].bytes, "%s: an argument has changed", op());
    return out;
  }

  const char* op() const { return std::get<std::string>(options_[0].second).c_str(); }

 private:
  std::string given_;
  std::vector<Numbers> arrays_, results_;
  std::vector<std::pair<std::string, std::variant<bool, int64_t, std::string>>> options_;
};

// The results on the device, which are those of the CPU to the bit, or within that share of the
// largest number of each; `left_out` are not compared.
Answer check_same(const Call& call, double within = 0, int left_out = -1,
                  int least_allocations = 0) {
  xla::Context cpu, device;
  const Answer want = call.run(on_cpu, cpu), got = call.run(recurra_xla_cuda, device);
  CHECK(want.code == 0 && got.code == 0, "%s: %s | %s", call.op(), want.text.c_str(),
        got.text.c_str());
  CHECK(cpu.allocations == 0, "%s: the CPU asked for memory of the device", call.op());
  CHECK(device.allocations >= least_allocations, "%s: %d allocations", call.op(),
        device.allocations);
  for (size_t i = 0; i < want.results.size(); ++i) {
    const Numbers &w = want.results[i], &g = got.results[i];
    if (static_cast<int>(i) == left_out || w.bytes == g.bytes) continue;
    double largest = 0, difference = 0;
    for (int64_t k = 0; w.floating() && k < w.count(); ++k) {
      largest = std::fmax(largest, std::fabs(w.at(k)));
      const double d = std::fabs(w.at(k) - g.at(k));
      if (!(d <= difference)) difference = d;
    }
    CHECK(w.floating() && difference <= within * largest, "%s: result %zu differs by %g of %g",
          call.op(), i, difference, largest);
  }
  return got;
}

void check_error(const Call& call, xla::ErrorCode code, const char* text, size_t memory = SIZE_MAX,
                 const char* broken = "") {
  xla::Context device;
  device.left = memory;
  device.broken = broken;
  const Answer got = call.run(recurra_xla_cuda, device);
  CHECK(got.code == static_cast<int>(code) && got.text == text, "%s: %d %s", call.op(), got.code,
        got.text.c_str());
}

constexpr double kClose = 0x1p-12;  // where sums are in another order
constexpr DType f32 = DType::f32;

Call linear_scan_of(DType dtype, int64_t B, int64_t T, int64_t D) {
  Call call("linear_scan");
  call.array(draw(1, dtype, {B, T, D}, 0.3, 1)).array(draw(2, dtype, {B, T, D}));
  const DType state = dtype == DType::bf16 ? f32 : dtype;
  call.array(draw(3, state, {B, D})).absent();
  call.result(dtype, {B, T, D}).result(state, {B, D});
  return call.option("log_a", false).option("reverse", dtype == f32);
}

void check_linear_scan() {
  for (DType dtype : {f32, DType::f64, DType::bf16}) {
    check_same(linear_scan_of(dtype, 3, 40, 80));
    check_same(linear_scan_of(dtype, 1, 300, 3), dtype == DType::bf16 ? 0x1p-6 : kClose, -1, 2);
  }
  check_same(linear_scan_of(f32, 2, 0, 3));
  Call backward("_linear_scan_backward");
  backward.array(draw(1, f32, {1, 1, 80}, 0.3, 1)).array(draw(2, f32, {3, 40, 80})).absent();
  backward.array(draw(3, f32, {3, 40, 80})).absent(2);
  backward.result(f32, {1, 1, 80}).result(f32, {3, 40, 80}).result(f32, {3, 80});
  check_same(backward.option("log_a", false).option("reverse", false), kClose, -1, 1);
}

Call packed(const std::vector<int32_t>& ends) {
  const int64_t sequences = static_cast<int64_t>(ends.size()) - 1;
  Call call("linear_scan");
  call.array(draw(1, f32, {1, 40, 80}, 0.3, 1)).array(draw(2, f32, {1, 40, 80})).absent();
  call.array(integers_of(ends)).result(f32, {1, 40, 80}).result(f32, {sequences, 80});
  return call.option("log_a", false).option("reverse", false);
}

// Values of cu_seqlens are on the device: they are clamped and leave a mark there.
void check_indices() {
  char said[100];
  check_same(packed({0, 7, 7, 30, 40}));
  CHECK(recurra_cuda_status(0, said, sizeof said) == 0 && !said[0], "a mark: %s", said);
  xla::Context device;
  const Answer got = packed({0, 7, 5, 30, 99}).run(recurra_xla_cuda, device);
  CHECK(got.code == 0, "%s", got.text.c_str());
  CHECK(recurra_cuda_status(0, said, sizeof said) == 0, "%s", said);
  CHECK(std::string(said) == "cu_seqlens of linear_scan\n", "%s", said);
  CHECK(recurra_cuda_status(-1, said, sizeof said) == 1, "%s", said);
  CHECK(std::string(said) == "recurra: no CUDA device has number -1", "%s", said);
}

void check_causal_conv1d() {
  Call forward("causal_conv1d"), backward("_causal_conv1d_backward");
  const Numbers x = draw(1, f32, {2, 50, 20}), weight = draw(2, f32, {20, 4});
  forward.array(x).array(weight).array(draw(3, f32, {20})).absent(2).option("activation", "silu");
  check_same(forward.result(f32, {2, 50, 20}).result(f32, {2, 3, 20}));
  backward.array(draw(4, f32, {2, 50, 20})).absent().array(x).array(weight).absent(3);
  backward.result(f32, {2, 50, 20}).result(f32, {20, 4}).result(f32, {20});
  check_same(backward.result(f32, {2, 3, 20}), kClose, -1, 1);
}

Call selective_scan_of(const char* op, DType of_A) {
  Call call(op);
  const int64_t B = 2, T = 70, D = 16, N = 8;
  call.array(draw(1, f32, {B, T, D})).array(draw(2, f32, {B, T, D}));
  call.array(draw(3, of_A, {D, N}, -1, -0.1)).array(draw(4, of_A, {B, T, N}));
  call.array(draw(5, f32, {B, T, N})).array(draw(6, f32, {D})).array(draw(7, f32, {B, T, D}));
  call.absent(3).option("delta_softplus", true);
  return call.result(f32, {B, T, D}).result(of_A, {B, D, N});
}

void check_selective_scan(DType of_A) {
  const int64_t B = 2, T = 70, D = 16, N = 8, rows = of_A == f32 ? N : 2 * N;
  check_same(selective_scan_of("selective_scan", of_A), kClose, -1, 2);  // time is split
  Call save = selective_scan_of("_selective_scan_save", of_A);
  save.result(f32, {B * 3, rows, D});
  const Numbers saved = check_same(save, kClose, -1, 2).results[2];

  Call backward("_selective_scan_backward");
  backward.array(draw(8, f32, {B, T, D})).absent().array(saved);
  backward.array(draw(1, f32, {B, T, D})).array(draw(2, f32, {B, T, D}));
  backward.array(draw(3, of_A, {D, N}, -1, -0.1)).array(draw(4, of_A, {B, T, N}));
  backward.array(draw(5, f32, {B, T, N})).array(draw(6, f32, {D})).array(draw(7, f32, {B, T, D}));
  backward.absent(3).option("delta_softplus", true);
  backward.result(f32, {B, T, D}).result(f32, {B, T, D}).result(of_A, {D, N});
  backward.result(of_A, {B, T, N}).result(f32, {B, T, N}).result(f32, {D});
  backward.result(f32, {B, T, D}).result(f32, {0}).result(of_A, {B, D, N});
  check_same(backward, kClose, -1, 5);
}

Call rnn_of(const char* op, const char* algorithm, const char* on_fail = "sequential") {
  const int64_t B = 2, T = 70, N = 16;
  Call call(op);
  call.array(draw(1, f32, {B, T, 3, N})).array(draw(2, f32, {3, N}));
  call.absent(3).option("cell", "paragru").option("return_states", false);
  call.option("algorithm", algorithm).option("on_fail", on_fail);
  call.result(f32, {B, T, N}).result(f32, {B, 1, N}).result(DType::i32, {}).result(f32, {});
  return call;
}

void check_rnn() {
  const int64_t B = 2, T = 70, N = 16;
  check_same(rnn_of("rnn", "sequential"));
  Call save = rnn_of("_rnn_save", "sequential");
  const Numbers saved = check_same(save.result(f32, {B * 3, 1, N})).results[4];
  Call backward("_rnn_backward");
  backward.array(draw(3, f32, {B, T, N})).absent().array(saved);
  backward.array(draw(1, f32, {B, T, 3, N})).array(draw(2, f32, {3, N})).absent(3);
  backward.option("cell", "paragru").option("return_states", false);
  check_same(backward.result(f32, {B, T, 3, N}).result(f32, {3, N}).result(f32, {B, 1, N}), 0, -1,
             1);
  Call newton = rnn_of("rnn", "newton");
  const Answer got = check_same(newton.option("chunk", int64_t{32}), kClose, 2, 6);
  int32_t passes = 0;
  std::memcpy(&passes, got.results[2].bytes.data(), sizeof passes);
  CHECK(passes > 0 && passes < 20, "%d passes", passes);
}

void check_errors() {
  const Call wide = linear_scan_of(f32, 3, 40, 80), narrow = linear_scan_of(f32, 1, 300, 3);
  Call wrong("linear_scan");
  wrong.array(draw(1, f32, {1, 4, 3})).array(draw(2, f32, {1, 4, 5})).absent(2);
  wrong.option("log_a", false).option("reverse", false);
  check_error(wrong.result(f32, {1, 4, 5}).result(f32, {1, 5}), xla::ErrorCode::invalid_argument,
              "linear_scan: a must have shape (B or 1, T or 1, D or 1) with B = 1, T = 4, D = 5, "
              "got (1, 4, 3)");
  check_error(Call("linear_scam"), xla::ErrorCode::invalid_argument,
              "recurra: no op is named linear_scam");
  Call more = linear_scan_of(f32, 3, 40, 80);
  check_error(more.result(f32, {1}), xla::ErrorCode::invalid_argument,
              "recurra: a custom call has too many results");
  check_error(narrow, xla::ErrorCode::resource_exhausted,
              "recurra: there is no memory for an array of shape (1, 37, 3) and dtype float64: the "
              "device is full",
              100);
  // The first array fits, the second one does not.
  check_error(narrow, xla::ErrorCode::resource_exhausted,
              "recurra: there is no memory for an array of shape (1, 37, 3) and dtype float32: the "
              "device is full",
              1000);
  for (const char* broken : {"stream", "ordinal"})
    check_error(wide, xla::ErrorCode::internal,
                ("recurra: no " + std::string(broken) + " is here").c_str(), SIZE_MAX, broken);
  Call old = linear_scan_of(f32, 3, 40, 80);
  old.api.struct_size = offsetof(xla::Api, ordinal_get);
  check_error(old, xla::ErrorCode::internal,
              "recurra: this version of jaxlib does not tell a custom call its device; install a "
              "newer one");
  old.api.version.major = 1;
  check_error(old, xla::ErrorCode::internal,
              "recurra: this version of jaxlib calls custom calls in another way; install a newer "
              "recurra");
}

// What XLA asks before it calls, of a handler that it does not let into CUDA graphs.
void check_metadata() {
  xla::Metadata metadata{sizeof(xla::Metadata), {}, 7};
  xla::MetadataExtension extension{
      {sizeof(xla::MetadataExtension), xla::ExtensionType::metadata, nullptr}, &metadata};
  xla::CallFrame frame{};
  frame.extensions = &extension.base;
  CHECK(!recurra_xla_cuda(&frame) && metadata.traits == 0, "traits %u", metadata.traits);
  CHECK(metadata.version.major == xla::kMajor && metadata.version.minor == xla::kFirstMinor,
        "version %d", metadata.version.minor);
  const xla::Api api = make_api();
  frame = {};
  frame.struct_size = sizeof frame;
  frame.api = &api;
  frame.stage = xla::Stage::prepare;
  CHECK(!recurra_xla_cuda(&frame), "a stage before the call");
}

}  // namespace
}  // namespace recurra::test

int main() {
  using namespace recurra::test;
  check_linear_scan();
  check_indices();
  check_causal_conv1d();
  check_selective_scan(f32);
  check_selective_scan(recurra::DType::c64);
  check_rnn();
  check_errors();
  check_metadata();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
