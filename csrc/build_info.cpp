// How the compiled part of sftmix_kernels was built, for bug reports and `sftmix doctor`.
// setup.py passes what the compiler cannot know; an empty string means "none".

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#ifndef SFTMIX_TORCH
#define SFTMIX_TORCH ""
#endif
#ifndef SFTMIX_CUDA
#define SFTMIX_CUDA ""
#endif
#ifndef SFTMIX_KERNELS
#define SFTMIX_KERNELS ""
#endif

namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("Clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("GCC ") + __VERSION__;
#elif defined(_MSC_VER)
  return "MSVC " + std::to_string(_MSC_FULL_VER);
#else
  return "unknown";
#endif
}

// MSVC keeps __cplusplus at 199711 and reports the truth in _MSVC_LANG.
std::string cxx_standard() {
#if defined(_MSVC_LANG)
  return std::to_string(_MSVC_LANG);
#else
  return std::to_string(__cplusplus);
#endif
}

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", compiler()}, {"cxx_standard", cxx_standard()}, {"torch", SFTMIX_TORCH},
      {"cuda", SFTMIX_CUDA},    {"kernels", SFTMIX_KERNELS},
  };
}

}  // namespace

PYBIND11_MODULE(_build_info, module) {
  module.doc() = "How the compiled part of sftmix_kernels was built.";
  module.def("build_info", &build_info, "Returns the build facts as a dict of strings.");
}
