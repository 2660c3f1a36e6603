#include "rnn/backward.h"

namespace recurra::cuda {

void rnn_backward_f64(const RnnBackward& args, const Indices& cu_seqlens, void* chunk_sums,
                      const Stream& stream) {
  rnn_detail::run_backward<double>(args, cu_seqlens, chunk_sums, stream);
}

}  // namespace recurra::cuda
