// An op as programs without torch call it: its function of values, and from its schema what each
// value is and how it is called.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "native/registry.h"

namespace recurra {

enum class Kind { array, boolean, integer, number, text };

struct Parameter {
  std::string name;
  Kind kind;
  bool optional;
  bool written;  // an array that the op changes
};

struct CallableOp {
  std::string name;
  Function function;
  std::vector<Parameter> parameters;
};

// Throws where no op of the platform has that name.
const CallableOp& callable_op(Platform platform, std::string_view name);

}  // namespace recurra
