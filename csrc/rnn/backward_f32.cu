#include "rnn/backward.h"

namespace recurra::cuda {

void rnn_backward_f64(const RnnBackward&, const Indices&, void*, const Stream&);

void rnn_backward(const RnnBackward& args, const Indices& cu_seqlens, void* chunk_sums,
                  const Stream& stream) {
  if (computes_in_double(args.x.dtype))
    return rnn_backward_f64(args, cu_seqlens, chunk_sums, stream);
  rnn_detail::run_backward<float>(args, cu_seqlens, chunk_sums, stream);
}

}  // namespace recurra::cuda
