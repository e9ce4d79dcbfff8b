// Checks online_softmax.h and online_softmax_kernels.cuh against plain float64 loops.
//
// `online_softmax_test values` checks every kind of kernel and is for -fsanitize=address,undefined:
// buffers end where their last value does. `online_softmax_test races` runs each way in which
// threads meet, on small blocks, and is for -fsanitize=thread.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string_view>
#include <vector>

// The kernels are written in CUDA, which simt.h stands in for.
// clang-format off
#include "simt.h"
#include "online_softmax_kernels.cuh"
// clang-format on

#define REQUIRE(holds, ...)                                            \
  do {                                                                 \
    if (!(holds)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #holds); \
      std::fprintf(stderr, __VA_ARGS__);                               \
      std::fputc('\n', stderr);                                        \
      std::exit(1);                                                    \
    }                                                                  \
  } while (false)

namespace sftmix {
namespace {

constexpr float kInf = INFINITY;
constexpr float kUnit = 0x1p-24f;  // float32's rounding
// In padding and where nothing is to be written: a NaN that no computation gives.
const float kCanary = std::bit_cast<float>(0x7fc0beefu);

std::mt19937 random_bits(0);

double uniform(double low, double high) { return low + (high - low) * (random_bits() * 0x1p-32); }

bool same_bits(float x, float y) {
  return std::bit_cast<uint32_t>(x) == std::bit_cast<uint32_t>(y);
}

bool is_close(double value, double expected, double tolerance) {
  return value == expected || (std::isnan(value) && std::isnan(expected)) ||
         std::fabs(value - expected) <= tolerance;
}

// log sum_j exp(a_j): NaN with a NaN or +inf among them, -inf with nothing but -inf.
double log_sum_exp(const std::vector<double>& logits) {
  double max = -kInf, sum = 0.0;
  for (double logit : logits) max = std::isnan(logit) ? max : std::max(max, logit);
  const double base = max == -kInf ? 0.0 : max;
  for (double logit : logits) sum += std::exp(logit - base);
  return base + std::log(sum);
}

double log_sum_exp(const RowState& row) { return row.max + std::log(double{row.sum}); }

void check_exp() {
  for (float x = -87.0f; x <= 0.0f; x += 0x1p-10f) {
    const double expected = std::exp(double{x}), bound = 2.0 * kUnit * expected;
    REQUIRE(is_close(exp_of(x), expected, bound), "x = %a", x);
  }
  REQUIRE(exp_of(0.0f) == 1.0f && exp_of(-0.0f) == 1.0f, "zeros");
  for (float x : {-87.7f, -88.0f, -104.0f, -1e30f, -std::numeric_limits<float>::max(), -kInf}) {
    REQUIRE(exp_of(x) == 0.0f, "x = %g", x);
  }
  REQUIRE(std::isnan(exp_of(NAN)), "NaN");
}

void check_tanh() {
  for (float x = 0x1p-40f; x < 30.0f; x *= 1.0009765625f) {
    const double expected = std::tanh(double{x});
    REQUIRE(is_close(tanh_of(x), expected, 4.0 * kUnit * expected), "x = %a", x);
    REQUIRE(tanh_of(-x) == -tanh_of(x), "x = %a", x);
  }
  REQUIRE(tanh_of(0.0f) == 0.0f && tanh_of(kInf) == 1.0f && tanh_of(-kInf) == -1.0f, "limits");
  REQUIRE(std::isnan(tanh_of(NAN)), "NaN");
}

void check_merge() {
  const std::vector<std::vector<double>> rows = {
      {1.0, 2.0, 3.0, -40.0},          {5.0, 5.0, 5.0, 5.0},
      {-kInf, 0.5, -kInf, 0.5},        {-kInf, -kInf, -kInf, -kInf},
      {-kInf, 0x1p127, -0x1p127, 0.0}, {kInf, 1.0, -kInf, 2.0},
      {kInf, kInf, 0.0, -1.0},         {NAN, 1.0, 2.0, -kInf},
      {NAN, -kInf, -kInf, -kInf},      {NAN, kInf, 0.0, 0.0},
  };
  for (const auto& logits : rows) {
    const double expected = log_sum_exp(logits);
    std::vector<size_t> order = {0, 1, 2, 3};
    do {
      RowState one_by_one, left, right;
      for (size_t i : order) {
        // A logit as the kernels fold it.
        const float logit = static_cast<float>(logits[i]);
        const float values[1] = {logit};
        fold_values(one_by_one, values);
        fold_values(i % 2 ? left : right, values);
      }
      merge(left, right.max, right.sum);
      for (const RowState& row : {one_by_one, left}) {
        REQUIRE(is_close(log_sum_exp(row), expected, 8.0 * kUnit),
                "%g, %g, %g, %g: %.9g, expected %.9g", logits[0], logits[1], logits[2], logits[3],
                log_sum_exp(row), expected);
      }
    } while (std::next_permutation(order.begin(), order.end()));
  }
  RowState row;
  REQUIRE(raise_max(row, -kInf) == 0.0f && row.max == -kInf, "nothing but -inf");
  REQUIRE(raise_max(row, 2.0f) == 2.0f && row.max == 2.0f && row.sum == 0.0f, "the first maximum");
  row.sum = 3.0f;
  REQUIRE(raise_max(row, 2.0f) == 2.0f && row.sum == 3.0f, "an equal maximum");
  REQUIRE(raise_max(row, 1.0f) == 2.0f && row.sum == 3.0f, "a smaller maximum");
}

void check_token_loss() {
  for (int i = 0; i < 10000; ++i) {
    const float max = static_cast<float>(uniform(-300.0, 300.0));
    const float sum = static_cast<float>(std::exp(uniform(0.0, 12.0)));
    const float target = max - static_cast<float>(std::exp(uniform(-9.0, 7.0)));
    const double loss = token_loss({max, sum, target});
    REQUIRE(is_close(loss, std::log(double{sum}) + double{max} - double{target}, 0x1.01p-33),
            "max %g, sum %g, target %g: %.17g", max, sum, target, loss);
    REQUIRE(loss * 0x1p32 == std::floor(loss * 0x1p32), "%.17g", loss);
  }
  REQUIRE(token_loss({0.0f, 1.0f, -200.0f}) == 200.0, "beyond what float32's exp holds");
  REQUIRE(token_loss({0.0f, 1.0f, -3e38f}) == double{3e38f}, "a loss that has no such steps");
  REQUIRE(token_loss({1.0f, 2.0f, -kInf}) == kInf, "a label that is masked");
  REQUIRE(std::isnan(token_loss({1.0f, 2.0f, NAN})), "a label that no chunk held");
  REQUIRE(std::isnan(token_loss({1.0f, NAN, 0.0f})), "a row with NaN");
  REQUIRE(std::isnan(token_loss({-kInf, 0.0f, -kInf})), "a row with nothing but -inf");
}

// Rows of logits in chunks of some widths, their buffers, and the states that they are folded into.
template <typename Logit>
struct Rows {
  struct Piece {
    int64_t start, width, stride;
    std::vector<Logit> logits, bias;
  };
  int64_t num_rows, size = 0, state_stride;
  LogitTransform transform;
  std::vector<Piece> pieces;
  std::vector<int64_t> labels;
  std::vector<float> states;

