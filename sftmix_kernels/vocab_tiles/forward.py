"""Forward kernels of the ``vocab_tiles`` schedule: logits of a tile, their LSEs, and losses.

`soft_lse_kernel` and `pair_lse_kernel` interpolate and project, one program for each tile of 128
or 256 columns. They leave each row's ``(peak, total)`` of 128 columns, without its targets, and
the raw logits at the targets. `soft_combine_kernel` and `pair_combine_kernel`, one program for each
block of rows, make of these the row's loss and what backward needs to know of the row (its state),
and one flag for every 128 columns, which says whether any probability of the block in them can be
above the filter.

Legend: K rows of one group, P pairs of one group, T targets of a row (1 or 2), D hidden size,
V vocabulary, B tiles of the vocabulary.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives import (
    LOWEST,
    add_lse,
    cross_entropy,
    exp,
    held_targets,
    merge_lse,
    mixed_logits,
    pair_state,
    row_factor,
    soft_cross_entropy,
    target_gradient,
    transform_logits,
    weighted,
)
from ..schedules import BLOCK_P, BLOCK_R, BLOCK_V
from ..transform import LogitTransform
from .groups import PairGroup, RowGroup
from .logits import (
    grouped_tile,
    load_targets,
    pair_tile,
    soft_tile,
    tile_columns,
    tile_options,
)

# Tiles that a combining kernel takes at a time.
BLOCK_B = 16


@triton.jit
def store_lse(lse_ptr, term: tl.constexpr, logits, left_out, tile, num_tiles, row, num_rows,
              BLOCK_V: tl.constexpr):  # fmt: skip
    """Keep ``(peak, total)`` of each row and `BLOCK_V` columns, with some columns left out.

    Of each term peaks of all tiles, then totals of all.
    """
    PARTS: tl.constexpr = logits.shape[1] // BLOCK_V
    x = tl.where(left_out, -float("inf"), logits)
    x = tl.reshape(x, (logits.shape[0], PARTS, BLOCK_V))
    peak = tl.maximum(tl.max(x, 2), LOWEST)
    total = tl.sum(exp(x - peak[:, :, None]), 2)
    tile = (tile * PARTS + tl.arange(0, PARTS))[None, :]
    inside = (row < num_rows)[:, None] & (tile < num_tiles)
    size = tl.cast(num_tiles, tl.int64) * num_rows
    lse = lse_ptr + 2 * term * size + tile.to(tl.int64) * num_rows + row[:, None]
    tl.store(lse, peak, mask=inside)
    tl.store(lse + size, total, mask=inside)


@triton.jit
def store_at_target(pointer, row, logits, column, target, inside):
    """Keep a row's logit at its target, from the one tile that holds it."""
    at = column[None, :] == target[:, None]
    holds = (target >= tl.min(column, 0)) & (target <= tl.max(column, 0))
    tl.store(pointer + row, tl.sum(tl.where(at, logits, 0.0), 1), mask=inside & holds)


