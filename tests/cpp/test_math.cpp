// Accuracy of csrc/math for the instruction set that this file is compiled for. Prints the largest
// error of every function and fails when a bound is exceeded.
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
#include "check.h"
#include "math_functions.h"
#include "simd/vec.h"

using r::Vec;
using namespace math_functions;

namespace {

bool full = true;
constexpr int kBlock = 4096;

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
