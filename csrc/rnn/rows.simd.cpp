// Every cell over blocks of rows: the table that the engines use.
#include "cells/all.h"
#include "cells/jacobian.h"
#include "math/batch.h"
#include "math/taped.h"
#include "rnn/cell_rows.h"
#include "rnn/converged.h"

namespace recurra::RECURRA_ISA::recurrent {
namespace {

// Vectors that advance together, so that one need not wait for the other's latency.
template <class T>
constexpr int kTogether = sizeof(T) == 4 && Vec<T>::K == 1 ? 2 : 1;

template <class V>
struct Lanes;
template <class T>
struct Lanes<Vec<T>> {
  static constexpr int width = kLanes;
  static RECURRA_INLINE Vec<T> load(const T* p) { return Vec<T>::load(p); }
  static RECURRA_INLINE void store(T* p, const Vec<T>& v) { v.store(p); }
  static RECURRA_INLINE void stream(T* p, const Vec<T>& v) { v.stream(p); }
};
template <class T, int M>
struct Lanes<Batch<Vec<T>, M>> {
  using V = Batch<Vec<T>, M>;
  static constexpr int width = M * kLanes;
  static RECURRA_INLINE V load(const T* p) {
    V out;
    for_each_index<M>([&](auto i) RECURRA_LAMBDA { out.v[i] = Vec<T>::load(p + i * kLanes); });
    return out;
  }
  static RECURRA_INLINE void store(T* p, const V& v) {
    for_each_index<M>([&](auto i) RECURRA_LAMBDA { v.v[i].store(p + i * kLanes); });
  }
  static RECURRA_INLINE void stream(T* p, const V& v) {
    for_each_index<M>([&](auto i) RECURRA_LAMBDA { v.v[i].stream(p + i * kLanes); });
  }
};

// f(Lanes, t, c) for every step and every lane of a block.
template <class T, class F>
RECURRA_INLINE void for_each_row(const Block<T>& b, const F& f) {
  constexpr int M = kTogether<T>;
  for (int64_t t = 0; t < b.steps; ++t) {
    int64_t c = 0;
    if constexpr (M > 1)
      for (; c + M * kLanes <= b.width; c += M * kLanes) f(Lanes<Batch<Vec<T>, M>>{}, t, c);
    for (; c < b.width; c += kLanes) f(Lanes<Vec<T>>{}, t, c);
  }
}

template <class Cell>
struct Sizes {
  static constexpr int G = kInputs<Cell>, S = kStates<Cell>, P = kParams<Cell>;
  static_assert(G <= kMostInputs && S <= kMostStates && P <= kMostParams);

  static constexpr unsigned states = ((1u << S) - 1) << G;
  // What the backward needs: parameters that enter with an input have its derivative.
  static constexpr unsigned all() {
    unsigned mask = (1u << (G + S)) - 1;
    for (int p = 0; p < P; ++p)
      if (Cell::affine_params.find(p) < 0) mask |= 1u << (G + S + p);
    return mask;
  }
};

// x, h and p of a vector of lanes. One longer than needed: a cell may have no parameters.
template <class Cell, class V>
struct Arguments {
  V x[Sizes<Cell>::G + 1], h[Sizes<Cell>::S], p[Sizes<Cell>::P + 1];

