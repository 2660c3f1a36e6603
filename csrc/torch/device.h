// What the CUDA bindings have in common besides the checks.
#pragma once
#include "cuda/indices.h"
#include "cuda/status.h"
#include "cuda/stream.h"
#include "torch/check.h"

namespace recurra {

// The sequences of a (B, T, ...) tensor. The kernels read cu_seqlens, and slots, themselves: their
// values are on the device.
inline Sequences sequences_of(const Tensor& lead, const OptionalTensor& cu_seqlens) {
  return {cu_seqlens ? cu_seqlens->size(0) - 1 : lead.size(0), lead.size(1), nullptr};
}

// Where the kernels of a call go: the stream that torch uses now, or the one that XLA calls with.
inline cuda::Stream stream_of(const Tensor& t) {
#ifdef RECURRA_WITHOUT_TORCH
  return t.device->stream;
#else
  return cuda::current_stream(t.get_device_index());
#endif
}

// cu_seqlens or slots of an op, with where its kernels mark values that they clamp.
inline cuda::Indices indices(const char* op, const char* argument, const OptionalTensor& t) {
  if (!t) return {};
  return {view<1>(*t), cuda::status_word(op, argument, t->get_device_index())};
}

}  // namespace recurra
