// Every schema of the library and, beside it, what the op requires of its arguments; check.h
// explains the notation. Compiled into each library: the CPU one defines the ops, both check.
#pragma once
#include <span>
#include <string>

namespace recurra {

struct Op {
  const char* schema;
  const char* requirements;
};

std::span<const Op> ops();

}  // namespace recurra
