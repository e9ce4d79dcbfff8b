// fold_logits and add_token_losses on the CPU: loops around online_softmax.h.

#include "online_softmax_arguments.h"
#include "vectors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>

namespace sftmix {
namespace {

// Logits of one step: 4 KiB in float32, so that a second pass reads the L1 cache.
constexpr int64_t kStep = 1024;
// Above a maximum by this much an exponential is below e^40, and a step's sum far below overflow.
constexpr float kHeadroom = 40.0f;
// Fewest logits that are worth another thread.
constexpr int64_t kGrain = 32768;

// The logits of columns [first, first + size): where they lie if nothing is to be done to them, or
// else in `room`.
template <typename Logit>
SFTMIX_INLINE const float* step_logits(const Chunk<Logit>& chunk, const Logit* logits,
                                       int64_t first, int64_t size, float* room) {
  const LogitTransform transform = chunk.transform;
  const bool as_is = !chunk.bias && !transform.is_capped() && transform.scale == 1.0f;
  if constexpr (std::is_same_v<Logit, float>) {
    if (as_is) return logits + first;
  }
  for (int64_t j = 0; j < size; ++j) room[j] = static_cast<float>(logits[first + j]);
  if (as_is) return room;
  if (chunk.bias) {
    for (int64_t j = 0; j < size; ++j) room[j] += static_cast<float>(chunk.bias[first + j]);
  }
  if (transform.is_capped()) {
    for (int64_t j = 0; j < size; ++j) room[j] = transform.capped(room[j]);
  } else {
    for (int64_t j = 0; j < size; ++j) room[j] = transform.scaled(room[j]);
  }
  return room;
}

// Folds logits that lie side by side: most often in one pass, that is one read of memory. It takes
// exponentials relative to the maximum before these logits, while it looks for a higher one; only
// where that is higher by more than kHeadroom, or the first, are they taken again.
SFTMIX_INLINE void fold_values(RowState& state, const float* values, int64_t size) {
  const float base = state.max;
  float max = -INFINITY;
  float sum = 0.0f;
#pragma omp simd reduction(max : max) reduction(+ : sum)
  for (int64_t j = 0; j < size; ++j) {
    max = values[j] > max ? values[j] : max;
    sum += exp_of(values[j] - base);
  }
  if (base > -INFINITY && max <= base + kHeadroom) {
    state.sum += sum;
    raise_max(state, max);
    return;
  }
  const float new_base = raise_max(state, max);
  sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < size; ++j) sum += exp_of(values[j] - new_base);
  state.sum += sum;
}

template <typename Logit>
SFTMIX_INLINE void fold_row(const Chunk<Logit>& chunk, int64_t row) {
  const Logit* const logits = chunk.logits + row * chunk.row_stride;
  const int64_t label = chunk.labels[row];
  RowState state = chunk.states.load(row);
  float room[kStep];
  for (int64_t first = 0; first < chunk.num_columns; first += kStep) {
    const int64_t size = std::min(kStep, chunk.num_columns - first);
    const float* const values = step_logits(chunk, logits, first, size, room);
    const int64_t entry = chunk.start + first;  // of the vocabulary, in values[0]
    if (label >= entry && label < entry + size) state.target = values[label - entry];
    fold_values(state, values, size);
  }
  chunk.states.store(row, state);
}

template <typename Logit>
SFTMIX_INLINE void fold_rows(const Chunk<Logit>& chunk, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) fold_row(chunk, row);
}

// The same code, compiled for each instruction set.
#ifdef SFTMIX_X86
template <typename Logit>
SFTMIX_AVX512 void fold_rows_avx512(const Chunk<Logit>& chunk, int64_t first, int64_t last) {
  fold_rows(chunk, first, last);
}

template <typename Logit>
SFTMIX_AVX2 void fold_rows_avx2(const Chunk<Logit>& chunk, int64_t first, int64_t last) {
  fold_rows(chunk, first, last);
}
#endif

template <typename Logit>
void fold_rows_plain(const Chunk<Logit>& chunk, int64_t first, int64_t last) {
  fold_rows(chunk, first, last);
}

template <typename Logit>
auto pick_fold_rows() {
#ifdef SFTMIX_X86
  if (vectors() == Vectors::kAvx512) return fold_rows_avx512<Logit>;
  if (vectors() == Vectors::kAvx2) return fold_rows_avx2<Logit>;
#endif
  return fold_rows_plain<Logit>;
}

template <typename Logit>
void fold(const Chunk<Logit>& chunk) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, chunk.num_columns));
  const auto fold_rows = pick_fold_rows<Logit>();
  torch::stable::parallel_for(0, chunk.num_rows, grain,
                              [&](int64_t first, int64_t last) { fold_rows(chunk, first, last); });
}

void fold_logits(Tensor logits, std::optional<Tensor> bias, Tensor labels, int64_t start,
                 double logit_scale, std::optional<double> softcap, Tensor state) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return fold(check_chunk<float>(logits, bias, labels, start, logit_scale, softcap, state));
    case ScalarType::BFloat16:
      return fold(
          check_chunk<c10::BFloat16>(logits, bias, labels, start, logit_scale, softcap, state));
    case ScalarType::Half:
      return fold(check_chunk<c10::Half>(logits, bias, labels, start, logit_scale, softcap, state));
    default:
      STD_TORCH_CHECK(false, "logits: expected float32, bfloat16 or float16");
  }
}

void add_token_losses(Tensor state, Tensor labels, int64_t ignore_index, Tensor sample_ids,
                      Tensor order, Tensor nll_sum, Tensor num_tokens) {
  const Tokens tokens =
      check_tokens(state, labels, ignore_index, sample_ids, order, nll_sum, num_tokens);
  for (int64_t i = 0; i < tokens.num_tokens; ++i) {
    const int64_t row = tokens.order[i], sample = tokens.sample_ids[row];
    if (tokens.labels[row] == ignore_index || sample < 0 || sample >= tokens.num_samples) continue;
    tokens.nll_sums[sample] += token_loss(tokens.states.load(row));
    tokens.counts[sample] += 1;
  }
}

}  // namespace
}  // namespace sftmix

STABLE_TORCH_LIBRARY_IMPL(sftmix_kernels, CPU, library) {
  library.impl("fold_logits", TORCH_BOX(&sftmix::fold_logits));
  library.impl("add_token_losses", TORCH_BOX(&sftmix::add_token_losses));
}
