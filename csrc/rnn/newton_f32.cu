#include "rnn/newton.h"

namespace recurra::cuda {

void rnn_newton_f64(const RnnNewton&, const Indices&, int64_t*, const NewtonSummary&,
                    const Stream&);

void rnn_newton(const RnnNewton& args, const Indices& cu_seqlens, int64_t* taken,
                const NewtonSummary& summary, const Stream& stream) {
  if (computes_in_double(args.x.dtype))
    return rnn_newton_f64(args, cu_seqlens, taken, summary, stream);
  rnn_detail::run_newton<float>(args, cu_seqlens, taken, summary, stream);
}

}  // namespace recurra::cuda
