"""Row kernels of the ``row_chunks`` schedule: logits of a chunk become gradients in place.

A program reads its rows twice: once for the LSEs, once for the gradients, which overwrite them.
Bytes moved for a pair: 2 rows read, 2 read, 2 written.

Legend: K rows of one chunk, P pairs, T targets of a row, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gates import PLAIN, Objective
from ..primitives import (
    LOWEST,
    cross_entropy,
    held_targets,
    load_float32,
    merge_lse,
    mixed_hidden,
    mixed_logits,
    online_lse_update,
    pair_gradients,
    pair_state,
    row_factor,
    row_gradient,
    soft_cross_entropy,
    target_gradient,
    transform_logits,
    weighted,
)
from ..schedules import PADDING
from ..transform import LogitTransform

# A 16-byte load a thread, eight logits in half precision. The same for both kernels, so that a
# row's bits do not depend on which of them sums it. Four programs fit on an SM and have 64 KiB of
# logits on their way, twice what bandwidth times latency is there; five would with 96 registers,
# but float32 then spills (ptxas). By instructions (SASS, sm_90) issuing them takes about as long
# as moving the bytes. Not measured on a GPU yet.
BLOCK = 1024
NUM_WARPS = 4
MAX_REGISTERS = 128


def num_stages(logits: Tensor) -> int:
    """Return how many blocks of logits are on their way: about as many bytes in every dtype."""
    return 4 if logits.dtype == torch.float32 else 5


def launch_options(logits: Tensor) -> dict[str, int | bool]:
    """Return the options of both row kernels."""
    return {
        "BLOCK": BLOCK,
        "VECTOR": 16 // logits.element_size(),
        "STAGES": num_stages(logits),
        "num_warps": NUM_WARPS,
        "maxnreg": MAX_REGISTERS,
        "enable_fp_fusion": False,
    }


def width_of(logits: Tensor) -> int:
    """Return how many columns are read and written.

    They include `logits_workspace`'s padding, so that accesses are of whole vectors whatever V is.
    """
    stride, vocab_size = logits.stride(0), logits.shape[1]
    padded = vocab_size + -vocab_size % PADDING
    return padded if stride == padded else vocab_size


@triton.jit
def columns(start, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Return the columns of a block, (BLOCK / VECTOR, VECTOR).

    A thread's 16-byte loads lie side by side, so that it finds their LSE by itself.
    """
    lane = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR
    return start + lane + tl.arange(0, VECTOR)[None, :]


