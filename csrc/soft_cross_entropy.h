// The soft cross-entropy of a row of logits, and its gradient.
//
// With shares s_t of targets t (one or two, which may be the same column),
//
//     loss = -sum_t s_t log p_t,    d loss / d a_j = p_j - sum_(t = j) s_t
//
// Targets that have a share are *held*: kept out of the row's sum. What is left is the sum of all
// others, from which p - 1 and log p of a confident token follow without cancelling. A target
// without a share stays in the sum like any other column, which makes the row bitwise the plain
// cross-entropy. `soft_cross_entropy` in sftmix_kernels/primitives.py says the same for the GPU.

#pragma once

#include "online_softmax.h"

#include <algorithm>

namespace sftmix {

// The targets of a row, and what of the label each is. A plain cross-entropy has one, and -1.
struct Targets {
  int64_t column[2];
  float share[2];

  SFTMIX_INLINE bool same() const { return column[0] == column[1]; }
  SFTMIX_INLINE bool is_held(int t) const { return share[t] != 0.0f; }
  // What the label has in the column of target t.
  SFTMIX_INLINE float in_column(int t) const { return same() ? share[0] + share[1] : share[t]; }
};

struct RowLoss {
  double loss;
  double total;         // sum_j exp(a_j - top)
  double log_sum;       // its logarithm
  double at_target[2];  // total * d loss / d a at each target
  float top;            // max_j a_j
  float logit[2];       // a at each target
};

// The loss of a row from the softmax state of the columns that are not held, and the logits at its
// targets. In float64: it is a few operations a row.
SFTMIX_INLINE RowLoss soft_cross_entropy(const WideState& others, const float (&logit)[2],
                                         const Targets& targets) {
  const bool held[2] = {targets.is_held(0),
                        targets.is_held(1) && !(targets.same() && targets.is_held(0))};
  RowLoss row;
  row.top = others.max;
  std::copy_n(logit, 2, row.logit);
  for (int t = 0; t < 2; ++t) {
    if (held[t]) row.top = std::max(row.top, logit[t]);
  }
  const double top = row.top;
  // Beside a maximum that is infinite, 0 would be NaN.
  const double rest = others.max == row.top ? others.sum : others.sum * std::exp(others.max - top);
  double exp_at[2], held_exp[2];
  for (int t = 0; t < 2; ++t) {
    exp_at[t] = std::exp(logit[t] - top);
    held_exp[t] = held[t] ? exp_at[t] : 0.0;
  }
  const double held_sum = held_exp[0] + held_exp[1];
  row.total = rest + held_sum;
  const double log_sum = std::log1p(rest + (held_sum - 1.0));
  row.log_sum = log_sum;
  row.loss = 0.0;
  for (int t = 0; t < 2; ++t) {
    const double column = targets.in_column(t);
    const double other = rest + (targets.same() ? 0.0 : held_exp[1 - t]);
    // A column without a share may be masked by a logit of -inf, and 0 * inf is NaN.
    if (targets.is_held(t)) row.loss += targets.share[t] * (log_sum - (logit[t] - top));
    row.at_target[t] = exp_at[t] * (1.0 - column) - column * other;
  }
  return row;
}

}  // namespace sftmix
