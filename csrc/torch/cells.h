// Checks of what is asked of a cell, shared by the ops that run one.
#pragma once
#include <string>
#include <vector>

#include "cells/evaluate.h"
#include "torch/check.h"

namespace recurra {

// A cell and its place in the list.
struct Cell {
  int index;
  const CellInfo& info;
};

// Throws a sentence with all cells where none has that name.
Cell find_cell(const char* op, const std::string& name);

// Throws unless dimension `dim` of `argument` has one entry for each of `names`.
void check_size(const char* op, const std::string& cell, const char* argument, const Tensor& t,
                int dim, const char* letter, const char* what,
                const std::vector<const char*>& names);

// The inputs of x (..., G, N), the rows of params (P, N) and, where given, of a state (S, K, N).
void check_cell(const char* op, const CellInfo& info, const Tensor& x, const Tensor& params,
                const char* state_name, const OptionalTensor& h);

}  // namespace recurra
