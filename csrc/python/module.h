// The parts of recurra._native.
#pragma once
#include <pybind11/pybind11.h>

namespace recurra {

// call(): an op on NumPy arrays.
void define_arrays(pybind11::module_& m);
// What jax registers: one handler for all ops.
void define_xla(pybind11::module_& m);

}  // namespace recurra
