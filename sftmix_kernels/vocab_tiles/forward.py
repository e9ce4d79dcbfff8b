"""Forward kernels of the ``vocab_tiles`` schedule: interpolation, projection and a tile's LSEs.

They leave each row's ``(peak, total)`` of each tile, without its targets, and the raw logits at the
targets; `combine.py` makes losses of them.

Legend: K rows of one group, P pairs of one group, T targets of a row (1 or 2), D hidden size,
V vocabulary, B tiles of the vocabulary.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives import LOWEST, held_targets, mixed_logits, online_lse_update, transform_logits
from ..schedules import BLOCK_P, BLOCK_R, BLOCK_V
from ..transform import LogitTransform
from .combine import BLOCK_B, pair_combine_kernel, soft_combine_kernel
from .groups import PairGroup, RowGroup
from .logits import grouped_tile, load_targets, pair_tile, soft_tile, tile_options


@triton.jit
def tile_lse(logits, left_out):
    """Return ``(peak, total)`` of each row of a tile, with some columns left out."""
    peak = tl.full((logits.shape[0],), LOWEST, tl.float32)
    total = tl.zeros((logits.shape[0],), tl.float32)
    return online_lse_update(peak, total, tl.where(left_out, -float("inf"), logits))


@triton.jit
def store_lse(lse_ptr, term: tl.constexpr, peak, total, tile, num_tiles, row, num_rows):
    """Keep a tile's ``(peak, total)`` of one term: peaks of all tiles, then totals of all."""
    size = tl.cast(num_tiles, tl.int64) * num_rows
    lse = lse_ptr + 2 * term * size + tile.to(tl.int64) * num_rows + row
    tl.store(lse, peak, mask=row < num_rows)
    tl.store(lse + size, total, mask=row < num_rows)


@triton.jit
def store_at_target(pointer, row, logits, column, target, inside):
    """Keep a row's logit at its target, from the one tile that holds it."""
    at = column[None, :] == target[:, None]
    holds = (target >= tl.min(column, 0)) & (target <= tl.max(column, 0))
    tl.store(pointer + row, tl.sum(tl.where(at, logits, 0.0), 1), mask=inside & holds)


