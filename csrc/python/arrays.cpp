// NumPy arrays as arguments of ops, and results as NumPy arrays: no element is copied.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <atomic>
#include <string>
#include <utility>
#include <vector>

#include "python/module.h"
#include "python/op.h"
#include "torch/check.h"

namespace py = pybind11;

namespace recurra {
namespace {

std::string text_of(const py::handle& object) { return py::str(object); }
std::string type_of(const py::handle& object) {
  return text_of(py::type::handle_of(object).attr("__name__"));
}

[[noreturn]] void wrong_type(const CallableOp& op, const Parameter& p, const std::string& wanted,
                             const std::string& got) {
  throw py::type_error(op.name + ": " + p.name + " must be " + wanted +
                       (p.optional ? " or None" : "") + ", got " + got);
}

// The numbers of NumPy's types, which are part of its ABI.
enum { kBool = 0, kInt = 5, kLong = 7, kLongLong = 9, kFloat = 11, kDouble = 12 };
enum { kComplexFloat = 14, kComplexDouble = 15, kHalf = 23, kFirstOfUsers = 256 };

// The dtype of an array; false for one that no op takes.
bool dtype_of(const py::dtype& given, DType& out) {
  static std::atomic<int> bfloat16{-1};  // ml_dtypes gets its number when it is imported
  const int number = given.num();
  switch (number) {
    case kBool: out = DType::b8; return true;
    case kInt: out = DType::i32; return true;
    case kLong:
    case kLongLong: out = DType::i64; return true;
    case kFloat: out = DType::f32; return true;
    case kDouble: out = DType::f64; return true;
    case kComplexFloat: out = DType::c64; return true;
    case kComplexDouble: out = DType::c128; return true;
    case kHalf: out = DType::f16; return true;
    default: break;
  }
  if (number < kFirstOfUsers) return false;
  if (number != bfloat16.load(std::memory_order_relaxed)) {
    if (text_of(given) != "bfloat16") return false;
    bfloat16.store(number, std::memory_order_relaxed);
  }
  out = DType::bf16;
  return true;
}

py::object numpy_dtype(DType dtype) {
  constexpr int numbers[] = {kFloat,         kDouble, -1,    kHalf, kComplexFloat,
                             kComplexDouble, kInt,    kLong, kBool};
  if (dtype == DType::bf16)
    return py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16"));
  return py::dtype(numbers[static_cast<int>(dtype)]);
}

Array array_of(const CallableOp& op, const Parameter& p, const py::handle& object) {
  if (!py::isinstance<py::array>(object))
    wrong_type(op, p, "a numpy.ndarray", type_of(object) + ": pass numpy.asarray(" + p.name + ")");
  const auto array = py::reinterpret_borrow<py::array>(object);
  const char* const name = op.name.c_str();
  const py::dtype given = array.dtype();
  if (const char order = given.byteorder(); order != '=' && order != '|')
    fail(name, p.name + " must be in the byte order of this machine, got " +
                   text_of(given.attr("str")) + ": pass " + p.name + ".astype(" + p.name +
                   ".dtype.newbyteorder(\"=\"))");
  if (p.written && !array.writeable())
    fail(name, p.name + " is written in place and must not be read-only");
  if (array.ndim() > Array::kMostDims)
    fail(name, p.name + " must have at most " + std::to_string(Array::kMostDims) +
                   " dimensions, got " + std::to_string(array.ndim()));
  DType dtype = DType::f32;
  const bool known = dtype_of(given, dtype);
  const int64_t size = given.itemsize();
  bool whole = (array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0;
  int64_t sizes[Array::kMostDims], strides[Array::kMostDims];
  for (py::ssize_t n = 0; n < array.ndim(); ++n) {
    sizes[n] = array.shape(n);
    strides[n] = known ? array.strides(n) / size : 0;
    whole = whole && (!known || array.strides(n) % size == 0);
  }
  if (!whole)
    fail(name,
         p.name + " must be aligned, with strides of whole elements: pass " + p.name + ".copy()");
  Array a(const_cast<void*>(array.data()), dtype, array.ndim(), sizes, strides);
  if (!known) a.unknown = text_of(given);
  return a;
}

int64_t integer_of(const CallableOp& op, const Parameter& p, const py::handle& object) {
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(object.ptr()));
  if (!index) throw py::error_already_set();
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow) wrong_type(op, p, "an integer of 64 bits", text_of(index));
  return value;
}

double number_of(const py::handle& object) {
  const double value = PyFloat_AsDouble(object.ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

std::string string_of(const py::handle& object) {
  Py_ssize_t size = 0;
  const char* const text = PyUnicode_AsUTF8AndSize(object.ptr(), &size);
  if (!text) throw py::error_already_set();
  return std::string(text, static_cast<size_t>(size));
}

Value value_of(const CallableOp& op, const Parameter& p, const py::handle& object) {
  if (object.is_none() && p.optional) return {};
  PyObject* const raw = object.ptr();
  switch (p.kind) {
    case Kind::array: return array_of(op, p, object);
    case Kind::boolean:
      if (PyBool_Check(raw)) return raw == Py_True;
      if (type_of(object) == "bool" || type_of(object) == "bool_") return object.cast<bool>();
      wrong_type(op, p, "True or False", text_of(py::repr(object)));
    case Kind::integer:
      if (!PyIndex_Check(raw)) wrong_type(op, p, "an integer", text_of(py::repr(object)));
      return integer_of(op, p, object);
    case Kind::number:
      if (!PyNumber_Check(raw)) wrong_type(op, p, "a number", text_of(py::repr(object)));
      return number_of(object);
    case Kind::text:
      if (!PyUnicode_Check(raw)) wrong_type(op, p, "a string", text_of(py::repr(object)));
      return string_of(object);
  }
  return {};
}

// The memory of the result lives as long as the array or a view of it.
py::object numpy_array(const Array& a) {
  const py::ssize_t size = item_size(a.dtype);
  std::vector<py::ssize_t> shape, strides;
  for (int64_t n = 0; n < a.dim(); ++n) {
    shape.push_back(a.size(n));
    strides.push_back(a.stride(n) * size);
  }
  auto owner = std::make_unique<std::shared_ptr<void>>(a.memory());
  const py::capsule memory(owner.get(),
                           [](void* p) { delete static_cast<std::shared_ptr<void>*>(p); });
  owner.release();
  return py::array(numpy_dtype(a.dtype), std::move(shape), std::move(strides), a.data_ptr(),
                   memory);
}

py::object call(const std::string& name, const py::args& arguments) {
  const CallableOp& op = callable_op(Platform::cpu, name);
  if (arguments.size() != op.parameters.size())
    throw py::type_error(name + " takes " + std::to_string(op.parameters.size()) + " values, got " +
                         std::to_string(arguments.size()));
  std::vector<Value> values;
  values.reserve(arguments.size());
  for (size_t i = 0; i < arguments.size(); ++i)
    values.push_back(value_of(op, op.parameters[i], arguments[i]));
  Results results;
  {
    py::gil_scoped_release nogil;
    results = op.function(values);
  }
  if (results.empty()) return py::none();
  if (results.size() == 1) return numpy_array(results[0]);
  py::tuple out(results.size());
  for (size_t i = 0; i < results.size(); ++i) out[i] = numpy_array(results[i]);
  return out;
}

}  // namespace

void define_arrays(py::module_& m) {
  m.def("call", &call, py::arg("op"),
        "Calls an op with a value for each of its arguments, NumPy arrays for tensors, and returns "
        "new arrays. recurra.numpy holds the functions that one calls.");
}

}  // namespace recurra
