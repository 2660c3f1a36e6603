// What the kernel tests share: random numbers, arrays of any layout in heap buffers of the exact
// size, so that AddressSanitizer sees a read or write one element too far, and a Case, which is one
// call of a kernel that can be repeated on every instruction set and compared byte by byte.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "view.h"

namespace recurra::test {

// SplitMix64 (Steele, Lea and Flood 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  bool chance(int percent) { return below(100) < percent; }
  double uniform(double low, double high) {
    return low + (high - low) * static_cast<double>(next() >> 11) * 0x1p-53;
  }
  template <class T>
  T pick(std::initializer_list<T> values) {
    return values.begin()[below(static_cast<int64_t>(values.size()))];
  }

 private:
  uint64_t state_;
};

// Conversions written for clarity, apart from those under test.
struct Narrow {
  int mantissa, lowest, highest;  // bits after the leading one; exponents of normal numbers
};
inline Narrow narrow(DType d) {
  return d == DType::f16 ? Narrow{10, -14, 15} : Narrow{7, -126, 127};
}

inline double load(const char* p, DType d) {
  const auto read = [&](auto x) {
    std::memcpy(&x, p, sizeof x);
    return x;
  };
  if (d == DType::f32) return read(0.0f);
  if (d == DType::f64) return read(0.0);
  const Narrow n = narrow(d);
  const int bits = read(uint16_t{}), fraction = bits & ((1 << n.mantissa) - 1);
  const int field = (bits & 0x7fff) >> n.mantissa;
  double value;
  if (field == n.highest + 1 - n.lowest + 1)
    value = fraction ? NAN : INFINITY;
  else if (field == 0)
    value = std::ldexp(fraction, n.lowest - n.mantissa);
  else
    value = std::ldexp(fraction + (1 << n.mantissa), field - 1 + n.lowest - n.mantissa);
  return bits & 0x8000 ? -value : value;
}

// Rounded to nearest even. For 16-bit storage `value` must be exact, as a float is.
inline void store(char* p, DType d, double value) {
  const auto write = [&](auto x) { std::memcpy(p, &x, sizeof x); };
  if (d == DType::f32) return write(static_cast<float>(value));
  if (d == DType::f64) return write(value);
  const Narrow n = narrow(d);
  const int top = (n.highest - n.lowest + 2) << n.mantissa;
  int bits;
  if (value != value) {
    bits = top | 1 << (n.mantissa - 1);
  } else if (std::isinf(value)) {
    bits = top;
  } else {
    const double size = std::fabs(value);
    const int exponent = size == 0 ? n.lowest : std::max(std::ilogb(size), n.lowest);
    const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, n.mantissa - exponent)));
    // Carries run into the exponent, and from the largest number to infinity, as they should.
    bits = std::min(top, ((exponent - n.lowest) << n.mantissa) + steps);
  }
  write(static_cast<uint16_t>(bits | (std::signbit(value) ? 0x8000 : 0)));
}

// Of the parts of a complex number.
inline DType real_of(DType d) {
  return d == DType::c64 ? DType::f32 : d == DType::c128 ? DType::f64 : d;
}

struct Range {
  double low = -1, high = 1;
};

// One array: a buffer of the exact size and which bytes of it are elements. Or several such pieces,
// far apart in memory of which nothing but them is touched: more is reserved than any machine has.
class Array {
 public:
  enum class Role { input, output, scratch };