@triton.jit
def soft_lse_kernel(
    group,  # a RowGroup
    stride,  # of both hidden states
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
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Find the LSEs of rows in one tile, and the raw logits at their targets."""
    row_block, tile = grouped_tile(tl.cdiv(num_rows, BLOCK_R), tl.cdiv(vocab_size, COLUMNS), GROUP)
    row = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = row < num_rows
    target_1, target_2, share_1, share_2 = load_targets(
        group.targets, group.share, row, num_rows, inside
    )
    raw = soft_tile(
        group, stride, share_1, share_2, row, num_rows, head_ptr, head_stride, bias_ptr, column,
        hidden_size, vocab_size, BLOCK_D,
    )  # fmt: skip
    # Before the LSE, so that raw logits and transformed ones need not be kept together.
    store_at_target(raw_ptr, row, raw, column, target_1, inside)
    if group.share is not None:
        store_at_target(raw_ptr + num_rows, row, raw, column, target_2, inside)
    held_1, held_2 = held_targets(target_1, target_2, share_1, share_2)
    left_out = (column >= vocab_size)[None, :] | (column[None, :] == held_1[:, None])
    left_out = left_out | (column[None, :] == held_2[:, None])
    logit = transform_logits(raw, logit_scale, softcap)
    num_tiles = tl.cdiv(vocab_size, BLOCK_V)
    store_lse(lse_ptr, 0, logit, left_out, tile, num_tiles, row, num_rows, BLOCK_V)


@triton.jit
def pair_lse_kernel(
    hidden_ptr,  # (R, D)
    stride,
    group,  # a PairGroup
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
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Find the three LSEs of pairs in one tile, and the raw logits at both targets."""
    pair_block, tile = grouped_tile(
        tl.cdiv(num_pairs, BLOCK_P), tl.cdiv(vocab_size, COLUMNS), GROUP
    )
    pair = pair_block * BLOCK_P + tl.arange(0, BLOCK_P)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = pair < num_pairs
    raw_c, raw_u = pair_tile(
        hidden_ptr, stride, group, pair, num_pairs, head_ptr, head_stride, bias_ptr, column,
        hidden_size, vocab_size, BLOCK_D,
    )  # fmt: skip
    target_c, target_u, share_c, share_u = load_targets(
        group.labels, group.share, pair, num_pairs, inside
    )
    store_at_target(raw_ptr, pair, raw_c, column, target_c, inside)
    store_at_target(raw_ptr + num_pairs, pair, raw_c, column, target_u, inside)
    store_at_target(raw_ptr + 2 * num_pairs, pair, raw_u, column, target_c, inside)
    store_at_target(raw_ptr + 3 * num_pairs, pair, raw_u, column, target_u, inside)

    outside = (column >= vocab_size)[None, :]
    held_c, held_u = held_targets(target_c, target_u, share_c, share_u)
    left_out = outside | (column[None, :] == held_c[:, None]) | (column[None, :] == held_u[:, None])
    raw_m = mixed_logits(raw_c, raw_u, share_c[:, None], share_u[:, None], bias_ptr is not None)
    logit = transform_logits(raw_m, logit_scale, softcap)
    num_tiles = tl.cdiv(vocab_size, BLOCK_V)
    store_lse(lse_ptr, 2, logit, left_out, tile, num_tiles, pair, num_pairs, BLOCK_V)
    left_out = outside | (column[None, :] == target_c[:, None])
    logit = transform_logits(raw_c, logit_scale, softcap)
    store_lse(lse_ptr, 0, logit, left_out, tile, num_tiles, pair, num_pairs, BLOCK_V)
    left_out = outside | (column[None, :] == target_u[:, None])
    logit = transform_logits(raw_u, logit_scale, softcap)
    store_lse(lse_ptr, 1, logit, left_out, tile, num_tiles, pair, num_pairs, BLOCK_V)


@triton.jit
def load_lse(lse_ptr, start, row, inside, num_rows, num_tiles, BLOCK_B: tl.constexpr):
    """Return ``(peak, total)`` of some tiles, (BLOCK_B, rows) each."""
    tile = start + tl.arange(0, BLOCK_B)
    pointers = lse_ptr + tile.to(tl.int64)[:, None] * num_rows + row[None, :]
    mask = (tile < num_tiles)[:, None] & inside[None, :]
    peak = tl.load(pointers, mask=mask, other=LOWEST)
    total = tl.load(pointers + tl.cast(num_tiles, tl.int64) * num_rows, mask=mask, other=0.0)
    return peak, total


@triton.jit
def combined_lse(lse_ptr, row, inside, num_rows, num_tiles, BLOCK_B: tl.constexpr):
    """Return ``(peak, total)`` of rows over all tiles."""
    peak = tl.full(row.shape, LOWEST, tl.float32)
    total = tl.zeros(row.shape, tl.float32)
    for start in range(0, num_tiles, BLOCK_B):
        peak_2, total_2 = load_lse(lse_ptr, start, row, inside, num_rows, num_tiles, BLOCK_B)
        peak_2, total_2 = merge_lse(peak_2, total_2, 0)
        peak, total = add_lse(peak, total, peak_2, total_2)
    return peak, total


@triton.jit
def reaching(lse_ptr, start, row, inside, num_rows, num_tiles, log_sum, counts, log_eps,
             BLOCK_B: tl.constexpr):  # fmt: skip
    """Return 1 where a row's largest probability in a tile is above the filter, or is NaN."""
    peak, _ = load_lse(lse_ptr, start, row, inside, num_rows, num_tiles, BLOCK_B)
    below = peak - log_sum[None, :] <= log_eps
    return tl.where(below | (counts == 0)[None, :], 0, 1)


@triton.jit
def soft_combine_kernel(
    lse_ptr,  # (2, B, K) float32
    raw_ptr,  # (T, K) float32
    targets_ptr,  # (T, K) int64
    share_ptr,  # (2, K) float32, or None for one target
    weight_ptr,  # (K,) float32
    loss_ptr,  # (K,) float32
    state_ptr,  # (4, K) float32: maximum, factor, d loss / d raw at both targets
    live_ptr,  # (row blocks, B) uint8, or None without a filter
    num_rows,
    num_tiles,
    logit_scale,
    softcap,
    log_eps,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Find the losses of a block of rows, their state, and which tiles are live."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < num_rows
    weight = tl.load(weight_ptr + row, mask=inside, other=0.0)
    target_1, target_2, share_1, share_2 = load_targets(
        targets_ptr, share_ptr, row, num_rows, inside
    )
    peak, total = combined_lse(lse_ptr, row, inside, num_rows, num_tiles, BLOCK_B)
    raw_1 = tl.load(raw_ptr + row, mask=inside, other=0.0)
    logit_1 = transform_logits(raw_1, logit_scale, softcap)
    if share_ptr is None:
        raw_2 = raw_1
        loss, top, total, at_1 = cross_entropy(peak, total, logit_1)
        at_2 = at_1
    else:
        raw_2 = tl.load(raw_ptr + num_rows + row, mask=inside, other=0.0)
        logit_2 = transform_logits(raw_2, logit_scale, softcap)
        loss, top, total, at_1, at_2 = soft_cross_entropy(
            peak, total, logit_1, logit_2, share_1, share_2, target_1 == target_2
        )
    factor = row_factor(tl.full(row.shape, 1.0, tl.float32), logit_scale, total)
    at_1 = target_gradient(raw_1, at_1, factor, logit_scale, softcap)
    at_2 = target_gradient(raw_2, at_2, factor, logit_scale, softcap)
    tl.store(loss_ptr + row, weighted(weight, loss), mask=inside)
    tl.store(state_ptr + row, top, mask=inside)
    tl.store(state_ptr + num_rows + row, factor, mask=inside)
    tl.store(state_ptr + 2 * num_rows + row, at_1, mask=inside)
    tl.store(state_ptr + 3 * num_rows + row, at_2, mask=inside)

    if live_ptr is not None:
        log_sum, counts = top + tl.log(total), weight != 0.0
        held = tl.where(counts, target_1 // BLOCK_V, -1)
        other = tl.where(counts, target_2 // BLOCK_V, -1)
        for start in range(0, num_tiles, BLOCK_B):
            tile = start + tl.arange(0, BLOCK_B)
            live = reaching(
                lse_ptr, start, row, inside, num_rows, num_tiles, log_sum, counts, log_eps, BLOCK_B
            )
            store_live(live_ptr, live, tile, held, other, num_tiles)


@triton.jit
def store_live(live_ptr, live, tile, held_1, held_2, num_tiles):
    """Store one flag for each tile: whether any row reaches it or has a target in it."""
    holds = (tile[:, None] == held_1[None, :]) | (tile[:, None] == held_2[None, :])
    live = tl.max(tl.where(holds, 1, live), 1)
    flags = live_ptr + tl.program_id(0).to(tl.int64) * num_tiles + tile
    tl.store(flags, live.to(tl.uint8), mask=tile < num_tiles)


@triton.jit
def pair_combine_kernel(
    lse_ptr,  # (3, 2, B, P) float32
    raw_ptr,  # (4, P) float32
    labels_ptr,  # (2, P) int64
    share_ptr,  # (2, P) float32
    weight_ptr,  # (3, P) float32
    mix_ratio_ptr,  # () float32
    loss_ptr,  # (3, P) float32
    state_ptr,  # (10, P) float32: three maxima, three factors, d loss / d raw at the targets
    live_ptr,  # (pair blocks, B) uint8, or None without a filter
    num_pairs,
    num_tiles,
    logit_scale,
    softcap,
    log_eps,
    HAS_BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Find the losses of a block of pairs, their state, and which tiles are live."""
    pair = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pair < num_pairs
    weight_c = tl.load(weight_ptr + pair, mask=inside, other=0.0)
    weight_u = tl.load(weight_ptr + num_pairs + pair, mask=inside, other=0.0)
    pair_weight = tl.load(weight_ptr + 2 * num_pairs + pair, mask=inside, other=0.0)
    target_c, target_u, share_c, share_u = load_targets(
        labels_ptr, share_ptr, pair, num_pairs, inside
    )
    lse_u = lse_ptr + 2 * tl.cast(num_tiles, tl.int64) * num_pairs
    lse_m = lse_ptr + 4 * tl.cast(num_tiles, tl.int64) * num_pairs
    peak_c, total_c = combined_lse(lse_ptr, pair, inside, num_pairs, num_tiles, BLOCK_B)
    peak_u, total_u = combined_lse(lse_u, pair, inside, num_pairs, num_tiles, BLOCK_B)
    peak_m, total_m = combined_lse(lse_m, pair, inside, num_pairs, num_tiles, BLOCK_B)
    state = pair_state(
        (peak_c, peak_u, peak_m),
        (total_c, total_u, total_m),
        tl.load(raw_ptr + pair, mask=inside, other=0.0),
        tl.load(raw_ptr + num_pairs + pair, mask=inside, other=0.0),
        tl.load(raw_ptr + 2 * num_pairs + pair, mask=inside, other=0.0),
        tl.load(raw_ptr + 3 * num_pairs + pair, mask=inside, other=0.0),
        (weight_c, weight_u, weighted(pair_weight, tl.load(mix_ratio_ptr))),
        share_c,
        share_u,
        target_c == target_u,
        logit_scale,
        softcap,
        HAS_BIAS,
    )
    tl.store(loss_ptr + pair, weighted(weight_c, state.loss[0]), mask=inside)
    tl.store(loss_ptr + num_pairs + pair, weighted(weight_u, state.loss[1]), mask=inside)
    tl.store(loss_ptr + 2 * num_pairs + pair, weighted(pair_weight, state.loss[2]), mask=inside)
    for term in tl.static_range(3):
        tl.store(state_ptr + term * num_pairs + pair, state.top[term], mask=inside)
        tl.store(state_ptr + (3 + term) * num_pairs + pair, state.factor[term], mask=inside)
    for term in tl.static_range(4):
        tl.store(state_ptr + (6 + term) * num_pairs + pair, state.at_targets[term], mask=inside)

    if live_ptr is not None:
        held_c = tl.where(weight_c != 0.0, target_c // BLOCK_V, -1)
        held_u = tl.where(weight_u != 0.0, target_u // BLOCK_V, -1)
        log_sum_c = state.top[0] + tl.log(state.total[0])
        log_sum_u = state.top[1] + tl.log(state.total[1])
        log_sum_m = state.top[2] + tl.log(state.total[2])
        for start in range(0, num_tiles, BLOCK_B):
            live_c = reaching(
                lse_ptr, start, pair, inside, num_pairs, num_tiles, log_sum_c, weight_c != 0.0,
                log_eps, BLOCK_B,
            )  # fmt: skip
            live_u = reaching(
                lse_u, start, pair, inside, num_pairs, num_tiles, log_sum_u, weight_u != 0.0,
                log_eps, BLOCK_B,
            )  # fmt: skip
            live_m = reaching(
                lse_m, start, pair, inside, num_pairs, num_tiles, log_sum_m, pair_weight != 0.0,
                log_eps, BLOCK_B,
            )  # fmt: skip
            tile = start + tl.arange(0, BLOCK_B)
            store_live(live_ptr, live_c | live_u | live_m, tile, held_c, held_u, num_tiles)


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
    columns = tile_columns(weight.dtype, transform.softcap)
    lse = row_weight.new_empty(2, num_tiles, num_rows)
    raw = row_weight.new_empty(targets.shape)
    loss, state = torch.empty_like(row_weight), row_weight.new_empty(4, num_rows)
    with torch.cuda.device_of(weight):
        soft_lse_kernel[(blocks * triton.cdiv(weight.shape[0], columns),)](
            group, hidden_c.stride(0), weight, weight.stride(0), bias, lse, raw, num_rows,
            weight.shape[1], weight.shape[0], transform.scale, transform.softcap,
            BLOCK_R=BLOCK_R, BLOCK_V=BLOCK_V, COLUMNS=columns,
            **tile_options(weight, columns, fuses=False, interpolates=hidden_u is not None),
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
    columns = tile_columns(weight.dtype, transform.softcap)
    lse = weights.new_empty(3, 2, num_tiles, num_pairs)
    raw = weights.new_empty(4, num_pairs)
    loss, state = torch.empty_like(weights), weights.new_empty(10, num_pairs)
    with torch.cuda.device_of(weight):
        pair_lse_kernel[(blocks * triton.cdiv(weight.shape[0], columns),)](
            hidden, hidden.stride(0), group, weight, weight.stride(0), bias, lse, raw, num_pairs,
            weight.shape[1], weight.shape[0], transform.scale, transform.softcap,
            BLOCK_P=BLOCK_P, BLOCK_V=BLOCK_V, COLUMNS=columns,
            **tile_options(weight, columns, fuses=False),
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
