#include "cells/evaluate.h"

#include "cells/all.h"
#include "cells/jacobian.h"

namespace recurra {
namespace {

namespace isa = RECURRA_ISA;

template <class Names>
std::vector<const char*> list(const Names& names) {
  return {names.name, names.name + Names::size};
}

template <class Cell>
void evaluate(const double* x, const double* h, const double* p, int64_t n, double* h_out,
              double* jacobian) {
  constexpr int G = isa::kInputs<Cell>, S = isa::kStates<Cell>, P = isa::kParams<Cell>;
  constexpr int K = G + S + P;
  for (int64_t i = 0; i < n; ++i) {
    // One longer than needed, since a cell may have no parameters.
    double x1[G + 1], h1[S], p1[P + 1], next[S], J[S][K];
    for (int g = 0; g < G; ++g) x1[g] = x[g * n + i];
    for (int s = 0; s < S; ++s) h1[s] = h[s * n + i];
    for (int j = 0; j < P; ++j) p1[j] = p[j * n + i];
    isa::jacobian<Cell>(x1, h1, p1, next, J);
    for (int s = 0; s < S; ++s) {
      h_out[s * n + i] = next[s];
      if (!jacobian) continue;
      for (int k = 0; k < K; ++k) jacobian[(s * K + k) * n + i] = J[s][k];
    }
  }
}

std::vector<CellInfo> describe() {
  std::vector<CellInfo> all;
  isa::for_each_cell([&](auto cell) {
    using Cell = decltype(cell);
    CellInfo info{Cell::name, list(Cell::inputs), list(Cell::states), list(Cell::params),
                  {},         Cell::output};
    for (int i = 0; i < decltype(Cell::affine_params)::size; ++i) {
      const isa::Affine a = Cell::affine_params.entry[i];
      info.affine.push_back({a.param, a.input, a.state});
    }
    all.push_back(info);
  });
  return all;
}

const std::vector<CellInfo>& infos() {
  static const std::vector<CellInfo> all = describe();
  return all;
}

}  // namespace

std::vector<const char*> cell_names() {
  std::vector<const char*> out;
  for (const CellInfo& info : infos()) out.push_back(info.name);
  return out;
}

const CellInfo* cell_info(const char* name) {
  for (const CellInfo& info : infos())
    if (isa::same_name(info.name, name)) return &info;
  return nullptr;
}

bool evaluate_cell(const char* name, const double* x, const double* h, const double* p, int64_t n,
                   double* h_out, double* jacobian) {
  return isa::with_cell(name,
                        [&](auto cell) { evaluate<decltype(cell)>(x, h, p, n, h_out, jacobian); });
}

}  // namespace recurra