  Array(std::string name, Role role, size_t size) : Array(std::move(name), role, size, 1, size) {}
  // Pieces of a size, whose begins are `apart` bytes from each other.
  Array(std::string name, Role role, size_t piece, size_t pieces, size_t apart)
      : name(std::move(name)),
        role(role),
        piece_(std::max<size_t>(piece, 1)),
        apart_(std::max<size_t>(apart, 1)),
        size_(piece * pieces),
        data_(nullptr, Free{pieces > 1 ? apart * (pieces - 1) + piece : 0}) {
    void* memory = nullptr;
    if (pieces > 1) {
      memory = reserve(apart * (pieces - 1) + piece);
    } else if (posix_memalign(&memory, 64, piece) != 0) {
      throw std::bad_alloc();
    }
    data_.reset(static_cast<char*>(memory));
    element.assign(size_, 0);
  }
  // Of all pieces, one after the other.
  size_t size() const { return size_; }
  char* at(size_t i) const { return data_.get() + i / piece_ * apart_ + i % piece_; }
  size_t index(const char* p) const {
    const auto offset = static_cast<size_t>(p - data_.get());
    return offset / apart_ * piece_ + offset % apart_;
  }
  std::vector<char> bytes() const {
    std::vector<char> all(size_);
    for (size_t i = 0; i < size_; i += piece_) std::copy_n(at(i), piece_, &all[i]);
    return all;
  }
  void restore() const {
    for (size_t i = 0; i < size_; i += piece_) std::copy_n(&initial[i], piece_, at(i));
  }

  std::string name;
  Role role;
  DType dtype = DType::f32;
  std::vector<char> element;  // per byte: 1 where an element starts, 2 inside it, 0 in a gap
  std::vector<char> initial;

 private:
#if defined(__linux__)
  static void* reserve(size_t size) {
    void* const memory = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    madvise(memory, size, MADV_NOHUGEPAGE);  // of which each piece would take 2 MiB
    return memory;
  }
  static void release(void* memory, size_t size) { munmap(memory, size); }
#else
  static void* reserve(size_t) { throw std::bad_alloc(); }
  static void release(void*, size_t) {}
#endif
  struct Free {
    size_t reserved;
    void operator()(char* p) const { reserved > 0 ? release(p, reserved) : std::free(p); }
  };
  size_t piece_, apart_, size_;
  std::unique_ptr<char, Free> data_;
};

class Case {
 public:
  Case(uint64_t seed, bool any_bytes) : random(seed), any_bytes_(any_bytes) {}

  Random random;
  std::function<void()> run;       // calls the kernel on the chosen instruction set
  std::function<void()> oracle;    // the same in plain C++, where the equations define the bits
  std::function<void()> emulated;  // the CUDA kernel over cuda_emulator.h
  bool raced = false;  // what outputs hold depends on who writes first, so it is not compared
  // By how much the emulated kernel may differ from the others where it adds up in another order:
  // relative to the largest number of the same output. Its bits are still those of every order of
  // threads.
  double emulated_within = 0;

  // An array that the kernel may only read: any order of dimensions, gaps, offsets, reversed and
  // expanded dimensions.
  template <int N>
  View<N> input(const char* name, DType dtype, const int64_t (&size)[N], Range range = {}) {
    return make<N>(name, Array::Role::input, dtype, size, range, false);
  }
  // Contiguous arrays from now on, for a kernel that takes no others.
  void dense() { dense_ = true; }
  // Most arrays have more than 2^31 elements between neighbours along one of their dimensions.
  void far() { far_ = true; }
  // One that it writes, or updates; `plain`: contiguous and zero, as a scratch array is.
  template <int N>
  View<N> output(const char* name, DType dtype, const int64_t (&size)[N], bool plain = false) {
    return make<N>(name, Array::Role::output, dtype, size, {}, plain);
  }
  // Memory of emulated kernels alone, which nobody compares: all bits set, so NaN, where nothing
  // was written.
  void* scratch(int64_t bytes) {
    if (bytes == 0) return nullptr;
    scratch_.emplace_back(new char[static_cast<size_t>(bytes)]);
    std::memset(scratch_.back().get(), 0xff, static_cast<size_t>(bytes));
    return scratch_.back().get();
  }
  // Zeros that a kernel may use as it likes: what it leaves there is not compared.
  template <int N>
  View<N> scratch(const char* name, DType dtype, const int64_t (&size)[N]) {
    return make<N>(name, Array::Role::scratch, dtype, size, {}, true);
  }
  const int64_t* integers(const char* name, const std::vector<int64_t>& values) {
    Array& array = add(name, Array::Role::input, DType::i64, values.size() * sizeof(int64_t));
    std::copy(values.begin(), values.end(), reinterpret_cast<int64_t*>(array.at(0)));
    std::fill(array.element.begin(), array.element.end(), 2);
    return reinterpret_cast<const int64_t*>(array.at(0));
  }
  // The same values as a one-dimensional array of int32 or int64.
  View<1> indices(const char* name, const int64_t* values, int64_t count) {
    const DType dtype = random.chance(50) ? DType::i32 : DType::i64;
    Array& array = add(name, Array::Role::input, dtype, count * item_size(dtype));
    for (int64_t i = 0; i < count; ++i)
      if (dtype == DType::i32)
        reinterpret_cast<int32_t*>(array.at(0))[i] = static_cast<int32_t>(values[i]);
      else
        reinterpret_cast<int64_t*>(array.at(0))[i] = values[i];
    return {array.at(0), dtype, {count}, {1}};
  }
  // Sequences of a (B, T, ...) array, packed ones when B is 1 and chance has it.
  Sequences sequences(int64_t batch, int64_t time) {
    if (batch != 1 || random.chance(50)) return {batch, time, nullptr};
    std::vector<int64_t> ends{0, time};
    for (int64_t i = random.below(5); i > 0; --i) ends.push_back(random.below(time + 1));
    if (random.chance(30)) ends.push_back(ends.back());
    std::sort(ends.begin(), ends.end());
    const auto count = static_cast<int64_t>(ends.size()) - 1;
    return {count, time, integers("offsets", ends)};
  }

