// The rows of a chunk of logits on the CPU: their losses, and their gradients in place.
//
// sftmix_kernels/row_chunks/pytorch.py says the same in PyTorch operations. A thread takes a row
// (or the two rows of a pair) and goes over its columns twice, in steps that stay in the L1 cache:
// once for the softmax, once for the gradient. Nothing of a row depends on its neighbours or on the
// number of threads.
//
// Legend: K rows, P pairs, T targets of a row, V vocabulary.

#pragma once

#include "row_objectives.h"
#include "row_steps.h"
#include "soft_cross_entropy.h"
#include "vectors.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace sftmix {

// The arguments that both ops share.
template <typename Logit>
struct Rows {
  Logit* logits;  // (K, V) raw; gradients afterwards
  int64_t row_stride;
  int64_t vocab_size;
  LogitTransform transform;
  bool needs_gradient;
  Objective objective;  // of rows with one target; that of pairs is of their NTP

  SFTMIX_INLINE Logit* row(int64_t i) const { return logits + i * row_stride; }
};

template <typename Logit>
struct SoftRows : Rows<Logit> {
  const int64_t* targets;   // (K, T)
  const float* share;       // (K, T) or null where T is 1
  const float* row_weight;  // (K,)
  int64_t num_targets;
  float* loss;  // (K,)
};

template <typename Logit>
struct PairRows : Rows<Logit> {
  const int64_t* labels;     // (2 P,) of rows of c, then of u; as row_weight and ntp
  const float* row_weight;   // (2 P,)
  const float* share;        // (P, 2): lam and 1 - lam
  const float* pair_weight;  // (P,)
  float mix_ratio;
  bool has_bias;
  int64_t num_pairs;
  float* ntp;    // (2 P,)
  float* mixup;  // (P,)
};

// A step's logits without the columns of held targets, which lie `first` columns before them.
SFTMIX_INLINE const float* without_held(const Targets& targets, const float* values, int64_t first,
                                        int64_t size, float* room) {
  for (int t = 0; t < 2; ++t) {
    const int64_t column = targets.column[t] - first;
    if (!targets.is_held(t) || column < 0 || column >= size) continue;
    if (values != room) std::copy_n(values, size, room);
    room[column] = -INFINITY;
    values = room;
  }
  return values;
}

// Folds a step's logits into what the row's objective needs.
SFTMIX_INLINE void fold_step(RowSums& sums, const Objective& objective, const Targets& targets,
                             float at_target, const float* values, int64_t first, int64_t size,
                             float* room) {
  if (objective.kind == Kind::kSmoothed) sums.gap += sum_of_gaps(values, at_target, size);
  const float* const others = without_held(targets, values, first, size, room);
  if (objective.needs_moment()) {
    fold_moment(sums, others, size);
  } else {
    fold_values(sums.others, others, size);
  }
}

// lam a_c + (1 - lam) a_u of raw logits.
SFTMIX_INLINE float mixed(float raw_c, float raw_u, const float* share, bool has_bias) {
  // A bias of -inf masks an entry, and 0 * -inf is NaN: where one share is 0, the mixture is the
  // other row.
  if (has_bias && share[1] == 0.0f) return raw_c;
  if (has_bias && share[0] == 0.0f) return raw_u;
  return share[0] * raw_c + share[1] * raw_u;
}

SFTMIX_INLINE void mix_step(const float* raw_c, const float* raw_u, const float* share,
                            bool has_bias, int64_t size, float* room) {
  for (int64_t j = 0; j < size; ++j) room[j] = mixed(raw_c[j], raw_u[j], share, has_bias);
}

// Writes `factor exp(f(raw) - top) f'(raw) / scale`, the gradient at columns that are no targets.
// A factor of 0 gives 0, whatever the logits. `flat` is what every column has besides.
SFTMIX_INLINE void gradient_step(LogitTransform transform, const float* raw, int64_t size,
                                 float top, float factor, float flat, float* gradient) {
  if (factor == 0.0f) {
    std::fill_n(gradient, size, 0.0f);
  } else {
    // By way of memory, so that logits are rounded as they are in the sum: fused with the
    // subtraction they would not be, and a probability could be above 1.
    const float* const values = transform_step(transform, raw, size, gradient);
    for (int64_t j = 0; j < size; ++j) gradient[j] = factor * exp_of(values[j] - top);
    if (flat != 0.0f) {
      for (int64_t j = 0; j < size; ++j) gradient[j] += flat;
    }
    if (transform.is_capped()) {
      for (int64_t j = 0; j < size; ++j) gradient[j] *= transform.slope(raw[j]);
    }
  }
}

