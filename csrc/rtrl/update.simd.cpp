// A task is a span of channels of one sample and input. A block of a few channels by a few vectors
// of the weights stays in registers while time goes by, so that S is read and written once; what
// that costs besides is a matrix product at its usual rate. A row of S depends to the bit on its
// own channel alone.
#include "rtrl/rtrl.h"
#include "tile.h"

namespace recurra::RECURRA_ISA {
namespace {

constexpr int64_t kSteps = 128;            // of u that are walked for a block of channels
constexpr int64_t kTaskBytes = 128 << 10;  // of S, about
constexpr int64_t kSerialBelow = 1 << 20;  // products that threads would not make faster

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Sums of a block take half of the registers, of which there are 32 where one holds sixteen floats.
template <class T>
constexpr int kSums = (Vec<float>::K == 1 ? 16 : 8) / Vec<T>::K;
template <class T>
constexpr int kVectors = kSums<T> >= 16 ? 2 : 1;
template <class T, int K>
constexpr int kRows = kSums<T> / kVectors<T> / K > 1 ? kSums<T> / kVectors<T> / K : 1;

// What R channels have of one sample and input; past the last channel that one again, whose row is
// then written twice alike.
template <class T, int K, int R>
struct Channels {
  T decay[K][K][R];
  bool keep[R];  // whether any decay is not 0
  T factors[kSteps][K][R];
  int64_t at[R];  // the rows of S

