// What the ops of this folder share in checking their arguments.

#pragma once

// Before any header of torch: of its stable ABI only what 2.11 has, so that what is built beside
// one version runs beside later ones.
#ifdef TORCH_FEATURE_VERSION
#error "include arguments.h before torch's headers"
#endif
#define TORCH_TARGET_VERSION 0x020b000000000000ULL

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace sftmix {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_vector(const Tensor& tensor, const char* name, int64_t size, ScalarType type) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size && tensor.is_contiguous(), name,
                  ": expected a contiguous vector of ", size, " elements");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": wrong dtype");
}

inline void check_matrix(const Tensor& tensor, const char* name, int64_t rows, int64_t columns,
                         ScalarType type) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns &&
                      tensor.is_contiguous(),
                  name, ": expected a contiguous matrix of ", rows, " x ", columns);
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": wrong dtype");
}

inline void check_logits(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.size(1) <= 1 || logits.stride(1) == 1),
                  "logits: expected shape (K, N) with rows of unit stride");
}

}  // namespace sftmix