  // Two packed sequences, of which the first has no step and hands its state on as it is, infinite
  // numbers too, however many parts time is split into.
  Sequences empty_first(int64_t time) {
    dense();
    return {2, time, integers("offsets", {0, 0, time})};
  }
  template <int N>
  void make_infinite_first(const View<N>& states) {
    int64_t count = 1;
    for (int n = 1; n < N; ++n) count *= states.size[n];
    const DType part = real_of(states.dtype);
    for (int64_t i = 0; i < count; ++i)
      if (random.chance(60))
        store(static_cast<char*>(states.data) + i * item_size(states.dtype), part, INFINITY);
  }

  void remember() {
    for (auto& a : arrays_) a->initial = a->bytes();
  }
  void restore() {
    for (auto& a : arrays_) a->restore();
  }
  // Throws unless inputs and the gaps of outputs are as they were.
  void check_untouched() const {
    for (const auto& a : arrays_)
      for (size_t i = 0; i < a->size(); ++i)
        if (*a->at(i) != a->initial[i] && (a->role == Array::Role::input || !a->element[i]))
          throw std::runtime_error(a->name + " was written at byte " + std::to_string(i) + " of " +
                                   std::to_string(a->size()) + ", which is not an output");
  }
  std::vector<std::vector<char>> results() const {
    std::vector<std::vector<char>> all;
    for (const auto& a : arrays_) all.push_back(a->bytes());
    return all;
  }
  // Throws unless the outputs are `wanted` bit for bit, any NaN being like any other, or differ by
  // no more than `within` times the largest number of the output.
  void check_results(const std::vector<std::vector<char>>& wanted, double within = 0) const {
    for (size_t n = 0; n < arrays_.size(); ++n) {
      const Array& a = *arrays_[n];
      if (a.role != Array::Role::output) continue;
      const auto item = static_cast<size_t>(item_size(a.dtype));
      const double bound = within > 0 ? within * largest(a, wanted[n]) : 0;
      for (size_t i = 0; i < a.size(); ++i) {
        if (a.element[i] != 1 || std::equal(&wanted[n][i], &wanted[n][i] + item, a.at(i))) continue;
        const double want = load(&wanted[n][i], a.dtype), got = load(a.at(i), a.dtype);
        if ((want != want && got != got) || std::fabs(want - got) <= bound) continue;
        char text[128];
        std::snprintf(text, sizeof text, " at byte %zu of %zu: %a instead of %a", i, a.size(), got,
                      want);
        throw std::runtime_error(a.name + " differs" + text);
      }
    }
  }

