// The extension's Python module. Loading it registers the ops of online_softmax_cpu.cpp,
// row_chunks_cpu.cpp and online_softmax_cuda.cu; all it says itself is how it was built. An empty
// string means "none".

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <map>
#include <string>

#ifdef USE_CUDA
#include <cuda_runtime_api.h>
#endif

#include "vectors.h"

namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("Clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("GCC ") + __VERSION__;
#else
  return "unknown";
#endif
}

// The instruction set whose loops run here.
std::string vectors() {
#ifdef SFTMIX_X86
  switch (sftmix::vectors()) {
    case sftmix::Vectors::kAvx512:
      return "avx512f";
    case sftmix::Vectors::kAvx2:
      return "avx2";
    case sftmix::Vectors::kPlain:
      return "sse2";
  }
#endif
  return "";
}

std::string cuda() {
#ifdef USE_CUDA
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
#else
  return "";
#endif
}

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", compiler()},
      {"cxx_standard", std::to_string(__cplusplus)},
      {"torch", TORCH_VERSION},
      {"cuda", cuda()},
      {"kernels", cuda().empty() ? "online_softmax, row_chunks (CPU)"
                                 : "online_softmax (CPU, CUDA), row_chunks (CPU)"},
      {"vectors", vectors()},
  };
}

}  // namespace

PYBIND11_MODULE(_extension, module) {
  module.doc() = "Compiled ops of sftmix_kernels; registered with torch by loading this module.";
  module.def("build_info", &build_info, "Returns the build facts as a dict of strings.");
}
