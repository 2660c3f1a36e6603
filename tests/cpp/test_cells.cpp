// Every cell: its dual Jacobian against central differences, vectors against plain numbers, what it
// declares about its parameters, and that the interface carries cells of several states.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cells/all.h"
#include "cells/evaluate.h"
#include "cells/jacobian.h"
#include "check.h"
#include "simd/vec.h"

namespace recurra::RECURRA_ISA {

// sLSTM (arXiv 2405.04517) with a diagonal recurrence: exponential gates kept finite by a running
// maximum, four states.
struct Slstm {
  static constexpr const char* name = "slstm";
  static constexpr auto inputs = names("i", "f", "z", "o");
  static constexpr auto states = names("c", "n", "m", "h");
  static constexpr auto params = names("r_i", "r_f", "r_z", "r_o");
  static constexpr auto affine_params =
      affine(Affine{0, 0, 3}, Affine{1, 1, 3}, Affine{2, 2, 3}, Affine{3, 3, 3});
  static constexpr int output = 3;

  template <class X, class H, class P>
  RECURRA_FN static auto step(X inputs, H states, P params) {
    auto [x_i, x_f, x_z, x_o] = inputs;
    auto [c, n, m, h] = states;
    auto [r_i, r_f, r_z, r_o] = params;
    auto i = fma(r_i, h, x_i);
    auto f = m - softplus(-fma(r_f, h, x_f));  // log of the forget gate, a sigmoid, and m
    auto m_new = max(f, i);
    auto forget = exp(f - m_new), input = exp(i - m_new);
    auto c_new = fma(forget, c, input * tanh(fma(r_z, h, x_z)));
    auto n_new = fma(forget, n, input);
    auto h_new = sigmoid(fma(r_o, h, x_o)) * (c_new / n_new);
    return pack(c_new, n_new, m_new, h_new);
  }
};

// Two states and a parameter that enters alone.
struct TwoStates {
  static constexpr const char* name = "two";
  static constexpr auto inputs = names("f", "g");
  static constexpr auto states = names("c", "h");
  static constexpr auto params = names("a", "bias");
  static constexpr auto affine_params = affine(Affine{1, 1, kAlone});
  static constexpr int output = 1;

  template <class X, class H, class P>
  RECURRA_FN static auto step(X inputs, H states, P params) {
    auto [x_f, x_g] = inputs;
    auto [c, h] = states;
    auto [a, bias] = params;
    auto f = sigmoid(fma(a, h * c, x_f));
    auto c_new = f * c + (1 - f) * silu(x_g + bias);
    return pack(c_new, tanh(c_new) * like(f, 0.75));
  }
};

// No parameters, and every function of the vocabulary on paths where it is smooth.
struct Vocabulary {
  static constexpr const char* name = "vocabulary";
  static constexpr auto inputs = names("x", "y");
  static constexpr auto states = names("h");
  static constexpr auto params = names();
  static constexpr auto affine_params = affine();
  static constexpr int output = 0;

  template <class X, class H, class P>
  RECURRA_FN static auto step(X inputs, H states, P) {
    auto [x, y] = inputs;
    auto [h] = states;
    auto wave = sincos(x * y);
    auto a = exp(-abs(x)) + exp2(y) - exp2_fast(h * like(h, 0.5)) * expm1(x);
    auto b = log1p(x * x) / sqrt(2 + h * h) + silu(x - 3) - softplus(y) / (1 + abs(h));
    auto c = select(x < y, wave.sin * h, wave.cos - h) + select(h > 0, x, 2 * y);
    auto d = max(x, y) * min(y, h) - max(h, 0) * min(1, x) + select(x <= 0, h, like(h, 0.25));
    return pack(fma(a, b, c) - fma(2, d, x) + fma(a, 3, 1) + fma(x, y, y) / 7 + (-h) - (1 - y));
  }
};

}  // namespace recurra::RECURRA_ISA

namespace r = recurra::RECURRA_ISA;

