// The ops as custom calls of XLA on CUDA: _xla_cuda.so, which recurra.jax opens. It has no Python,
// and its kernels are those of librecurra_cuda.so.
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/memory.h"
#include "cuda/status.h"
#include "python/xla.h"

namespace recurra {
namespace {

// The sentence of an error that XLA gave, which is destroyed.
std::string text_of(const xla::Api& api, xla::Error* error) {
  xla::ErrorMessage message{sizeof(xla::ErrorMessage), nullptr, error, ""};
  api.error_message(&message);
  const std::string text = message.message;
  xla::ErrorDestroy destroy{sizeof(xla::ErrorDestroy), nullptr, error};
  api.error_destroy(&destroy);
  return text;
}

// The device of a call, with memory of XLA's, which goes back when the call ends: what others then
// do with it comes after our kernels on the stream.
class CallDevice final : public Device {
 public:
  explicit CallDevice(const xla::CallFrame& frame) : api_(*frame.api), context_(frame.context) {
    xla::OrdinalGet ordinal{sizeof(xla::OrdinalGet), nullptr, context_, 0};
    require(api_.ordinal_get(&ordinal));
    xla::StreamGet on{sizeof(xla::StreamGet), nullptr, context_, nullptr};
    require(api_.stream_get(&on));
    stream = {ordinal.ordinal, on.stream};
  }
  ~CallDevice() {
    for (xla::MemoryFree& memory : held_)
      if (xla::Error* error = api_.memory_free(&memory)) text_of(api_, error);
  }
  CallDevice(const CallDevice&) = delete;
  CallDevice& operator=(const CallDevice&) = delete;

  void* allocate(size_t bytes, std::string& why) override {
    held_.reserve(held_.size() + 1);
    xla::MemoryAllocate memory{sizeof(xla::MemoryAllocate), nullptr, context_, bytes, 16, nullptr};
    if (xla::Error* error = api_.memory_allocate(&memory)) {
      why = text_of(api_, error);
      return nullptr;
    }
    if (memory.data)
      held_.push_back({sizeof(xla::MemoryFree), nullptr, context_, bytes, memory.data});
    return memory.data;
  }
  void set_zero(void* data, size_t bytes) override { cuda::fill_zero(data, bytes, stream); }

 private:
  void require(xla::Error* error) {
    if (error) throw std::runtime_error("recurra: " + text_of(api_, error));
  }

  const xla::Api& api_;
  xla::Context* const context_;
  std::vector<xla::MemoryFree> held_;
};

}  // namespace
}  // namespace recurra

#define RECURRA_SHOWN extern "C" __attribute__((visibility("default")))

// What jax.ffi.register_ffi_target takes for the platform CUDA.
RECURRA_SHOWN recurra::xla::Error* recurra_xla_cuda(recurra::xla::CallFrame* frame) {
  using namespace recurra;
  return handle_xla(frame, sizeof(xla::Api), [](const xla::CallFrame& each) {
    CallDevice device(each);
    run_xla(each, Platform::cuda, &device);
  });
}

// A line for each argument whose values were clamped on that device, as take_status has them, which
// waits for it. Returns 0, or 1 with what went wrong instead.
RECURRA_SHOWN int recurra_cuda_status(int device, char* text, size_t size) {
  std::string said;
  int failed = 0;
  try {
    for (const std::string& argument : recurra::cuda::take_status({device, nullptr}))
      said += argument + "\n";
  } catch (const std::exception& error) {
    said = error.what();
    failed = 1;
  }
  std::snprintf(text, size, "%s", said.c_str());
  return failed;
}
