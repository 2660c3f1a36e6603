// csrc/simd/vec.h and batches of csrc/math/batch.h against plain arithmetic, for the instruction
// set that this file is compiled for.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "bits.h"
#include "check.h"
#include "math/batch.h"
#include "simd/pairs.h"
#include "simd/vec.h"

namespace r = recurra::RECURRA_ISA;
using r::Vec;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

template <class T>
void test_vec_of() {
  using L = std::numeric_limits<T>;
  constexpr int N = r::kLanes;
  std::mt19937_64 random(3);
  const T special[] = {0,
                       T(-0.0),
                       1,
                       -1,
                       L::infinity(),
                       -L::infinity(),
                       L::quiet_NaN(),
                       L::denorm_min(),
                       -L::denorm_min(),
                       L::min(),
                       L::max(),
                       L::lowest(),
                       T(0.5),
                       T(1.5),
                       T(2.5),
                       T(-0.5),
                       T(-2.5),
                       T(1 / L::epsilon()),
                       T(1 / L::epsilon() - 0.5),
                       T(0.5) - L::epsilon() / 4};
  const auto draw = [&]() -> T {
    if (random() % 4 == 0) return special[random() % std::size(special)];
    if (random() % 2) return bits<T>(Bits<T>(random()));
    return T(std::ldexp(double(random() >> 11) * 0x1p-53 - 0.5, int(random() % 24)));
  };
  for (int trial = 0; trial < 20000; ++trial) {
    T a[N], b[N], c[N], y[N];
    for (int i = 0; i < N; ++i) a[i] = draw(), b[i] = draw(), c[i] = draw();
    const auto va = Vec<T>::load(a), vb = Vec<T>::load(b), vc = Vec<T>::load(c);
    const auto check = [&](const char* name, Vec<T> v, auto f) {
      v.store(y);
      for (int i = 0; i < N; ++i)
        CHECK(same(y[i], T(f(i))), "%s(%a, %a, %a) = %a, not %a", name, double(a[i]), double(b[i]),
              double(c[i]), double(y[i]), double(f(i)));
    };
    check("+", va + vb, [&](int i) { return a[i] + b[i]; });
    check("-", va - vb, [&](int i) { return a[i] - b[i]; });
    check("*", va * vb, [&](int i) { return a[i] * b[i]; });
    check("/", va / vb, [&](int i) { return a[i] / b[i]; });
    check("fma", fma(va, vb, vc), [&](int i) { return std::fma(a[i], b[i], c[i]); });
    check("fma scalar", fma(va, T(3), vc), [&](int i) { return std::fma(a[i], T(3), c[i]); });
    check("negation", -va, [&](int i) { return -a[i]; });
    check("min", min(va, vb), [&](int i) { return a[i] < b[i] ? a[i] : b[i]; });
    check("max", max(va, vb), [&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
    check("abs", abs(va), [&](int i) { return std::abs(a[i]); });
    check("sqrt", sqrt(va), [&](int i) { return std::sqrt(a[i]); });
    check("copysign", copysign(va, vb), [&](int i) { return std::copysign(a[i], b[i]); });
    check("round", round(va), [&](int i) { return std::nearbyint(a[i]); });
    check("<", select(va < vb, va, vc), [&](int i) { return a[i] < b[i] ? a[i] : c[i]; });
    check("<=", select(va <= vb, va, vc), [&](int i) { return a[i] <= b[i] ? a[i] : c[i]; });
    check(">", select(va > vb, va, vc), [&](int i) { return a[i] > b[i] ? a[i] : c[i]; });
    check(">=", select(va >= vb, va, vc), [&](int i) { return a[i] >= b[i] ? a[i] : c[i]; });
    check("==", select(va == vb, va, vc), [&](int i) { return a[i] == b[i] ? a[i] : c[i]; });
    bool some = false, numbers = true;
    for (int i = 0; i < N; ++i) some |= a[i] < b[i], numbers &= a[i] == a[i];
    CHECK(any(va < vb) == some, "any");
    CHECK(all(va == va) == numbers, "all");
    check("negative", select(negative(va), vb, vc),
          [&](int i) { return std::signbit(a[i]) ? b[i] : c[i]; });

    T n[N], finite[N], positive[N];
    for (int i = 0; i < N; ++i) {
      n[i] = T(int(random() % (L::max_exponent * 5)) - L::max_exponent * 5 / 2);
      finite[i] = std::isinf(a[i]) ? T(1) : a[i];
      positive[i] = std::isnormal(a[i]) ? std::abs(a[i]) : T(3);
      const int power = int(n[i]);
      n[i] = random() % 64 ? n[i] : L::quiet_NaN();
      b[i] = n[i] == n[i] ? std::ldexp(finite[i], power) : n[i];
      c[i] = r::scale2(finite[i], n[i]);
    }
    const auto vp = Vec<T>::load(positive);
    check("scale2", scale2(Vec<T>::load(finite), Vec<T>::load(n)), [&](int i) { return b[i]; });
    check("scale2 plain", Vec<T>::load(c), [&](int i) { return b[i]; });
    check("exponent", exponent(vp), [&](int i) { return std::ilogb(positive[i]); });
    check("mantissa", mantissa(vp),
          [&](int i) { return std::ldexp(positive[i], -std::ilogb(positive[i])); });

    // The tree of the sum, with numbers whose sum depends on the order.
    T tree[N];
    for (int i = 0; i < N; ++i) tree[i] = finite[i] = T(draw() * 0 == 0 ? a[i] : T(i)) * T(1e-3);
    for (int half = N / 2; half; half /= 2)
      for (int i = 0; i < half; ++i) tree[i] += tree[i + half];
    CHECK(same(sum(Vec<T>::load(finite)), tree[0]), "sum %a", double(tree[0]));

    // Partial loads and stores, and what lies around them.
    const int count = trial % (N + 3) - 1, used = std::clamp(count, 0, N);
    std::vector<T> exact_size(a, a + used);  // a sanitizer sees a read past the end
    T guarded[N];
    std::fill(guarded, guarded + N, T(7));
    Vec<T>::load(exact_size.data(), count).store(y);
    va.store(guarded, count);
    for (int i = 0; i < N; ++i) {
      CHECK(same(y[i], i < used ? a[i] : T(0)), "partial load of %d", count);
      CHECK(same(guarded[i], i < used ? a[i] : T(7)), "partial store of %d", count);
    }
    alignas(64) T streamed[N];
    va.stream(streamed);
    r::fence();
    for (int i = 0; i < N; ++i) CHECK(same(streamed[i], a[i]), "stream");
  }
  Vec<T> rows[N];
  T line[N];
  for (int i = 0; i < N; ++i) {
    for (int j = 0; j < N; ++j) line[j] = T(i * N + j);
    rows[i] = Vec<T>::load(line);
  }
  r::transpose(rows);
  for (int i = 0; i < N; ++i) {
    rows[i].store(line);
    for (int j = 0; j < N; ++j) CHECK(line[j] == T(j * N + i), "transpose %d %d", i, j);
  }
}

template <class T>
void test_pairs() {
  constexpr int N = r::kLanes;
  T line[N], out[N];
  Vec<T> rows[r::kPairs];
  for (int i = 0; i < r::kPairs; ++i) {
    for (int j = 0; j < N; ++j) line[j] = T(i * N + j);
    rows[i] = Vec<T>::load(line);
  }
  r::transpose_pairs(rows);
  for (int i = 0; i < r::kPairs; ++i) {
    rows[i].store(line);
    for (int j = 0; j < N; ++j)
      CHECK(line[j] == T(j / 2 * N + 2 * i + j % 2), "transpose_pairs %d %d", i, j);
  }
  const T re[] = {2, -1}, im[] = {3, 5};  // two factors, two arguments
  for (int j = 0; j < N; ++j) line[j] = j % 2 ? im[j / 2 % 2] : re[j / 2 % 2];
  const Vec<T> f = Vec<T>::load(line), x = r::swapped(f);
  for (int conjugate = 0; conjugate < 2; ++conjugate) {
    ((conjugate ? r::conj_factor(f) : r::factor(f)) * x).store(out);
    for (int k = 0; k < r::kPairs; ++k) {
      const T a = line[2 * k], b = conjugate ? -line[2 * k + 1] : line[2 * k + 1];
      const T u = line[2 * k + 1], v = line[2 * k];
      CHECK(out[2 * k] == a * u - b * v && out[2 * k + 1] == a * v + b * u, "product %d", k);
    }
  }
}

// A float of the 16-bit format with that many fraction bits and that bias, by its definition.
float widen(uint16_t u, int fraction, int bias) {
  const int e = (u & 0x7fff) >> fraction, f = u & ((1 << fraction) - 1);
  const int top = 0x7fff >> fraction;
  const float sign = u & 0x8000 ? -1.0f : 1.0f;
  if (e == top) return f ? std::numeric_limits<float>::quiet_NaN() : sign * kInf;
  const double m = e ? f + (1 << fraction) : f;
  return sign * float(std::ldexp(m, std::max(e, 1) - bias - fraction));
}

// To the nearest number of the format, ties to even, computed in double.
uint16_t narrow(float x, int fraction, int bias) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const uint16_t top = uint16_t(0x7fff >> fraction << fraction);
  const double a = std::abs(double(x));
  if (std::isinf(a)) return sign | top;
  int e = 0;
  if (a > 0) std::frexp(a, &e);
  e = std::max(e - 1, 1 - bias);
  const double units = std::nearbyint(std::ldexp(a, fraction - e));  // of 2^(e - fraction)
  // A carry into the next exponent is what adding the bits does by itself.
  const double out = units + double((e + bias - 1) << fraction);
  return sign | uint16_t(std::min(out, double(top)));
}

void test_half_precision() {
  uint16_t in[r::kLanes], out[r::kLanes];
  float y[r::kLanes];
  for (uint32_t first = 0; first < 65536; first += r::kLanes) {
    for (uint32_t i = 0; i < r::kLanes; ++i) in[i] = uint16_t(first + i);
    r::load_bf16(in).store(y);
    for (int i = 0; i < r::kLanes; ++i) CHECK(same(y[i], widen(in[i], 7, 127)), "bf16 %x", in[i]);
    r::load_f16(in).store(y);
    for (int i = 0; i < r::kLanes; ++i) {
      CHECK(same(y[i], widen(in[i], 10, 15)), "f16 %x", in[i]);
      // The instructions keep a payload and make it quiet; so must the portable code.
      if (y[i] != y[i])
        CHECK(bits<uint32_t>(y[i]) ==
                  (uint32_t(in[i] & 0x8000) << 16 | 0x7fc00000 | uint32_t(in[i] & 0x3ff) << 13),
              "f16 nan %x", in[i]);
    }
  }
  // The largest finite float16, where rounding turns to infinity, and both sides of subnormal.
  const float edges[r::kLanes] = {65504,           65519.996f,   65520,      65520.004f,
                                  65536,           kInf,         0x1p-14f,   0x1.ffcp-15f,
                                  0x1.ffep-15f,    0x1.fffp-15f, 0x1p-24f,   0x1p-25f,
                                  0x1.000002p-25f, 0x1.8p-24f,   0x1.4p-23f, 0x1p-149f};
  r::store_f16(out, Vec<float>::load(edges));
  for (int i = 0; i < r::kLanes; ++i)
    CHECK(out[i] == narrow(edges[i], 10, 15), "f16 of %a: %x", double(edges[i]), out[i]);
#if defined(__AVX2__)
  const uint64_t stride = 255 * r::kLanes;
#else
  const uint64_t stride = 4093 * r::kLanes;
#endif
  for (uint64_t u = 0; u < 1ull << 32; u += stride) {
    for (uint32_t i = 0; i < r::kLanes; ++i) {
      // Some on and beside the ties, which evenly spaced patterns rarely meet.
      const uint32_t even = uint32_t(u + i * (stride / r::kLanes));
      const uint32_t tie = (even & ~0x1fffu) + 0x1000u * (i / 4) + even % 3 - 1;
      y[i] = bits<float>(i % 4 ? even : tie);
    }
    r::store_bf16(out, Vec<float>::load(y));
    for (int i = 0; i < r::kLanes; ++i)
      CHECK(y[i] != y[i] ? (out[i] & 0x7fc0) == 0x7fc0 : out[i] == narrow(y[i], 7, 127),
            "bf16 of %a: %x", double(y[i]), out[i]);
    r::store_f16(out, Vec<float>::load(y));
    for (int i = 0; i < r::kLanes; ++i)
      CHECK(y[i] != y[i] ? (out[i] & 0x7e00) == 0x7e00 : out[i] == narrow(y[i], 10, 15),
            "f16 of %a: %x", double(y[i]), out[i]);
  }
}

// Each number of a batch is what it would be alone.
template <class T>
void test_batch() {
  constexpr int M = 3;
  std::mt19937_64 random(5);
  for (int n = 0; n < 2000; ++n) {
    T x[M][r::kLanes], y[M][r::kLanes];
    r::Batch<Vec<T>, M> batch;
    for (int m = 0; m < M; ++m) {
      for (T& v : x[m]) {
        const uint64_t any = random();
        v = any % 8 ? T((double(random() >> 11) * 0x1p-53 - 0.5) * 200) : bits<T>(Bits<T>(any));
      }
      batch.v[m] = Vec<T>::load(x[m]);
    }
    const auto compare = [&](const char* name, auto f) {
      const auto got = f(batch);
      for (int m = 0; m < M; ++m) {
        got.v[m].store(y[m]);
        T alone[r::kLanes];
        f(batch.v[m]).store(alone);
        for (int i = 0; i < r::kLanes; ++i)
          CHECK(same(y[m][i], alone[i]), "%s of %a in a batch", name, double(x[m][i]));
      }
    };
    compare("silu", [](auto v) { return r::silu(v); });
    compare("silu'", [](auto v) { return r::silu_slope(v).slope; });
    compare("softplus", [](auto v) { return r::softplus(v); });
    compare("tanh", [](auto v) { return r::tanh(v); });
    compare("exp2_fast", [](auto v) { return r::exp2_fast(v); });
    compare("log1p", [](auto v) { return r::log1p(abs(v)); });
    compare("sqrt", [](auto v) { return sqrt(v * v + v); });
  }
}

}  // namespace

int main(int, char**) {
  test_vec_of<float>();
  test_vec_of<double>();
  test_pairs<float>();
  test_pairs<double>();
  test_half_precision();
  test_batch<float>();
  test_batch<double>();
  std::printf(failures ? "%d FAILED\n" : "ok\n", failures);
  return failures != 0;
}
