// Which instruction set the loops of online_softmax_cpu.cpp and row_chunks_cpu.cpp use.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <string_view>

// The loops are compiled for each set on x86-64, with functions that name their target.
#if defined(__x86_64__) && defined(__GNUC__)
#define SFTMIX_X86 1
#define SFTMIX_AVX512 __attribute__((target("avx512f,avx2,fma,f16c")))
#define SFTMIX_AVX2 __attribute__((target("avx2,fma,f16c")))
#endif

namespace sftmix {

enum class Vectors { kAvx512, kAvx2, kPlain };

// The widest that the processor has, or less where ATEN_CPU_CAPABILITY says so: what caps PyTorch's
// own kernels ("default", "avx2", "avx512") caps these too.
inline Vectors vectors() {
#ifdef SFTMIX_X86
  static const Vectors widest = [] {
    const char* const variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view cap = variable ? variable : "";
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    if (cap == "default" || !has_avx2) return Vectors::kPlain;
    const bool has_avx512 = __builtin_cpu_supports("avx512f");
    return has_avx512 && cap != "avx2" ? Vectors::kAvx512 : Vectors::kAvx2;
  }();
  return widest;
#else
  return Vectors::kPlain;
#endif
}

}  // namespace sftmix

// Defines pick_NAME<Logit>(), which returns the function (args, first, last) that calls
// ONE(args, i) for each row i of [first, last), in the version for this processor. ARGS is a
// template of the arguments' type, ONE is inlined always.
#define SFTMIX_ONE_SET(NAME, ONE, ARGS, TARGET)                            \
  template <typename Logit>                                                \
  TARGET void NAME(const ARGS<Logit>& args, int64_t first, int64_t last) { \
    for (int64_t i = first; i < last; ++i) ONE(args, i);                   \
  }

#ifdef SFTMIX_X86
#define SFTMIX_EACH_SET(NAME, ONE, ARGS)                            \
  SFTMIX_ONE_SET(NAME##_plain, ONE, ARGS, )                         \
  SFTMIX_ONE_SET(NAME##_avx2, ONE, ARGS, SFTMIX_AVX2)               \
  SFTMIX_ONE_SET(NAME##_avx512, ONE, ARGS, SFTMIX_AVX512)           \
  template <typename Logit>                                         \
  auto pick_##NAME() {                                              \
    if (vectors() == Vectors::kAvx512) return NAME##_avx512<Logit>; \
    if (vectors() == Vectors::kAvx2) return NAME##_avx2<Logit>;     \
    return NAME##_plain<Logit>;                                     \
  }
#else
#define SFTMIX_EACH_SET(NAME, ONE, ARGS)    \
  SFTMIX_ONE_SET(NAME##_plain, ONE, ARGS, ) \
  template <typename Logit>                 \
  auto pick_##NAME() {                      \
    return NAME##_plain<Logit>;             \
  }
#endif
