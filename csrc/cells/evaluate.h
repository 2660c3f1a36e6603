// The cells by name, in float64 on plain arrays: what a test or a tool needs without torch.
#pragma once
#include <cstdint>
#include <vector>

namespace recurra {

struct AffineParam {
  int param, input, state;  // enters only as input + param * state, or alone where state is -1
};
struct CellInfo {
  const char* name;
  std::vector<const char*> inputs, states, params;
  std::vector<AffineParam> affine;
  int output;  // the state that is the cell's output
};

std::vector<const char*> cell_names();

// Null for an unknown name; valid for the life of the process.
const CellInfo* cell_info(const char* name);

// One step of n independent channels: x (G, n), h (S, n), p (P, n) give h_out (S, n) and, unless it
// is null, jacobian (S, G + S + P, n). False for an unknown name.
bool evaluate_cell(const char* name, const double* x, const double* h, const double* p, int64_t n,
                   double* h_out, double* jacobian);

}  // namespace recurra
