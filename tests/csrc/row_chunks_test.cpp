// Checks row_chunks.h against plain float64 loops, in the version of the processor's instructions
// (capped by ATEN_CPU_CAPABILITY). It is for -fsanitize=address,undefined: every buffer ends where
// its last value does.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "row_chunks.h"

namespace sftmix {
namespace {

std::mt19937 random_bits(0);

double uniform(double low, double high) { return low + (high - low) * (random_bits() * 0x1p-32); }

int64_t index_below(int64_t size) { return static_cast<int64_t>(uniform(0.0, size - 0.5)); }

double transformed(LogitTransform f, double raw) {
  return f.is_capped() ? f.cap * std::tanh(f.scale * raw / f.cap) : f.scale * raw;
}

double slope(LogitTransform f, double raw) {
  const double t = f.is_capped() ? std::tanh(f.scale * raw / f.cap) : 0.0;
  return f.scale * (1.0 - t * t);
}

// Adds weight * the gradient of -sum_t share_t log p_t to `gradient`, and returns the loss.
double add_dense(LogitTransform f, const std::vector<double>& raw, const Targets& targets,
                 double weight, std::vector<double>& gradient) {
  double sum = 0.0, loss = 0.0;
  for (double x : raw) sum += std::exp(transformed(f, x));
  for (int t = 0; t < 2; ++t) {
    if (targets.column[t] < 0) continue;
    loss += targets.share[t] * (std::log(sum) - transformed(f, raw[targets.column[t]]));
    gradient[targets.column[t]] -= weight * targets.share[t] * slope(f, raw[targets.column[t]]);
  }
  for (size_t j = 0; j < raw.size(); ++j) {
    gradient[j] += weight * std::exp(transformed(f, raw[j])) / sum * slope(f, raw[j]);
  }
  return loss;
}

void require_close(double found, double expected, double tolerance, const char* what) {
  if (std::fabs(found - expected) <= tolerance * (1.0 + std::fabs(expected))) return;
  std::fprintf(stderr, "%s: %.9g, expected %.9g\n", what, found, expected);
  std::exit(1);
}

// K rows of V logits, each of which ends where its buffer does.
template <typename Logit>
struct Room {
  std::vector<Logit> values;
  int64_t stride;

  Room(int64_t rows, int64_t columns, int64_t gap)
      : values((rows - 1) * (columns + gap) + columns, Logit(NAN)), stride(columns + gap) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) values[i * stride + j] = Logit(uniform(-6.0, 6.0));
    }
  }
  std::vector<double> row(int64_t i, int64_t columns) const {
    const auto first = values.begin() + i * stride;
    return {first, first + columns};
  }
};

template <typename Logit>
void check_soft(int64_t columns, LogitTransform f, int64_t num_targets, double tolerance) {
  const int64_t num_rows = 5;
  Room<Logit> room(num_rows, columns, 3);
  const Room<Logit> before = room;
  std::vector<int64_t> targets;
  std::vector<float> share, weight, loss(num_rows);
  for (int64_t i = 0; i < num_rows; ++i) {
    const float lam = i == 0 ? 1.0f : static_cast<float>(uniform(0.0, 1.0));
    for (int t = 0; t < num_targets; ++t) targets.push_back(index_below(columns));
    if (i == 1) targets.back() = targets[targets.size() - num_targets];
    if (i == 2) targets.back() = columns - 1;
    share.insert(share.end(), {lam, 1.0f - lam});
    weight.push_back(i == 3 ? 0.0f : static_cast<float>(uniform(0.5, 2.0)));
  }
  const SoftRows<Logit> rows = {{room.values.data(), room.stride, columns, f, true},
                                targets.data(),
                                num_targets == 2 ? share.data() : nullptr,
                                weight.data(),
                                num_targets,
                                loss.data()};
  pick_soft_rows<Logit>()(rows, 0, num_rows);
  for (int64_t i = 0; i < num_rows; ++i) {
    Targets of_row = {{targets[i * num_targets], -1}, {1.0f, 0.0f}};
    if (num_targets == 2) {
      of_row = {{targets[2 * i], targets[2 * i + 1]}, {share[2 * i], share[2 * i + 1]}};
    }
    std::vector<double> expected(columns, 0.0);
    const double dense = add_dense(f, before.row(i, columns), of_row, weight[i], expected);
    require_close(loss[i], weight[i] * dense, tolerance, "loss");
    const std::vector<double> gradient = room.row(i, columns);
    for (int64_t j = 0; j < columns; ++j) {
      require_close(gradient[j], expected[j], tolerance, "gradient");
    }
  }
}

