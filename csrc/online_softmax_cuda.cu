// fold_logits and add_token_losses on CUDA: launches of online_softmax_kernels.cuh.

#include "online_softmax_arguments.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "online_softmax_kernels.cuh"

namespace sftmix {
namespace {

// Up to this many columns one warp folds a row, and the block's warps take a row each.
constexpr int64_t kShortRow = 2048;

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

template <typename Logit, bool kCapped>
void launch_fold(const Chunk<Logit>& chunk, cudaStream_t stream) {
  if (chunk.num_columns <= kShortRow) {
    fold_logits_kernel<Logit, kCapped, 1>
        <<<blocks_for(chunk.num_rows * kWarp), kThreads, 0, stream>>>(chunk);
  } else {
    fold_logits_kernel<Logit, kCapped, kThreads / kWarp>
        <<<blocks_for(chunk.num_rows * kThreads), kThreads, 0, stream>>>(chunk);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename Logit>
void fold(const Chunk<Logit>& chunk, cudaStream_t stream) {
  if (chunk.num_rows == 0) return;
  STD_TORCH_CHECK(is_aligned(chunk.logits) && is_aligned(chunk.bias) &&
                      chunk.row_stride * sizeof(Logit) % 16 == 0,
                  "logits, bias: expected rows that begin at multiples of 16 bytes");
  if (chunk.transform.is_capped()) {
    launch_fold<Logit, true>(chunk, stream);
  } else {
    launch_fold<Logit, false>(chunk, stream);
  }
}

void fold_logits(Tensor logits, std::optional<Tensor> bias, Tensor labels, int64_t start,
                 double logit_scale, std::optional<double> softcap, Tensor state) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const cudaStream_t stream = current_stream(logits);
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return fold(check_chunk<float>(logits, bias, labels, start, logit_scale, softcap, state),
                  stream);
    case ScalarType::BFloat16:
      return fold(
          check_chunk<c10::BFloat16>(logits, bias, labels, start, logit_scale, softcap, state),
          stream);
    case ScalarType::Half:
      return fold(check_chunk<c10::Half>(logits, bias, labels, start, logit_scale, softcap, state),
                  stream);
    default:
      STD_TORCH_CHECK(false, "logits: expected float32, bfloat16 or float16");
  }
}

void add_token_losses(Tensor state, Tensor labels, int64_t ignore_index, Tensor sample_ids,
                      Tensor order, Tensor nll_sum, Tensor num_tokens) {
  const torch::stable::accelerator::DeviceGuard guard(state.get_device_index());
  const Tokens tokens =
      check_tokens(state, labels, ignore_index, sample_ids, order, nll_sum, num_tokens);
  if (tokens.num_tokens == 0) return;
  add_token_losses_kernel<<<blocks_for(tokens.num_tokens * kWarp), kThreads, 0,
                            current_stream(state)>>>(tokens);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace sftmix

STABLE_TORCH_LIBRARY_IMPL(sftmix_kernels, CUDA, library) {
  library.impl("fold_logits", TORCH_BOX(&sftmix::fold_logits));
  library.impl("add_token_losses", TORCH_BOX(&sftmix::add_token_losses));
}
