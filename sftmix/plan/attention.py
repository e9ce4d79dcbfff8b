"""Attention without numbers: allocate what the kernels of `sftmix train` allocate.

transformers cannot see in tensors without values that nothing is padded, and would make L x L masks
for all of them. These implementations, registered under names of their own, take it from the
layout: all sequences of a batch are of one length.

Legend: B sequences, H heads, K heads of keys and values, L tokens, D head size.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sftmix.plan.trace import ACTIVATIONS, active_trace

# Kernels round a sequence and a head up to whole tiles when they add up dQ.
TOKENS_OF_TILE, HEAD_OF_TILE = 128, 32


class PlannedAttention(torch.autograd.Function):
    """Allocate out and LSE of flash attention; dQ, dK, dV, and its backward's workspace."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,  # (B, H, L, D)
        key: Tensor,  # (B, K, L, D)
        value: Tensor,  # (B, K, L, D)
        bias: Tensor | None,  # (B, 1, L, L)
    ) -> Tensor:  # (B, H, L, D), a view of (B, L, H, D) as the kernels write it
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        lse = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, out, lse)
        active_trace().products += causal_products(query, products=2)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        gradients = [torch.empty_like(tensor) for tensor in (query, key, value)]
        active_trace().hold_briefly(backward_bytes(query, key), ACTIVATIONS)
        active_trace().products += causal_products(query, products=5)
        return *gradients, None


def causal_products(query: Tensor, products: int) -> int:
    """Return the operations of `products` matrix products over the lower half of the scores."""
    batch, heads, length, size = query.shape
    return products * batch * heads * length * length * size


def backward_bytes(query: Tensor, key: Tensor) -> int:
    """Return the bytes that flash attention 2's backward holds besides dQ, dK and dV.

    `mha_bwd` of PyTorch's and of Dao's flash attention hold the same: dQ in float32 if inputs are
    of half precision (in float32 another kernel adds to dQ itself), the row sums `dO . O` in
    float32, and, if heads share keys and values, dK and dV of every head, which are added up
    afterwards. `enable_gqa` holds no more: keys and values are never copied for every head.
    """
    batch, heads, length, size = query.shape
    tokens = batch * heads * (length + -length % TOKENS_OF_TILE)
    total = 4 * tokens
    if query.itemsize < 4:
        total += 4 * tokens * (size + -size % HEAD_OF_TILE)
    if key.shape[1] != heads:
        total += 2 * batch * heads * length * size * query.itemsize
    return total


def planned_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Stand for any of the linear-memory kernels, with the signature that transformers calls.

    With a mask it stands for the memory-efficient kernel, which takes no shared heads, and adds the
    mask to the scores, in their dtype, and keeps it for backward.
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    bias = None
    if attention_mask is not None:
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        bias = torch.zeros_like(attention_mask, dtype=query.dtype)
    out: Tensor = PlannedAttention.apply(query, key, value, bias)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


def planned_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Stand for the attention that PyTorch chooses on a GPU.

    That is a linear-memory kernel, except in float32 with heads that share keys and values: flash
    attention and cuDNN take only half precision, the memory-efficient kernel takes no shared heads
    (`check_batch_size_and_num_heads_dense` of `sdp_utils.cpp`), and the remaining kernel makes the
    scores (B, H, L, L).
    """
    in_float32 = query.itemsize == 4 and not torch.is_autocast_enabled("cpu")
    if attention_mask is None and in_float32 and key.shape[1] != query.shape[1]:
        scores = torch.ops.aten._scaled_dot_product_attention_math
        out: Tensor = scores(query, key, value, None, 0.0, True, enable_gqa=True)[0]
        return out.transpose(1, 2).contiguous(), None
    return planned_attention(module, query, key, value, attention_mask, **options)


def planned_mask(
    packed: bool, *, kv_length: int, local_size: int | None = None, **options: Any
) -> Tensor | None:
    """Return the mask that transformers makes for SDPA if no token is padding.

    It is None unless several sequences share a row, the model brings a pattern of its own, or a
    window of attention is no longer than the sequence.
    """
    in_window = local_size is None or kv_length < local_size
    if in_window and not packed and not options.get("use_vmap", False):
        return None
    options["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(kv_length=kv_length, local_size=local_size, **options)
    return mask


def no_mask(**options: Any) -> None:
    """Return no mask: flash attention is told of windows and sequence ends in other ways."""


def planned_implementation(real: str, *, packed: bool, on_cpu: bool) -> str:
    """Return the name of the implementation that stands for `real`."""
    if real == "eager":
        return real
    if real != "sdpa":
        return "sftmix_planned_flash"
    return f"sftmix_planned_{'cpu' if on_cpu else 'gpu'}{'_packed' if packed else ''}"


for _name, _attention in (("gpu", planned_sdpa), ("cpu", sdpa_attention_forward)):
    for _suffix, _packed in (("", False), ("_packed", True)):
        AttentionInterface.register(f"sftmix_planned_{_name}{_suffix}", _attention)
        AttentionMaskInterface.register(
            f"sftmix_planned_{_name}{_suffix}", functools.partial(planned_mask, _packed)
        )
AttentionInterface.register("sftmix_planned_flash", planned_attention)
AttentionMaskInterface.register("sftmix_planned_flash", no_mask)
