// Checks of what an op was given, made before anything is allocated. What an op requires of the
// dtypes, shapes and devices of its arguments is one line of text beside its schema in schemas.cpp,
//
//   b:act(B,T,D) a:act(B|1,T|1,D|1) h0:state?(S,D) cu_seqlens:index?
//
// read here for real tensors and by python/recurra/_check.py for fake ones, in the same words.
// The first argument leads: it sets the device and the dtype of the activations.
//   kind    act    activations: one dtype, that of the leading argument
//           param  parameters: that dtype or float32
//           state  float32 for 16-bit activations, otherwise the activations' dtype
//           index  int32 or int64
//           mask   bool
//           a kind followed by * may be complex as well
//   ?       may be None
//   shape   names bind to sizes when first met; a|1 also allows 1; W-1 is one less; W>=2 also sets
//           a minimum and k=1..16 both ends; shapes separated by / are alternatives by number of
//           dimensions
//   S       the number of sequences: B, or one less than the length of cu_seqlens
#pragma once
#include <string>
#include <vector>

#include "native/dtype_name.h"
#include "native/memory_order.h"
#include "torch/tensor.h"

namespace recurra {

[[noreturn]] void fail(const char* op, const std::string& message);

struct Argument {
  const char* name;
  const Tensor* tensor;  // null when absent

  Argument(const char* n, const Tensor& t) : name(n), tensor(&t) {}
  Argument(const char* n, const OptionalTensor& t) : name(n), tensor(t ? &*t : nullptr) {}
};

// Checks the arguments, in any order, against the requirements of `op`; throws with one sentence
// that names the argument, what is required and what came.
void check(const char* op, std::initializer_list<Argument> arguments);

// The requirements of an op as text; schemas.cpp holds them.
const char* requirements(const std::string& op);

// The sequences of a checked call; the vector keeps what `offsets` points to. Throws unless
// cu_seqlens starts at 0, does not descend and ends at time.
Sequences sequences(const char* op, int64_t batch, int64_t time, const OptionalTensor& cu_seqlens,
                    std::vector<int64_t>& storage);

// Refuses a state h, which is written in place, that has an element twice in memory or one in
// common with slots or an input. Only `alike`, of whose inputs each element is read with the state
// of its row and channel alone and before that is written, may without slots be h itself, or some
// of it along `spare`, the dimension of h that is neither rows nor channels, -1 for none. What
// strides leave open in reasonable time is allowed.
void check_written(const char* op, const Tensor& h, const OptionalTensor& slots, int spare,
                   std::initializer_list<Argument> alike, std::initializer_list<Argument> others);

// Refuses a state h that without slots has other than `rows` states.
void check_states(const char* op, int64_t rows, const Tensor& h, const OptionalTensor& slots);
// The state in h of each of `rows` rows as int64, below their number and none twice, negative to
// skip; null where there are no slots. Checks the states too. The vector keeps them.
const int64_t* slot_indices(const char* op, int64_t rows, const Tensor& h,
                            const OptionalTensor& slots, std::vector<int64_t>& storage);

// Refuses an x (B, D, L) where (B, T, D) is meant, which the D of a parameter (D, ...) gives away
// unless D = T; `also` goes on with what to transpose besides.
void check_layout(const char* op, const char* name, const Tensor& x, const char* parameter,
                  const Tensor& p, const char* also = "");

// A shape as Python writes it.
std::string shape_of(const Tensor& t);

template <int N>
View<N> view(const Tensor& t) {
  View<N> v;
  v.data = t.data_ptr();
  v.dtype = dtype_of(t);
  for (int n = 0; n < N; ++n) {
    v.size[n] = t.size(n);
    v.stride[n] = t.stride(n);
  }
  return v;
}

template <int N>
View<N> view(const OptionalTensor& t) {
  return t ? view<N>(*t) : View<N>();
}

// (B, ...) as (B, 1, ...): a row a sequence, of one step.
template <int N>
View<N + 1> one_step(const View<N>& v) {
  View<N + 1> out;
  out.data = v.data;
  out.dtype = v.dtype;
  for (int n = 0; n <= N; ++n) {
    out.size[n] = n == 1 ? 1 : v.size[n < 1 ? n : n - 1];
    out.stride[n] = n == 1 ? 0 : v.stride[n < 1 ? n : n - 1];
  }
  return out;
}

// Zeros for the sums of csrc/partial_sums.h, where `a` (B, T, D) is broadcast to the shape of
// `full`; none where it is not.
// Those of the first dimension stand apart for `rows`, a multiple of a's, where it is given.
OptionalTensor partial_sums(const Tensor& a, const Tensor& full, int64_t rows = -1);
inline DType state_dtype(DType d) { return d == DType::bf16 || d == DType::f16 ? DType::f32 : d; }

}  // namespace recurra
