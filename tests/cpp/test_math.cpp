// Accuracy of csrc/math and rightness of csrc/simd/vec.h, for the instruction set that this file is
// compiled for. Prints the largest error of every function and fails when a bound is exceeded.
//   test_math [--full] [--dump FILE]
// --full: the scalar build takes as many samples as the others. --dump: the result bits of a fixed
// sample, which must be the same bytes whatever the instruction set.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "bits.h"
#include "math/dual.h"
#include "simd/vec.h"

namespace r = recurra::RECURRA_ISA;
using r::Vec;

namespace {

int failures = 0;
bool full = true;
constexpr int kBlock = 4096;
constexpr float kInf = std::numeric_limits<float>::infinity();

#define CHECK(CONDITION, ...)                                      \
  do {                                                             \
    if (!(CONDITION)) {                                            \
      if (++failures < 40) {                                       \
        std::printf("FAILED line %d: %s: ", __LINE__, #CONDITION); \
        std::printf(__VA_ARGS__);                                  \
        std::printf("\n");                                         \
      }                                                            \
    }                                                              \
  } while (0)

// One function: on blocks of vectors, on a plain number, and its reference in wider arithmetic.
template <class T, class Wide>
struct Function {
  const char* name;
  double bound;  // in ulp
  void (*block)(const T*, T*);
  T (*plain)(T);
  Wide (*exact)(Wide);
};

template <class F, class T>
void on_block(const T* x, T* y) {
  for (int i = 0; i < kBlock; i += r::kLanes) F::f(Vec<T>::load(x + i)).store(y + i);
}
template <class F, class T>
T on_plain(T x) {
  return F::f(x);
}

template <class W>
W exact_sigmoid(W x) {
  return 1 / (1 + std::exp(-x));
}
template <class W>
W exact_softplus(W x) {
  return std::max(x, W(0)) + std::log1p(std::exp(-std::abs(x)));
}
template <class W>
W exact_silu(W x) {
  return std::isinf(x) && x < 0 ? -W(0) : x / (1 + std::exp(-x));
}

#define FUNCTION(NAME, CALL, EXACT)  \
  struct NAME {                      \
    template <class V>               \
    static RECURRA_INLINE V f(V x) { \
      return CALL;                   \
    }                                \
    template <class W>               \
    static W exact(W x) {            \
      return EXACT;                  \
    }                                \
  };
FUNCTION(Exp, r::exp(x), std::exp(x))
FUNCTION(Exp2, r::exp2(x), std::exp2(x))
FUNCTION(Exp2Fast, r::exp2_fast(x), std::exp2(x))
FUNCTION(Expm1, r::expm1(x), std::expm1(x))
FUNCTION(Log1p, r::log1p(x), std::log1p(x))
FUNCTION(Sigmoid, r::sigmoid(x), exact_sigmoid(x))
FUNCTION(Tanh, r::tanh(x), std::tanh(x))
FUNCTION(Softplus, r::softplus(x), exact_softplus(x))
FUNCTION(Silu, r::silu(x), exact_silu(x))

// The derivatives by dual numbers; that of SiLU has a root, at -1.28, where no ulp can hold.
#define TANGENT(NAME, CALL, EXACT) FUNCTION(NAME, r::tangent<0>(CALL((r::seed<1, 0>(x)))), EXACT)
template <class W>
W exact_sigmoid_slope(W x) {
  const W t = std::exp(-std::abs(x));
  return t / ((1 + t) * (1 + t));
}
template <class W>
W exact_tanh_slope(W x) {
  // Where it is that small, the slope is 0.
  const bool single = std::numeric_limits<W>::digits == 53;
  return std::abs(x + x) >= (single ? 80 : 700) ? 0 : 4 * exact_sigmoid_slope(x + x);
}
TANGENT(ExpSlope, exp, std::exp(x))
TANGENT(Expm1Slope, expm1, std::exp(x))
TANGENT(Log1pSlope, log1p, 1 / (1 + x))
TANGENT(SigmoidSlope, sigmoid, exact_sigmoid_slope(x))
TANGENT(TanhSlope, tanh, exact_tanh_slope(x))
TANGENT(SoftplusSlope, softplus, exact_sigmoid(x))

template <class T, class W>
std::vector<Function<T, W>> functions() {
  const bool f = sizeof(T) == 4;
#define ROW(STRUCT, NAME, FLOAT_BOUND, DOUBLE_BOUND)                                \
  Function<T, W> {                                                                  \
    NAME, f ? FLOAT_BOUND : DOUBLE_BOUND, on_block<STRUCT, T>, on_plain<STRUCT, T>, \
        [](W x) -> W { return STRUCT::exact(x); }                                   \
  }
  return {ROW(Exp, "exp", 2, 3),
          ROW(Exp2, "exp2", 2, 3),
          ROW(Exp2Fast, "exp2_fast", 2, 3),
          ROW(Expm1, "expm1", 2, 3),
          ROW(Log1p, "log1p", 2, 3),
          ROW(Sigmoid, "sigmoid", 2, 3),
          ROW(Tanh, "tanh", 2, 3),
          ROW(Softplus, "softplus", 3, 3),
          ROW(Silu, "silu", 3, 3),
          ROW(ExpSlope, "exp'", 2, 3),
          ROW(Expm1Slope, "expm1'", 2, 3),
          ROW(Log1pSlope, "log1p'", 2, 3),
          ROW(SigmoidSlope, "sigmoid'", 4, 4),
          ROW(TanhSlope, "tanh'", 5, 5),
          ROW(SoftplusSlope, "softplus'", 2, 3)};
}

// |y - exact| in units in the last place of the exact result; infinity where it makes no sense.
template <class T, class W>
double ulp_error(T y, W exact) {
  using L = std::numeric_limits<T>;
  if (exact != exact) return y != y ? 0 : HUGE_VAL;
  if (y != y) return HUGE_VAL;
  if (std::isinf(y) || std::isinf(exact)) {
    // Rounding up to infinity is an error of half an ulp, or whatever the distance to 2^128 is.
    const W top = std::ldexp(W(1), L::max_exponent);
    const W ulp = std::ldexp(W(1), L::max_exponent - L::digits);
    if (std::isinf(y) && std::isinf(exact)) return (y > 0) == (exact > 0) ? 0 : HUGE_VAL;
    if (std::isinf(y)) {
      if ((y > 0) != (exact > 0)) return HUGE_VAL;
      return std::abs(exact) >= top ? 0 : double((top - std::abs(exact)) / ulp);
    }
    return std::isinf(W(T(exact))) ? HUGE_VAL : double(std::abs(W(y) - exact) / ulp);
  }
  int e;
  std::frexp(exact, &e);
  e = std::max(e, L::min_exponent);
  return double(std::abs(std::ldexp(W(y) - exact, L::digits - e)));
}

// Every float exponent, evenly spaced bit patterns, and the neighbours of every power of two.
std::vector<float> float_samples() {
  const uint64_t stride = full ? 255 : 4093;
  std::vector<float> out;
  out.reserve((1ull << 32) / stride + 8192);
  for (uint64_t u = 0; u < 1ull << 32; u += stride) out.push_back(bits<float>(uint32_t(u)));
  for (uint32_t e = 0; e <= 255; ++e)
    for (uint32_t sign = 0; sign < 2; ++sign)
      for (int d = -3; d <= 3; ++d)
        out.push_back(bits<float>(((sign << 31) | (e << 23)) + uint32_t(d)));
  while (out.size() % kBlock) out.push_back(0);
  return out;
}
// Half of them any bit pattern, half where the functions do something.
std::vector<double> double_samples() {
  std::mt19937_64 random(1);
  std::vector<double> out;
  const int count = full ? 1 << 20 : 1 << 16;
  for (int i = 0; i < count / 4; ++i) {
    out.push_back(bits<double>(random()));
    const uint64_t near_one = random() % 2 ? 0x3000000000000000 : 0x4000000000000000;
    out.push_back(bits<double>((random() & 0x8fffffffffffffff) | near_one));
    const double u = double(random() >> 11) * 0x1p-53;
    out.push_back((u - 0.5) * 1600);
    out.push_back((u - 0.5) * std::ldexp(4.0, int(random() % 8)));
  }
  for (uint64_t e = 0; e <= 2047; ++e)
    for (uint64_t sign = 0; sign < 2; ++sign)
      for (int d = -3; d <= 3; ++d)
        out.push_back(bits<double>(((sign << 63) | (e << 52)) + uint64_t(int64_t(d))));
  while (out.size() % kBlock) out.push_back(0);
  return out;
}

template <class T, class W>
void test_accuracy(const std::vector<T>& samples) {
  for (const auto& f : functions<T, W>()) {
    double worst = 0;
    T at = 0, y[kBlock];
    for (size_t i = 0; i < samples.size(); i += kBlock) {
      f.block(&samples[i], y);
      for (int j = 0; j < kBlock; ++j) {
        const T x = samples[i + j];
        const double error = ulp_error(y[j], f.exact(W(x)));
        if (error > worst) worst = error, at = x;
        if (j % 64 == 0)
          CHECK(same(f.plain(x), y[j]), "%s plain and vector at %a", f.name, double(x));
      }
    }
    std::printf("%-6s %-10s max %.3f ulp at %a\n", sizeof(T) == 4 ? "float" : "double", f.name,
                worst, double(at));
    CHECK(worst <= f.bound, "%s: %g > %g ulp", f.name, worst, f.bound);
  }
}

// With the argument multiplied by log2(e): rounded once, |x| 2^-24 relative and 2 ulp; multiplied
// by the float next to log2(e), whose own error is 0.23 2^-24, |x| 1.25 2^-24 and 2 ulp.
void test_prescaled(const std::vector<float>& samples) {
  float t[kBlock], y[kBlock];
  for (const bool once : {true, false}) {
    double worst = 0;
    for (size_t i = 0; i < samples.size(); i += kBlock) {
      for (int j = 0; j < kBlock; ++j)
        t[j] = once ? float(samples[i + j] * 1.44269504088896341) : samples[i + j] * 1.44269504f;
      on_block<Exp2Fast>(t, y);
      for (int j = 0; j < kBlock; ++j) {
        const double x = samples[i + j];
        if (!(std::abs(x) < 110)) continue;
        const double exact = std::exp(x);
        const double slack = std::abs(x) * (once ? 1 : 1.25) * 0x1p-24 * exact;
        if (exact + slack >= 0x1p128) continue;
        int e;
        std::frexp(exact, &e);
        const double ulp = std::ldexp(1.0, std::max(e, -125) - 24);
        worst = std::max(worst, (std::abs(y[j] - exact) - slack) / ulp);
      }
    }
    std::printf("float  exp2_fast  beyond |x| %s2^-24 when %s: max %.3f ulp\n", once ? "" : "1.25 ",
                once ? "scaled exactly" : "scaled in float", worst);
    CHECK(worst <= 2, "pre-scaled exp2_fast");
  }
}

template <class T, class W>
void test_sincos(const std::vector<T>& samples, double bound) {
  double worst = 0;
  const double ulp = std::numeric_limits<T>::epsilon() / 2;
  for (size_t i = 0; i < samples.size(); i += r::kLanes) {
    T s[r::kLanes], c[r::kLanes];
    const auto sc = r::sincos(Vec<T>::load(&samples[i]));
    sc.sin.store(s);
    sc.cos.store(c);
    for (int j = 0; j < r::kLanes; ++j) {
      const T x = samples[i + j];
      if (!std::isfinite(x)) {
        CHECK(s[j] != s[j] && c[j] != c[j], "sincos(%g)", double(x));
        continue;
      }
      CHECK(std::abs(s[j]) <= 1 && std::abs(c[j]) <= 1, "sincos(%a) beyond 1", double(x));
      if (j == 0) {
        const auto plain = r::sincos(x);
        CHECK(same(plain.sin, s[j]) && same(plain.cos, c[j]), "sincos(%a) plain", double(x));
      }
      if (!(std::abs(x) < 0x1p25)) continue;
      const W ds = std::abs(W(s[j]) - std::sin(W(x))), dc = std::abs(W(c[j]) - std::cos(W(x)));
      const double error = double(std::max(ds, dc)) / ulp;
      if (std::abs(x) <= 1e5) {
        worst = std::max(worst, error);
      } else {
        CHECK(error <= std::abs(x), "sincos(%a): %g", double(x), error);
      }
      if (x == 0) CHECK(same(s[j], x) && c[j] == 1, "sincos(0)");
    }
  }
  std::printf("%-6s %-10s max %.3f * 2^%d absolute, |x| <= 1e5\n",
              sizeof(T) == 4 ? "float" : "double", "sincos", worst, sizeof(T) == 4 ? -24 : -53);
  CHECK(worst <= bound, "sincos: %g", worst);
}

template <class T>
void test_exact_points() {
  using L = std::numeric_limits<T>;
  const T inf = L::infinity(), nan = L::quiet_NaN(), tiny = L::denorm_min(), z = T(0);
  struct Row {
    const char* name;
    T (*f)(T);
    T x, y;
  };
#define F(CALL) [](T x) -> T { return CALL; }
  const auto exp = F(r::exp(x)), exp2 = F(r::exp2(x)), fast = F(r::exp2_fast(x)),
             expm1 = F(r::expm1(x)), log1p = F(r::log1p(x)), sigmoid = F(r::sigmoid(x)),
             tanh = F(r::tanh(x)), softplus = F(r::softplus(x)), silu = F(r::silu(x)),
             sin = F(r::sincos(x).sin), cos = F(r::sincos(x).cos);
#undef F
  const T ln2 = T(0.693147180559945309417L);
  const std::vector<Row> rows = {{"exp", exp, z, 1},
                                 {"exp", exp, -z, 1},
                                 {"exp", exp, inf, inf},
                                 {"exp", exp, -inf, 0},
                                 {"exp", exp, L::max(), inf},
                                 {"exp", exp, L::lowest(), 0},
                                 {"exp", exp, tiny, 1},
                                 {"exp2", exp2, z, 1},
                                 {"exp2", exp2, -z, 1},
                                 {"exp2", exp2, inf, inf},
                                 {"exp2", exp2, -inf, 0},
                                 {"exp2", exp2, L::max(), inf},
                                 {"exp2", exp2, L::lowest(), 0},
                                 {"exp2", exp2, 10, 1024},
                                 {"exp2", exp2, T(L::min_exponent - L::digits), tiny},
                                 {"exp2_fast", fast, z, 1},
                                 {"exp2_fast", fast, -z, 1},
                                 {"exp2_fast", fast, inf, inf},
                                 {"exp2_fast", fast, -inf, 0},
                                 {"exp2_fast", fast, L::max(), inf},
                                 {"exp2_fast", fast, L::lowest(), 0},
                                 {"exp2_fast", fast, -3, T(0.125)},
                                 {"exp2_fast", fast, T(L::min_exponent - L::digits), tiny},
                                 {"expm1", expm1, z, z},
                                 {"expm1", expm1, -z, -z},
                                 {"expm1", expm1, inf, inf},
                                 {"expm1", expm1, -inf, -1},
                                 {"expm1", expm1, tiny, tiny},
                                 {"expm1", expm1, -tiny, -tiny},
                                 {"log1p", log1p, z, z},
                                 {"log1p", log1p, -z, -z},
                                 {"log1p", log1p, inf, inf},
                                 {"log1p", log1p, -1, -inf},
                                 {"log1p", log1p, T(-1.5), nan},
                                 {"log1p", log1p, -inf, nan},
                                 {"log1p", log1p, tiny, tiny},
                                 {"log1p", log1p, -tiny, -tiny},
                                 {"log1p", log1p, 1, ln2},
                                 {"sigmoid", sigmoid, z, T(0.5)},
                                 {"sigmoid", sigmoid, inf, 1},
                                 {"sigmoid", sigmoid, -inf, 0},
                                 {"sigmoid", sigmoid, L::max(), 1},
                                 {"sigmoid", sigmoid, L::lowest(), 0},
                                 {"tanh", tanh, z, z},
                                 {"tanh", tanh, -z, -z},
                                 {"tanh", tanh, inf, 1},
                                 {"tanh", tanh, -inf, -1},
                                 {"tanh", tanh, L::max(), 1},
                                 {"tanh", tanh, tiny, tiny},
                                 {"tanh", tanh, -tiny, -tiny},
                                 {"tanh", tanh, L::min(), L::min()},
                                 {"softplus", softplus, inf, inf},
                                 {"softplus", softplus, -inf, 0},
                                 {"softplus", softplus, L::max(), L::max()},
                                 {"silu", silu, z, z},
                                 {"silu", silu, -z, -z},
                                 {"silu", silu, inf, inf},
                                 {"silu", silu, -inf, -z},
                                 {"silu", silu, L::max(), L::max()},
                                 {"silu", silu, L::lowest(), -z},
                                 {"sin", sin, z, z},
                                 {"sin", sin, -z, -z},
                                 {"sin", sin, inf, nan},
                                 {"sin", sin, -inf, nan},
                                 {"cos", cos, z, 1},
                                 {"cos", cos, inf, nan}};
  for (const Row& row : rows) {
    const T y = row.f(row.x);
    CHECK(same(y, row.y), "%s(%g) = %a, not %a", row.name, double(row.x), double(y), double(row.y));
    CHECK(row.f(nan) != row.f(nan), "%s(nan)", row.name);
  }
  // The slopes stay finite where the values do not.
  CHECK(r::silu_slope(inf).slope == 1 && r::silu_slope(-inf).slope == 0, "silu'");
  CHECK(r::softplus_slope(inf).slope == 1 && r::softplus_slope(-inf).slope == 0, "softplus'");
}

// csrc/simd/vec.h against plain arithmetic.
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
    bool some = false;
    for (int i = 0; i < N; ++i) some |= a[i] < b[i];
    CHECK(any(va < vb) == some, "any");

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
  const uint64_t stride = (full ? 255 : 4093) * r::kLanes;
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

void test_vec() {
  test_vec_of<float>();
  test_vec_of<double>();
  test_half_precision();
}

// The results of everything on a fixed sample, every NaN the same.
template <class T>
void dump(std::FILE* file) {
  std::vector<T> x(1 << 16), y(x.size());
  std::mt19937_64 random(7);
  for (size_t i = 0; i < x.size(); ++i) {
    const T any = bits<T>(Bits<T>(random()));
    x[i] = i % 2 ? any : T((double(random() >> 11) * 0x1p-53 - 0.5) * (i % 4 ? 20 : 220));
  }
  const auto write = [&] {
    for (T& v : y)
      if (v != v) v = std::numeric_limits<T>::quiet_NaN();
    std::fwrite(y.data(), sizeof(T), y.size(), file);
  };
  using W = std::conditional_t<sizeof(T) == 4, double, long double>;
  for (const auto& f : functions<T, W>()) {
    for (size_t i = 0; i < x.size(); i += kBlock) f.block(&x[i], &y[i]);
    write();
  }
  const auto each = [&](auto f) {
    for (size_t i = 0; i < x.size(); i += r::kLanes) f(Vec<T>::load(&x[i])).store(&y[i]);
    write();
  };
  each([](Vec<T> v) { return r::sincos(v).sin; });
  each([](Vec<T> v) { return r::sincos(v).cos; });
  each([](Vec<T> v) { return r::softplus_slope(v).slope; });
  each([](Vec<T> v) { return r::silu_slope(v).slope; });
  each([](Vec<T> v) { return Vec<T>(sum(v)); });
  each([](Vec<T> v) { return sqrt(v) * fma(v, v, -v); });
  each([](Vec<T> v) { return min(v, max(-v, T(1))); });
  each([](Vec<T> v) { return scale2(v, round(v)); });
}

}  // namespace

int main(int argc, char** argv) {
#if !defined(__AVX2__)
  full = false;
#endif
  std::string dump_to;
  for (int i = 1; i < argc; ++i) {
    if (!std::strcmp(argv[i], "--full")) full = true;
    if (!std::strcmp(argv[i], "--dump") && i + 1 < argc) dump_to = argv[++i];
  }
  if (!dump_to.empty()) {
    std::FILE* file = std::fopen(dump_to.c_str(), "wb");
    if (!file) return 1;
    dump<float>(file);
    dump<double>(file);
    return std::fclose(file) ? 1 : 0;
  }
  test_vec();
  test_exact_points<float>();
  test_exact_points<double>();
  const std::vector<float> floats = float_samples();
  const std::vector<double> doubles = double_samples();
  test_accuracy<float, double>(floats);
  test_prescaled(floats);
  test_sincos<float, double>(floats, 1.5);
  test_accuracy<double, long double>(doubles);
  test_sincos<double, long double>(doubles, 1.5);
  std::printf(failures ? "%d FAILED\n" : "ok\n", failures);
  return failures != 0;
}
