// A task is a span of channels of one input, for which the samples are read one after the other,
// S once; the sums stay in the first cache.
#include "rtrl/rtrl.h"
#include "tile.h"

namespace recurra::RECURRA_ISA {
namespace {

constexpr int64_t kTaskBytes = 16 << 10;     // of sums, about
constexpr int64_t kSerialBelow = 128 << 10;  // products that threads would not make faster

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// to += scale from, or to = scale from.
template <class T>
RECURRA_INLINE void add_row(T* to, const T* from, T scale, int64_t width, bool start) {
  const Vec<T> f(scale);
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    const Vec<T> old = start ? Vec<T>(T(0)) : Vec<T>::load(to + d);
    fma(Vec<T>::load(from + d), f, old).store(to + d);
  }
  if (d < width) {
    const int lanes = static_cast<int>(width - d);
    const Vec<T> old = start ? Vec<T>(T(0)) : Vec<T>::load(to + d, lanes);
    fma(Vec<T>::load(from + d, lanes), f, old).store(to + d, lanes);
  }
}

template <class T>
void clear_row(T* to, int64_t width) {
  for (int64_t d = 0; d < width; d += kLanes) Vec<T>(T(0)).store(to + d, at_most_lanes(width - d));
}

// The samples whose sum is row `out` of the result.
struct Samples {
  int64_t begin, end;
  Samples(const RtrlGradient& args, int64_t out)
      : begin(args.dweight.size[0] == args.weight.size[0] ? out : 0),
        end(args.dweight.size[0] == args.weight.size[0] ? out + 1 : args.weight.size[0]) {}
};

template <class T>
void weights(const RtrlGradient& args, int64_t out, int64_t g, int64_t n0, int64_t n1) {
  const int64_t width = args.weight.size[4], states = args.weight.size[1];
  const Samples samples(args, out);
  for (int64_t n = n0; n < n1; ++n)
    clear_row(reinterpret_cast<T*>(args.dweight.at(out, g, n, 0)), width);
  for (int64_t b = samples.begin; b < samples.end; ++b)
    for (int64_t k = 0; k < states; ++k)
      for (int64_t n = n0; n < n1; ++n) {
        const T scale = *reinterpret_cast<const T*>(args.dh0.at(b, k, n));
        if (scale != T(0))
          add_row(reinterpret_cast<T*>(args.dweight.at(out, g, n, 0)),
                  reinterpret_cast<const T*>(args.weight.at(b, k, g, n, 0)), scale, width, false);
      }
}

// Rows of N numbers, such as those of the bias.
template <class T>
void rows(const RtrlGradient& args, int64_t out, const View<4>& s, const View<3>& to) {
  const int64_t channels = s.size[3];
  const Samples samples(args, out);
  for (int64_t row = 0; row < s.size[2]; ++row)
    for (int64_t n = 0; n < channels; n += kLanes) {
      const int lanes = at_most_lanes(channels - n);
      Vec<T> sum(T(0));
      for (int64_t b = samples.begin; b < samples.end; ++b)
        for (int64_t k = 0; k < s.size[1]; ++k) {
          const auto scale = Vec<T>::load(reinterpret_cast<const T*>(args.dh0.at(b, k, n)), lanes);
          const auto v = Vec<T>::load(reinterpret_cast<const T*>(s.at(b, k, row, n)), lanes);
          sum = select(scale == T(0), sum, fma(v, scale, sum));
        }
      sum.store(reinterpret_cast<T*>(to.at(out, row, n)), lanes);
    }
}

template <class T>
void run(const RtrlGradient& args) {
  const int64_t outs = args.dweight.size[0], inputs = args.weight.size[2];
  const int64_t channels = args.weight.size[3], width = args.weight.size[4];
  const int64_t bytes = width * static_cast<int64_t>(sizeof(T));
  const int64_t fit = bytes > 0 ? kTaskBytes / bytes : channels;
  const int64_t each = fit < 1 ? 1 : least(fit, channels > 0 ? channels : 1);
  const int64_t spans = (channels + each - 1) / each;
  const bool serial =
      args.weight.size[0] * args.weight.size[1] * inputs * channels * width < kSerialBelow;
  parallel_unless(serial, outs * (inputs * spans + 1), [&](int64_t i) {
    const int64_t out = i / (inputs * spans + 1), task = i % (inputs * spans + 1);
    if (task == inputs * spans) {
      rows<T>(args, out, args.bias, args.dbias);
      rows<T>(args, out, args.params, args.dparams);
      return;
    }
    const int64_t g = task / spans, n = task % spans * each;
    weights<T>(args, out, g, n, least(channels, n + each));
  });
}

}  // namespace

void rtrl_gradient(const RtrlGradient& args) {
  computes_in_double(args.weight.dtype) ? run<double>(args) : run<float>(args);
}

}  // namespace recurra::RECURRA_ISA
