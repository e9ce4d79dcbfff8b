// A row of logits on the CPU, a step of columns at a time: what all loops over rows share.
//
// online_softmax_cpu.cpp and row_chunks_cpu.cpp compile their loops around these functions once for
// each instruction set of vectors.h.

#pragma once

#include "online_softmax.h"

#include <cstdint>
#include <type_traits>

namespace sftmix {

// Logits of one step: 4 KiB in float32, so that a second pass reads the L1 cache.
constexpr int64_t kStep = 1024;
// Above a maximum by this much an exponential is below e^40, and a step's sum far below overflow.
constexpr float kHeadroom = 40.0f;

// A step's logits in float32: where they lie if they are float32, or else in `room`.
template <typename Logit>
SFTMIX_INLINE const float* load_step(const Logit* logits, int64_t size, float* room) {
  if constexpr (std::is_same_v<Logit, float>) {
    return logits;
  } else {
    for (int64_t j = 0; j < size; ++j) room[j] = static_cast<float>(logits[j]);
    return room;
  }
}

// What the head makes of a step's raw logits: they themselves, or f(raw) in `room`, which may be
// where they lie.
SFTMIX_INLINE const float* transform_step(LogitTransform transform, const float* raw, int64_t size,
                                          float* room) {
  if (transform.is_capped()) {
    for (int64_t j = 0; j < size; ++j) room[j] = transform.capped(raw[j]);
  } else if (transform.scale != 1.0f) {
    for (int64_t j = 0; j < size; ++j) room[j] = transform.scaled(raw[j]);
  } else {
    return raw;
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

}  // namespace sftmix