  Rows(int64_t num_rows, const std::vector<int64_t>& widths, bool has_bias,
       LogitTransform transform)
      : num_rows(num_rows), state_stride(num_rows + 3), transform(transform) {
    constexpr int64_t kSize = Vector<Logit>::kSize;
    for (int64_t width : widths) {
      // Rows begin at multiples of 16 bytes; the last one ends with its last logit.
      const int64_t stride = (width + kSize - 1) / kSize * kSize + kSize;
      Piece piece{size, width, stride, std::vector<Logit>((num_rows - 1) * stride + width, kCanary),
                  std::vector<Logit>(has_bias ? width : 0)};
      for (Logit& value : piece.bias) value = static_cast<float>(uniform(-1.0, 1.0));
      pieces.push_back(piece);
      size += width;
    }
    for (int64_t row = 0; row < num_rows; ++row) {
      const double range = row % 2 ? 20.0 : 2.0;
      for (int64_t j = 0; j < size; ++j) logit(row, j) = static_cast<float>(uniform(-range, range));
    }
    labels.assign(num_rows, 0);
    states.assign(2 * state_stride + num_rows, kCanary);
    std::fill_n(states.begin(), num_rows, -kInf);
    std::fill_n(states.begin() + state_stride, num_rows, 0.0f);
  }

  Piece& piece_of(int64_t column) {
    return *std::find_if(pieces.begin(), pieces.end(),
                         [&](Piece& piece) { return column < piece.start + piece.width; });
  }
  Logit& logit(int64_t row, int64_t column) {
    Piece& piece = piece_of(column);
    return piece.logits[row * piece.stride + column - piece.start];
  }
  double transformed(int64_t row, int64_t column) {
    const Piece& piece = piece_of(column);
    double value = float{logit(row, column)};
    if (!piece.bias.empty()) value += float{piece.bias[column - piece.start]};
    value *= transform.scale;
    return transform.is_capped() ? transform.cap * std::tanh(value / transform.cap) : value;
  }
  RowState state(int64_t row) { return StateRows{states.data(), state_stride}.load(row); }