  template <class T, class L>
  RECURRA_INLINE Arguments(const Block<T>& b, L, int64_t t, int64_t c) {
    for_each_index<Sizes<Cell>::G>(
        [&](auto g) RECURRA_LAMBDA { x[g] = L::load(b.x[g] + t * b.x_stride + c); });
    for_each_index<Sizes<Cell>::S>([&](auto s)
                                       RECURRA_LAMBDA { h[s] = L::load(b.h + s * b.apart + c); });
    for_each_index<Sizes<Cell>::P>(
        [&](auto p_) RECURRA_LAMBDA { p[p_] = L::load(b.params + p_ * b.apart + c); });
  }
};

template <class Cell, class T>
RECURRA_INLINE void fetch_inputs(const Block<T>& b, int width, int64_t t, int64_t c) {
  if (b.ahead == 0) return;
  for_each_index<Sizes<Cell>::G>([&](auto g) RECURRA_LAMBDA {
    const T* const row = b.x[g] + (t + b.ahead) * b.x_stride + c;
    for (int i = 0; i < width; i += 64 / static_cast<int>(sizeof(T))) prefetch<2>(row + i);
  });
}

template <class T, class L, class V>
RECURRA_INLINE void put_state(const Block<T>& b, L, int s, int64_t t, int64_t c, const V& state) {
  L::store(b.h + s * b.apart + c, state);
  if (!b.y[s]) return;
  T* const to = b.y[s] + t * b.y_stride + c;
  b.past ? L::stream(to, state) : L::store(to, state);
}

template <class Cell, class T>
void advance(const Block<T>& b) {
  for_each_row(b, [&](auto lanes, int64_t t, int64_t c) RECURRA_LAMBDA {
    using L = decltype(lanes);
    using V = decltype(L::load(b.h));
    fetch_inputs<Cell>(b, L::width, t, c);
    const Arguments<Cell, V> at(b, lanes, t, c);
    V next[Sizes<Cell>::S];
    step<Cell>(at.x, at.h, at.p, next);
    for_each_index<Sizes<Cell>::S>([&](auto s)
                                       RECURRA_LAMBDA { put_state(b, lanes, s, t, c, next[s]); });
  });
}

template <class Cell, class T>
void advance_with_product(const Block<T>& b) {
  constexpr int G = Sizes<Cell>::G, S = Sizes<Cell>::S;
  constexpr unsigned D = Sizes<Cell>::states;
  for_each_row(b, [&](auto lanes, int64_t t, int64_t c) RECURRA_LAMBDA {
    using L = decltype(lanes);
    using V = decltype(L::load(b.h));
    const Arguments<Cell, V> at(b, lanes, t, c);
    const auto next = step_along<Cell, D>(at.x, at.h, at.p);
    V before[S][S];
    for_each_index<S * S>([&](auto i) RECURRA_LAMBDA {
      before[i / S][i % S] = L::load(b.product + i * b.apart + c);
    });
    for_each_index<S>([&](auto s) RECURRA_LAMBDA {
      const auto state = get<s.value>(next);
      put_state(b, lanes, s, t, c, value(state));
      for_each_index<S>([&](auto j) RECURRA_LAMBDA {
        V sum{Vec<T>(T(0))};
        for_each_index<S>([&](auto i) RECURRA_LAMBDA {
          if constexpr ((kDependsOn<Cell, D, s.value, V> >> (G + i.value)) & 1)
            sum = fma(tangent<G + i.value>(state), before[i][j], sum);
        });
        L::store(b.product + (s * S + j) * b.apart + c, sum);
      });
    });
  });
}

// The rows that are held of a step: the states before it, and what its elementary functions come
// to.
template <class V>
struct Recorder {
  static constexpr bool replays = false;
  Number<V>* next;
  int64_t apart;

  RECURRA_INLINE void keep(const V& v) {
    Lanes<V>::store(next, v);
    next += apart;
  }
};
template <class V>
struct Player {
  static constexpr bool replays = true;
  const Number<V>* next;
  int64_t apart;

  RECURRA_INLINE V take() {
    const V v = Lanes<V>::load(next);
    next += apart;
    return v;
  }
};
struct Counter {
  static constexpr bool replays = false;
  int count = 0;

  RECURRA_INLINE void keep(float) { ++count; }
};

template <class V, class Tape, int N>
RECURRA_INLINE void on_tape(const V (&from)[N], Tape& tape, Taped<V, Tape> (&to)[N]) {
  for_each_index<N>([&](auto i) RECURRA_LAMBDA { to[i] = {from[i], &tape}; });
}
template <class Cell, class V, class Tape>
struct TapedArguments {
  using X = Taped<V, Tape>;
  X x[Sizes<Cell>::G + 1], h[Sizes<Cell>::S], p[Sizes<Cell>::P + 1];