template <typename Logit>
SFTMIX_INLINE void store_step(const float* values, int64_t size, Logit* logits) {
  for (int64_t j = 0; j < size; ++j) logits[j] = static_cast<Logit>(values[j]);
}

// What a row's gradient follows from.
struct RowGradient {
  float top;
  float factor;
  float at_target[2];  // d loss / d raw

  // `weight` times the gradient of a row's loss with respect to its raw logits.
  SFTMIX_INLINE RowGradient(const RowLoss& row, const Targets& targets, float weight,
                            LogitTransform transform, const float (&raw)[2])
      : top(row.top), factor(weighted(weight, transform.scale / row.total)) {
    for (int t = 0; t < 2; ++t) {
      // A target without a share is a column like any other, to the bit.
      const float slope = transform.slope(raw[t]);
      at_target[t] = targets.is_held(t) ? weighted(factor, row.at_target[t] * slope)
                                        : weighted(factor, exp_of(row.logit[t] - top)) * slope;
    }
  }
};

// The raw logits of a row at its targets, 0 where it has but one.
template <typename Logit>
SFTMIX_INLINE void raw_at(const Logit* logits, const Targets& targets, float (&raw)[2]) {
  for (int t = 0; t < 2; ++t) {
    raw[t] = targets.column[t] < 0 ? 0.0f : static_cast<float>(logits[targets.column[t]]);
  }
}

SFTMIX_INLINE RowLoss row_loss(const WideState& others, LogitTransform transform,
                               const float (&raw)[2], const Targets& targets) {
  const float logit[2] = {transform(raw[0]), transform(raw[1])};
  return soft_cross_entropy(others, logit, targets);
}

template <typename Logit>
SFTMIX_INLINE void soft_row(const SoftRows<Logit>& rows, int64_t i) {
  Logit* const logits = rows.row(i);
  const Objective& objective = rows.objective;
  const LogitTransform transform = objective.tempered(rows.transform);
  Targets targets = {{rows.targets[i * rows.num_targets], -1}, {1.0f, 0.0f}};
  if (rows.num_targets == 2) {
    const float* const share = rows.share + 2 * i;
    targets = {{rows.targets[2 * i], rows.targets[2 * i + 1]}, {share[0], share[1]}};
  }
  float raw[2], room[kStep], other_room[kStep];
  raw_at(logits, targets, raw);
  const float at_target = transform(raw[0]);
  RowSums sums, untempered;
  for (int64_t first = 0; first < rows.vocab_size; first += kStep) {
    const int64_t size = std::min(kStep, rows.vocab_size - first);
    const float* const loaded = load_step(logits + first, size, room);
    if (objective.is_tempered_with_stats()) {
      const float* const values = transform_step(rows.transform, loaded, size, other_room);
      fold_step(untempered, objective, targets, 0.0f, values, first, size, other_room);
    }
    const float* const values = transform_step(transform, loaded, size, room);
    fold_step(sums, objective, targets, at_target, values, first, size, room);
  }
  RowLoss loss = row_loss(sums.others, transform, raw, targets);
  if (objective.is_tempered_with_stats()) {
    const RowLoss plain = row_loss(untempered.others, rows.transform, raw, targets);
    write_stats(objective, untempered, plain, i);
  } else if (objective.stats != nullptr) {
    write_stats(objective, sums, loss, i);
  }
  float weight = rows.row_weight[i];
  const float flat = apply(objective, sums, rows.vocab_size, i, loss, weight);
  rows.loss[i] = weighted(weight, loss.loss);
  if (!rows.needs_gradient) return;
  const RowGradient row(loss, targets, weight, transform, raw);
  const float flat_gradient = flat * weight * transform.scale;
  for (int64_t first = 0; first < rows.vocab_size; first += kStep) {
    const int64_t size = std::min(kStep, rows.vocab_size - first);
    const float* const values = load_step(logits + first, size, room);
    gradient_step(transform, values, size, row.top, row.factor, flat_gradient, other_room);
    store_step(other_room, size, logits + first);
  }
  for (int t = 0; t < rows.num_targets; ++t) {
    if (!targets.is_held(t)) continue;
    logits[targets.column[t]] = static_cast<Logit>(row.at_target[t]);
  }
}