  template <bool kCapped, int kWarps>
  void fold() {
    const int64_t num_blocks = (num_rows * kWarps * kWarp + kThreads - 1) / kThreads;
    for (const Piece& piece : pieces) {
      const Chunk<Logit> chunk = {piece.logits.data(),
                                  piece.bias.empty() ? nullptr : piece.bias.data(),
                                  labels.data(),
                                  num_rows,
                                  piece.width,
                                  piece.stride,
                                  piece.start,
                                  transform,
                                  {states.data(), state_stride}};
      simt::launch(fold_logits_kernel<Logit, kCapped, kWarps>, num_blocks, kThreads, chunk);
    }
  }

  void check() {
    for (int64_t row = 0; row < num_rows; ++row) {
      std::vector<double> logits;
      double largest = 0.0;
      for (int64_t j = 0; j < size; ++j) {
        logits.push_back(transformed(row, j));
        if (std::isfinite(logits.back())) largest = std::max(largest, std::fabs(logits.back()));
      }
      // Of each logit three operations are rounded, of the sum about one for 32 columns a thread.
      const double tolerance = (8.0 * largest + 64.0) * kUnit;
      const RowState found = state(row);
      REQUIRE(is_close(log_sum_exp(found), log_sum_exp(logits), tolerance),
              "row %lld of %zu columns: %.9g, expected %.9g", static_cast<long long>(row),
              logits.size(), log_sum_exp(found), log_sum_exp(logits));
      const int64_t label = labels[row];
      if (label >= 0 && label < size) {
        REQUIRE(is_close(found.target, logits[label], tolerance), "row %lld, label %lld: %.9g",
                static_cast<long long>(row), static_cast<long long>(label), found.target);
      } else {
        REQUIRE(same_bits(found.target, kCanary), "label %lld", static_cast<long long>(label));
      }
    }
    for (int64_t i = 0; i < 2 * state_stride; ++i) {
      REQUIRE(i % state_stride < num_rows || same_bits(states[i], kCanary), "state %lld is written",
              static_cast<long long>(i));
    }
  }
};

LogitTransform make_transform(bool is_capped, float scale) {
  return {scale, is_capped ? 3.0f : 0.0f};
}

template <typename Logit, bool kCapped, int kWarps>
void check_columns(const std::vector<int64_t>& widths, bool has_bias, float scale) {
  static size_t next_label = 0;
  // One block and a part of one; with a block a row, two whole ones.
  Rows<Logit> rows(kWarps == 1 ? 5 : 3, widths, has_bias, make_transform(kCapped, scale));
  const int64_t edges[] = {0, widths[0] - 1, std::min(widths[0], rows.size - 1), rows.size - 1};
  for (int64_t& label : rows.labels) label = edges[next_label++ % std::size(edges)];
  rows.template fold<kCapped, kWarps>();
  rows.check();
}

// Labels that no chunk holds, rows with infinities, and what a row with NaN does to its neighbours.
template <typename Logit, bool kCapped, int kWarps>
void check_odd_rows() {
  constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();
  constexpr int64_t kRows = 9, kMasked = 1, kAllMasked = 2, kInfinite = 3, kNan = 5;
  Rows<Logit> rows(kRows, {40, 137}, true, make_transform(kCapped, 0.5f));
  const int64_t end = rows.size;
  rows.labels = {end, -1, -100, int64_t{1} << 31, -kLargest - 1, kLargest, end - 1, 0, 40};
  for (int64_t j = 0; j < end; ++j) {
    if (j < 40 || j > 160) rows.logit(kMasked, j) = -kInf;
    rows.logit(kAllMasked, j) = -kInf;
  }
  rows.logit(kInfinite, 41) = kInf;
  Rows<Logit> with_nan = rows;
  with_nan.logit(kNan, 100) = NAN;
  rows.template fold<kCapped, kWarps>();
  rows.check();
  with_nan.template fold<kCapped, kWarps>();
  REQUIRE(std::isnan(with_nan.state(kNan).sum), "%g", with_nan.state(kNan).sum);
  for (size_t i = 0; i < rows.states.size(); ++i) {
    REQUIRE(i % rows.state_stride == kNan || same_bits(rows.states[i], with_nan.states[i]),
            "state %zu changes with another row's NaN", i);
  }
}

template <typename Logit, bool kCapped, int kWarps>
void check_kernel() {
  check_columns<Logit, kCapped, kWarps>({1, 7, 31}, true, 1.0f);
  check_columns<Logit, kCapped, kWarps>({127, 123, 515}, false, 0.7f);
  check_columns<Logit, kCapped, kWarps>({1000, 2049}, true, 0.7f);
  check_columns<Logit, kCapped, kWarps>({8201}, false, 1.0f);
  check_columns<Logit, kCapped, kWarps>({4608}, true, 1.0f);
  check_odd_rows<Logit, kCapped, kWarps>();
}

template <typename Logit>
void check_kernels() {
  check_kernel<Logit, false, 1>();
  check_kernel<Logit, false, kThreads / kWarp>();
  check_kernel<Logit, true, 1>();
  check_kernel<Logit, true, kThreads / kWarp>();
}

// Examples of some numbers of tokens, with ids outside [0, S) around them.
void check_sums(const std::vector<int64_t>& lengths, int num_calls) {
  constexpr int64_t kIgnored = -100, kSmallest = std::numeric_limits<int64_t>::min();
  const int64_t num_samples = lengths.size();
  std::vector<int64_t> ids = {kSmallest, -1, -1, num_samples, num_samples, num_samples + 40};
  for (int64_t i = 0; i < num_samples; ++i) ids.insert(ids.end(), lengths[i], i);
  const int64_t size = ids.size();
  std::vector<double> sums(num_samples, 0.25), expected_sums = sums;
  std::vector<int64_t> counts(num_samples, 3), expected_counts = counts;
  for (int call = 0; call < num_calls; ++call) {
    std::shuffle(ids.begin(), ids.end(), random_bits);
    std::vector<int64_t> labels(size), order(size);
    std::vector<float> states(3 * size);
    const StateRows rows{states.data(), size};
    for (int64_t i = 0; i < size; ++i) {
      order[i] = i;
      labels[i] = random_bits() % 4 == 0 ? kIgnored : 5;
      const float max = static_cast<float>(uniform(-9.0, 9.0));
      // The largest loss is far beyond the others; an ignored token's is NaN.
      const float gap = static_cast<float>(random_bits() % 50 == 0 ? 1000.0 : uniform(0.0, 9.0));
      rows.store(i, {max, 2.5f, labels[i] == kIgnored ? NAN : max - gap});
      if (ids[i] < 0 || ids[i] >= num_samples || labels[i] == kIgnored) continue;
      expected_sums[ids[i]] += token_loss(rows.load(i));
      expected_counts[ids[i]] += 1;
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t i, int64_t j) { return ids[i] < ids[j]; });
    const Tokens tokens = {rows, labels.data(), kIgnored,      ids.data(), order.data(),
                           size, sums.data(),   counts.data(), num_samples};
    simt::launch(add_token_losses_kernel, (size * kWarp + kThreads - 1) / kThreads, kThreads,
                 tokens);
  }
  for (int64_t i = 0; i < num_samples; ++i) {
    REQUIRE(sums[i] == expected_sums[i] && counts[i] == expected_counts[i],
            "an example of %lld tokens: %.17g of %lld, expected %.17g of %lld",
            static_cast<long long>(lengths[i]), sums[i], static_cast<long long>(counts[i]),
            expected_sums[i], static_cast<long long>(expected_counts[i]));
  }
}

void check_values() {
  check_exp();
  check_tanh();
  check_merge();
  check_token_loss();
  check_kernels<float>();
  check_kernels<c10::BFloat16>();
  check_kernels<c10::Half>();
  check_sums({1, 2, 0, 3, 31, 32, 33, 0, 63, 64, 65, 97, 100}, 3);
}

void check_races() {
  check_columns<float, false, 1>({123, 515}, true, 1.0f);
  check_columns<float, false, kThreads / kWarp>({515, 2049}, true, 1.0f);
  check_columns<c10::BFloat16, true, 1>({123}, false, 1.0f);
  check_columns<c10::BFloat16, true, kThreads / kWarp>({123, 4608}, false, 1.0f);
  check_sums({1, 0, 33, 5}, 2);
}

}  // namespace
}  // namespace sftmix

int main(int count, char** arguments) {
  const std::string_view name = count == 2 ? arguments[1] : "";
  REQUIRE(name == "values" || name == "races", "usage: %s values|races", arguments[0]);
  name == "values" ? sftmix::check_values() : sftmix::check_races();
}
