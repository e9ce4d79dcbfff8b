// soft_rows_ and pair_rows_ on the CPU: the loops of row_chunks.h behind checked arguments.
// Shapes: sftmix_kernels/row_chunks/cpu.py.

#include "arguments.h"
#include "parallel.h"
#include "row_chunks.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>

namespace sftmix {
namespace {

const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

float* mutable_floats(const Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}

// The objective of rows, which are of NTP: the Mixup term has none.
Objective check_objective(int64_t kind, double parameter, const std::optional<Tensor>& old,
                          const std::optional<Tensor>& stats, int64_t num_rows, bool gates_only) {
  const auto last = gates_only ? Kind::kClipped : Kind::kGem;
  STD_TORCH_CHECK(kind >= 0 && kind <= static_cast<int64_t>(last),
                  "kind: expected a number in [0, ", static_cast<int64_t>(last), "], got ", kind);
  Objective objective = {static_cast<Kind>(kind), static_cast<float>(parameter)};
  STD_TORCH_CHECK((objective.kind == Kind::kClipped) == old.has_value(),
                  "old_log_probs: expected with kind 5 and no other");
  objective.num_rows = num_rows;
  if (old) {
    check_vector(*old, "old_log_probs", num_rows, ScalarType::Float);
    objective.old_log_probs = floats(*old);
  }
  if (stats) {
    check_matrix(*stats, "stats", 3, num_rows, ScalarType::Float);
    objective.stats = mutable_floats(*stats);
  }
  return objective;
}

template <typename Logit>
Rows<Logit> check_rows(const Tensor& logits, double logit_scale, std::optional<double> softcap,
                       bool needs_gradient, const Objective& objective) {
  return {static_cast<Logit*>(logits.mutable_data_ptr()),
          logits.stride(0),
          logits.size(1),
          {static_cast<float>(logit_scale), static_cast<float>(softcap.value_or(0.0))},
          needs_gradient,
          objective};
}

void check_targets(const int64_t* targets, int64_t size, int64_t vocab_size, const char* name) {
  const bool inside =
      std::all_of(targets, targets + size, [&](int64_t t) { return t >= 0 && t < vocab_size; });
  STD_TORCH_CHECK(inside, name, ": expected values in [0, ", vocab_size, ")");
}

// Calls work with a null pointer to the logits' type.
template <typename Work>
void for_dtype(const Tensor& logits, const Work& work) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return work(static_cast<float*>(nullptr));
    case ScalarType::BFloat16:
      return work(static_cast<c10::BFloat16*>(nullptr));
    case ScalarType::Half:
      return work(static_cast<c10::Half*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "logits: expected float32, bfloat16 or float16");
  }
}

void soft_rows_(Tensor logits, Tensor targets, std::optional<Tensor> share, Tensor row_weight,
                double logit_scale, std::optional<double> softcap, bool needs_gradient, Tensor loss,
                int64_t kind, double parameter, std::optional<Tensor> old_log_probs,
                std::optional<Tensor> stats) {
  check_logits(logits);
  STD_TORCH_CHECK(targets.dim() == 2 && (targets.size(1) == 2 || (targets.size(1) == 1 && !share)),
                  "targets: expected shape (K, 1), or (K, 2) with shares");
  const int64_t num_rows = logits.size(0), num_targets = targets.size(1);
  STD_TORCH_CHECK(num_targets == 1 || share, "share: expected shape (K, 2), got None");
  check_matrix(targets, "targets", num_rows, num_targets, ScalarType::Long);
  if (share) check_matrix(*share, "share", num_rows, num_targets, ScalarType::Float);
  check_vector(row_weight, "row_weight", num_rows, ScalarType::Float);
  check_vector(loss, "loss", num_rows, ScalarType::Float);
  const auto* const columns = static_cast<const int64_t*>(targets.const_data_ptr());
  check_targets(columns, num_rows * num_targets, logits.size(1), "targets");
  const Objective objective =
      check_objective(kind, parameter, old_log_probs, stats, num_rows, false);
  STD_TORCH_CHECK(num_targets == 1 || (kind == 0 && !stats),
                  "kind: expected 0, and no stats, of rows with two targets");
  for_dtype(logits, [&](auto* type) {
    using Logit = std::remove_pointer_t<decltype(type)>;
    const SoftRows<Logit> rows = {
        check_rows<Logit>(logits, logit_scale, softcap, needs_gradient, objective),
        columns,
        share ? floats(*share) : nullptr,
        floats(row_weight),
        num_targets,
        mutable_floats(loss)};
    const auto work = pick_soft_rows<Logit>();
    for_rows(num_rows, rows.vocab_size,
             [&](int64_t first, int64_t last) { work(rows, first, last); });
  });
}

void pair_rows_(Tensor logits, Tensor labels, Tensor row_weight, Tensor share, Tensor pair_weight,
                Tensor mix_ratio, double logit_scale, std::optional<double> softcap, bool has_bias,
                bool needs_gradient, Tensor ntp, Tensor mixup, int64_t kind, double parameter,
                std::optional<Tensor> old_log_probs, std::optional<Tensor> stats) {
  check_logits(logits);
  const int64_t num_pairs = pair_weight.numel();
  STD_TORCH_CHECK(logits.size(0) >= 2 * num_pairs, "logits: expected at least ", 2 * num_pairs,
                  " rows");
  check_vector(labels, "labels", 2 * num_pairs, ScalarType::Long);
  check_vector(row_weight, "row_weight", 2 * num_pairs, ScalarType::Float);
  check_matrix(share, "share", num_pairs, 2, ScalarType::Float);
  check_vector(pair_weight, "pair_weight", num_pairs, ScalarType::Float);
  STD_TORCH_CHECK(mix_ratio.numel() == 1 && mix_ratio.scalar_type() == ScalarType::Float,
                  "mix_ratio: expected one float32 number");
  check_vector(ntp, "ntp", 2 * num_pairs, ScalarType::Float);
  check_vector(mixup, "mixup", num_pairs, ScalarType::Float);
  const auto* const columns = static_cast<const int64_t*>(labels.const_data_ptr());
  check_targets(columns, 2 * num_pairs, logits.size(1), "labels");
  const Objective objective =
      check_objective(kind, parameter, old_log_probs, stats, 2 * num_pairs, true);
  for_dtype(logits, [&](auto* type) {
    using Logit = std::remove_pointer_t<decltype(type)>;
    const PairRows<Logit> rows = {
        check_rows<Logit>(logits, logit_scale, softcap, needs_gradient, objective),
        columns,
        floats(row_weight),
        floats(share),
        floats(pair_weight),
        *floats(mix_ratio),
        has_bias,
        num_pairs,
        mutable_floats(ntp),
        mutable_floats(mixup)};
    const auto work = pick_pair_rows<Logit>();
    for_rows(num_pairs, 2 * rows.vocab_size,
             [&](int64_t first, int64_t last) { work(rows, first, last); });
  });
}

}  // namespace
}  // namespace sftmix

STABLE_TORCH_LIBRARY_IMPL(sftmix_kernels, CPU, library) {
  library.impl("soft_rows_", TORCH_BOX(&sftmix::soft_rows_));
  library.impl("pair_rows_", TORCH_BOX(&sftmix::pair_rows_));
}
