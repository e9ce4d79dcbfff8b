// The CUDA kernels of fold_logits and add_token_losses: threads around online_softmax.h.
// They do not use torch's runtime, so that the tests can run them on CPU threads.

#pragma once

#include <cstdint>

#include "online_softmax.h"

namespace sftmix {

constexpr int kWarp = 32;
constexpr int kThreads = 128;
// Blocks that a multiprocessor shall hold, which leaves a thread 80 registers. Without
// this bound nvcc 13.0 aims at 64 and spills.
constexpr int kBlocks = 6;
constexpr unsigned kFullWarp = 0xffffffffu;

// 16-byte loads of each thread under way at a time: with 2,048 threads on a multiprocessor far more
// bytes than bandwidth times latency asks for, with a quarter of them still enough.
constexpr int kLoads = 4;

template <typename Logit>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(Logit);
  Logit values[kSize];
};

// Folds the kCount logits that a thread holds into what it has seen of its row.
template <int kCount>
__device__ inline void fold_values(RowState& row, const float (&values)[kCount]) {
  float max = -INFINITY;
#pragma unroll
  for (int j = 0; j < kCount; ++j) max = fmaxf(max, values[j]);
  const float base = raise_max(row, max);
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kCount; ++j) sum += exp_of(values[j] - base);
  row.sum += sum;
}

template <bool kCapped, typename Logit>
__device__ inline float transformed(const Chunk<Logit>& chunk, float raw) {
  return kCapped ? chunk.transform.capped(raw) : chunk.transform.scaled(raw);
}

// The logit of one column.
template <bool kCapped, typename Logit>
__device__ inline float column_logit(const Chunk<Logit>& chunk, const Logit* logits,
                                     int64_t column) {
  float raw = static_cast<float>(logits[column]);
  if (chunk.bias) raw += static_cast<float>(chunk.bias[column]);
  return transformed<kCapped>(chunk, raw);
}

// Folds kCount vectors of a row, kParts apart: all are loaded before the first is used.
template <bool kCapped, int kParts, int kCount, typename Logit>
__device__ inline void fold_vectors(RowState& row, const Chunk<Logit>& chunk,
                                    const Vector<Logit>* vectors, int64_t first) {
  constexpr int kSize = Vector<Logit>::kSize;
  const auto* bias = reinterpret_cast<const Vector<Logit>*>(chunk.bias);
  Vector<Logit> loaded[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) loaded[i] = vectors[first + i * kParts];
  float values[kCount * kSize];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    Vector<Logit> added;
    if (bias) added = bias[first + i * kParts];
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      float raw = static_cast<float>(loaded[i].values[j]);
      if (bias) raw += static_cast<float>(added.values[j]);
      values[i * kSize + j] = transformed<kCapped>(chunk, raw);
    }
  }
  fold_values(row, values);
}

// Part `part` of kParts threads folds its share of a row's columns: 16 bytes of neighbours at a
// time. Rows and bias begin at multiples of 16 bytes.
template <bool kCapped, int kParts, typename Logit>
__device__ inline RowState fold_columns(const Chunk<Logit>& chunk, const Logit* logits, int part) {
  constexpr int kSize = Vector<Logit>::kSize;
  const auto* vectors = reinterpret_cast<const Vector<Logit>*>(logits);
  const int64_t num_vectors = chunk.num_columns / kSize;
  RowState row;
  int64_t next = part;
  // Without a test of each vector's index, which costs every one of its logits two instructions.
  for (; next + (kLoads - 1) * kParts < num_vectors; next += kLoads * kParts) {
    fold_vectors<kCapped, kParts, kLoads>(row, chunk, vectors, next);
  }
  for (; next < num_vectors; next += kParts) {
    fold_vectors<kCapped, kParts, 1>(row, chunk, vectors, next);
  }
  // Fewer than kSize columns are left, one for a thread.
  const int64_t last = num_vectors * kSize + part;
  if (last < chunk.num_columns) {
    const float value[1] = {column_logit<kCapped>(chunk, logits, last)};
    fold_values(row, value);
  }
  return row;
}

// A row of logits is folded by kWarps warps: one where it is short, all of the block's otherwise.
template <typename Logit, bool kCapped, int kWarps>
__global__ void __launch_bounds__(kThreads, kBlocks) fold_logits_kernel(const Chunk<Logit> chunk) {
  constexpr int kParts = kWarps * kWarp;
  const int part = static_cast<int>(threadIdx.x) % kParts;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kParts) +
                      static_cast<int>(threadIdx.x) / kParts;
  // With one warp a row, whole warps leave here; with more, a block has one row and none does.
  if (row >= chunk.num_rows) return;
  const Logit* const logits = chunk.logits + row * chunk.row_stride;

  RowState seen = fold_columns<kCapped, kParts>(chunk, logits, part);
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const float max = __shfl_xor_sync(kFullWarp, seen.max, distance);
    const float sum = __shfl_xor_sync(kFullWarp, seen.sum, distance);
    merge(seen, max, sum);
  }
  if constexpr (kWarps > 1) {
    __shared__ float maxima[kWarps];
    __shared__ float sums[kWarps];
    if (part % kWarp == 0) {
      maxima[part / kWarp] = seen.max;
      sums[part / kWarp] = seen.sum;
    }
    __syncthreads();
    if (part == 0) {
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) merge(seen, maxima[warp], sums[warp]);
    }
  }
  if (part == 0) {
    RowState state = chunk.states.load(row);
    merge(state, seen.max, seen.sum);
    const int64_t label = chunk.labels[row];
    if (label >= chunk.start && label < chunk.start + chunk.num_columns) {
      state.target = column_logit<kCapped>(chunk, logits, label - chunk.start);
    }
    chunk.states.store(row, state);
  }
}

// One warp for each token in sorted order; that of an example's first token adds up the example.
// No other warp touches the example: no atomics, and the same bits every time.
__global__ void __launch_bounds__(kThreads) add_token_losses_kernel(const Tokens tokens) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t first = thread / kWarp;
  const int lane = static_cast<int>(thread % kWarp);
  if (first >= tokens.num_tokens) return;
  const int64_t sample = tokens.sample_ids[tokens.order[first]];
  if (first > 0 && tokens.sample_ids[tokens.order[first - 1]] == sample) return;
  if (sample < 0 || sample >= tokens.num_samples) return;

  double sum = 0.0;
  long long count = 0;
  for (int64_t i = first + lane; i < tokens.num_tokens; i += kWarp) {
    const int64_t row = tokens.order[i];
    if (tokens.sample_ids[row] != sample) break;
    if (tokens.labels[row] == tokens.ignore_index) continue;
    sum += token_loss(tokens.states.load(row));
    count += 1;
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, distance);
    count += __shfl_xor_sync(kFullWarp, count, distance);
  }
  if (lane == 0) {
    tokens.nll_sums[sample] += sum;
    tokens.counts[sample] += count;
  }
}

}  // namespace sftmix
