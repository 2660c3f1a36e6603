// recurra._native: the ops on arrays of NumPy and of XLA, and what the command line needs, without
// torch. torch.ops never loads it. It holds a copy of the kernels, and so an instruction set and a
// thread count of its own, which start as torch.ops' do: from RECURRA_ISA and from OpenMP.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <dlfcn.h>

#include <atomic>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>

#include "bench/rates.h"
#include "cells/evaluate.h"
#include "parallel.h"
#include "python/module.h"
#include "simd/isa.h"

namespace py = pybind11;

namespace recurra {
namespace {

std::atomic<int> chosen_threads{0};

py::dict cpu_features() {
  py::dict flags;
  for (const CpuFlag& flag : cpu_flags()) flags[flag.name] = flag.present;
  py::dict out;
  out["isa"] = isa_name(isa());
  out["best"] = isa_name(best_isa());
  out["flags"] = flags;
  return out;
}

std::string isa_in_use(const std::optional<std::string>& cap) {
  if (cap) cap_isa(cap->c_str());
  return isa_name(isa());
}

int threads(std::optional<int> count) {
  if (count) {
    if (*count < 1) throw std::invalid_argument("threads: count must be at least 1");
    chosen_threads.store(*count);
    set_thread_source([] { return chosen_threads.load(std::memory_order_relaxed); });
  }
  return thread_count();
}

// torch's thread count, as torch.ops has it in the calling thread, from the library of a torch that
// is loaded already.
using TorchThreads = int32_t (*)(uint32_t* count);
TorchThreads torch_threads = nullptr;

bool follow_torch() {
  void* const library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  void* const found = library ? dlsym(library, "torch_get_num_threads") : nullptr;
  if (!found) return false;
  torch_threads = reinterpret_cast<TorchThreads>(found);
  set_thread_source([] {
    uint32_t count = 1;
    torch_threads(&count);
    return static_cast<int>(count);
  });
  return true;
}

template <class Value>
Value named(const std::map<std::string, Value>& table, const char* what, const std::string& name) {
  const auto found = table.find(name);
  if (found != table.end()) return found->second;
  std::string known;
  for (const auto& entry : table) known += (known.empty() ? "" : ", ") + entry.first;
  throw std::invalid_argument(std::string(what) + " must be one of " + known + ", got " + name);
}

const std::map<std::string, Loop> kLoops = {
    {"fma", Loop::fma},   {"exp2", Loop::exp2},
    {"exp", Loop::exp},   {"sigmoid", Loop::sigmoid},
    {"tanh", Loop::tanh}, {"softplus", Loop::softplus},
    {"silu", Loop::silu}, {"paragru_chain", Loop::paragru_chain}};
const std::map<std::string, StreamKind> kStreams = {
    {"triad", StreamKind::triad},
    {"triad_past_caches", StreamKind::triad_past_caches},
    {"read", StreamKind::read}};

double rate(const std::string& name, double milliseconds) {
  const Loop loop = named(kLoops, "loop", name);
  if (!(milliseconds > 0)) throw std::invalid_argument("rate: milliseconds must be positive");
  py::gil_scoped_release nogil;
  return loop_rate(loop, thread_count(), milliseconds);
}

using Floats = py::array_t<float, py::array::c_style>;

double stream(const std::string& kind, const Floats& a, const Floats& b, Floats& c) {
  if (a.size() != b.size() || a.size() != c.size())
    throw std::invalid_argument("stream: a, b and c must have the same size");
  float sum = 0;
  Stream args{named(kStreams, "kind", kind), a.data(), b.data(), c.mutable_data(), a.size(), &sum};
  if (args.kind == StreamKind::triad_past_caches && reinterpret_cast<uintptr_t>(args.c) % 64 != 0)
    throw std::invalid_argument("stream: c must be aligned to 64 bytes to be written past caches");
  py::gil_scoped_release nogil;
  return stream_seconds(args);
}

double exp2_ulp(float low, float high, int64_t count) {
  py::gil_scoped_release nogil;
  return exp2_max_ulp(low, high, count);
}

// What is measured here and printed by `recurra bench`.
void define_rates(py::module_& m) {
  m.def("rate", &rate, py::arg("loop"), py::arg("milliseconds") = 5.0,
        "Floats per nanosecond of a loop (fma, exp2, exp, sigmoid, tanh, softplus, silu, or "
        "paragru_chain, steps that wait for one another) on sixteen lanes in the L1 cache, all "
        "threads together; a fused multiply-add counts once.");
  m.def("stream", &stream, py::arg("kind"), py::arg("a").noconvert(), py::arg("b").noconvert(),
        py::arg("c").noconvert(),
        "Seconds of one pass c = 3 a + b (triad, triad_past_caches) or of reading a (read).");
  m.def("exp2_max_ulp", &exp2_ulp, py::arg("low") = -126.0f, py::arg("high") = 126.0f,
        py::arg("count") = 1 << 20,
        "Largest error, in units in the last place, of the exponential that kernels use.");
}

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;

py::dict describe_cell(const std::string& name) {
  const CellInfo* info = cell_info(name.c_str());
  if (!info) throw std::invalid_argument("cell_info: no cell is named " + name);
  py::dict out;
  out["inputs"] = info->inputs;
  out["states"] = info->states;
  out["params"] = info->params;
  out["output"] = info->states[static_cast<size_t>(info->output)];
  return out;
}

py::tuple step_cell(const std::string& name, const Doubles& x, const Doubles& h, const Doubles& p) {
  const CellInfo* info = cell_info(name.c_str());
  if (!info) throw std::invalid_argument("evaluate_cell: no cell is named " + name);
  const auto inputs = static_cast<py::ssize_t>(info->inputs.size()),
             states = static_cast<py::ssize_t>(info->states.size()),
             params = static_cast<py::ssize_t>(info->params.size());
  const py::ssize_t n = h.ndim() == 2 ? h.shape(1) : -1;
  const auto require = [&](const char* what, const Doubles& a, py::ssize_t rows) {
    if (a.ndim() != 2 || a.shape(0) != rows || a.shape(1) != n)
      throw std::invalid_argument(std::string("evaluate_cell: ") + what + " must have shape (" +
                                  std::to_string(rows) + ", n)");
  };
  require("h", h, states);
  require("x", x, inputs);
  require("p", p, params);
  py::array_t<double> out({states, n}), jacobian({states, inputs + states + params, n});
  evaluate_cell(name.c_str(), x.data(), h.data(), p.data(), n, out.mutable_data(),
                jacobian.mutable_data());
  return py::make_tuple(out, jacobian);
}

void define_cells(py::module_& m) {
  m.def("cell_names", &cell_names, "The names of all cells.");
  m.def("cell_info", &describe_cell, py::arg("name"),
        "The names of a cell's inputs, states and params, and of the state that is its output.");
  m.def("evaluate_cell", &step_cell, py::arg("name"), py::arg("x"), py::arg("h"), py::arg("p"),
        "One step in float64 of n channels: x (G, n), h (S, n), p (P, n) -> h (S, n) and the "
        "Jacobian (S, G + S + P, n) in x, h and p.");
}

void define_machine(py::module_& m) {
  m.def("cpu_features", &cpu_features,
        "The instruction set in use (isa), the best of this machine (best) and its flags.");
  m.def("isa", &isa_in_use, py::arg("cap") = py::none(),
        "The instruction set in use here; a name (scalar, avx2, avx512) caps it from now on.");
  m.def("threads", &threads, py::arg("count") = py::none(),
        "The number of threads used here; a count sets it from now on.");
  m.def("follow_torch", &follow_torch,
        "Takes the number of threads from the torch of this process from now on; False where none "
        "is loaded.");
}

}  // namespace
}  // namespace recurra

PYBIND11_MODULE(_native, m) {
  m.doc() = "Kernels and machine figures of recurra without torch.";
  recurra::define_arrays(m);
  recurra::define_xla(m);
  recurra::define_cells(m);
  recurra::define_machine(m);
  recurra::define_rates(m);
}
