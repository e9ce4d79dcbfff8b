// The arguments of fold_logits and add_token_losses, checked alike on every device.
// Shapes: sftmix_kernels/perplexity/online_softmax.py.

#pragma once

#include "arguments.h"
#include "online_softmax.h"

#include <cstdint>
#include <optional>

namespace sftmix {

inline StateRows check_state(const Tensor& state, int64_t num_rows) {
  STD_TORCH_CHECK(state.dim() == 2 && state.size(0) == 3 && state.size(1) == num_rows &&
                      (num_rows <= 1 || state.stride(1) == 1),
                  "state: expected shape (3, ", num_rows, ") with rows of unit stride");
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Float, "state: expected float32");
  return {static_cast<float*>(state.mutable_data_ptr()), state.stride(0)};
}

template <typename Logit>
Chunk<Logit> check_chunk(const Tensor& logits, const std::optional<Tensor>& bias,
                         const Tensor& labels, int64_t start, double logit_scale,
                         std::optional<double> softcap, const Tensor& state) {
  check_logits(logits);
  const int64_t num_rows = logits.size(0), num_columns = logits.size(1);
  check_vector(labels, "labels", num_rows, ScalarType::Long);
  if (bias) check_vector(*bias, "bias", num_columns, logits.scalar_type());
  return {static_cast<const Logit*>(logits.const_data_ptr()),
          bias ? static_cast<const Logit*>(bias->const_data_ptr()) : nullptr,
          static_cast<const int64_t*>(labels.const_data_ptr()),
          num_rows,
          num_columns,
          logits.stride(0),
          start,
          {static_cast<float>(logit_scale), static_cast<float>(softcap.value_or(0.0))},
          check_state(state, num_rows)};
}

inline Tokens check_tokens(const Tensor& state, const Tensor& labels, int64_t ignore_index,
                           const Tensor& sample_ids, const Tensor& order, const Tensor& nll_sum,
                           const Tensor& num_tokens) {
  const int64_t size = labels.numel(), num_samples = nll_sum.numel();
  check_vector(labels, "labels", size, ScalarType::Long);
  check_vector(sample_ids, "sample_ids", size, ScalarType::Long);
  check_vector(order, "order", size, ScalarType::Long);
  check_vector(nll_sum, "nll_sum", num_samples, ScalarType::Double);
  check_vector(num_tokens, "num_tokens", num_samples, ScalarType::Long);
  return {check_state(state, size),
          static_cast<const int64_t*>(labels.const_data_ptr()),
          ignore_index,
          static_cast<const int64_t*>(sample_ids.const_data_ptr()),
          static_cast<const int64_t*>(order.const_data_ptr()),
          size,
          static_cast<double*>(nll_sum.mutable_data_ptr()),
          static_cast<int64_t*>(num_tokens.mutable_data_ptr()),
          num_samples};
}

}  // namespace sftmix
