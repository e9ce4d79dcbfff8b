// What instructions compute that take numbers from registers and give one, lane by lane.
//
// `f` of each is applied to the operands, read as the types beside it; bool is a predicate.
// Rounding is the hardware's: to nearest even, once for a fused multiply-add.

#pragma once

#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "machine.h"

namespace ptx {

// Half precision, as bits.
struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

inline float to_float(Bfloat x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

inline float to_float(Half x) {
  uint32_t bits = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  bits = bits >= 0x0f800000 ? bits + 0x70000000
                            : std::bit_cast<uint32_t>(std::bit_cast<float>(bits) * 0x1p112f);
  return std::bit_cast<float>(bits | sign);
}

inline Bfloat to_bfloat(float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded)};
}

inline Half to_half(float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  uint32_t normal = (bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13;
  uint32_t small =
      std::bit_cast<uint32_t>(std::bit_cast<float>(bits) + 0.5f) - std::bit_cast<uint32_t>(0.5f);
  uint32_t result = bits > 0x7f800000    ? 0x7fff
                    : bits >= 0x477ff000 ? 0x7c00
                    : bits < 0x38800000  ? small
                                         : normal;
  return {uint16_t(result | (bits > 0x7f800000 ? 0 : sign))};
}

inline Bfloat rounded(float x, Bfloat) { return to_bfloat(x); }
inline Half rounded(float x, Half) { return to_half(x); }

inline uint32_t packed(uint16_t high, uint16_t low) { return uint32_t(high) << 16 | low; }

// Flush numbers below the smallest normal one to zero.
inline float flushed(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

// A relative error of 2^-22 is allowed. Half of it is made, one way or the other, and at most the
// other half is what this function and the product round.
inline float exp2_approx(float x) {
  float exact = std::exp2(flushed(x));
  uint32_t bits = std::bit_cast<uint32_t>(exact);
  if ((bits & 0x7fffff) == 0) return exact;  // a power of two, 0, infinity
  return flushed(exact * (bits >> 3 & 1 ? 1.0f + 0x1p-23f : 1.0f - 0x1p-23f));
}

// What a predicate's register holds, read by lane.
struct Bits {
  uint32_t bits;
  bool operator[](int lane) const { return bits >> lane & 1; }
};

template <class T>
auto view(Warp& warp, int slot) {
  if constexpr (std::is_same_v<T, bool>)
    return Bits{warp.bits(slot)};
  else
    return static_cast<const T*>(warp.as<T>(slot));
}

template <class T>
constexpr int width_of = std::is_same_v<T, bool> ? 0 : int(sizeof(T));

template <class F, class R, class... A, size_t... k>
void apply(Warp& warp, const Instruction& at, std::index_sequence<k...>) {
  const int* slots = at.registers.data();
  auto compute = [&](auto... from) {
    uint32_t unknown = (0u | ... | warp.undefined[slots[k + 1]]);
    if constexpr (std::is_same_v<R, bool>) {
      uint32_t result = 0;
      for (int lane = 0; lane < kLanes; ++lane) result |= uint32_t(F()(from[lane]...)) << lane;
      warp.write_bits(slots[0], result, unknown);
    } else {
      alignas(64) R result[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) result[lane] = F()(from[lane]...);
      warp.write(slots[0], result, unknown);
    }
  };
  compute(view<A>(warp, slots[k + 1])...);
}

template <class F, class R, class... A>
void lanes(Warp& warp, const Instruction& at) {
  apply<F, R, A...>(warp, at, std::index_sequence_for<A...>());
}

// Undefined is what is chosen, not what is left.
template <class T>
void select(Warp& warp, const Instruction& at) {
  const int* slots = at.registers.data();
  const T *yes = warp.as<T>(slots[1]), *no = warp.as<T>(slots[2]);
  uint32_t chosen = warp.bits(slots[3]);
  alignas(64) T result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    result[lane] = chosen >> lane & 1 ? yes[lane] : no[lane];
  warp.write(slots[0], result,
             warp.undefined[slots[3]] | (warp.undefined[slots[1]] & chosen) |
                 (warp.undefined[slots[2]] & ~chosen));
}

struct Entry {
  Handler run;
  std::vector<int> widths;
};

using Table = std::unordered_map<std::string, Entry>;

template <class R, class... A, class F>
Entry entry(F) {
  return {&lanes<F, R, A...>, {width_of<R>, width_of<A>...}};
}

template <class F>
struct Flushed {
  template <class... A>
  float operator()(A... a) const {
    return flushed(F()(flushed(a)...));
  }
};

template <class... A, class F>
void add_float(Table& table, const std::string& name, F f) {
  table[name + ".f32"] = entry<float, A...>(f);
  table[name + ".ftz.f32"] = entry<float, A...>(Flushed<F>());
}

// Of two numbers or one. Rounding may be left out, and then ptxas may fuse; here nothing is fused.
template <class F>
void add_float(Table& table, const std::string& name, const std::string& rounding, F f) {
  for (const std::string& way : {std::string(), rounding}) {
    if constexpr (std::is_invocable_v<F, float, float>)
      add_float<float, float>(table, name + way, f);
    else
      add_float<float>(table, name + way, f);
  }
}

inline void add_floats(Table& table) {
  using F = float;
  add_float(table, "add", ".rn", [](F a, F b) { return a + b; });
  add_float(table, "sub", ".rn", [](F a, F b) { return a - b; });
  add_float(table, "mul", ".rn", [](F a, F b) { return a * b; });
  add_float<F, F, F>(table, "fma.rn", [](F a, F b, F c) { return std::fma(a, b, c); });
  add_float(table, "div", ".rn", [](F a, F b) { return a / b; });
  add_float(table, "div", ".full", [](F a, F b) { return a / b; });
  add_float(table, "div", ".approx", [](F a, F b) { return a / b; });
  add_float(table, "sqrt", ".rn", [](F a) { return std::sqrt(a); });
  add_float(table, "sqrt", ".approx", [](F a) { return std::sqrt(a); });
  add_float(table, "rcp", ".rn", [](F a) { return 1.0f / a; });
  add_float(table, "rcp", ".approx", [](F a) { return 1.0f / a; });
  add_float(table, "rsqrt", ".approx", [](F a) { return 1.0f / std::sqrt(a); });
  add_float(table, "lg2", ".approx", [](F a) { return std::log2(a); });
  add_float(table, "ex2", ".approx", [](F a) { return exp2_approx(a); });
  add_float(table, "neg", "", [](F a) { return -a; });
  add_float(table, "abs", "", [](F a) { return std::fabs(a); });
  // The number where the other one is NaN.
  add_float(table, "max", "",
            [](F a, F b) { return b != b || a > b || (a == b && !std::signbit(a)) ? a : b; });
  add_float(table, "min", "",
            [](F a, F b) { return b != b || a < b || (a == b && std::signbit(a)) ? a : b; });
  add_float(table, "max", ".NaN", [](F a, F b) { return a != a || a > b ? a : b; });
  add_float(table, "min", ".NaN", [](F a, F b) { return a != a || a < b ? a : b; });
}

template <class T, class F>
void add_comparison(Table& table, const std::string& name, const std::string& type, F f) {
  table["setp." + name + type] = entry<bool, T, T>(f);
  if constexpr (std::is_same_v<T, float>)
    table["setp." + name + ".ftz" + type] =
        entry<bool, T, T>([](T a, T b) { return F()(flushed(a), flushed(b)); });
}

template <class T>
void add_comparisons(Table& table, const std::string& type) {
  add_comparison<T>(table, "eq", type, [](T a, T b) { return a == b; });
  add_comparison<T>(table, "ne", type, [](T a, T b) { return a < b || a > b; });
  add_comparison<T>(table, "lt", type, [](T a, T b) { return a < b; });
  add_comparison<T>(table, "le", type, [](T a, T b) { return a <= b; });
  add_comparison<T>(table, "gt", type, [](T a, T b) { return a > b; });
  add_comparison<T>(table, "ge", type, [](T a, T b) { return a >= b; });
  if constexpr (std::is_floating_point_v<T>) {
    // True also where one of them is NaN.
    add_comparison<T>(table, "equ", type, [](T a, T b) { return !(a < b || a > b); });
    add_comparison<T>(table, "neu", type, [](T a, T b) { return a != b; });
    add_comparison<T>(table, "ltu", type, [](T a, T b) { return !(a >= b); });
    add_comparison<T>(table, "leu", type, [](T a, T b) { return !(a > b); });
    add_comparison<T>(table, "gtu", type, [](T a, T b) { return !(a <= b); });
    add_comparison<T>(table, "geu", type, [](T a, T b) { return !(a < b); });
    add_comparison<T>(table, "num", type, [](T a, T b) { return a == a && b == b; });
    add_comparison<T>(table, "nan", type, [](T a, T b) { return a != a || b != b; });
  } else if constexpr (std::is_unsigned_v<T>) {
    table["setp.lo" + type] = table["setp.lt" + type];
    table["setp.ls" + type] = table["setp.le" + type];
    table["setp.hi" + type] = table["setp.gt" + type];
    table["setp.hs" + type] = table["setp.ge" + type];
  }
}

// `Wide` holds a product of two.
template <class T, class Wide>
void add_integers(Table& table, const std::string& type) {
  constexpr int size = 8 * int(sizeof(T));
  using U = std::make_unsigned_t<T>;
  add_comparisons<T>(table, type);
  table["add" + type] = entry<T, T, T>([](T a, T b) { return T(a + b); });
  table["sub" + type] = entry<T, T, T>([](T a, T b) { return T(a - b); });
  table["neg" + type] = entry<T, T>([](T a) { return T(-a); });
  table["abs" + type] = entry<T, T>([](T a) { return T(a < 0 ? -a : a); });
  table["min" + type] = entry<T, T, T>([](T a, T b) { return a < b ? a : b; });
  table["max" + type] = entry<T, T, T>([](T a, T b) { return a > b ? a : b; });
  table["mul.lo" + type] = entry<T, T, T>([](T a, T b) { return T(a * b); });
  table["mad.lo" + type] = entry<T, T, T, T>([](T a, T b, T c) { return T(a * b + c); });
  table["mul.hi" + type] = entry<T, T, T>([](T a, T b) { return T(Wide(a) * b >> size); });
  table["div" + type] = entry<T, T, T>([](T a, T b) { return b ? T(Wide(a) / b) : T(-1); });
  table["rem" + type] = entry<T, T, T>([](T a, T b) { return b ? T(Wide(a) % b) : a; });
  table["shr" + type] = entry<T, T, uint32_t>(
      [](T a, uint32_t n) { return n < size ? T(a >> n) : T(a < 0 ? -1 : 0); });
  if constexpr (size < 64) {
    table["mul.wide" + type] = entry<Wide, T, T>([](T a, T b) { return Wide(Wide(a) * b); });
    table["mad.wide" + type] =
        entry<Wide, T, T, Wide>([](T a, T b, Wide c) { return Wide(Wide(a) * b + c); });
  }
  // Bits of `a` from `from`, `count` of them, the last one repeated where it is a sign.
  table["bfe" + type] = entry<T, T, uint32_t, uint32_t>([](T a, uint32_t from, uint32_t count) {
    from &= 255, count &= 255;
    U bits = from < size ? U(a) >> from : 0;
    U sign = std::is_signed_v<T> && count ? U(a) >> std::min(from + count - 1, size - 1u) & 1 : 0;
    U kept = count < size ? (U(1) << count) - 1 : ~U(0);
    return T((bits & kept) | (sign ? ~kept : 0));
  });
}

template <class T>
void add_bits(Table& table, const std::string& type) {
  constexpr int size = std::is_same_v<T, bool> ? 1 : 8 * int(sizeof(T));
  table["and" + type] = entry<T, T, T>([](T a, T b) { return T(a & b); });
  table["or" + type] = entry<T, T, T>([](T a, T b) { return T(a | b); });
  table["xor" + type] = entry<T, T, T>([](T a, T b) { return T(a ^ b); });
  if constexpr (size == 1) {
    table["not" + type] = entry<T, T>([](T a) { return !a; });
    table["mov" + type] = entry<T, T>([](T a) { return a; });
  } else {
    table["not" + type] = entry<T, T>([](T a) { return T(~a); });
    table["setp.eq" + type] = entry<bool, T, T>([](T a, T b) { return a == b; });
    table["setp.ne" + type] = entry<bool, T, T>([](T a, T b) { return a != b; });
    auto shifts = [&](const std::string& name) {
      table["shl" + name] =
          entry<T, T, uint32_t>([](T a, uint32_t n) { return n < size ? T(a << n) : T(0); });
    };
    shifts(type);
    table["shr" + type] =
        entry<T, T, uint32_t>([](T a, uint32_t n) { return n < size ? T(a >> n) : T(0); });
    table["selp" + type] = {&select<T>, {size / 8, size / 8, size / 8, 0}};
  }
}

template <class T>
void add_rounded(Table& table, const std::string& type) {
  // Out of range is the nearest that there is, NaN is 0.
  auto add = [&](const std::string& way, auto round) {
    using Round = decltype(round);
    table["cvt." + way + type + ".f32"] = entry<T, float>([](float a) {
      using Limits = std::numeric_limits<T>;
      double rounded = Round()(double(a));
      if (rounded != rounded) return T(0);
      if (rounded <= double(Limits::min())) return Limits::min();
      return rounded >= double(Limits::max()) ? Limits::max() : T(rounded);
    });
  };
  add("rzi", [](double a) { return std::trunc(a); });
  add("rni", [](double a) { return std::nearbyint(a); });
  add("rmi", [](double a) { return std::floor(a); });
  add("rpi", [](double a) { return std::ceil(a); });
}

inline void add_float_conversions(Table& table) {
  using F = float;
  table["cvt.f32.bf16"] = entry<F, Bfloat>([](Bfloat a) { return to_float(a); });
  table["cvt.f32.f16"] = entry<F, Half>([](Half a) { return to_float(a); });
  table["cvt.rn.bf16.f32"] = entry<Bfloat, F>([](F a) { return to_bfloat(a); });
  table["cvt.rn.f16.f32"] = entry<Half, F>([](F a) { return to_half(a); });
  table["cvt.rn.f32.s32"] = entry<F, int32_t>([](int32_t a) { return float(a); });
  table["cvt.rn.f32.u32"] = entry<F, uint32_t>([](uint32_t a) { return float(a); });
  table["cvt.rn.bf16x2.f32"] = entry<uint32_t, F, F>(
      [](F high, F low) { return packed(to_bfloat(high).bits, to_bfloat(low).bits); });
  table["cvt.rn.f16x2.f32"] = entry<uint32_t, F, F>(
      [](F high, F low) { return packed(to_half(high).bits, to_half(low).bits); });
  add_rounded<int32_t>(table, ".s32");
  add_rounded<uint32_t>(table, ".u32");
  table["cvt.rmi.f32.f32"] = entry<F, F>([](F a) { return std::floor(a); });
  table["cvt.rni.f32.f32"] = entry<F, F>([](F a) { return std::nearbyint(a); });
  table["cvt.rzi.f32.f32"] = entry<F, F>([](F a) { return std::trunc(a); });
}

// One number of 16 bits, or two of them in 32, computed in float32 and rounded.
template <class T, class F>
void add_half(Table& table, const std::string& name, const std::string& type, F) {
  static constexpr auto one = [](T a, T b) { return rounded(F()(to_float(a), to_float(b)), T()); };
  table[name + type] = entry<T, T, T>([](T a, T b) { return one(a, b); });
  table[name + type + "x2"] = entry<uint32_t, uint32_t, uint32_t>([](uint32_t a, uint32_t b) {
    auto part = [&](int shift) {
      return one(T{uint16_t(a >> shift)}, T{uint16_t(b >> shift)}).bits;
    };
    return packed(part(16), part(0));
  });
}

template <class T>
void add_halves(Table& table, const std::string& type) {
  for (const std::string& way : {std::string(), std::string(".rn")}) {
    add_half<T>(table, "add" + way, type, [](float a, float b) { return a + b; });
    add_half<T>(table, "sub" + way, type, [](float a, float b) { return a - b; });
    add_half<T>(table, "mul" + way, type, [](float a, float b) { return a * b; });
  }
}

inline void add_doubles(Table& table) {
  using D = double;
  add_comparisons<D>(table, ".f64");
  for (const std::string& way : {std::string(), std::string(".rn")}) {
    table["add" + way + ".f64"] = entry<D, D, D>([](D a, D b) { return a + b; });
    table["sub" + way + ".f64"] = entry<D, D, D>([](D a, D b) { return a - b; });
    table["mul" + way + ".f64"] = entry<D, D, D>([](D a, D b) { return a * b; });
  }
  table["fma.rn.f64"] = entry<D, D, D, D>([](D a, D b, D c) { return std::fma(a, b, c); });
  table["div.rn.f64"] = entry<D, D, D>([](D a, D b) { return a / b; });
  table["neg.f64"] = entry<D, D>([](D a) { return -a; });
  table["abs.f64"] = entry<D, D>([](D a) { return std::fabs(a); });
  table["selp.f64"] = {&select<D>, {8, 8, 8, 0}};
  table["cvt.f64.f32"] = entry<D, float>([](float a) { return D(a); });
  table["cvt.ftz.f64.f32"] = entry<D, float>([](float a) { return D(flushed(a)); });
  table["cvt.rn.f32.f64"] = entry<float, D>([](D a) { return float(a); });
  table["cvt.rn.f64.s32"] = entry<D, int32_t>([](int32_t a) { return D(a); });
  table["cvt.rni.f64.f64"] = entry<D, D>([](D a) { return std::nearbyint(a); });
  // Of the result's bits only the upper half.
  table["rcp.approx.ftz.f64"] = entry<D, D>(
      [](D a) { return std::bit_cast<D>(std::bit_cast<uint64_t>(1.0 / a) >> 32 << 32); });
}

inline void add_bytes(Table& table) {
  using U = uint32_t;
  // Each byte of the result is one of the eight of `b` above `a`, or its sign eight times.
  table["prmt.b32"] = entry<U, U, U, U>([](U a, U b, U selectors) {
    uint64_t both = uint64_t(b) << 32 | a;
    U result = 0;
    for (int i = 0; i < 4; ++i) {
      U selector = selectors >> 4 * i & 15, byte = U(both >> 8 * (selector & 7) & 255);
      if (selector & 8) byte = byte & 128 ? 255 : 0;
      result |= byte << 8 * i;
    }
    return result;
  });
  table["lop3.b32"] = entry<U, U, U, U, U>([](U a, U b, U c, U truth) {
    U result = 0;
    for (U i = 0; i < 8; ++i)
      if (truth >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return result;
  });
  table["shf.l.wrap.b32"] =
      entry<U, U, U, U>([](U a, U b, U n) { return U((uint64_t(b) << 32 | a) << (n & 31) >> 32); });
  table["shf.r.wrap.b32"] =
      entry<U, U, U, U>([](U a, U b, U n) { return U((uint64_t(b) << 32 | a) >> (n & 31)); });
  table["popc.b32"] = entry<U, U>([](U a) { return U(std::popcount(a)); });
  table["clz.b32"] = entry<U, U>([](U a) { return U(std::countl_zero(a)); });
  table["brev.b32"] = entry<U, U>([](U a) {
    U result = 0;
    for (int i = 0; i < 32; ++i) result |= (a >> i & 1) << (31 - i);
    return result;
  });
}

inline Table arithmetic() {
  Table table;
  add_floats(table);
  add_comparisons<float>(table, ".f32");
  table["selp.f32"] = {&select<float>, {4, 4, 4, 0}};
  add_integers<int32_t, int64_t>(table, ".s32");
  add_integers<uint32_t, uint64_t>(table, ".u32");
  add_integers<int64_t, __int128>(table, ".s64");
  add_integers<uint64_t, unsigned __int128>(table, ".u64");
  add_bits<bool>(table, ".pred");
  add_bits<uint16_t>(table, ".b16");
  add_bits<uint32_t>(table, ".b32");
  add_bits<uint64_t>(table, ".b64");
  add_float_conversions(table);
  add_halves<Bfloat>(table, ".bf16");
  add_halves<Half>(table, ".f16");
  add_doubles(table);
  add_bytes(table);
  return table;
}

}  // namespace ptx
