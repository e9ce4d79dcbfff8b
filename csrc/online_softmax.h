// The softmax of a row of logits that arrives in chunks, and the loss that follows from it.
//
// The only place with this maths: the CUDA kernels (online_softmax_kernels.cuh) and their CPU twin
// (online_softmax_cpu.cpp) are loops around it, and sftmix_kernels/perplexity/online_softmax.py
// says the same in PyTorch operations.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SFTMIX_INLINE __host__ __device__ __forceinline__
#else
// Inlined always: the CPU twin compiles its loops once for each vector width.
#define SFTMIX_INLINE __attribute__((always_inline)) inline
#endif

namespace sftmix {

// The state of a row after the logits a_j seen so far.
template <typename Sum>
struct SoftmaxState {
  float max = -INFINITY;  // m = max_j a_j
  Sum sum = 0;            // sum_j exp(a_j - m)
  float target = NAN;     // the label's logit; stays NaN where no chunk holds the label
};
// What is kept between chunks, and by each thread of a GPU.
using RowState = SoftmaxState<float>;
// What the CPU keeps within a chunk: a hundred sums of 1,024 terms each, one after another.
using WideState = SoftmaxState<double>;

// e^x for x < 88; 0 below e^-87.7. NaN stays NaN.
SFTMIX_INLINE float exp_of(float x) {
#ifdef __CUDA_ARCH__
  return __expf(x);
#else
  // e^x = 2^k e^r with k = round(x log2(e)) and r = x - k ln(2): the last bits of k + 1.5 * 2^23
  // are k in two's complement. ln(2) comes in two parts, of which the first has so few bits that
  // its product with k is exact with or without fused multiplication. e^r on [-0.347, 0.347] is
  // fitted to a relative error of 4e-9.
  // What is smaller ends at k = -127, whose bits are those of 0. There is no other condition: GCC
  // leaves a loop with a branch around arithmetic scalar on AVX2 and SSE2, four times as slow and,
  // with a thousand terms in one sum, eight times as inexact.
  const float low = x < -88.0f ? -88.0f : x;
  const float shifted = low * 1.44269504f + 12582912.0f;
  const float k = shifted - 12582912.0f;
  const float r = (low - k * 0.693359375f) + k * 2.12194440e-4f;
  float power = 1.381432e-3f;
  power = power * r + 8.368851e-3f;
  power = power * r + 4.16684e-2f;
  power = power * r + 0.1666652f;
  power = power * r + 0.49999994f;
  power = power * r + 1.0f;
  power = power * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;
  float two_to_k;
  std::memcpy(&two_to_k, &bits, sizeof two_to_k);
  return power * two_to_k;
#endif
}

SFTMIX_INLINE float divide(float x, float y) {
#ifdef __CUDA_ARCH__
  return __fdividef(x, y);
#else
  return x / y;
#endif
}

// tanh(x), to float32's own relative precision: up to 0.6 an odd polynomial (fitted to a relative
// error of 3e-9), since 1 - e^(-2x) cancels there. `tanh_and_slope` in sftmix_kernels/primitives.py
// has the same polynomial: change both.
SFTMIX_INLINE float tanh_of(float x) {
  const float e = exp_of(-2.0f * std::fabs(x));
  const float large = 1.0f - divide(2.0f * e, 1.0f + e);
  const float y = x * x;
  float odd = 0.02079596f - 0.00589515f * y;
  odd = 0.13331924f + y * (-0.05378383f + y * odd);
  const float small = x + x * (y * (-0.33333298f + y * odd));
  return std::fabs(x) < 0.6f ? small : (x < 0.0f ? -large : large);
}

// 1 - tanh(x)^2, as 4 e / (1 + e)^2 with e = e^(-2|x|): the difference cancels where tanh comes
// near 1.
SFTMIX_INLINE float tanh_slope(float x) {
  const float e = exp_of(-2.0f * std::fabs(x));
  return divide(4.0f * e, (1.0f + e) * (1.0f + e));
}

// f(x) = cap * tanh(scale * x / cap), or scale * x where cap is 0.
struct LogitTransform {
  float scale;
  float cap;

  SFTMIX_INLINE bool is_capped() const { return cap != 0.0f; }
  SFTMIX_INLINE float scaled(float raw) const { return scale * raw; }
  SFTMIX_INLINE float capped(float raw) const { return cap * tanh_of(raw * (scale / cap)); }
  SFTMIX_INLINE float operator()(float raw) const {
    return is_capped() ? capped(raw) : scaled(raw);
  }
  // f'(x) / scale.
  SFTMIX_INLINE float slope(float raw) const {
    return is_capped() ? tanh_slope(raw * (scale / cap)) : 1.0f;
  }
};

// Takes a maximum of further logits into account and returns what their exponentials are relative
// to: the new maximum, or 0 while that is -inf, since -inf - -inf would be NaN.
template <typename Sum>
SFTMIX_INLINE float raise_max(SoftmaxState<Sum>& row, float max) {
  const float new_max = row.max > max ? row.max : max;
  // An equal maximum, an infinite one too, needs no factor.
  if (row.max != new_max) row.sum *= exp_of(row.max - new_max);
  row.max = new_max;
  return new_max == -INFINITY ? 0.0f : new_max;
}

// Adds the state of other logits of the same row.
SFTMIX_INLINE void merge(RowState& row, float max, float sum) {
  raise_max(row, max);
  row.sum += max == row.max ? sum : sum * exp_of(max - row.max);
}

// log sum_j exp(a_j) - target, rounded to a multiple of 2^-32: sums of such losses below 2^21 are
// exact in float64, so that their order does not matter.
SFTMIX_INLINE double token_loss(const RowState& row) {
  const double loss = std::log(static_cast<double>(row.sum)) -
                      (static_cast<double>(row.target) - static_cast<double>(row.max));
  return std::rint(loss * 4294967296.0) / 4294967296.0;
}

// What the loops run over. K rows, N columns, S examples.

// (3, K) float32: m, s, t of each row.
struct StateRows {
  float* values;
  int64_t stride;

  SFTMIX_INLINE RowState load(int64_t row) const {
    return {values[row], values[stride + row], values[2 * stride + row]};
  }
  SFTMIX_INLINE void store(int64_t row, const RowState& state) const {
    values[row] = state.max;
    values[stride + row] = state.sum;
    values[2 * stride + row] = state.target;
  }
};

// Raw logits of vocabulary entries [start, start + N), to be folded into the states of K rows.
template <typename Logit>
struct Chunk {
  const Logit* logits;    // (K, N)
  const Logit* bias;      // (N,) or null
  const int64_t* labels;  // (K,)
  int64_t num_rows;
  int64_t num_columns;
  int64_t row_stride;
  int64_t start;
  LogitTransform transform;
  StateRows states;
};

// Tokens, and the sums of their examples.
struct Tokens {
  StateRows states;
  const int64_t* labels;
  int64_t ignore_index;
  const int64_t* sample_ids;
  const int64_t* order;  // sorts the tokens by example
  int64_t num_tokens;
  double* nll_sums;  // (S,)
  int64_t* counts;   // (S,)
  int64_t num_samples;
};

}  // namespace sftmix
