#include "torch/check.h"

#include <algorithm>
#include <cstdlib>
#include <map>

#include "native/overlap.h"

namespace recurra {
namespace {

struct Dim {
  std::string name;  // empty for the number `value`
  int64_t value = 0;
  int64_t minus = 0;
  int64_t minimum = 0;
  int64_t maximum = INT64_MAX;
  bool or_one = false;
};

struct Rule {
  std::string name, kind;
  bool complex = false, optional = false;
  std::vector<std::vector<Dim>> shapes;  // none: not checked here
  std::string shape_text;
};

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts(1);
  for (char c : text) {
    if (c == separator)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  return parts;
}

std::string replace_all(std::string text, const std::string& from, const std::string& to) {
  for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size())
    text.replace(at, from.size(), to);
  return text;
}

// Without std::stoll, whose template this library would export.
int64_t number_in(const std::string& text) { return std::strtoll(text.c_str(), nullptr, 10); }

Dim parse_dim(std::string text) {
  Dim dim;
  if (auto bar = text.find("|1"); bar != std::string::npos) {
    dim.or_one = true;
    text.erase(bar);
  }
  if (auto at = text.find(">="); at != std::string::npos) {
    dim.minimum = number_in(text.substr(at + 2));
    text.erase(at);
  }
  if (auto at = text.find('='), to = text.find(".."); to != std::string::npos) {
    dim.minimum = number_in(text.substr(at + 1));
    dim.maximum = number_in(text.substr(to + 2));
    text.erase(at);
  }
  if (auto at = text.find('-'); at != std::string::npos) {
    dim.minus = number_in(text.substr(at + 1));
    text.erase(at);
  }
  if (text[0] >= '0' && text[0] <= '9')
    dim.value = number_in(text);
  else
    dim.name = text;
  return dim;
}

std::vector<Rule> parse(const std::string& text) {
  std::vector<Rule> rules;
  for (const std::string& word : split(text, ' ')) {
    if (word.empty()) continue;
    Rule rule;
    const auto colon = word.find(':'), open = word.find('(');
    rule.name = word.substr(0, colon);
    rule.kind =
        word.substr(colon + 1, (open == std::string::npos ? word.size() : open) - colon - 1);
    if (rule.kind.back() == '?') rule.optional = true, rule.kind.pop_back();
    if (rule.kind.back() == '*') rule.complex = true, rule.kind.pop_back();
    if (open != std::string::npos) {
      const std::string shapes = word.substr(open);
      for (const std::string& shape : split(shapes, '/')) {
        rule.shapes.emplace_back();
        const std::string inner = shape.substr(1, shape.size() - 2);
        for (const std::string& dim : split(inner, ','))
          if (!dim.empty()) rule.shapes.back().push_back(parse_dim(dim));
      }
      rule.shape_text = replace_all(
          replace_all(replace_all(replace_all(shapes, ",", ", "), "|1", " or 1"), "/", " or "),
          ">=", " >= ");
    }
    rules.push_back(std::move(rule));
  }
  return rules;
}

const std::vector<Rule>& rules_of(const char* op) {
  // Parsed once per thread and op: no lock on the path of a decoding step.
  thread_local std::map<std::string, std::vector<Rule>, std::less<>> parsed;
  auto found = parsed.find(std::string_view(op));
  if (found == parsed.end()) found = parsed.emplace(op, parse(requirements(op))).first;
  return found->second;
}

DType complex_of(DType d) { return d == DType::f64 ? DType::c128 : DType::c64; }

void check_dtype(const char* op, const Rule& rule, const Tensor& t, const Rule& lead,
                 const Tensor& leader) {
  if (rule.kind == "index") {
    if (!known_dtype(t) || (dtype_of(t) != DType::i32 && dtype_of(t) != DType::i64))
      fail(op, rule.name + " must have dtype int32 or int64, got " + dtype_name(t));
    return;
  }
  if (rule.kind == "mask") {
    if (!known_dtype(t) || dtype_of(t) != DType::b8)
      fail(op, rule.name + " must have dtype bool, got " + dtype_name(t));
    return;
  }
  if (&rule == &lead) {
    const bool real =
        known_dtype(t) && static_cast<int>(dtype_of(t)) <= static_cast<int>(DType::f16);
    const bool complex = rule.complex && known_dtype(t) && is_complex(dtype_of(t));
    if (!real && !complex)
      fail(op, rule.name + " must have dtype float32, float64, bfloat16 or float16" +
                   (rule.complex ? ", or be complex" : "") + ", got " + dtype_name(t) +
                   advice(rule.name));
    return;
  }
  const DType act = dtype_of(leader);
  std::vector<DType> allowed;
  if (rule.kind == "state") {
    allowed = {state_dtype(act)};
  } else {
    allowed = {act};
    if (rule.kind == "param" && act != DType::f32) allowed.push_back(DType::f32);
  }
  if (rule.complex && !is_complex(act)) allowed.push_back(complex_of(act));
  if (known_dtype(t))
    for (DType d : allowed)
      if (dtype_of(t) == d) return;
  std::string wanted;
  for (size_t i = 0; i < allowed.size(); ++i)
    wanted += (i ? " or " : "") + std::string(dtype_name(allowed[i]));
  fail(op, rule.name + " must have dtype " + wanted + " where " + lead.name + " has " +
               dtype_name(leader) + ", got " + dtype_name(t));
}

using Sizes = std::map<std::string, int64_t, std::less<>>;

void check_shape(const char* op, const Rule& rule, const Tensor& t, Sizes& sizes) {
  if (rule.shapes.empty()) return;
  const std::vector<Dim>* shape = nullptr;
  for (const auto& candidate : rule.shapes)
    if (static_cast<int64_t>(candidate.size()) == t.dim()) shape = &candidate;
  bool good = shape != nullptr;
  Sizes fresh;
  for (size_t n = 0; good && n < shape->size(); ++n) {
    const Dim& dim = (*shape)[n];
    const int64_t size = t.size(n);
    if (dim.or_one && size == 1) continue;
    auto bound = sizes.find(dim.name);
    if (dim.name.empty()) {
      good = size == dim.value;
    } else if (bound != sizes.end()) {
      good = size == bound->second - dim.minus;
    } else {
      auto again = fresh.find(dim.name);
      good = size + dim.minus >= dim.minimum && size + dim.minus <= dim.maximum &&
             (again == fresh.end() || again->second == size + dim.minus);
      fresh[dim.name] = size + dim.minus;
    }
  }
  if (good) {
    sizes.merge(fresh);
    return;
  }
  std::string where;
  std::string seen;
  for (const auto& candidate : rule.shapes)
    for (const Dim& dim : candidate) {
      auto bound = sizes.find(dim.name);
      if (dim.name.empty() || bound == sizes.end() ||
          seen.find(" " + dim.name + " ") != std::string::npos)
        continue;
      seen += " " + dim.name + " ";
      where += (where.empty() ? " with " : ", ") + dim.name + " = " + std::to_string(bound->second);
    }
  fail(op, rule.name + " must have shape " + rule.shape_text + where + ", got " + shape_of(t));
}

std::vector<int64_t> integers(const Tensor& t) {
  const View<1> v = view<1>(t);
  std::vector<int64_t> values(v.size[0]);
  for (int64_t i = 0; i < v.size[0]; ++i)
    values[i] = v.dtype == DType::i32 ? *reinterpret_cast<const int32_t*>(v.at(i))
                                      : *reinterpret_cast<const int64_t*>(v.at(i));
  return values;
}

// Whether t is h, or some of it along `spare`, so that rows and channels are in the same places.
bool lines_up(const Tensor& h, const Tensor& t, int spare) {
  const bool one = spare >= 0 && t.dim() == h.dim() - 1;  // entry of h along `spare`
  if (dtype_of(t) != dtype_of(h) || (!one && t.dim() != h.dim())) return false;
  for (int64_t n = 0; n < t.dim(); ++n) {
    const int64_t of_h = one && n >= spare ? n + 1 : n;
    if (of_h != spare && t.size(n) != h.size(of_h)) return false;
    if (t.size(n) > 1 && t.stride(n) != h.stride(of_h)) return false;
  }
  const int64_t from =
      static_cast<char*>(t.data_ptr()) - static_cast<char*>(h.data_ptr());  // bytes
  if (spare < 0) return from == 0;
  const int64_t by = h.stride(spare) * item_size(dtype_of(h));
  for (int64_t k = 0; k + (one ? 1 : t.size(spare)) <= h.size(spare); ++k)
    if (from == k * by) return true;
  return false;
}

std::string strides_of(const Tensor& t) {
  std::string text;
  for (int64_t n = 0; n < t.dim(); ++n) text += (n ? ", " : "") + std::to_string(t.stride(n));
  return "(" + text + ")";
}

}  // namespace

