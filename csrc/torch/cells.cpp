#include "torch/cells.h"

namespace recurra {
namespace {

std::string listed(const std::vector<const char*>& names) {
  std::string out;
  for (const char* name : names) out += (out.empty() ? "" : ", ") + std::string(name);
  return out;
}

}  // namespace

Cell find_cell(const char* op, const std::string& name) {
  const std::vector<const char*> all = cell_names();
  for (size_t i = 0; i < all.size(); ++i)
    if (name == all[i]) return {static_cast<int>(i), *cell_info(all[i])};
  fail(op, "cell must be one of " + listed(all) + ", got \"" + name + "\"");
}

void check_size(const char* op, const std::string& cell, const char* argument, const Tensor& t,
                int dim, const char* letter, const char* what,
                const std::vector<const char*>& names) {
  if (t.size(dim) == static_cast<int64_t>(names.size())) return;
  fail(op, std::string(argument) + " must have " + letter + " = " + std::to_string(names.size()) +
               " for the " + what + " of " + cell + " (" + listed(names) + "), got " + shape_of(t));
}

void check_cell(const char* op, const CellInfo& info, const Tensor& x, const Tensor& params,
                const char* state_name, const OptionalTensor& h) {
  const std::string name = info.name;
  check_size(op, name, "x", x, static_cast<int>(x.dim()) - 2, "G", "inputs", info.inputs);
  check_size(op, name, "params", params, 0, "P", "parameters", info.params);
  if (h) check_size(op, name, state_name, *h, 1, "K", "states", info.states);
}

}  // namespace recurra