@triton.jit
def soft_lse_kernel(
    first_ptr,  # (K, D)
    second_ptr,  # (K, D), or None
    stride,
    share_ptr,  # (2, K) float32, or None for one target
    targets_ptr,  # (T, K) int64
    weight_ptr,  # (K,) float32
    head_ptr,  # (V, D)
    head_stride,
    bias_ptr,  # (V,), or None
    lse_ptr,  # (2, B, K) float32: peaks, totals
    raw_ptr,  # (T, K) float32: raw logits at the targets
    num_rows,
    hidden_size,
    vocab_size,
    logit_scale,
    softcap,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Find the LSEs of rows in one tile, and the raw logits at their targets."""
    num_tiles = tl.cdiv(vocab_size, BLOCK_V)
    row_block, tile = grouped_tile(tl.cdiv(num_rows, BLOCK_R), num_tiles, GROUP)
    row = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = row < num_rows
    target_1, target_2, share_1, share_2 = load_targets(
        targets_ptr, share_ptr, row, num_rows, inside
    )
    raw = soft_tile(
        first_ptr, second_ptr, stride, share_1, share_2, weight_ptr, row, num_rows, head_ptr,
        head_stride, bias_ptr, column, hidden_size, vocab_size, BLOCK_D,
    )  # fmt: skip
    # Before the LSE, so that raw logits and transformed ones need not be kept together.
    store_at_target(raw_ptr, row, raw, column, target_1, inside)
    if share_ptr is not None:
        store_at_target(raw_ptr + num_rows, row, raw, column, target_2, inside)
    held_1, held_2 = held_targets(target_1, target_2, share_1, share_2)
    left_out = (column >= vocab_size)[None, :] | (column[None, :] == held_1[:, None])
    left_out = left_out | (column[None, :] == held_2[:, None])
    peak, total = tile_lse(transform_logits(raw, logit_scale, softcap), left_out)
    store_lse(lse_ptr, 0, peak, total, tile, num_tiles, row, num_rows)


@triton.jit
def pair_lse_kernel(
    hidden_ptr,  # (R, D)
    stride,
    rows_ptr,  # (2, P) int64: rows of c, of u
    share_ptr,  # (2, P) float32: lam, 1 - lam
    labels_ptr,  # (2, P) int64
    weight_ptr,  # (3, P) float32: of c, of u, of the pair
    head_ptr,  # (V, D)
    head_stride,
    bias_ptr,  # (V,), or None
    lse_ptr,  # (3, 2, B, P) float32: peaks, totals of c, of u, of their mixture
    raw_ptr,  # (4, P) float32: raw logits of c at both targets, of u at both
    num_pairs,
    hidden_size,
    vocab_size,
    logit_scale,
    softcap,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Find the three LSEs of pairs in one tile, and the raw logits at both targets."""
    num_tiles = tl.cdiv(vocab_size, BLOCK_V)
    pair_block, tile = grouped_tile(tl.cdiv(num_pairs, BLOCK_P), num_tiles, GROUP)
    pair = pair_block * BLOCK_P + tl.arange(0, BLOCK_P)
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = pair < num_pairs
    raw_c, raw_u = pair_tile(
        hidden_ptr, stride, rows_ptr, weight_ptr, pair, num_pairs, head_ptr, head_stride, bias_ptr,
        column, hidden_size, vocab_size, BLOCK_D,
    )  # fmt: skip
    target_c, target_u, share_c, share_u = load_targets(
        labels_ptr, share_ptr, pair, num_pairs, inside
    )
    store_at_target(raw_ptr, pair, raw_c, column, target_c, inside)
    store_at_target(raw_ptr + num_pairs, pair, raw_c, column, target_u, inside)
    store_at_target(raw_ptr + 2 * num_pairs, pair, raw_u, column, target_c, inside)
    store_at_target(raw_ptr + 3 * num_pairs, pair, raw_u, column, target_u, inside)

    outside = (column >= vocab_size)[None, :]
    held_c, held_u = held_targets(target_c, target_u, share_c, share_u)
    left_out = outside | (column[None, :] == held_c[:, None]) | (column[None, :] == held_u[:, None])
    raw_m = mixed_logits(raw_c, raw_u, share_c[:, None], share_u[:, None], bias_ptr is not None)
    peak, total = tile_lse(transform_logits(raw_m, logit_scale, softcap), left_out)
    store_lse(lse_ptr, 2, peak, total, tile, num_tiles, pair, num_pairs)
    left_out = outside | (column[None, :] == target_c[:, None])
    peak, total = tile_lse(transform_logits(raw_c, logit_scale, softcap), left_out)
    store_lse(lse_ptr, 0, peak, total, tile, num_tiles, pair, num_pairs)
    left_out = outside | (column[None, :] == target_u[:, None])
    peak, total = tile_lse(transform_logits(raw_u, logit_scale, softcap), left_out)
    store_lse(lse_ptr, 1, peak, total, tile, num_tiles, pair, num_pairs)


def soft_forward(
    group: RowGroup,
    weight: Tensor,  # (V, D)
    bias: Tensor | None,
    transform: LogitTransform,
    live: Tensor | None,  # (row blocks, B) uint8, to be filled
    filter_eps: float,
) -> tuple[Tensor, Tensor]:  # (K,), (4, K)
    """Return the weighted losses of a group of rows, and their state for backward."""
    hidden_c, hidden_u, targets, share, row_weight = group
    num_rows, num_tiles = row_weight.numel(), triton.cdiv(weight.shape[0], BLOCK_V)
    blocks = triton.cdiv(num_rows, BLOCK_R)
    lse = row_weight.new_empty(2, num_tiles, num_rows)
    raw = row_weight.new_empty(targets.shape)
    loss, state = torch.empty_like(row_weight), row_weight.new_empty(4, num_rows)
    with torch.cuda.device_of(weight):
        soft_lse_kernel[(blocks * num_tiles,)](
            hidden_c, hidden_u, hidden_c.stride(0), share, targets, row_weight, weight,
            weight.stride(0), bias, lse, raw, num_rows, weight.shape[1], weight.shape[0],
            transform.scale, transform.softcap, BLOCK_R=BLOCK_R, BLOCK_V=BLOCK_V,
            **tile_options(weight, fuses=False, interpolates=hidden_u is not None),
        )  # fmt: skip
        soft_combine_kernel[(blocks,)](
            lse, raw, targets, share, row_weight, loss, state, live, num_rows, num_tiles,
            transform.scale, transform.softcap, log_filter(filter_eps), BLOCK_R=BLOCK_R,
            BLOCK_V=BLOCK_V, BLOCK_B=BLOCK_B, enable_fp_fusion=False,
        )  # fmt: skip
    return loss, state


def pair_forward(
    hidden: Tensor,  # (R, D)
    group: PairGroup,
    mix_ratio: Tensor,  # () float32
    weight: Tensor,  # (V, D)
    bias: Tensor | None,
    transform: LogitTransform,
    live: Tensor | None,  # (pair blocks, B) uint8, to be filled
    filter_eps: float,
) -> tuple[Tensor, Tensor]:  # (3, P), (10, P)
    """Return weighted losses of a group of pairs (NTP of c and u, Mixup), and their state."""
    rows, labels, weights, share = group
    num_pairs, num_tiles = rows.shape[1], triton.cdiv(weight.shape[0], BLOCK_V)
    blocks = triton.cdiv(num_pairs, BLOCK_P)
    lse = weights.new_empty(3, 2, num_tiles, num_pairs)
    raw = weights.new_empty(4, num_pairs)
    loss, state = torch.empty_like(weights), weights.new_empty(10, num_pairs)
    with torch.cuda.device_of(weight):
        pair_lse_kernel[(blocks * num_tiles,)](
            hidden, hidden.stride(0), rows, share, labels, weights, weight, weight.stride(0), bias,
            lse, raw, num_pairs, weight.shape[1], weight.shape[0], transform.scale,
            transform.softcap, BLOCK_P=BLOCK_P, BLOCK_V=BLOCK_V,
            **tile_options(weight, fuses=False),
        )  # fmt: skip
        pair_combine_kernel[(blocks,)](
            lse, raw, labels, share, weights, mix_ratio, loss, state, live, num_pairs, num_tiles,
            transform.scale, transform.softcap, log_filter(filter_eps), bias is not None,
            BLOCK_P=BLOCK_P, BLOCK_V=BLOCK_V, BLOCK_B=BLOCK_B, enable_fp_fusion=False,
        )  # fmt: skip
    return loss, state


def log_filter(filter_eps: float) -> float:
    """Return the filter as a log-probability."""
    return math.log(filter_eps) if filter_eps else -math.inf