template <typename Logit>
void check_pairs(int64_t columns, LogitTransform f, double tolerance) {
  const int64_t num_pairs = 3;
  Room<Logit> room(2 * num_pairs, columns, 1);
  const Room<Logit> before = room;
  std::vector<int64_t> labels;
  std::vector<float> share, weight, pair_weight, ntp(2 * num_pairs), mixup(num_pairs);
  for (int64_t i = 0; i < 2 * num_pairs; ++i) {
    labels.push_back(index_below(columns));
    weight.push_back(static_cast<float>(uniform(0.5, 2.0)));
  }
  labels[num_pairs] = labels[0];
  labels[1] = columns - 1;
  for (int64_t i = 0; i < num_pairs; ++i) {
    const float lam = i == 2 ? 0.0f : static_cast<float>(uniform(0.0, 1.0));
    share.insert(share.end(), {lam, 1.0f - lam});
    pair_weight.push_back(static_cast<float>(uniform(0.5, 2.0)));
  }
  const float ratio = 0.37f;
  const PairRows<Logit> rows = {{room.values.data(), room.stride, columns, f, true},
                                labels.data(),
                                weight.data(),
                                share.data(),
                                pair_weight.data(),
                                ratio,
                                true,
                                num_pairs,
                                ntp.data(),
                                mixup.data()};
  pick_pair_rows<Logit>()(rows, 0, num_pairs);
  for (int64_t i = 0; i < num_pairs; ++i) {
    const int64_t both[2] = {i, i + num_pairs};
    std::vector<double> raw[2], mixed(columns), of_mixed(columns, 0.0);
    for (int k = 0; k < 2; ++k) raw[k] = before.row(both[k], columns);
    for (int64_t j = 0; j < columns; ++j) {
      mixed[j] = share[2 * i] * raw[0][j] + share[2 * i + 1] * raw[1][j];
    }
    const Targets targets = {{labels[both[0]], labels[both[1]]}, {share[2 * i], share[2 * i + 1]}};
    const double dense = add_dense(f, mixed, targets, double{pair_weight[i]} * ratio, of_mixed);
    require_close(mixup[i], pair_weight[i] * dense, tolerance, "mixup");
    for (int k = 0; k < 2; ++k) {
      std::vector<double> expected(columns, 0.0);
      const Targets own = {{labels[both[k]], -1}, {1.0f, 0.0f}};
      const double loss = add_dense(f, raw[k], own, weight[both[k]], expected);
      require_close(ntp[both[k]], weight[both[k]] * loss, tolerance, "ntp");
      const std::vector<double> gradient = room.row(both[k], columns);
      for (int64_t j = 0; j < columns; ++j) {
        const double whole = expected[j] + share[2 * i + k] * of_mixed[j];
        require_close(gradient[j], whole, tolerance, "gradient of a pair");
      }
    }
  }
}

// What multiplies a row's NLL, of the largest entropy that V columns allow.
double dense_gate(Kind kind, double parameter, double nll, double entropy, int64_t columns,
                  double old_log_prob) {
  const double p = std::exp(-nll), ratio = std::exp(-nll - old_log_prob);
  const double most = std::log(std::max<double>(2.0, columns));
  switch (kind) {
    case Kind::kPower:
      return std::pow(p, parameter);
    case Kind::kAbove:
      return p >= parameter;
    case Kind::kBelow:
      return p < parameter;
    case Kind::kEntropy:
      return std::pow(std::max(0.0, entropy) / most, parameter);
    case Kind::kClipped:
      return ratio < 1.0 + parameter ? ratio : 0.0;
    default:
      return 1.0;
  }
}

