#include "rnn/newton.h"

namespace recurra::cuda {

void rnn_newton_f64(const RnnNewton& args, const Indices& cu_seqlens, int64_t* taken,
                    const NewtonSummary& summary, const Stream& stream) {
  rnn_detail::run_newton<double>(args, cu_seqlens, taken, summary, stream);
}

}  // namespace recurra::cuda
