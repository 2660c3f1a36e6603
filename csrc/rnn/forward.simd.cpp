// Sequentially: a task is one sequence by one span of channels.
#include "rnn/sequential.h"

namespace recurra::RECURRA_ISA {
namespace {

using namespace recurrent;

template <class T>
void run(const Rnn& args) {
  const int64_t channels = args.x.size[3];
  const CellRows<T>& cell = cell_rows<T>(args.cell);
  const Cut shape = cut(channels, tile_shape<T>(args.x, args.y).widest, args.sequences.count);
  const int64_t count = args.y.size[0] * args.y.size[1] * args.y.size[2] * channels;
  const bool stream = count * item_size(args.y.dtype) >= kStreamFrom;
  parallel_unless(count < 1 << 12, args.sequences.count * shape.spans, [&](int64_t task) {
    const int64_t n = task / shape.spans, c0 = task % shape.spans * shape.width;
    walk_span(args, cell, n, c0, channels - c0 < shape.width ? channels - c0 : shape.width, stream);
    if (stream) fence();
  });
}

}  // namespace

void rnn(const Rnn& args) {
  computes_in_double(args.x.dtype) ? run<double>(args) : run<float>(args);
}

}  // namespace recurra::RECURRA_ISA