  RECURRA_INLINE TapedArguments(const Arguments<Cell, V>& at, Tape& tape) {
    on_tape(at.x, tape, x);
    on_tape(at.h, tape, h);
    on_tape(at.p, tape, p);
  }
};

template <class Cell>
int held_rows() {
  using X = Taped<float, Counter>;
  Counter counter;
  X numbers[kMostParams];
  for (X& x : numbers) x = {0.5f, &counter};
  X next[Sizes<Cell>::S];
  step<Cell>(numbers, numbers, numbers, next);
  return Sizes<Cell>::S + counter.count;
}

template <class Cell, class T>
void record(const Block<T>& b) {
  constexpr int S = Sizes<Cell>::S;
  for_each_row(b, [&](auto lanes, int64_t t, int64_t c) RECURRA_LAMBDA {
    using L = decltype(lanes);
    using V = decltype(L::load(b.h));
    fetch_inputs<Cell>(b, L::width, t, c);
    const Arguments<Cell, V> at(b, lanes, t, c);
    T* const to = b.held + t * b.held_rows * b.apart + c;
    for_each_index<S>([&](auto s) RECURRA_LAMBDA { L::store(to + s * b.apart, at.h[s]); });
    Recorder<V> tape{to + S * b.apart, b.apart};
    const TapedArguments<Cell, V, Recorder<V>> on(at, tape);
    Taped<V, Recorder<V>> next[S];
    step<Cell>(on.x, on.h, on.p, next);
    for_each_index<S>([&](auto s) RECURRA_LAMBDA { L::store(b.h + s * b.apart + c, next[s].v); });
  });
}

template <class Cell, class T>
void reverse(const Block<T>& b) {
  using V = Vec<T>;
  constexpr int G = Sizes<Cell>::G, S = Sizes<Cell>::S, P = Sizes<Cell>::P;
  constexpr unsigned D = Sizes<Cell>::all();
  for (int64_t t = b.steps - 1; t >= 0; --t)
    for (int64_t c = 0; c < b.width; c += kLanes) {
      const T* const held = b.held + t * b.held_rows * b.apart + c;
      V mu[S];
      Arguments<Cell, V> at(b, Lanes<V>{}, t, c);
      for_each_index<S>([&](auto s) RECURRA_LAMBDA {
        at.h[s] = V::load(held + s * b.apart);
        mu[s] = V::load(b.mu + s * b.apart + c);
        if (!b.dy[s]) return;
        const T* const dy = b.dy[s] + t * b.dy_stride + c;
        if (b.ahead)
          for (int i = 0; i < kLanes; i += 64 / static_cast<int>(sizeof(T)))
            prefetch<2>(dy + b.ahead * b.dy_stride + i);
        mu[s] = mu[s] + V::load(dy);
      });
      Player<V> tape{held + S * b.apart, b.apart};
      const TapedArguments<Cell, V, Player<V>> on(at, tape);
      const auto next = step_along<Cell, D>(on.x, on.h, on.p);
      // mu' J along direction k.
      const auto along = [&](auto k) RECURRA_LAMBDA {
        V sum(T(0));
        for_each_index<S>([&](auto s) RECURRA_LAMBDA {
          using State = decltype(get<s.value>(next));
          if constexpr (kHas<k.value, State>)
            sum = fma(mu[s], tangent<k.value>(get<s.value>(next)).v, sum);
        });
        return sum;
      };
      V dx[G + 1];
      for_each_index<G>([&](auto g) RECURRA_LAMBDA {
        dx[g] = along(g);
        T* const to = b.dx[g] + t * b.dx_stride + c;
        b.past ? dx[g].stream(to) : dx[g].store(to);
      });
      for_each_index<P>([&](auto p) RECURRA_LAMBDA {
        T* const to = b.dparams + p * b.apart + c;
        constexpr int entry = Cell::affine_params.find(p.value);
        V sum = V::load(to);
        if constexpr (entry < 0) {
          sum = sum + along(Index<G + S + p.value>{});
        } else {
          constexpr Affine a = Cell::affine_params.entry[entry];
          if constexpr (a.state == kAlone)
            sum = sum + dx[a.input];
          else
            sum = fma(dx[a.input], at.h[a.state], sum);
        }
        sum.store(to);
      });
      for_each_index<S>([&](auto s) RECURRA_LAMBDA {
        along(Index<G + s.value>{}).store(b.mu + s * b.apart + c);
      });
    }
}

// One pass of the textbook form over the states in y. h: the state before, of the pass before; mu:
// how far that one has moved; product: of each state the most by which a move was too large, the
// largest residual, and its size of late. What is not finite stays so in the first two.
template <class Cell, class T>
void newton(const Block<T>& b) {
  constexpr int G = Sizes<Cell>::G, S = Sizes<Cell>::S;
  constexpr unsigned D = Sizes<Cell>::states;
  for_each_row(b, [&](auto lanes, int64_t t, int64_t c) RECURRA_LAMBDA {
    using L = decltype(lanes);
    using V = decltype(L::load(b.h));
    const Arguments<Cell, V> at(b, lanes, t, c);
    const auto next = step_along<Cell, D>(at.x, at.h, at.p);
    V moved[S];
    for_each_index<S>([&](auto s) RECURRA_LAMBDA { moved[s] = L::load(b.mu + s * b.apart + c); });
    const auto keep = [&](int row, const V& x) RECURRA_LAMBDA {
      T* const to = b.product + row * b.apart + c;
      const V most = L::load(to);
      L::store(to, select(most == most, select(x <= most, most, x), most));
    };
    for_each_index<S>([&](auto s) RECURRA_LAMBDA {
      const auto state = get<s.value>(next);
      T* const to = b.y[s] + t * b.y_stride + c;
      const V old = L::load(to);
      V now = value(state);
      keep(S + s, abs(now - old));
      for_each_index<S>([&](auto i) RECURRA_LAMBDA {
        if constexpr ((kDependsOn<Cell, D, s.value, V> >> (G + i.value)) & 1)
          now = fma(tangent<G + i.value>(state), moved[i], now);
      });
      T* const size = b.product + (2 * S + s) * b.apart + c;
      const V of_late = max(abs(now), L::load(size) * V{Vec<T>(T(0.9))});
      L::store(size, of_late);
      keep(s, abs(now - old) - of_late * V{Vec<T>(kConverged<T>)});
      L::store(to, now);
      L::store(b.h + s * b.apart + c, old);
      L::store(b.mu + s * b.apart + c, now - old);
    });
  });
}

template <class Cell, class T>
CellRows<T> rows_of() {
  CellRows<T> out{};
  out.inputs = kInputs<Cell>;
  out.states = kStates<Cell>;
  out.params = kParams<Cell>;
  out.output = Cell::output;
  out.held = held_rows<Cell>();
  out.advance = advance<Cell, T>;
  out.advance_with_product = advance_with_product<Cell, T>;
  out.record = record<Cell, T>;
  out.reverse = reverse<Cell, T>;
  out.newton = newton<Cell, T>;
  return out;
}

template <class T, class... Cell>
const CellRows<T>& pick(int cell, CellList<Cell...>) {
  static const CellRows<T> table[] = {rows_of<Cell, T>()...};
  return table[cell];
}

}  // namespace

template <class T>
const CellRows<T>& cell_rows(int cell) {
  return pick<T>(cell, Cells{});
}
template const CellRows<float>& cell_rows<float>(int);
template const CellRows<double>& cell_rows<double>(int);

}  // namespace recurra::RECURRA_ISA::recurrent
