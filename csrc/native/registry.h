// The ops by name, as functions of values: what NumPy and XLA call. A binding of csrc/torch
// registers itself here where it is compiled without torch, for the CPU or for CUDA.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "native/array.h"

namespace recurra {

using Value = std::variant<std::monostate, Array, bool, int64_t, double, std::string>;
using Results = std::vector<Array>;
using Function = Results (*)(std::vector<Value>& arguments);

enum class Platform { cpu, cuda };

// The function of an op; null where none has that name.
Function find_op(Platform platform, std::string_view name);

class Registry {
 public:
  explicit Registry(Platform platform) : platform_(platform) {}
  void impl(const char* name, Function function);

 private:
  Platform platform_;
};

namespace boxing {

template <class T>
struct Unbox {
  static T from(Value& v) {
    T* const value = std::get_if<T>(&v);
    if (!value) throw Error("recurra: an argument is missing or of another kind");
    return std::move(*value);
  }
};
template <class T>
struct Unbox<std::optional<T>> {
  static std::optional<T> from(Value& v) {
    if (std::holds_alternative<std::monostate>(v)) return {};
    return Unbox<T>::from(v);
  }
};

template <class... T>
Results results(std::tuple<T...> out) {
  return std::apply([](auto&... each) { return Results{std::move(each)...}; }, out);
}
inline Results results(Array out) { return {std::move(out)}; }

template <auto function, class Result, class... Arguments, size_t... I>
Results call(std::vector<Value>& values, Result (*)(Arguments...), std::index_sequence<I...>) {
  if (values.size() != sizeof...(Arguments)) throw Error("recurra: wrong number of arguments");
  if constexpr (std::is_void_v<Result>) {
    function(Unbox<Arguments>::from(values[I])...);
    return {};
  } else {
    return results(function(Unbox<Arguments>::from(values[I])...));
  }
}

template <class... Arguments>
constexpr size_t arity(auto (*)(Arguments...)) {
  return sizeof...(Arguments);
}

}  // namespace boxing

template <auto function>
Results boxed(std::vector<Value>& values) {
  constexpr size_t count = boxing::arity(function);
  return boxing::call<function>(values, function, std::make_index_sequence<count>());
}

// RECURRA_CPU_OPS(m) { m.impl("name", RECURRA_BOX(&function)); } once a file, and RECURRA_CUDA_OPS.
#define RECURRA_BOX(...) (&::recurra::boxed<__VA_ARGS__>)
#define RECURRA_CPU_OPS(m) RECURRA_OPS(::recurra::Platform::cpu, m)
#define RECURRA_CUDA_OPS(m) RECURRA_OPS(::recurra::Platform::cuda, m)
#define RECURRA_OPS(PLATFORM, m)                            \
  static void recurra_ops(::recurra::Registry& m);          \
  [[maybe_unused]] static const bool recurra_has_ops = [] { \
    ::recurra::Registry registry(PLATFORM);                 \
    recurra_ops(registry);                                  \
    return true;                                            \
  }();                                                      \
  static void recurra_ops(::recurra::Registry& m)

}  // namespace recurra
