// fold_logits and add_token_losses on the CPU: loops around online_softmax.h.

#include "online_softmax_arguments.h"
#include "parallel.h"
#include "row_steps.h"
#include "vectors.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

namespace sftmix {
namespace {

// The logits of columns [first, first + size): where they lie if nothing is to be done to them, or
// else in `room`.
template <typename Logit>
SFTMIX_INLINE const float* step_logits(const Chunk<Logit>& chunk, const Logit* logits,
                                       int64_t first, int64_t size, float* room) {
  const float* raw = load_step(logits + first, size, room);
  if (chunk.bias) {
    const Logit* const bias = chunk.bias + first;
    for (int64_t j = 0; j < size; ++j) room[j] = raw[j] + static_cast<float>(bias[j]);
    raw = room;
  }
  return transform_step(chunk.transform, raw, size, room);
}

template <typename Logit>
SFTMIX_INLINE void fold_row(const Chunk<Logit>& chunk, int64_t row) {
  const Logit* const logits = chunk.logits + row * chunk.row_stride;
  const int64_t label = chunk.labels[row];
  const RowState before = chunk.states.load(row);
  WideState state = {before.max, before.sum, before.target};
  float room[kStep];
  for (int64_t first = 0; first < chunk.num_columns; first += kStep) {
    const int64_t size = std::min(kStep, chunk.num_columns - first);
    const float* const values = step_logits(chunk, logits, first, size, room);
    const int64_t entry = chunk.start + first;  // of the vocabulary, in values[0]
    if (label >= entry && label < entry + size) state.target = values[label - entry];
    fold_values(state, values, size);
  }
  chunk.states.store(row, {state.max, static_cast<float>(state.sum), state.target});
}

SFTMIX_EACH_SET(fold_rows, fold_row, Chunk)

template <typename Logit>
void fold(const Chunk<Logit>& chunk) {
  const auto fold_rows = pick_fold_rows<Logit>();
  for_rows(chunk.num_rows, chunk.num_columns,
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