// Every objective, with stats that begin and end where their buffers do.
template <typename Logit>
void check_objective(int64_t columns, LogitTransform f, Kind kind, double tolerance) {
  const int64_t num_rows = 4;
  const float parameter = kind == Kind::kAbove || kind == Kind::kBelow ? 1e-3f : 0.7f;
  Room<Logit> room(num_rows, columns, 3);
  const Room<Logit> before = room;
  std::vector<int64_t> labels;
  std::vector<float> old, weight, loss(num_rows), stats(3 * num_rows);
  for (int64_t i = 0; i < num_rows; ++i) {
    labels.push_back(i == 0 ? columns - 1 : index_below(columns));
    old.push_back(static_cast<float>(uniform(-4.0, 0.0)));
    weight.push_back(static_cast<float>(uniform(0.5, 2.0)));
  }
  const float* const old_log_probs = kind == Kind::kClipped ? old.data() : nullptr;
  const SoftRows<Logit> rows = {{room.values.data(),
                                 room.stride,
                                 columns,
                                 f,
                                 true,
                                 {kind, parameter, old_log_probs, stats.data(), num_rows}},
                                labels.data(),
                                nullptr,
                                weight.data(),
                                1,
                                loss.data()};
  pick_soft_rows<Logit>()(rows, 0, num_rows);
  for (int64_t i = 0; i < num_rows; ++i) {
    const std::vector<double> raw = before.row(i, columns);
    std::vector<double> plain(columns, 0.0), gradient = room.row(i, columns);
    const double nll = add_dense(f, raw, {{labels[i], -1}, {1.0f, 0.0f}}, 1.0, plain);
    const double at_label = transformed(f, raw[labels[i]]), log_sum = nll + at_label;
    double entropy = 0.0, sum = 0.0, mean = 0.0, tempered = 0.0, expected_gap = 0.0;
    for (double x : raw) {
      const double a = transformed(f, x), q = std::exp((a - log_sum) / parameter);
      entropy += std::exp(a - log_sum) * (log_sum - a);
      mean += a / columns;
      tempered += q;
      expected_gap += q * (a - at_label);
      sum += a > at_label;
    }
    require_close(stats[i], nll, tolerance, "stats: nll");
    require_close(stats[num_rows + i], entropy, tolerance, "stats: entropy");
    require_close(stats[2 * num_rows + i], sum == 0.0, 0.0, "stats: top");
    const double gate = dense_gate(kind, parameter, nll, entropy, columns, old[i]);
    double value = gate * nll;
    if (kind == Kind::kSmoothed) value = nll - parameter * (mean - at_label);
    if (kind == Kind::kGem) value = expected_gap / tempered;
    require_close(loss[i], weight[i] * value, tolerance, "loss of an objective");
    for (int64_t j = 0; j < columns; ++j) {
      const double of_f = slope(f, raw[j]), onehot = j == labels[i];
      double expected = gate * plain[j];
      if (kind == Kind::kSmoothed) expected += of_f * parameter * (onehot - 1.0 / columns);
      if (kind == Kind::kGem) {
        const double q = std::exp((transformed(f, raw[j]) - log_sum) / parameter) / tempered;
        expected = (q - onehot) * of_f;
      }
      require_close(gradient[j], weight[i] * expected, tolerance, "gradient of an objective");
    }
  }
}

template <typename Logit>
void check_all(double tolerance) {
  const LogitTransform transforms[] = {{1.0f, 0.0f}, {0.5f, 0.0f}, {1.5f, 3.0f}};
  for (int64_t columns : {1, 7, 123, 1024, 1025, 3000}) {
    for (const LogitTransform& f : transforms) {
      check_soft<Logit>(columns, f, 1, tolerance);
      check_soft<Logit>(columns, f, 2, tolerance);
      check_pairs<Logit>(columns, f, tolerance);
      for (int kind = 0; kind <= static_cast<int>(Kind::kGem); ++kind) {
        check_objective<Logit>(columns, f, static_cast<Kind>(kind), tolerance);
      }
    }
  }
}

}  // namespace
}  // namespace sftmix

int main() {
  sftmix::check_all<float>(2e-6);
  sftmix::check_all<c10::Half>(2e-3);
  sftmix::check_all<c10::BFloat16>(1.6e-2);
}
