// What the engines of rnn ask of a cell: to be run over blocks of steps, in rows of lanes, with or
// without its derivatives. Engines know of a cell only this table, so that a new cell costs four
// short functions for each type, and an engine is there once.
#pragma once
#include "tile.h"

namespace recurra::RECURRA_ISA::recurrent {

constexpr int kMostInputs = 4, kMostStates = 4, kMostParams = 8;

// Rows of `apart` numbers that the lanes keep from step to step; a block uses the first `width`.
// Every pointer is to the first lane of the block.
template <class T>
struct Block {
  int64_t steps, width;  // width in lanes, a multiple of 16
  int64_t apart;

  const T* x[kMostInputs];  // input g of step t lies at x[g] + t * x_stride
  int64_t x_stride;
  // Steps from one whose inputs, or cotangents, are read to one whose are fetched meanwhile: no
  // machine foresees rows this far apart. Zero where they are near already.
  int64_t ahead = 0;
  const T* params;         // rows
  T* h;                    // rows: the states, advanced in place
  T* y[kMostStates] = {};  // state s after step t to y[s] + t * y_stride; null: not wanted
  int64_t y_stride = 0;
  bool past = false;  // y, or dx, past the caches

  T* product = nullptr;  // (states, states) rows: multiplied from the left by each step's Jacobian

  T* held = nullptr;              // (steps, held_rows) rows: what record leaves to reverse
  int64_t held_rows = 0;          // CellRows::held
  const T* dy[kMostStates] = {};  // cotangent of y[s]; null: none
  int64_t dy_stride = 0;
  T* dx[kMostInputs];
  int64_t dx_stride;
  T* mu;       // rows: the cotangents of the states, taken back in place
  T* dparams;  // rows: added to
};

template <class T>
struct CellRows {
  int inputs, states, params, output;
  int held;  // rows of a step

  void (*advance)(const Block<T>&);               // h, y
  void (*advance_with_product)(const Block<T>&);  // h, y, product
  void (*record)(const Block<T>&);                // h, held
  void (*reverse)(const Block<T>&);               // from x and held: dx, mu, dparams
  void (*newton)(const Block<T>&);                // a sweep of the textbook form: see rows.simd.cpp
};

template <class T>
const CellRows<T>& cell_rows(int cell);

// Sets rows of lanes to zero.
template <class T>
RECURRA_INLINE void clear_rows(T* rows, int64_t count, int64_t apart, int64_t width) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < width; c += kLanes) Vec<T>(T(0)).store(rows + i * apart + c);
}

// Zeros for what is subnormal. A factor or a cotangent that decays along time would stay so for
// ever, where a multiplication takes a hundred times as long.
template <class T>
RECURRA_INLINE void flush_rows(T* rows, int64_t count, int64_t apart, int64_t width) {
  constexpr T least = sizeof(T) == 4 ? T(0x1p-126) : T(0x1p-1022);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < width; c += kLanes) {
      const Vec<T> v = Vec<T>::load(rows + i * apart + c);
      select(abs(v) < Vec<T>(least), Vec<T>(T(0)), v).store(rows + i * apart + c);
    }
}

// Whether the state is emptied before step t of a sequence.
RECURRA_INLINE bool resets(const View<2>& reset, const Sequence& s, int64_t t) {
  return reset && *reinterpret_cast<const uint8_t*>(reset.at(s.batch, s.begin + t));
}
// Steps from t on that are walked without emptying the state in between.
RECURRA_INLINE int64_t run_length(const View<2>& reset, const Sequence& s, int64_t t,
                                  int64_t steps) {
  int64_t n = 1;
  while (n < steps && !resets(reset, s, t + n)) ++n;
  return reset ? n : steps;
}

// Input, output or state g of a sequence as a plane.
RECURRA_INLINE Plane plane(const View<4>& v, const Sequence& s, int64_t g, int64_t channel) {
  if (!v) return {};
  return {v.at(s.batch, s.begin, g, channel), v.dtype, v.step(1), v.step(3)};
}
RECURRA_INLINE Plane state_plane(const View<3>& v, int64_t n, int64_t s, int64_t channel) {
  if (!v) return {};
  return {v.at(n, s, channel), v.dtype, 0, v.step(2)};
}

// Whether rows of channels lie in memory as they are worked on.
template <class T>
RECURRA_INLINE bool is_rows(const View<4>& v) {
  return v.dtype == kDType<T> && (v.step(3) == 1 || v.size[3] == 0) && v.size[3] % kLanes == 0;
}

}  // namespace recurra::RECURRA_ISA::recurrent
