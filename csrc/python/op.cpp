#include "python/op.h"

#include <map>

#include "torch/schemas.h"

namespace recurra {
namespace {

// "str? activation=None" or "Tensor(a!) h".
Parameter parse(const std::string& text) {
  Parameter p;
  const auto space = text.rfind(' ');
  std::string type = text.substr(0, space);
  p.name = text.substr(space + 1, text.find('=', space) - space - 1);
  p.optional = type.back() == '?';
  p.written = type.find('!') != std::string::npos;
  if (p.optional) type.pop_back();
  p.kind = type == "bool"    ? Kind::boolean
           : type == "int"   ? Kind::integer
           : type == "float" ? Kind::number
           : type == "str"   ? Kind::text
                             : Kind::array;
  return p;
}

std::map<std::string, CallableOp, std::less<>> all(Platform platform) {
  std::map<std::string, CallableOp, std::less<>> found;
  for (const Op& op : ops()) {
    const std::string schema = op.schema;
    const auto open = schema.find('('), arrow = schema.rfind(") ->");
    CallableOp callable{schema.substr(0, open), nullptr, {}};
    callable.function = find_op(platform, callable.name);
    for (auto at = open + 1; at < arrow;) {
      auto comma = schema.find(", ", at);
      if (comma == std::string::npos || comma > arrow) comma = arrow;
      const std::string one = schema.substr(at, comma - at);
      if (one != "*") callable.parameters.push_back(parse(one));
      at = comma + 2;
    }
    if (callable.function) found[callable.name] = callable;
  }
  return found;
}

}  // namespace

const CallableOp& callable_op(Platform platform, std::string_view name) {
  static const std::map<std::string, CallableOp, std::less<>> of_platforms[] = {
      all(Platform::cpu), all(Platform::cuda)};
  const auto& ops = of_platforms[static_cast<int>(platform)];
  const auto found = ops.find(name);
  if (found == ops.end()) throw Error("recurra: no op is named " + std::string(name));
  return found->second;
}

}  // namespace recurra
