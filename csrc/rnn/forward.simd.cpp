// Sequentially: a task is one sequence, or several narrow ones, by one span of channels.
#include "rnn/sequential.h"

namespace recurra::RECURRA_ISA {
namespace {

using namespace recurrent;

template <class T>
void run(const Rnn& args) {
  const int64_t channels = args.x.size[3];
  const CellRows<T>& cell = cell_rows<T>(args.cell);
  const int64_t count = args.sequences.count, most = args.slots ? 1 : args.together();
  const int64_t groups = (count + most - 1) / most;
  const Cut shape = cut(channels, tile_shape<T>(args.x, args.y).widest, groups);
  const int64_t outputs = args.y.size[0] * args.y.size[1] * args.y.size[2] * channels;
  const bool stream = outputs * item_size(args.y.dtype) >= kStreamFrom;
  parallel_unless(outputs < 1 << 12, groups * shape.spans, [&](int64_t task) {
    const int64_t n = task / shape.spans * most, c0 = task % shape.spans * shape.width;
    const int64_t left = channels - c0;
    walk_span(args, cell,
              {n, count - n < most ? count - n : most, c0, left < shape.width ? left : shape.width},
              stream);
    if (stream) fence();
  });
}

}  // namespace

void rnn(const Rnn& args) {
  computes_in_double(args.x.dtype) ? run<double>(args) : run<float>(args);
}

}  // namespace recurra::RECURRA_ISA