 private:
  static double largest(const Array& a, const std::vector<char>& bytes) {
    double out = 0;
    for (size_t i = 0; i < a.size(); ++i)
      if (a.element[i] == 1) {
        const double size = std::fabs(load(&bytes[i], a.dtype));
        if (std::isfinite(size)) out = std::fmax(out, size);
      }
    return out;
  }
  Array& add(const char* name, Array::Role role, DType dtype, size_t size, size_t pieces = 1,
             size_t apart = 0) {
    arrays_.push_back(std::make_unique<Array>(name, role, size, pieces, apart));
    arrays_.back()->dtype = dtype;
    return *arrays_.back();
  }

  template <int N>
  View<N> make(const char* name, Array::Role role, DType dtype, const int64_t (&size)[N],
               Range range, bool plain) {
    View<N> view;
    view.dtype = dtype;
    int order[N];
    for (int n = 0; n < N; ++n) order[n] = N - 1 - n;
    const bool odd = !plain && !dense_ && random.chance(60);
    if (odd)
      for (int n = N - 1; n > 0; --n) std::swap(order[n], order[random.below(n + 1)]);
    const int far = !plain && !dense_ && far_ ? far_dimension(size) : -1;
    int64_t step = odd && random.chance(20) ? 1 + random.below(3) : 1, low = 0, high = 0;
    for (int n : order) {
      view.size[n] = size[n];
      if (n == far) continue;
      view.stride[n] = odd && random.chance(15) ? -step : step;
      if (odd && role == Array::Role::input && random.chance(10)) view.stride[n] = 0;
      const int64_t reach = std::max<int64_t>(size[n] - 1, 0) * view.stride[n];
      (reach < 0 ? low : high) += reach;
      if (view.stride[n] != 0)
        step *= std::max<int64_t>(size[n], 1) + (odd && random.chance(30) ? random.below(9) : 0);
    }
    const int64_t apart = (int64_t{1} << 31) + 64, pieces = far < 0 ? 1 : size[far];
    const bool turned = far >= 0 && random.chance(15);
    if (far >= 0) view.stride[far] = turned ? -apart : apart;
    int64_t count = 1;
    for (int64_t s : size) count *= s;
    // Mostly no margin, for the sanitizer to see the first element too far.
    const int64_t margin = odd && random.chance(30) ? 1 + random.below(7) : 0;
    const int64_t item = item_size(dtype), elements = count ? high - low + 1 + 2 * margin : 0;
    // A complex number is filled and compared as its two parts.
    const int parts = is_complex(dtype) ? 2 : 1;
    const DType part = real_of(dtype);
    Array& array = add(name, role, part, static_cast<size_t>(elements * item),
                       static_cast<size_t>(pieces), static_cast<size_t>(apart * item));
    for (size_t i = 0; i < array.size(); ++i)
      *array.at(i) = plain ? 0 : static_cast<char>(random.next());
    view.data = array.at(0) + (count ? (margin - low) * item : 0) +
                (turned ? (pieces - 1) * apart * item : 0);
    if (!count) return view;
    int64_t index[N] = {};
    for (int64_t i = 0; i < count; ++i) {
      int64_t offset = 0;
      for (int n = 0; n < N; ++n) offset += index[n] * view.stride[n];
      char* at = static_cast<char*>(view.data) + offset * item;
      for (int each = 0; each < parts; ++each, at += item_size(part)) {
        const size_t place = array.index(at);
        std::fill_n(&array.element[place], item_size(part), 2);
        array.element[place] = 1;
        if (!plain && !any_bytes_) {
          const double value = random.uniform(range.low, range.high);
          store(at, part, part == DType::f64 ? value : static_cast<float>(value));
        }
      }
      for (int n = N - 1; n >= 0 && ++index[n] == size[n]; --n) index[n] = 0;
    }
    return view;
  }