template <typename Logit>
SFTMIX_INLINE void pair_row(const PairRows<Logit>& rows, int64_t i) {
  const int64_t index[2] = {i, i + rows.num_pairs};  // of c, of u
  Logit* const logits[2] = {rows.row(index[0]), rows.row(index[1])};
  const float* const share = rows.share + 2 * i;
  const LogitTransform transform = rows.transform;
  const int64_t label[2] = {rows.labels[index[0]], rows.labels[index[1]]};
  // Of c, of u and of their mixture. All three have logits at both labels.
  const Targets targets[3] = {{{label[0], label[1]}, {1.0f, 0.0f}},
                              {{label[1], label[0]}, {1.0f, 0.0f}},
                              {{label[0], label[1]}, {share[0], share[1]}}};
  float raw[3][2];
  raw_at(logits[0], targets[0], raw[0]);
  raw_at(logits[1], targets[1], raw[1]);
  for (int t = 0; t < 2; ++t) raw[2][t] = mixed(raw[0][t], raw[1][1 - t], share, rows.has_bias);

  float room[3][kStep], gradient[3][kStep];
  // What the objective needs, and nothing more for the mixture.
  RowSums sums[3];
  const Objective of[3] = {rows.objective, rows.objective, {}};
  for (int64_t first = 0; first < rows.vocab_size; first += kStep) {
    const int64_t size = std::min(kStep, rows.vocab_size - first);
    const float* values[3] = {load_step(logits[0] + first, size, room[0]),
                              load_step(logits[1] + first, size, room[1]), room[2]};
    mix_step(values[0], values[1], share, rows.has_bias, size, room[2]);
    for (int k = 0; k < 3; ++k) {
      values[k] = transform_step(transform, values[k], size, room[k]);
      fold_step(sums[k], of[k], targets[k], 0.0f, values[k], first, size, room[k]);
    }
  }
  RowLoss loss[3] = {row_loss(sums[0].others, transform, raw[0], targets[0]),
                     row_loss(sums[1].others, transform, raw[1], targets[1]),
                     row_loss(sums[2].others, transform, raw[2], targets[2])};
  float weight[3] = {rows.row_weight[index[0]], rows.row_weight[index[1]],
                     rows.pair_weight[i] * rows.mix_ratio};
  for (int k = 0; k < 2; ++k) {
    if (of[k].stats != nullptr) write_stats(of[k], sums[k], loss[k], index[k]);
    apply(of[k], sums[k], rows.vocab_size, index[k], loss[k], weight[k]);
    rows.ntp[index[k]] = weighted(weight[k], loss[k].loss);
  }
  rows.mixup[i] = weighted(rows.pair_weight[i], loss[2].loss);
  if (!rows.needs_gradient) return;

  const RowGradient row[3] = {{loss[0], targets[0], weight[0], transform, raw[0]},
                              {loss[1], targets[1], weight[1], transform, raw[1]},
                              {loss[2], targets[2], weight[2], transform, raw[2]}};
  for (int64_t first = 0; first < rows.vocab_size; first += kStep) {
    const int64_t size = std::min(kStep, rows.vocab_size - first);
    const float* const values[3] = {load_step(logits[0] + first, size, room[0]),
                                    load_step(logits[1] + first, size, room[1]), room[2]};
    mix_step(values[0], values[1], share, rows.has_bias, size, room[2]);
    for (int k = 0; k < 3; ++k) {
      gradient_step(transform, values[k], size, row[k].top, row[k].factor, 0.0f, gradient[k]);
    }
    for (int k = 0; k < 2; ++k) {
      for (int64_t j = 0; j < size; ++j) gradient[k][j] += share[k] * gradient[2][j];
      store_step(gradient[k], size, logits[k] + first);
    }
  }
  for (int k = 0; k < 2; ++k) {
    const int64_t own = label[k], other = label[1 - k];
    // Of its own row only the own label is a target.
    const float at_other = row[k].at_target[1] + share[k] * row[2].at_target[1 - k];
    const float at_own = row[k].at_target[0] + share[k] * row[2].at_target[k];
    logits[k][other] = static_cast<Logit>(at_other);
    logits[k][own] = static_cast<Logit>(at_own);
  }
}

SFTMIX_EACH_SET(soft_rows, soft_row, SoftRows)
SFTMIX_EACH_SET(pair_rows, pair_row, PairRows)

}  // namespace sftmix
