#include "native/registry.h"

#include <map>

namespace recurra {
namespace {

std::map<std::string, Function, std::less<>>& functions() {
  static std::map<std::string, Function, std::less<>> all;
  return all;
}

}  // namespace

Function find_op(std::string_view name) {
  const auto found = functions().find(name);
  return found == functions().end() ? nullptr : found->second;
}

void Registry::impl(const char* name, Function function) { functions()[name] = function; }

}  // namespace recurra