  // One of some length, if there is any; each of its elements touches a page of memory.
  template <int N>
  int far_dimension(const int64_t (&size)[N]) {
    int64_t count = 1;
    for (int64_t s : size) count *= s;
    const int n = static_cast<int>(random.below(N));
    for (int i = 0; i < N && count > 0; ++i)
      if (const int64_t s = size[(n + i) % N]; s > 1 && s <= 80) return (n + i) % N;
    return -1;
  }

  bool any_bytes_, dense_ = false, far_ = false;
  std::vector<std::unique_ptr<Array>> arrays_;
  std::vector<std::unique_ptr<char[]>> scratch_;
};

// A contiguous array that nobody compares, of NaN until it is written.
template <int N>
View<N> scratch(Case& c, DType dtype, const int64_t (&size)[N]) {
  int64_t count = 1;
  View<N> view;
  view.dtype = dtype;
  for (int n = N - 1; n >= 0; --n) {
    view.size[n] = size[n];
    view.stride[n] = count;
    count *= size[n];
  }
  view.data = c.scratch(std::max<int64_t>(1, count * item_size(dtype)));
  return view;
}

// How far apart the numbers of a 16-bit dtype are, relative to them: what rounds to different ones
// differs so.
inline double stored_unit(DType d) {
  return d == DType::bf16 ? 0x1p-7 : d == DType::f16 ? 0x1p-10 : 0;
}

// What cases are drawn from.
struct Shape {
  int64_t batch, time, channels;
};

// Around the sixteen lanes, and past the tiles of either kind now and then.
inline Shape shape(Random& random) {
  if (random.chance(10))
    return {1, random.pick<int64_t>({257, 300}), random.pick<int64_t>({1, 33})};
  return {random.pick<int64_t>({0, 1, 1, 1, 2, 3}),
          random.pick<int64_t>({0, 1, 2, 3, 15, 16, 17, 33, 65, 70}),
          random.pick<int64_t>({0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 64, 65, 130, 260})};
}

inline DType activation(Random& random) {
  return random.pick({DType::f32, DType::f32, DType::f64, DType::bf16, DType::f16});
}
inline DType parameter(Random& random, DType activations) {
  return random.chance(50) ? activations : DType::f32;
}
inline DType state_of(DType d) { return d == DType::f64 || is_complex(d) ? d : DType::f32; }

// Which state each row uses: some skip, none is used twice.
inline std::vector<int64_t> slots(Random& random, int64_t rows, int64_t states) {
  std::vector<int64_t> all(static_cast<size_t>(states));
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int64_t>(i);
  for (size_t i = all.size(); i > 1; --i)
    std::swap(all[i - 1], all[static_cast<size_t>(random.below(static_cast<int64_t>(i)))]);
  all.resize(static_cast<size_t>(rows));
  for (int64_t& slot : all)
    if (random.chance(25)) slot = -1 - random.below(3);
  return all;
}

// Where the kernels of CUDA find cu_seqlens.
inline View<1> offsets_of(Case& c, const Sequences& s) {
  return s.offsets ? c.indices("cu_seqlens", s.offsets, s.count + 1) : View<1>{};
}

// What cu_seqlens and slots may be on the device, where nobody checks them.
inline std::vector<int64_t> hostile_integers(Random& random, int64_t count, int64_t end) {
  std::vector<int64_t> all(static_cast<size_t>(count));
  for (int64_t& each : all)
    each = random.pick<int64_t>({0, -1, end, end + 1, random.below(end + 1),
                                 static_cast<int64_t>(random.next()), INT64_MIN, INT64_MAX});
  return all;
}

template <int N, class... I>
double get(const View<N>& v, I... index) {
  return v ? load(v.at(index...), v.dtype) : 0.0;
}
template <int N, class... I>
void set(const View<N>& v, double value, I... index) {
  if (v) store(v.at(index...), v.dtype, value);
}

template <class F>
void in_compute_type(DType d, F f) {
  computes_in_double(d) ? f(0.0) : f(0.0f);
}

}  // namespace recurra::test