std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t n = 0; n < t.dim(); ++n)
    text += (n ? ", " : "") + std::to_string(t.size(n)) + (t.dim() == 1 ? "," : "");
  return text + ")";
}

void fail(const char* op, const std::string& message) {
  // An op of our own is called by the name that the user called: _OP_save is OP with grad enabled.
  std::string name = op[0] == '_' ? op + 1 : op;
  if (op[0] == '_' && name.size() > 5 && name.compare(name.size() - 5, 5, "_save") == 0)
    name.resize(name.size() - 5);
  throw Error(name + ": " + message);
}

void check(const char* op, std::initializer_list<Argument> arguments) {
  const std::vector<Rule>& rules = rules_of(op);
  Sizes sizes;
  const Tensor* leader = nullptr;
  auto find = [&](const std::string& name) -> const Tensor* {
    for (const Argument& a : arguments)
      if (name == a.name) return a.tensor;
    return nullptr;
  };
  const Tensor* packed = find("cu_seqlens");
  for (const Rule& rule : rules) {
    const Tensor* t = find(rule.name);
    if (!t) continue;
    if (!leader) leader = t;
    if (device_name(*t) != device_name(*leader))
      fail(op, rule.name + " must be on the device of " + rules[0].name + ", " +
                   device_name(*leader) + ", got " + device_name(*t));
    check_dtype(op, rule, *t, rules[0], *leader);
    check_shape(op, rule, *t, sizes);
    if (&rule == &rules[0] && packed) {
      if (packed->dim() != 1 || packed->size(0) < 1)
        fail(op, "cu_seqlens must have shape (S + 1,), got " + shape_of(*packed));
      // Known without its values, which lie on a device; kernels would start for no sequence.
      if (auto time = sizes.find("T");
          time != sizes.end() && time->second > 0 && packed->size(0) == 1)
        fail(op, "cu_seqlens must have shape (S + 1,) with S >= 1 where T = " +
                     std::to_string(time->second) + ", got (1,)");
      if (auto batch = sizes.find("B"); batch != sizes.end() && batch->second != 1)
        fail(op, rule.name + " must have batch size B = 1 with cu_seqlens, got " + shape_of(*t));
      sizes["S"] = packed->size(0) - 1;
    } else if (&rule == &rules[0] && sizes.count("B")) {
      sizes["S"] = sizes["B"];
    }
  }
}

