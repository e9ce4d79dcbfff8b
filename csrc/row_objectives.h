// What the loss of a token is beside the plain cross-entropy: sftmix_kernels/gates.py has the
// formulas, and the same numbers of kinds.
//
// A gate multiplies the weight of a row between the two passes over its logits. Entropy and GEM
// need the mean of the logits under a softmax, label smoothing their plain mean: one more sum each
// in the first pass, which only those calls take.

#pragma once

#include "row_steps.h"
#include "soft_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace sftmix {

enum class Kind : int64_t { kPlain, kPower, kAbove, kBelow, kEntropy, kClipped, kSmoothed, kGem };

// The objective of K rows.
struct Objective {
  Kind kind = Kind::kPlain;
  float parameter = 0.0f;                // k, tau, alpha, eps, label_smoothing or beta
  const float* old_log_probs = nullptr;  // (K,), kClipped only
  float* stats = nullptr;                // (3, K) or null: NLL, entropy, 1 where the label is top
  int64_t num_rows = 0;

  // GEM is the cross-entropy of a / beta.
  SFTMIX_INLINE LogitTransform tempered(LogitTransform transform) const {
    if (kind != Kind::kGem) return transform;
    return {transform.scale / parameter, transform.cap / parameter};
  }
  SFTMIX_INLINE bool needs_moment() const {
    return stats != nullptr || kind == Kind::kEntropy || kind == Kind::kGem;
  }
  // Whether stats need a softmax that the loss has not.
  SFTMIX_INLINE bool is_tempered_with_stats() const {
    return stats != nullptr && kind == Kind::kGem;
  }
};

// The sums over a row's columns that its loss follows from; the targets held are in none of them.
struct RowSums {
  WideState others;
  double moment = 0.0;  // sum_j exp(a_j - max) (a_j - max)
  double gap = 0.0;     // sum_j (a_j - a_target)
};

// Sums of exponentials of a step, and of exponentials times exponents, in lanes as those of Lanes.
struct MomentLanes {
  float sum[kLanes];
  float moment[kLanes];

  SFTMIX_INLINE void add(const float* values, int64_t count, float base) {
#pragma omp simd
    for (int64_t l = 0; l < count; ++l) {
      const float below = values[l] - base;
      // exp_of is 0 there, and 0 * -inf would be NaN.
      const float x = below < -88.0f ? -88.0f : below;
      const float exponential = exp_of(x);
      sum[l] += exponential;
      moment[l] += x * exponential;
    }
  }
};

// Does what fold_values does, and adds to the moment. The maximum is found first: exponentials
// above 1 would cancel in a moment.
SFTMIX_INLINE void fold_moment(RowSums& sums, const float* values, int64_t size) {
  WideState& state = sums.others;
  float max = -INFINITY;
#pragma omp simd reduction(max : max)
  for (int64_t j = 0; j < size; ++j) max = values[j] > max ? values[j] : max;
  // Before the first logit there is nothing to move: 0 * -inf would be NaN.
  if (max > state.max && state.sum != 0.0) {
    const float down = state.max - max;
    sums.moment = exp_of(down) * (sums.moment + down * state.sum);
  }
  const float base = raise_max(state, max);
  MomentLanes lanes;
  std::fill_n(lanes.sum, kLanes, 0.0f);
  std::fill_n(lanes.moment, kLanes, 0.0f);
  int64_t first = 0;
  for (; first + kLanes <= size; first += kLanes) lanes.add(values + first, kLanes, base);
  lanes.add(values + first, size - first, base);
  float sum = 0.0f, moment = 0.0f;
#pragma omp simd reduction(+ : sum, moment)
  for (int64_t l = 0; l < kLanes; ++l) {
    sum += lanes.sum[l];
    moment += lanes.moment[l];
  }
  state.sum += sum;
  sums.moment += moment;
}

SFTMIX_INLINE float sum_of_gaps(const float* values, float at_target, int64_t size) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < size; ++j) sum += values[j] - at_target;
  return sum;
}

// sum_j p_j (a_j - top) over all columns of a row with one target.
SFTMIX_INLINE double mean_below_top(const RowSums& sums, const RowLoss& row) {
  const double top = row.top, at_target = row.logit[0] - top;
  double moment = at_target == -INFINITY ? 0.0 : std::exp(at_target) * at_target;
  if (sums.others.sum != 0.0) {
    const double down = sums.others.max == row.top ? 0.0 : sums.others.max - top;
    moment += std::exp(down) * (sums.moment + down * sums.others.sum);
  }
  return moment / row.total;
}

// `weight * value`, exactly 0 where the weight is 0 whatever the value.
SFTMIX_INLINE float weighted(float weight, double value) {
  return weight == 0.0f ? 0.0f : static_cast<float>(weight * value);
}

// The detached factor of row i; NaN where the NLL is, whatever a comparison would say.
SFTMIX_INLINE double gate_of(const Objective& objective, double nll, double entropy,
                             int64_t vocab_size, int64_t i) {
  const double parameter = objective.parameter, p = std::exp(-nll);
  if (std::isnan(nll)) return nll;
  switch (objective.kind) {
    case Kind::kPower:
      return std::pow(p, parameter);
    case Kind::kAbove:
      return p >= parameter ? 1.0 : 0.0;
    case Kind::kBelow:
      return p < parameter ? 1.0 : 0.0;
    case Kind::kEntropy: {
      // One token has no entropy.
      const double most = std::log(static_cast<double>(std::max<int64_t>(2, vocab_size)));
      return std::pow(std::max(entropy, 0.0) / most, parameter);
    }
    case Kind::kClipped: {
      const double ratio = std::exp(-nll - objective.old_log_probs[i]);
      return ratio >= 1.0 + parameter ? 0.0 : ratio;
    }
    default:
      return 1.0;
  }
}

SFTMIX_INLINE void write_stats(const Objective& objective, const RowSums& sums, const RowLoss& row,
                               int64_t i) {
  float* const stats = objective.stats + i;
  stats[0] = static_cast<float>(row.loss);
  stats[objective.num_rows] = static_cast<float>(row.log_sum - mean_below_top(sums, row));
  // A maximum does not see NaN; the loss does.
  const bool is_top = row.logit[0] >= sums.others.max && !std::isnan(row.loss);
  stats[2 * objective.num_rows] = is_top ? 1.0f : 0.0f;
}

// Makes the cross-entropy of row i, of tempered logits, the objective's, and multiplies the weight
// by what its softmax has. Returns what every column has besides, before weight and slope.
SFTMIX_INLINE float apply(const Objective& objective, const RowSums& sums, int64_t vocab_size,
                          int64_t i, RowLoss& row, float& weight) {
  switch (objective.kind) {
    case Kind::kPlain:
      return 0.0f;
    case Kind::kSmoothed: {
      const double each = static_cast<double>(objective.parameter) / vocab_size;
      row.loss -= each * sums.gap;
      row.at_target[0] += (objective.parameter - each) * row.total;
      return static_cast<float>(-each);
    }
    case Kind::kGem:
      row.loss = mean_below_top(sums, row) - (row.logit[0] - row.top);
      weight *= objective.parameter;
      return 0.0f;
    default: {
      const bool needs_entropy = objective.kind == Kind::kEntropy;
      const double entropy = needs_entropy ? row.log_sum - mean_below_top(sums, row) : 0.0;
      weight = weighted(weight, gate_of(objective, row.loss, entropy, vocab_size, i));
      return 0.0f;
    }
  }
}

}  // namespace sftmix