namespace {

// x, h and p of one step, one after the other; steps of a vector are sixteen of these.
template <class Cell, class V>
struct Point {
  static constexpr int G = r::kInputs<Cell>, S = r::kStates<Cell>, P = r::kParams<Cell>;
  static constexpr int K = G + S + P;
  V v[K], out[S], J[S][K];
  void step() { r::step<Cell>(v, v + G, v + G + S, out); }
  void jacobian() { r::jacobian<Cell>(v, v + G, v + G + S, out, J); }
};

template <class Cell>
void draw(std::mt19937_64& random, double* v) {
  std::normal_distribution<double> normal;
  using P = Point<Cell, double>;
  for (int k = 0; k < P::K; ++k) v[k] = normal(random);
  // A normaliser is positive.
  for (int s = 0; s < P::S; ++s)
    if (!std::strcmp(Cell::states.name[s], "n")) v[P::G + s] = 1 + std::abs(v[P::G + s]);
}

template <class Cell>
void test_jacobian() {
  using P = Point<Cell, double>;
  std::mt19937_64 random(5);
  double worst = 0;
  for (int trial = 0; trial < 2000; ++trial) {
    P point, plain;
    draw<Cell>(random, point.v);
    plain = point;
    point.jacobian();
    plain.step();
    for (int s = 0; s < P::S; ++s)
      CHECK(point.out[s] == plain.out[s], "%s: the dual step's value", Cell::name);
    for (int k = 0; k < P::K; ++k) {
      // Fourth order, and half of the points no further than a kink.
      double difference[P::S] = {}, other[P::S] = {};
      const double eps = 1e-4;
      for (int side = -2; side <= 2; ++side) {
        P shifted = point;
        shifted.v[k] += side * eps;
        shifted.step();
        const double weight = side == 0 ? 0 : std::abs(side) == 1 ? 8 : -1;
        for (int s = 0; s < P::S; ++s) {
          difference[s] += (side < 0 ? -weight : weight) * shifted.out[s] / (12 * eps);
          if (std::abs(side) == 1) other[s] += side * shifted.out[s] / (2 * eps);
        }
      }
      for (int s = 0; s < P::S; ++s) {
        // Where a maximum switches between the points the two orders disagree.
        if (std::abs(difference[s] - other[s]) > 1e-5 * (1 + std::abs(other[s]))) continue;
        const double error =
            std::abs(point.J[s][k] - difference[s]) / std::max(1.0, std::abs(difference[s]));
        worst = std::max(worst, error);
        CHECK(error < 1e-6, "%s: d %s / d %d = %g, not %g", Cell::name, Cell::states.name[s], k,
              point.J[s][k], difference[s]);
      }
    }
    for (int i = 0; i < decltype(Cell::affine_params)::size; ++i) {
      const r::Affine a = Cell::affine_params.entry[i];
      const double state = a.state == r::kAlone ? 1 : point.v[P::G + a.state];
      for (int s = 0; s < P::S; ++s) {
        const double along = point.J[s][P::G + P::S + a.param], want = point.J[s][a.input] * state;
        CHECK(std::abs(along - want) <= 1e-12 * std::max(1.0, std::abs(want)),
              "%s: parameter %d is not affine", Cell::name, a.param);
      }
      CHECK(Cell::affine_params.find(a.param) == i, "%s: find", Cell::name);
    }
    CHECK(Cell::affine_params.find(99) == -1, "%s: find", Cell::name);
  }
  std::printf("%-10s jacobian %d x %d: max relative difference %.1e\n", Cell::name, P::S, P::K,
              worst);
}

template <class Cell>
void test_vectors() {
  using Vd = r::Vec<double>;
  using Vf = r::Vec<float>;
  using P = Point<Cell, double>;
  std::mt19937_64 random(6);
  double worst = 0;
  for (int trial = 0; trial < 200; ++trial) {
    P point[r::kLanes];
    Point<Cell, Vd> doubles;
    Point<Cell, Vf> floats, floats_step;
    for (auto& p : point) {
      draw<Cell>(random, p.v);
      for (double& v : p.v) v = float(v);  // the same numbers in both types
      p.jacobian();
    }
    for (int k = 0; k < P::K; ++k) {
      double d[r::kLanes];
      float f[r::kLanes];
      for (int i = 0; i < r::kLanes; ++i) d[i] = point[i].v[k], f[i] = float(d[i]);
      doubles.v[k] = Vd::load(d);
      floats.v[k] = Vf::load(f);
    }
    floats_step = floats;
    doubles.jacobian();
    floats.jacobian();
    floats_step.step();
    for (int s = 0; s < P::S; ++s) {
      double d[r::kLanes];
      float f[r::kLanes], g[r::kLanes];
      doubles.out[s].store(d);
      floats.out[s].store(f);
      floats_step.out[s].store(g);
      for (int i = 0; i < r::kLanes; ++i) {
        CHECK(d[i] == point[i].out[s], "%s: vector and plain differ", Cell::name);
        CHECK(f[i] == g[i], "%s: float step with and without tangents", Cell::name);
        worst = std::max(worst, std::abs(f[i] - d[i]) / std::max(1.0, std::abs(d[i])));
      }
      for (int k = 0; k < P::K; ++k) {
        doubles.J[s][k].store(d);
        floats.J[s][k].store(f);
        for (int i = 0; i < r::kLanes; ++i) {
          CHECK(d[i] == point[i].J[s][k], "%s: vector and plain Jacobian", Cell::name);
          CHECK(std::abs(f[i] - d[i]) <= 2e-4 * std::max(1.0, std::abs(d[i])),
                "%s: float Jacobian %g, not %g", Cell::name, double(f[i]), d[i]);
        }
      }
    }
  }
  std::printf("%-10s float step: max difference %.1e\n", Cell::name, worst);
  CHECK(worst < 5e-5, "%s: float step", Cell::name);
}

// A chosen set of columns is the same as in the whole Jacobian, and the others stay as they were.
void test_some_columns() {
  using Cell = r::ParaGru;
  Point<Cell, double> all, some;
  std::mt19937_64 random(8);
  draw<Cell>(random, all.v);
  some = all;
  all.jacobian();
  for (double& j : some.J[0]) j = 99;
  r::jacobian_along<Cell, 0b0001000>(some.v, some.v + 3, some.v + 4, some.out, some.J);
  for (int k = 0; k < 7; ++k) CHECK(some.J[0][k] == (k == 3 ? all.J[0][k] : 99), "column %d", k);
}

// The equations of ParaGRU and its published Jacobian, by hand.
void test_paragru() {
  Point<r::ParaGru, double> q;
  std::mt19937_64 random(9);
  for (int trial = 0; trial < 100; ++trial) {
    draw<r::ParaGru>(random, q.v);
    q.jacobian();
    const double *x = q.v, h = q.v[3], *a = q.v + 4;
    const auto sigma = [](double v) { return 1 / (1 + std::exp(-v)); };
    const double z = sigma(a[0] * h + x[0]), s = sigma(a[1] * h + x[1]);
    const double n = std::tanh(a[2] * h * s + x[2]);
    const double next = z * n + (1 - z) * h;
    const double J = (1 - z) + (n - h) * z * (1 - z) * a[0] +
                     z * (1 - n * n) * a[2] * (s + h * s * (1 - s) * a[1]);
    CHECK(std::abs(q.out[0] - next) < 1e-14, "paragru %g, not %g", q.out[0], next);
    CHECK(std::abs(q.J[0][3] - J) < 1e-13, "paragru Jacobian %g, not %g", q.J[0][3], J);
  }
}

void test_evaluate() {
  const int64_t n = 5;
  const auto known = recurra::cell_names();
  CHECK(known.size() == std::size_t(r::Cells::size), "cell_names");
  CHECK(!recurra::cell_info("no such cell"), "unknown name");
  CHECK(!recurra::evaluate_cell("no such cell", nullptr, nullptr, nullptr, 0, nullptr, nullptr),
        "unknown name");
  r::for_each_cell([&](auto cell) {
    using Cell = decltype(cell);
    using P = Point<Cell, double>;
    const auto* info = recurra::cell_info(Cell::name);
    CHECK(info && info->inputs.size() == P::G && info->states.size() == P::S &&
              info->params.size() == P::P && info->output == Cell::output,
          "%s: cell_info", Cell::name);
    std::mt19937_64 random(4);
    std::vector<double> v(P::K * n), out(P::S * n), J(P::S * P::K * n);
    std::vector<P> points(n);
    for (int i = 0; i < n; ++i) {
      draw<Cell>(random, points[i].v);
      points[i].jacobian();
      for (int k = 0; k < P::K; ++k) v[k * n + i] = points[i].v[k];
    }
    CHECK(recurra::evaluate_cell(Cell::name, &v[0], &v[P::G * n], &v[(P::G + P::S) * n], n, &out[0],
                                 &J[0]),
          "%s: evaluate_cell", Cell::name);
    for (int i = 0; i < n; ++i)
      for (int s = 0; s < P::S; ++s) {
        // A few last places apart at most: another instruction set may have compiled it.
        CHECK(std::abs(out[s * n + i] - points[i].out[s]) < 1e-14, "%s: value", Cell::name);
        for (int k = 0; k < P::K; ++k)
          CHECK(std::abs(J[(s * P::K + k) * n + i] - points[i].J[s][k]) < 1e-13, "%s: Jacobian",
                Cell::name);
      }
  });
}

template <class Cell>
void test_cell() {
  test_jacobian<Cell>();
  test_vectors<Cell>();
}

}  // namespace

int main(int, char**) {
  r::for_each_cell([](auto cell) { test_cell<decltype(cell)>(); });
  test_cell<r::Slstm>();
  test_cell<r::TwoStates>();
  test_cell<r::Vocabulary>();
  test_some_columns();
  test_paragru();
  test_evaluate();
  const auto twelve = r::generate<12>([](auto i) { return double(i.value); });
  CHECK(r::get<11>(twelve) == 11 && twelve.a == 0, "pack of twelve");
  std::printf(failures ? "%d FAILED\n" : "ok\n", failures);
  return failures != 0;
}