void check_layout(const char* op, const char* name, const Tensor& x, const char* parameter,
                  const Tensor& p, const char* also) {
  if (x.dim() == 3 && p.dim() == 2 && p.size(0) != x.size(2) && p.size(0) == x.size(1))
    fail(op, std::string(name) + " must have shape (B, T, D) with D = " +
                 std::to_string(p.size(0)) + " as in " + parameter + ", got " + shape_of(x) +
                 ", which looks like (B, D, L): pass " + name + ".swapaxes(1, 2)" + also);
}

Sequences sequences(const char* op, int64_t batch, int64_t time, const OptionalTensor& cu_seqlens,
                    std::vector<int64_t>& storage) {
  if (!cu_seqlens) return {batch, time, nullptr};
  storage = integers(*cu_seqlens);
  if (storage.front() != 0)
    fail(op, "cu_seqlens must start at 0, got " + std::to_string(storage.front()));
  for (size_t i = 1; i < storage.size(); ++i)
    if (storage[i] < storage[i - 1])
      fail(op, "cu_seqlens must ascend, got " + std::to_string(storage[i]) + " after " +
                   std::to_string(storage[i - 1]) + " at index " + std::to_string(i));
  if (storage.back() != time)
    fail(op, "cu_seqlens must end at T = " + std::to_string(time) + ", got " +
                 std::to_string(storage.back()));
  return {static_cast<int64_t>(storage.size()) - 1, time, storage.data()};
}

