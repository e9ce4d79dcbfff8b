// A row of logits on the CPU, a step of columns at a time: what all loops over rows share.
//
// online_softmax_cpu.cpp and row_chunks_cpu.cpp compile their loops around these functions once for
// each instruction set of vectors.h.

#pragma once

#include "online_softmax.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace sftmix {

// Logits of one step: 4 KiB in float32, so that a second pass reads the L1 cache.
constexpr int64_t kStep = 1024;
constexpr int64_t kLanes = 32;
// How far above a maximum exponentials are taken relative to it. A difference of logits is rounded
// as a number of its size: by 1.2e-7 up to here, which is the exponential's relative error. With
// 40, the largest error of log-sum-exp was five times PyTorch's (V = 128,256, logits of size 10).
constexpr float kHeadroom = 4.0f;

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

// Maxima and sums of exponentials of a step: every kLanes-th logit goes to the same one. At most 32
// terms are then added up one after another, and with vectors of any width in the same order.
struct Lanes {
  float max[kLanes];
  float sum[kLanes];

  SFTMIX_INLINE void add(const float* values, int64_t count, float base) {
#pragma omp simd
    for (int64_t l = 0; l < count; ++l) {
      max[l] = values[l] > max[l] ? values[l] : max[l];
      sum[l] += exp_of(values[l] - base);
    }
  }
};

struct StepSum {
  float max;
  float sum;
};

// The maximum of a step's logits, and the sum of their exponentials relative to `base`.
SFTMIX_INLINE StepSum sum_step(const float* values, int64_t size, float base) {
  Lanes lanes;
  std::fill_n(lanes.max, kLanes, -INFINITY);
  std::fill_n(lanes.sum, kLanes, 0.0f);
  int64_t first = 0;
  for (; first + kLanes <= size; first += kLanes) lanes.add(values + first, kLanes, base);
  lanes.add(values + first, size - first, base);
  float max = -INFINITY;
  float sum = 0.0f;
#pragma omp simd reduction(max : max) reduction(+ : sum)
  for (int64_t l = 0; l < kLanes; ++l) {
    max = lanes.max[l] > max ? lanes.max[l] : max;
    sum += lanes.sum[l];
  }
  return {max, sum};
}

// Folds logits that lie side by side: most often in one pass, that is one read of memory. It takes
// exponentials relative to the maximum before these logits, while it looks for a higher one; only
// where that is higher by more than kHeadroom, or the first, are they taken again.
SFTMIX_INLINE void fold_values(WideState& state, const float* values, int64_t size) {
  const float base = state.max;
  const StepSum step = sum_step(values, size, base);
  if (base > -INFINITY && step.max <= base + kHeadroom) {
    state.sum += step.sum;
    raise_max(state, step.max);
    return;
  }
  const float new_base = raise_max(state, step.max);
  state.sum += sum_step(values, size, new_base).sum;
}

}  // namespace sftmix
