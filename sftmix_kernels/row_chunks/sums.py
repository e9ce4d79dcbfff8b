"""The first pass over a row of a chunk: what its losses follow from.

A plain call finds the LSE of the columns that are no targets. Objectives that need more take one
more sum there: the moment ``sum e^(x - peak) (x - peak)``, of which entropy and GEM are made, or
the gap ``sum (x - target)`` of label smoothing.

Legend: V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..primitives import (
    LOWEST,
    exp,
    load_float32,
    merge_lse,
    mixed_logits,
    online_lse_update,
    transform_logits,
    without_unit,
)


@triton.jit
def lanes(BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Return the columns of the first block, (BLOCK / VECTOR, VECTOR).

    A thread's 16-byte loads lie side by side, so that it finds their LSE by itself.
    """
    return tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def needs_mask(start, target_1, target_2, vocab_size, BLOCK: tl.constexpr):
    """Say whether a block has columns that are left out: a target, or some past the end.

    Two or three of many have. All threads branch alike.
    """
    held = (start == target_1 // BLOCK * BLOCK) | (start == target_2 // BLOCK * BLOCK)
    return held | (start + BLOCK > vocab_size)


@triton.jit
def masked(logit, lane, start, target_1, target_2, vocab_size):
    """Return the logits of a block, -inf at both targets and past the end."""
    left_out = (lane == target_1 - start) | (lane == target_2 - start)
    return tl.where(left_out | (lane >= vocab_size - start), -float("inf"), logit)


@triton.jit
def row_lse(
    logits_ptr,  # (V,)
    width,
    held_1,
    held_2,
    vocab_size,
    logit_scale,
    softcap,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return ``(peak, total)`` of a row without its targets."""
    FUSED: tl.constexpr = logits_ptr.dtype.element_ty != tl.float32
    lane = lanes(BLOCK, VECTOR)
    peak = tl.full((BLOCK // VECTOR,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK // VECTOR,), tl.float32)
    for start in tl.range(0, vocab_size, BLOCK, num_stages=STAGES):
        raw = load_float32(logits_ptr + (start + lane), mask=start + lane < width, other=0.0)
        logit = transform_logits(raw, logit_scale, softcap)
        if needs_mask(start, held_1, held_2, vocab_size, BLOCK):
            logit = masked(logit, lane, start, held_1, held_2, vocab_size)
        peak, total = online_lse_update(peak, total, logit, FUSED)
    return merge_lse(peak, total * without_unit(peak, FUSED), 0)


@triton.jit
def moved_moment(peak, total, moment, top):
    """Return ``(total, moment)`` above another top; of nothing, whose peak is LOWEST, 0."""
    down = peak - top
    factor = exp(down)
    return total * factor, tl.where(total == 0.0, 0.0, factor * (moment + down * total))


@triton.jit
def moment_update(peak, total, moment, x):
    """Take the columns of ``x`` into each row's ``(peak, total, moment)``."""
    top = tl.maximum(peak, tl.max(x, 1))
    total, moment = moved_moment(peak, total, moment, top)
    below = x - top[:, None]
    # e^-104 is 0, and 0 * -inf would be NaN. Not a maximum, which would hide a NaN.
    below = tl.where(below < -104.0, -104.0, below)
    exponential = exp(below)
    return top, total + tl.sum(exponential, 1), moment + tl.sum(below * exponential, 1)


@triton.jit
def merge_moment(peak, total, moment):
    """Merge many ``(peak, total, moment)`` into one."""
    top = tl.max(peak, 0)
    total, moment = moved_moment(peak, total, moment, top)
    return top, tl.sum(total, 0), tl.sum(moment, 0)


@triton.jit
def row_sums(
    logits_ptr,  # (V,)
    width,
    target,
    at_target,  # its logit
    vocab_size,
    logit_scale,
    softcap,
    parameter,
    MOMENT: tl.constexpr,
    GAP: tl.constexpr,
    UNTEMPERED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return ``(peak, total, moment)`` of a row without its target, its gap, and that triple of
    its logits times the parameter, where those are tempered by it."""
    lane = lanes(BLOCK, VECTOR)
    peak = tl.full((BLOCK // VECTOR,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK // VECTOR,), tl.float32)
    moment, gap = total, total
    plain_peak, plain_total, plain_moment = peak, total, total
    for start in tl.range(0, vocab_size, BLOCK, num_stages=STAGES):
        raw = load_float32(logits_ptr + (start + lane), mask=start + lane < width, other=0.0)
        logit = transform_logits(raw, logit_scale, softcap)
        if GAP:
            gap += tl.sum(tl.where(lane < vocab_size - start, logit - at_target, 0.0), 1)
        if needs_mask(start, target, target, vocab_size, BLOCK):
            logit = masked(logit, lane, start, target, target, vocab_size)
        if MOMENT:
            peak, total, moment = moment_update(peak, total, moment, logit)
        else:
            peak, total = online_lse_update(peak, total, logit)
        if UNTEMPERED:
            plain_peak, plain_total, plain_moment = moment_update(
                plain_peak, plain_total, plain_moment, logit * parameter
            )
    peak, total, moment = merge_moment(peak, total, moment)
    plain = merge_moment(plain_peak, plain_total, plain_moment)
    return (peak, total, moment), tl.sum(gap, 0), plain


@triton.jit
def mixed_row(raw_c, raw_u, share_c, share_u, HAS_BIAS: tl.constexpr):
    """Return `mixed_logits` of one pair, with a branch where that selects."""
    raw_m = mixed_logits(raw_c, raw_u, share_c, share_u, False)
    if HAS_BIAS:
        selects = (share_c == 0.0) | (share_u == 0.0)
        if selects:
            raw_m = mixed_logits(raw_c, raw_u, share_c, share_u, True)
    return raw_m


@triton.jit
def pair_lses(
    ptr_c,  # (V,)
    ptr_u,  # (V,)
    width,
    targets,  # of c, of u
    held,  # those with a share in the mixture
    share_c,
    share_u,
    mixes,
    vocab_size,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    MOMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return the peaks of c, of u and of their mixture, targets left out, and the totals; and with
    MOMENT the moments of c and of u."""
    FUSED: tl.constexpr = ptr_c.dtype.element_ty != tl.float32
    lane = lanes(BLOCK, VECTOR)
    peak_c = tl.full((BLOCK // VECTOR,), LOWEST, tl.float32)
    peak_u, peak_m = peak_c, peak_c
    total_c = tl.zeros((BLOCK // VECTOR,), tl.float32)
    total_u, total_m = total_c, total_c
    moment_c, moment_u = total_c, total_c
    for start in tl.range(0, vocab_size, BLOCK, num_stages=STAGES):
        raw_c = load_float32(ptr_c + (start + lane), mask=start + lane < width, other=0.0)
        raw_u = load_float32(ptr_u + (start + lane), mask=start + lane < width, other=0.0)
        logit_c = transform_logits(raw_c, logit_scale, softcap)
        logit_u = transform_logits(raw_u, logit_scale, softcap)
        logit_m = logit_c
        if mixes:
            raw_m = mixed_row(raw_c, raw_u, share_c, share_u, HAS_BIAS)
            logit_m = transform_logits(raw_m, logit_scale, softcap)
        if needs_mask(start, targets[0], targets[1], vocab_size, BLOCK):
            logit_c = masked(logit_c, lane, start, targets[0], targets[0], vocab_size)
            logit_u = masked(logit_u, lane, start, targets[1], targets[1], vocab_size)
            logit_m = masked(logit_m, lane, start, held[0], held[1], vocab_size)
        if MOMENT:
            peak_c, total_c, moment_c = moment_update(peak_c, total_c, moment_c, logit_c)
            peak_u, total_u, moment_u = moment_update(peak_u, total_u, moment_u, logit_u)
        else:
            peak_c, total_c = online_lse_update(peak_c, total_c, logit_c, FUSED)
            peak_u, total_u = online_lse_update(peak_u, total_u, logit_u, FUSED)
        if mixes:
            peak_m, total_m = online_lse_update(peak_m, total_m, logit_m, FUSED)
    moments = None, None
    if MOMENT:
        peak_c, total_c, moment_c = merge_moment(peak_c, total_c, moment_c)
        peak_u, total_u, moment_u = merge_moment(peak_u, total_u, moment_u)
        moments = moment_c, moment_u
    else:
        peak_c, total_c = merge_lse(peak_c, total_c * without_unit(peak_c, FUSED), 0)
        peak_u, total_u = merge_lse(peak_u, total_u * without_unit(peak_u, FUSED), 0)
    peak_m, total_m = merge_lse(peak_m, total_m * without_unit(peak_m, FUSED), 0)
    return (peak_c, peak_u, peak_m), (total_c, total_u, total_m), moments