void check_written(const char* op, const Tensor& h, const OptionalTensor& slots, int spare,
                   std::initializer_list<Argument> alike, std::initializer_list<Argument> others) {
  for (int64_t n = 0; n < h.dim(); ++n)
    if (h.size(n) > 1 && h.stride(n) == 0 && h.numel() > 0)
      fail(op, "h is written in place and must not be expanded, got stride 0 in dimension " +
                   std::to_string(n));
  const Footprint written = footprint(h);
  if (overlaps_itself(written))
    fail(op, "h is written in place and must not overlap itself in memory, got shape " +
                 shape_of(h) + " with strides " + strides_of(h));
  const auto clashes = [&](const Argument& a) {
    return a.tensor && overlap(written, footprint(*a.tensor));
  };
  const auto refuse = [&](const Argument& a) {
    fail(op, "h is written in place and must not overlap " + std::string(a.name) + " in memory");
  };
  if (const Argument a{"slots", slots}; clashes(a)) refuse(a);
  for (const Argument& a : alike)
    if (clashes(a) && (slots || !lines_up(h, *a.tensor, spare))) refuse(a);
  for (const Argument& a : others)
    if (clashes(a)) refuse(a);
}

void check_states(const char* op, int64_t rows, const Tensor& h, const OptionalTensor& slots) {
  if (!slots && rows != h.size(0))
    fail(op, "h must have as many states as there are rows, " + std::to_string(rows) +
                 ", or slots must be given, got " + std::to_string(h.size(0)));
}

const int64_t* slot_indices(const char* op, int64_t rows, const Tensor& h,
                            const OptionalTensor& slots, std::vector<int64_t>& storage) {
  check_states(op, rows, h, slots);
  if (!slots) return nullptr;
  const int64_t states = h.size(0);
  storage = integers(*slots);
  std::vector<int64_t> used;
  for (size_t i = 0; i < storage.size(); ++i) {
    if (storage[i] >= states)
      fail(op, "slots must be less than the number of states of h, " + std::to_string(states) +
                   ", got " + std::to_string(storage[i]) + " at index " + std::to_string(i));
    if (storage[i] >= 0) used.push_back(storage[i]);
  }
  std::sort(used.begin(), used.end());
  auto twice = std::adjacent_find(used.begin(), used.end());
  if (twice != used.end())
    fail(op, "slots must not repeat a state, got " + std::to_string(*twice) + " more than once");
  return storage.data();
}

OptionalTensor partial_sums(const Tensor& a, const Tensor& full, int64_t rows) {
  const int64_t channels = full.size(2);
  if (a.size(0) == full.size(0) && a.size(1) == full.size(1) && a.size(2) == channels) return {};
  // At least one sum, so that a gradient shared by no channels at all is written too.
  const int64_t lanes =
      a.size(2) == channels ? channels : std::max<int64_t>(1, (channels + 15) / 16);
  return zeros(a, {rows < 0 ? a.size(0) : std::max<int64_t>(1, rows), a.size(1), lanes},
               state_dtype(dtype_of(full)));
}

}  // namespace recurra
