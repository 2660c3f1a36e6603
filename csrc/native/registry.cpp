#include "native/registry.h"

#include <map>

namespace recurra {
namespace {

using Functions = std::map<std::string, Function, std::less<>>;

Functions& functions(Platform platform) {
  static Functions all[2];
  return all[static_cast<int>(platform)];
}

}  // namespace

Function find_op(Platform platform, std::string_view name) {
  const Functions& all = functions(platform);
  const auto found = all.find(name);
  return found == all.end() ? nullptr : found->second;
}

void Registry::impl(const char* name, Function function) { functions(platform_)[name] = function; }

}  // namespace recurra