@triton.jit
def soft_rows_kernel(
    logits_ptr,  # (K, V) raw logits; gradients afterwards
    stride,
    width,  # V with padding
    targets_ptr,  # (K, T) int64 in [0, V)
    share_ptr,  # (K, T) float32, or None for one target
    weight_ptr,  # (K,) float32
    loss_ptr,  # (K,) float32
    vocab_size,
    logit_scale,
    softcap,
    NEEDS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Find a row's loss, and turn its logits into gradients: one program for each row."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    weight = tl.load(weight_ptr + row)
    if share_ptr is None:
        target_1 = tl.load(targets_ptr + row).to(tl.int32)
        target_2 = target_1
        held_1, held_2 = target_1, target_1
    else:
        target_1 = tl.load(targets_ptr + 2 * row).to(tl.int32)
        target_2 = tl.load(targets_ptr + 2 * row + 1).to(tl.int32)
        share_1, share_2 = tl.load(share_ptr + 2 * row), tl.load(share_ptr + 2 * row + 1)
        held_1, held_2 = held_targets(target_1, target_2, share_1, share_2)
    raw_1, raw_2 = load_float32(logits_ptr + target_1), load_float32(logits_ptr + target_2)
    logit_1 = transform_logits(raw_1, logit_scale, softcap)
    logit_2 = transform_logits(raw_2, logit_scale, softcap)

    peak = tl.full((BLOCK // VECTOR,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK // VECTOR,), tl.float32)
    for start in tl.range(0, vocab_size, BLOCK, num_stages=STAGES):
        column = columns(start, BLOCK, VECTOR)
        raw = load_float32(logits_ptr + column, mask=column < width, other=0.0)
        logit = transform_logits(raw, logit_scale, softcap)
        left_out = (column >= vocab_size) | (column == held_1) | (column == held_2)
        peak, total = online_lse_update(peak, total, tl.where(left_out, -float("inf"), logit))
    peak, total = merge_lse(peak, total, 0)

    if share_ptr is None:
        loss, top, total, at_1 = cross_entropy(peak, total, logit_1)
        at_2 = at_1
    else:
        loss, top, total, at_1, at_2 = soft_cross_entropy(
            peak, total, logit_1, logit_2, share_1, share_2, target_1 == target_2
        )
    tl.store(loss_ptr + row, weighted(weight, loss))

    if NEEDS_GRADIENT:
        factor = row_factor(weight, logit_scale, total)
        # Every thread has read the targets' logits before one of them overwrites these.
        tl.debug_barrier()
        for start in tl.range(0, vocab_size, BLOCK, num_stages=STAGES):
            column = columns(start, BLOCK, VECTOR)
            raw = load_float32(logits_ptr + column, mask=column < width, other=0.0)
            gradient = row_gradient(raw, top, factor, logit_scale, softcap)
            gradient = gradient.to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + column, gradient, mask=column < width)
        # The targets' columns have just been written, by other threads than those that correct
        # them. One without a share is right already.
        tl.debug_barrier()
        gradient = target_gradient(raw_1, at_1, factor, logit_scale, softcap)
        gradient = gradient.to(logits_ptr.dtype.element_ty)
        tl.store(logits_ptr + target_1, gradient, mask=held_1 >= 0)
        if share_ptr is not None:
            gradient = target_gradient(raw_2, at_2, factor, logit_scale, softcap)
            gradient = gradient.to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + target_2, gradient, mask=held_2 >= 0)


@triton.jit
def pair_rows_kernel(
    logits_ptr,  # (2 P, V) raw logits, rows of c before rows of u; gradients afterwards
    stride,
    width,  # V with padding
    labels_ptr,  # (2 P,) int64 in [0, V)
    weight_ptr,  # (2 P,) float32
    share_ptr,  # (P, 2) float32: lam and 1 - lam
    mix_weight_ptr,  # (P,) float32; 0 where the pair is not mixed
    mix_ratio_ptr,  # () float32
    ntp_ptr,  # (2 P,) float32
    mixup_ptr,  # (P,) float32
    num_pairs,
    vocab_size,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    NEEDS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Find a pair's three losses, and turn both rows into gradients: one program a pair."""
    row_c = tl.program_id(0).to(tl.int64)
    row_u = row_c + num_pairs
    ptr_c, ptr_u = logits_ptr + row_c * stride, logits_ptr + row_u * stride
    target_c = tl.load(labels_ptr + row_c).to(tl.int32)
    target_u = tl.load(labels_ptr + row_u).to(tl.int32)
    share_c, share_u = tl.load(share_ptr + 2 * row_c), tl.load(share_ptr + 2 * row_c + 1)
    held_c, held_u = held_targets(target_c, target_u, share_c, share_u)
    mix_weight = tl.load(mix_weight_ptr + row_c)
    mixes = mix_weight != 0.0

    peak_c = tl.full((BLOCK // VECTOR,), LOWEST, tl.float32)
    peak_u, peak_m = peak_c, peak_c
    total_c = tl.zeros((BLOCK // VECTOR,), tl.float32)
    total_u, total_m = total_c, total_c
    for start in tl.range(0, vocab_size, BLOCK, num_stages=STAGES):
        column = columns(start, BLOCK, VECTOR)
        outside = column >= vocab_size
        raw_c = load_float32(ptr_c + column, mask=column < width, other=0.0)
        raw_u = load_float32(ptr_u + column, mask=column < width, other=0.0)
        logit = transform_logits(raw_c, logit_scale, softcap)
        logit = tl.where(outside | (column == target_c), -float("inf"), logit)
        peak_c, total_c = online_lse_update(peak_c, total_c, logit)
        logit = transform_logits(raw_u, logit_scale, softcap)
        logit = tl.where(outside | (column == target_u), -float("inf"), logit)
        peak_u, total_u = online_lse_update(peak_u, total_u, logit)
        if mixes:
            raw_m = mixed_logits(raw_c, raw_u, share_c, share_u, HAS_BIAS)
            logit = transform_logits(raw_m, logit_scale, softcap)
            left_out = outside | (column == held_c) | (column == held_u)
            logit = tl.where(left_out, -float("inf"), logit)
            peak_m, total_m = online_lse_update(peak_m, total_m, logit)
    peak_c, total_c = merge_lse(peak_c, total_c, 0)
    peak_u, total_u = merge_lse(peak_u, total_u, 0)
    peak_m, total_m = merge_lse(peak_m, total_m, 0)

    raw_cc, raw_cu = load_float32(ptr_c + target_c), load_float32(ptr_c + target_u)
    raw_uc, raw_uu = load_float32(ptr_u + target_c), load_float32(ptr_u + target_u)
    weight_c, weight_u = tl.load(weight_ptr + row_c), tl.load(weight_ptr + row_u)
    weight_m = weighted(mix_weight, tl.load(mix_ratio_ptr))
    state = pair_state(
        (peak_c, peak_u, peak_m),
        (total_c, total_u, total_m),
        raw_cc,
        raw_cu,
        raw_uc,
        raw_uu,
        (weight_c, weight_u, weight_m),
        share_c,
        share_u,
        target_c == target_u,
        logit_scale,
        softcap,
        HAS_BIAS,
    )
    tl.store(ntp_ptr + row_c, weighted(weight_c, state.loss[0]))
    tl.store(ntp_ptr + row_u, weighted(weight_u, state.loss[1]))
    tl.store(mixup_ptr + row_c, weighted(mix_weight, state.loss[2]))

    if NEEDS_GRADIENT:
        # Every thread has read the targets' logits before one of them overwrites these.
        tl.debug_barrier()
        for start in tl.range(0, vocab_size, BLOCK, num_stages=STAGES):
            column = columns(start, BLOCK, VECTOR)
            inside = column < width
            raw_c = load_float32(ptr_c + column, mask=inside, other=0.0)
            raw_u = load_float32(ptr_u + column, mask=inside, other=0.0)
            gradient_c, gradient_u = pair_gradients(
                raw_c, raw_u, state, share_c, share_u, mixes, logit_scale, softcap, HAS_BIAS
            )
            tl.store(ptr_c + column, gradient_c.to(logits_ptr.dtype.element_ty), mask=inside)
            tl.store(ptr_u + column, gradient_u.to(logits_ptr.dtype.element_ty), mask=inside)
        # The targets' columns have just been written, by other threads than those that correct
        # them.
        tl.debug_barrier()
        tl.store(ptr_c + target_c, state.at_targets[0].to(logits_ptr.dtype.element_ty))
        tl.store(ptr_c + target_u, state.at_targets[1].to(logits_ptr.dtype.element_ty))
        tl.store(ptr_u + target_c, state.at_targets[2].to(logits_ptr.dtype.element_ty))
        tl.store(ptr_u + target_u, state.at_targets[3].to(logits_ptr.dtype.element_ty))


@triton.jit
def mixed_rows_kernel(
    first_ptr,  # (R, D)
    second_ptr,  # (R, D)
    rows_ptr,  # (K,) int64
    share_ptr,  # (R, 2) float32
    weight_ptr,  # (R,) float32
    mixed_ptr,  # (K, D)
    hidden_size,
    BLOCK: tl.constexpr,
):
    """Interpolate two rows of hidden states: one program for each row and block."""
    row = tl.load(rows_ptr + tl.program_id(0))
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # A row of weight 0 has no columns to read: what it holds, perhaps NaN, must not reach dW.
    counts = column < tl.where(tl.load(weight_ptr + row) == 0.0, 0, hidden_size)
    first = load_float32(first_ptr + row * hidden_size + column, mask=counts, other=0.0)
    second = load_float32(second_ptr + row * hidden_size + column, mask=counts, other=0.0)
    share_1, share_2 = tl.load(share_ptr + 2 * row), tl.load(share_ptr + 2 * row + 1)
    mixed = mixed_hidden(first, second, share_1, share_2)
    mixed = tl.where(counts, mixed, 0.0).to(mixed_ptr.dtype.element_ty)
    out = mixed_ptr + tl.program_id(0).to(tl.int64) * hidden_size + column
    tl.store(out, mixed, mask=column < hidden_size)


def mixed_rows(
    first: Tensor,  # (R, D)
    second: Tensor,  # (R, D)
    share: Tensor,  # (R, 2) float32
    rows: Tensor,  # (K,) int64
    row_weight: Tensor,  # (R,) float32
) -> Tensor:  # (K, D)
    """Return ``share_1 first + share_2 second`` of some rows, rounded once; 0 for weight 0."""
    first, second = first.contiguous(), second.contiguous()
    mixed = first.new_empty(rows.numel(), first.shape[1])
    if mixed.numel():
        with torch.cuda.device_of(mixed):
            mixed_rows_kernel[(rows.numel(), triton.cdiv(first.shape[1], 1024))](
                first,
                second,
                rows,
                share,
                row_weight,
                mixed,
                first.shape[1],
                BLOCK=1024,
                enable_fp_fusion=False,
            )
    return mixed


def soft_rows_(
    logits: Tensor,  # (K, V) raw logits of `logits_workspace`; gradients afterwards
    targets: Tensor,  # (K, T) int64 in [0, V); T is 1 or 2
    share: Tensor | None,  # (K, T) float32; None for one target
    row_weight: Tensor,  # (K,) float32
    transform: LogitTransform,
    needs_gradient: bool,
    objective: Objective = PLAIN,
) -> Tensor:  # (K,) float32
    """Return weighted row losses; turn the logits into the gradients of their sum in place."""
    assert objective.is_plain
    loss = torch.empty_like(row_weight)
    if loss.numel():
        with torch.cuda.device_of(logits):
            soft_rows_kernel[(loss.numel(),)](
                logits,
                logits.stride(0),
                width_of(logits),
                targets,
                share,
                row_weight,
                loss,
                logits.shape[1],
                None if transform.scale == 1.0 else transform.scale,
                transform.softcap,
                NEEDS_GRADIENT=needs_gradient,
                **launch_options(logits),
            )
    return loss


def pair_rows_(
    logits: Tensor,  # (>= 2 P, V) as in `soft_rows_`, rows of c before rows of u
    labels: Tensor,  # (>= 2 P,) int64 in [0, V)
    row_weight: Tensor,  # (>= 2 P,) float32
    share: Tensor,  # (P, 2) float32: lam and 1 - lam
    pair_weight: Tensor,  # (P,) float32
    mix_ratio: Tensor,  # () float32
    transform: LogitTransform,
    needs_gradient: bool,
    objective: Objective = PLAIN,  # of NTP
) -> tuple[Tensor, Tensor]:  # NTP (2 P,), Mixup (P,)
    """Return weighted losses; make logits the gradients of ``sum(ntp) + mix_ratio sum(mixup)``."""
    assert objective.is_plain
    mixup = torch.empty_like(pair_weight)
    ntp = mixup.new_empty(2 * mixup.numel())
    if mixup.numel():
        with torch.cuda.device_of(logits):
            pair_rows_kernel[(mixup.numel(),)](
                logits,
                logits.stride(0),
                width_of(logits),
                labels,
                row_weight,
                share,
                pair_weight,
                mix_ratio,
                ntp,
                mixup,
                mixup.numel(),
                logits.shape[1],
                None if transform.scale == 1.0 else transform.scale,
                transform.softcap,
                HAS_BIAS=transform.has_bias,
                NEEDS_GRADIENT=needs_gradient,
                **launch_options(logits),
            )
    return ntp, mixup
