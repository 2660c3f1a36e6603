// The cases of causal_conv1d. Its oracles are in Python; here its instruction sets are compared.
#pragma once
#include "case.h"
#include "causal_conv1d/causal_conv1d.h"

namespace recurra::test {

template <class Args>
std::shared_ptr<std::vector<ConvSpan>> cut_spans(Args& args) {
  auto spans = std::make_shared<std::vector<ConvSpan>>(conv_spans(args.sequences));
  args.spans = spans->data();
  args.span_count = static_cast<int64_t>(spans->size());
  return spans;
}

// Values of cu_seqlens that are not checked on the device: none may lead out of the arrays.
inline View<1> hostile_offsets(Case& c, Sequences& sequences, int64_t time) {
  const auto ends = hostile_integers(c.random, 1 + c.random.below(6), time);
  sequences = {static_cast<int64_t>(ends.size()) - 1, time, nullptr};
  c.raced = true;
  return c.indices("cu_seqlens", ends.data(), sequences.count + 1);
}

// The inputs of either direction; returns W.
template <class Args>
inline int64_t conv_inputs(Case& c, Args& args, DType dtype, const Shape& s) {
  const int64_t W = c.random.pick<int64_t>({2, 3, 4, 4, 5, 8}), D = s.channels;
  args.silu = c.random.chance(60);
  args.sequences = c.sequences(s.batch, s.time);
  args.x = c.input<3>("x", dtype, {s.batch, s.time, D});
  args.weight = c.input<2>("weight", parameter(c.random, dtype), {D, W});
  if (c.random.chance(60)) args.bias = c.input<1>("bias", parameter(c.random, dtype), {D});
  if (c.random.chance(60))
    args.h0 = c.input<3>("h0", state_of(dtype), {args.sequences.count, W - 1, D});
  return W;
}

inline void causal_conv1d_case(Case& c, const Shape& s) {
  CausalConv1d args;
  const DType dtype = activation(c.random);
  const int64_t W = conv_inputs(c, args, dtype, s);
  args.y = c.output<3>("y", dtype, {s.batch, s.time, s.channels});
  args.h_last = c.output<3>("h_last", state_of(dtype), {args.sequences.count, W - 1, s.channels});
  const auto spans = cut_spans(args);  // before the capture, which copies args
  c.run = [args, spans] { causal_conv1d(args); };
  const View<1> offsets = offsets_of(c, args.sequences);
  c.emulated = [args, offsets] { cuda::causal_conv1d(args, offsets, {}); };
}

inline void hostile_causal_conv1d_case(Case& c, const Shape& s) {
  CausalConv1d args;
  const DType dtype = activation(c.random);
  const int64_t W = conv_inputs(c, args, dtype, {1, s.time, s.channels});
  const View<1> offsets = hostile_offsets(c, args.sequences, s.time);
  args.h0 = {};
  if (c.random.chance(60))
    args.h0 = c.input<3>("h0", state_of(dtype), {args.sequences.count, W - 1, s.channels});
  args.y = c.output<3>("y", dtype, {1, s.time, s.channels});
  args.h_last = c.output<3>("h_last", state_of(dtype), {args.sequences.count, W - 1, s.channels});
  c.emulated = [args, offsets] { cuda::causal_conv1d(args, offsets, {}); };
}

// Partial sums that are not compared, with room to the element.
using Room = std::shared_ptr<std::vector<char>>;
inline Room room(CausalConv1dBackward& args) {
  const int64_t W = args.weight.size[1], D = args.x.size[2];
  const DType state = state_of(args.x.dtype);
  const auto bytes = static_cast<size_t>(args.span_count * (W + 1) * D * item_size(state));
  const Room memory = std::make_shared<std::vector<char>>(bytes);
  args.partial = {memory->data(), state, {args.span_count, W + 1, D}, {(W + 1) * D, D, 1}};
  return memory;
}

// More than one span now and then.
inline Shape conv_shape(Random& random, const Shape& s) {
  if (!random.chance(8)) return s;
  return {1 + random.below(2), 500 + random.below(700), random.pick<int64_t>({1, 3, 33})};
}

inline void causal_conv1d_backward_case(Case& c, const Shape& given) {
  CausalConv1dBackward args;
  const Shape s = conv_shape(c.random, given);
  const DType dtype = activation(c.random), state = state_of(dtype);
  const int64_t W = conv_inputs(c, args, dtype, s), D = s.channels;
  const int64_t size[] = {s.batch, s.time, D}, states[] = {args.sequences.count, W - 1, D};
  if (c.random.chance(80)) args.dy = c.input<3>("dy", dtype, size);
  if (c.random.chance(60)) args.dh_last = c.input<3>("dh_last", state, states);
  args.dx = c.output<3>("dx", dtype, size);
  args.dh0 = c.output<3>("dh0", state, states);
  args.dweight = c.output<2>("dweight", args.weight.dtype, {D, W});
  args.dbias = c.output<1>("dbias", args.weight.dtype, {D});
  CausalConv1dBackward on_device = args;
  const auto spans = cut_spans(args);
  const View<1> offsets = offsets_of(c, args.sequences);
  Room memory, on_device_memory;
  if (offsets) {
    memory = room(args);
    on_device.span_count = cuda::causal_conv1d_spans(s.batch, s.time, true);
    on_device_memory = room(on_device);
    // The same products in another order. In either the error is below 40 units, u, of the sum of
    // the products' sizes, which may be some 20 times the largest sum; and as much is stored.
    const DType stored = args.weight.dtype;
    const double unit = computes_in_double(dtype) ? 0x1p-53 : 0x1p-24;
    c.emulated_within = 0x1p11 * unit + (stored == DType::bf16  ? 0x1p-7
                                         : stored == DType::f16 ? 0x1p-10
                                                                : 0);
  } else {
    args.partial = c.output<3>("partial", state, {args.span_count, W + 1, D}, true);
    on_device.partial = args.partial;
    on_device.span_count = args.span_count;
  }
  c.run = [args, spans, memory] { causal_conv1d_backward(args); };
  if (c.random.chance(50)) return;  // blocks of 512 fibers take their time
  c.emulated = [on_device, offsets, on_device_memory] {
    cuda::causal_conv1d_backward(on_device, offsets, {});
  };
}

inline void hostile_causal_conv1d_backward_case(Case& c, const Shape& s) {
  CausalConv1dBackward args;
  const DType dtype = activation(c.random), state = state_of(dtype);
  const int64_t D = s.channels, size[] = {1, s.time, D};
  const int64_t W = conv_inputs(c, args, dtype, {1, s.time, D});
  const View<1> offsets = hostile_offsets(c, args.sequences, s.time);
  const int64_t states[] = {args.sequences.count, W - 1, D};
  args.h0 = c.random.chance(60) ? c.input<3>("h0", state, states) : View<3>();
  if (c.random.chance(80)) args.dy = c.input<3>("dy", dtype, size);
  if (c.random.chance(60)) args.dh_last = c.input<3>("dh_last", state, states);
  args.dx = c.output<3>("dx", dtype, size);
  args.dh0 = c.output<3>("dh0", state, states);
  args.dweight = c.output<2>("dweight", args.weight.dtype, {D, W});
  args.dbias = c.output<1>("dbias", args.weight.dtype, {D});
  args.span_count = cuda::causal_conv1d_spans(1, s.time, true);
  const Room memory = room(args);
  c.emulated = [args, offsets, memory] { cuda::causal_conv1d_backward(args, offsets, {}); };
}

inline void causal_conv1d_step_case(Case& c, const Shape& s) {
  CausalConv1dStep args;
  const DType dtype = activation(c.random);
  const int64_t W = c.random.pick<int64_t>({2, 3, 4, 4, 5, 8}), D = s.channels;
  const int64_t rows = s.time, states = rows + c.random.below(3);
  const int64_t length = W - 1 + (c.random.chance(30) ? c.random.below(4) : 0);
  args.silu = c.random.chance(60);
  if (states > rows || c.random.chance(50))
    args.slots = c.integers("slots", slots(c.random, rows, states));
  args.h = c.output<3>("h", state_of(dtype), {states, length, D});
  args.x = c.input<2>("x", dtype, {rows, D});
  args.weight = c.input<2>("weight", parameter(c.random, dtype), {D, W});
  if (c.random.chance(60)) args.bias = c.input<1>("bias", parameter(c.random, dtype), {D});
  args.out = c.output<2>("out", dtype, {rows, D});
  c.run = [args] { causal_conv1d_step(args); };
  View<1> on_device;
  if (args.slots) on_device = c.indices("slots", args.slots, rows);
  c.emulated = [args, on_device] { cuda::causal_conv1d_step(args, on_device, {}); };
}

// Slots that are not checked on the device: past the last they skip, and none leads out of h.
inline void hostile_causal_conv1d_step_case(Case& c, const Shape& s) {
  CausalConv1dStep args;
  const DType dtype = activation(c.random);
  const int64_t W = 4, D = s.channels, rows = s.time, states = c.random.below(4);
  const auto chosen = hostile_integers(c.random, rows, states);
  c.raced = true;
  args.h = c.output<3>("h", state_of(dtype), {states, W - 1, D});
  args.x = c.input<2>("x", dtype, {rows, D});
  args.weight = c.input<2>("weight", dtype, {D, W});
  args.out = c.output<2>("out", dtype, {rows, D});
  const View<1> on_device = c.indices("slots", chosen.data(), rows);
  c.emulated = [args, on_device] { cuda::causal_conv1d_step(args, on_device, {}); };
}

}  // namespace recurra::test