  void load(const RtrlUpdate& args, int64_t b, int64_t n, int64_t count) {
    for (int r = 0; r < R; ++r) {
      at[r] = n + least(r, count - 1);
      keep[r] = false;
      for (int k = 0; k < K; ++k)
        for (int j = 0; j < K; ++j) {
          decay[k][j][r] = *reinterpret_cast<const T*>(args.decay.at(k, b, j, at[r]));
          keep[r] |= decay[k][j][r] != T(0);
        }
    }
  }
  void load_factors(const RtrlUpdate& args, int64_t b, int64_t g, int64_t t0, int64_t steps) {
    for (int k = 0; k < K; ++k)
      for (int64_t t = 0; t < steps; ++t) {
        const T* const from = reinterpret_cast<const T*>(args.factors.at(k, b, t0 + t, g, 0));
        for (int r = 0; r < R; ++r) factors[t][k][r] = from[at[r]];
      }
  }
};

// V vectors of the rows of S, or the first `lanes` of one vector.
template <class T, int K, int R, int V, bool Part>
RECURRA_INLINE void block(const Channels<T, K, R>& c, T* const (&s)[K], int64_t width, bool first,
                          const T* u, int64_t u_stride, int64_t steps, int lanes) {
  const auto load = [&](const T* p)
                        RECURRA_LAMBDA { return Part ? Vec<T>::load(p, lanes) : Vec<T>::load(p); };
  Vec<T> sums[K][R][V];
  for_each_index<R>([&](auto r) RECURRA_LAMBDA {
    for_each_index<V>([&](auto v) RECURRA_LAMBDA {
      Vec<T> old[K];
      for_each_index<K>([&](auto k) RECURRA_LAMBDA {
        const T* const p = s[k] + c.at[r] * width + v * kLanes;
        old[k] = first && !c.keep[r] ? Vec<T>(T(0)) : load(p);
        if (first) prefetch<2>(p + R * width);
      });
      for_each_index<K>([&](auto k) RECURRA_LAMBDA {
        sums[k][r][v] = old[k];
        if (!first) return;
        sums[k][r][v] = old[0] * c.decay[k][0][r];
        for_each_index<K>([&](auto j) RECURRA_LAMBDA {
          if constexpr (j > 0) sums[k][r][v] = fma(old[j], c.decay[k][j][r], sums[k][r][v]);
        });
      });
    });
  });
  for (int64_t t = 0; t < steps; ++t) {
    Vec<T> x[V];
    for_each_index<V>([&](auto v) RECURRA_LAMBDA { x[v] = load(u + t * u_stride + v * kLanes); });
    for_each_index<K>([&](auto k) RECURRA_LAMBDA {
      for_each_index<R>([&](auto r) RECURRA_LAMBDA {
        const Vec<T> f(c.factors[t][k][r]);
        for_each_index<V>([&](auto v)
                              RECURRA_LAMBDA { sums[k][r][v] = fma(f, x[v], sums[k][r][v]); });
      });
    });
  }
  for_each_index<K>([&](auto k) RECURRA_LAMBDA {
    for_each_index<R>([&](auto r) RECURRA_LAMBDA {
      for_each_index<V>([&](auto v) RECURRA_LAMBDA {
        T* const p = s[k] + c.at[r] * width + v * kLanes;
        if constexpr (Part)
          sums[k][r][v].store(p, lanes);
        else
          sums[k][r][v].store(p);
      });
    });
  });
}

// The weights of the channels [n0, n1) of a sample and input.
template <class T, int K>
void weights(const RtrlUpdate& args, int64_t b, int64_t g, int64_t n0, int64_t n1) {
  constexpr int R = kRows<T, K>, V = kVectors<T>;
  const int64_t width = args.weight.size[4], time = args.u.size[1], u_stride = args.u.step(1);
  Channels<T, K, R> c;
  T* s[K];
  for (int k = 0; k < K; ++k) s[k] = reinterpret_cast<T*>(args.weight.at(b, k, g, 0, 0));
  for (int64_t n = n0; n < n1; n += R) {
    c.load(args, b, n, least(R, n1 - n));
    for (int64_t t = 0; t == 0 || t < time; t += kSteps) {
      const int64_t steps = least(kSteps, time - t);
      c.load_factors(args, b, g, t, steps);
      const T* const u = reinterpret_cast<const T*>(args.u.at(b, t, 0));
      int64_t d = 0;
      const auto at = [&](T*(&p)[K]) {
        for (int k = 0; k < K; ++k) p[k] = s[k] + d;
      };
      T* p[K];
      for (; d + V * kLanes <= width; d += V * kLanes) {
        at(p);
        block<T, K, R, V, false>(c, p, width, t == 0, u + d, u_stride, steps, kLanes);
      }
      for (; d < width; d += kLanes) {
        at(p);
        block<T, K, R, 1, true>(c, p, width, t == 0, u + d, u_stride, steps,
                                at_most_lanes(width - d));
      }
    }
  }
}

// `rows` rows of N numbers, `apart` of them between two states: S <- P S + add(k, row, n, lanes).
template <class T, int K, class F>
RECURRA_INLINE void move_rows(const RtrlUpdate& args, T* s, int64_t rows, int64_t b, const F& add) {
  const int64_t channels = args.decay.size[3], apart = rows * channels;
  for (int64_t n = 0; n < channels; n += kLanes) {
    const int lanes = at_most_lanes(channels - n);
    Vec<T> decay[K][K], largest(T(0));
    for (int k = 0; k < K; ++k)
      for (int j = 0; j < K; ++j) {
        decay[k][j] = Vec<T>::load(reinterpret_cast<const T*>(args.decay.at(k, b, j, n)), lanes);
        // A NaN counts as not 0.
        largest = select(decay[k][j] == T(0), largest, Vec<T>(T(1)));
      }
    for (int64_t row = 0; row < rows; ++row) {
      Vec<T> old[K];
      for (int k = 0; k < K; ++k)
        old[k] =
            select(largest == T(0), T(0), Vec<T>::load(s + k * apart + row * channels + n, lanes));
      for (int k = 0; k < K; ++k) {
        Vec<T> sum = old[0] * decay[k][0];
        for (int j = 1; j < K; ++j) sum = fma(old[j], decay[k][j], sum);
        add(k, row, n, lanes, sum).store(s + k * apart + row * channels + n, lanes);
      }
    }
  }
}

template <class T, int K>
void others(const RtrlUpdate& args, int64_t b) {
  move_rows<T, K>(
      args, reinterpret_cast<T*>(args.bias.at(b, 0, 0, 0)), args.bias.size[2], b,
      [&](int k, int64_t g, int64_t n, int lanes, Vec<T> sum) {
        for (int64_t t = 0; t < args.factors.size[2]; ++t)
          sum =
              sum + Vec<T>::load(reinterpret_cast<const T*>(args.factors.at(k, b, t, g, n)), lanes);
        return sum;
      });
  move_rows<T, K>(args, reinterpret_cast<T*>(args.params.at(b, 0, 0, 0)), args.params.size[2], b,
                  [&](int k, int64_t p, int64_t n, int lanes, Vec<T> sum) {
                    return sum + Vec<T>::load(
                                     reinterpret_cast<const T*>(args.direct.at(k, b, p, n)), lanes);
                  });
}

template <class T, int K>
void run(const RtrlUpdate& args) {
  const int64_t batch = args.weight.size[0], inputs = args.weight.size[2];
  const int64_t channels = args.weight.size[3], width = args.weight.size[4];
  const int64_t bytes = K * width * static_cast<int64_t>(sizeof(T));
  int64_t each = bytes > 0 ? kTaskBytes / bytes : channels;
  each = least(each, channels) / kRows<T, K> * kRows<T, K>;
  if (each < kRows<T, K>) each = kRows<T, K>;
  const int64_t spans = (channels + each - 1) / each;
  const bool serial = batch * K * inputs * channels * width * (args.u.size[1] + 1) < kSerialBelow;
  // The last task of a sample does what is not weights.
  parallel_unless(serial, batch * (inputs * spans + 1), [&](int64_t i) {
    const int64_t b = i / (inputs * spans + 1), task = i % (inputs * spans + 1);
    if (task == inputs * spans) return others<T, K>(args, b);
    const int64_t g = task / spans, n = task % spans * each;
    weights<T, K>(args, b, g, n, least(channels, n + each));
  });
}

template <class T>
void run(const RtrlUpdate& args) {
  switch (args.weight.size[1]) {
    case 1: return run<T, 1>(args);
    case 2: return run<T, 2>(args);
    case 3: return run<T, 3>(args);
    default: return run<T, 4>(args);
  }
}

}  // namespace

void rtrl_update(const RtrlUpdate& args) {
  computes_in_double(args.weight.dtype) ? run<double>(args) : run<float>(args);
}

}  // namespace recurra::RECURRA_ISA
