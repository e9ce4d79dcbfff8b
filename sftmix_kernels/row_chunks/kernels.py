"""Row kernels of the ``row_chunks`` schedule: logits of a chunk become gradients in place.

A program reads its rows twice: once for the LSEs, once for the gradients, which overwrite them.
Bytes moved for a pair: 2 rows read, 2 read, 2 written. In half precision exponentials are FUSED
(`primitives.exp_above`); in float32 a logit's own rounding is not larger than what that takes away.

Legend: K rows of one chunk, P pairs, T targets of a row, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gates import PLAIN, Kind, Objective
from ..primitives import (
    cross_entropy,
    exp_slope,
    held_targets,
    load_float32,
    pair_state,
    row_factor,
    soft_cross_entropy,
    target_gradient,
    transform_logits,
    transform_slope,
    weighted,
    without_unit,
)
from ..schedules import PADDING
from ..transform import LogitTransform
from .objectives import SMOOTHED, gated_weight, objective_options, objective_row
from .sums import lanes, mixed_row, pair_lses, row_lse

# A 16-byte load a thread, eight logits in half precision. The same for both kernels, so that a
# row's bits do not depend on which of them sums it. Five programs of pairs in half precision fit
# on an SM (95 registers, ptxas) and have 80 KiB of logits on their way, over twice what bandwidth
# times latency is there. By instructions (203 and 171 in an ordinary block of pairs, SASS, sm_90)
# issuing takes 0.41 ms for 4,096 rows of V = 128,256 on an H200, moving bytes 0.73: predicted.
BLOCK = 1024
NUM_WARPS = 4
MAX_REGISTERS = 128
# The second pass begins with what the first has read last, which may still be in L2: a fifth of it
# is, by the bytes of all programs at work. Predicted too.
REVERSED = True


def num_stages(logits: Tensor) -> int:
    """Return how many blocks of logits are on their way: about as many bytes in every dtype."""
    return 4 if logits.dtype == torch.float32 else 5


def launch_options(logits: Tensor) -> dict[str, int | bool]:
    """Return the options of both row kernels."""
    return {
        "BLOCK": BLOCK,
        "VECTOR": 16 // logits.element_size(),
        "STAGES": num_stages(logits),
        "REVERSED": REVERSED,
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
    REVERSED: tl.constexpr,
    # The objective of rows with one target; a plain call has none of it.
    parameter=None,
    old_ptr=None,  # (K,) float32
    stats_ptr=None,  # (3, K) float32
    KIND: tl.constexpr = 0,
    MOMENT: tl.constexpr = False,
):
    """Find a row's loss, and turn its logits into gradients: one program for each row."""
    FUSED: tl.constexpr = logits_ptr.dtype.element_ty != tl.float32
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
    if MOMENT or KIND != 0:
        weight, loss, top, total, at_1, each = objective_row(
            weight,
            row,
            logits_ptr,
            width,
            target_1,
            logit_1,
            vocab_size,
            logit_scale,
            softcap,
            parameter,
            old_ptr,
            stats_ptr,
            KIND,
            MOMENT,
            BLOCK,
            VECTOR,
            STAGES,
        )
    else:
        peak, total = row_lse(
            logits_ptr,
            width,
            held_1,
            held_2,
            vocab_size,
            logit_scale,
            softcap,
            BLOCK,
            VECTOR,
            STAGES,
        )
        if share_ptr is None:
            loss, top, total, at_1 = cross_entropy(peak, total, logit_1)
        else:
            loss, top, total, at_1, at_2 = soft_cross_entropy(
                peak, total, logit_1, logit_2, share_1, share_2, target_1 == target_2
            )
    tl.store(loss_ptr + row, weighted(weight, loss))

    if NEEDS_GRADIENT:
        factor = row_factor(weight, logit_scale, total)
        lane = lanes(BLOCK, VECTOR)
        top, row_scale, readable = gradient_terms(top, factor, factor != 0.0, width, FUSED)
        last = (vocab_size - 1) // BLOCK * BLOCK
        # Every thread has read the targets' logits before one of them overwrites these.
        tl.debug_barrier()
        for at in tl.range(0, vocab_size, BLOCK, num_stages=STAGES):
            start = last - at if REVERSED else at
            raw = load_float32(logits_ptr + (start + lane), mask=start + lane < readable, other=0.0)
            gradient = row_scale * exp_slope(raw, top, logit_scale, softcap, FUSED)
            if KIND == SMOOTHED:
                gradient -= each * transform_slope(raw, logit_scale, softcap)
            store_gradient(logits_ptr, start, lane, gradient, width)
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
def gradient_terms(top, factor, reads, width, FUSED: tl.constexpr):
    """Return top, factor of `exp_slope` and width of a row's second pass.

    What makes no gradient is not read, so that it is 0 whatever the row holds.
    """
    top = tl.where(reads, top, 0.0)
    return top, factor * without_unit(top, FUSED), tl.where(reads, width, 0)


@triton.jit
def store_gradient(logits_ptr, start, lane, gradient, width):
    """Overwrite a block of logits.

    The address is not that of the load, which goes some blocks ahead: it would be kept until here.
    """
    gradient = gradient.to(logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + start + lane, gradient, mask=lane < width - start)


@triton.jit
def pair_gradients_(
    ptr_c,  # (V,) raw logits; gradients afterwards
    ptr_u,  # (V,)
    width,
    state,  # a PairState
    share_c,
    share_u,
    vocab_size,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
    REVERSED: tl.constexpr,
):
    """Overwrite the logits of a pair by the gradients of columns that are no targets."""
    FUSED: tl.constexpr = ptr_c.dtype.element_ty != tl.float32
    lane = lanes(BLOCK, VECTOR)
    factor_c, factor_u, factor_m = state.factor
    mixes = factor_m != 0.0
    reads_c, reads_u = (factor_c != 0.0) | mixes, (factor_u != 0.0) | mixes
    top_c, factor_c, width_c = gradient_terms(state.top[0], factor_c, reads_c, width, FUSED)
    top_u, factor_u, width_u = gradient_terms(state.top[1], factor_u, reads_u, width, FUSED)
    top_m, factor_m, _ = gradient_terms(state.top[2], factor_m, mixes, width, FUSED)
    factor_mc, factor_mu = share_c * factor_m, share_u * factor_m
    last = (vocab_size - 1) // BLOCK * BLOCK
    for at in tl.range(0, vocab_size, BLOCK, num_stages=STAGES):
        start = last - at if REVERSED else at
        raw_c = load_float32(ptr_c + (start + lane), mask=start + lane < width_c, other=0.0)
        raw_u = load_float32(ptr_u + (start + lane), mask=start + lane < width_u, other=0.0)
        gradient_c = factor_c * exp_slope(raw_c, top_c, logit_scale, softcap, FUSED)
        gradient_u = factor_u * exp_slope(raw_u, top_u, logit_scale, softcap, FUSED)
        if mixes:
            raw_m = mixed_row(raw_c, raw_u, share_c, share_u, HAS_BIAS)
            exp_m = exp_slope(raw_m, top_m, logit_scale, softcap, FUSED)
            gradient_c = tl.fma(exp_m, factor_mc, gradient_c)
            gradient_u = tl.fma(exp_m, factor_mu, gradient_u)
        store_gradient(ptr_c, start, lane, gradient_c, width)
        store_gradient(ptr_u, start, lane, gradient_u, width)


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
    REVERSED: tl.constexpr,
    # The gate of NTP; a plain call has none of it.
    parameter=None,
    old_ptr=None,  # (2 P,) float32
    stats_ptr=None,  # (3, 2 P) float32
    KIND: tl.constexpr = 0,
    MOMENT: tl.constexpr = False,
):
    """Find a pair's three losses, and turn both rows into gradients: one program a pair."""
    row_c = tl.program_id(0).to(tl.int64)
    row_u = row_c + num_pairs
    ptr_c, ptr_u = logits_ptr + row_c * stride, logits_ptr + row_u * stride
    target_c = tl.load(labels_ptr + row_c).to(tl.int32)
    target_u = tl.load(labels_ptr + row_u).to(tl.int32)
    share_c, share_u = tl.load(share_ptr + 2 * row_c), tl.load(share_ptr + 2 * row_c + 1)
    mix_weight = tl.load(mix_weight_ptr + row_c)
    held_c, held_u = held_targets(target_c, target_u, share_c, share_u)
    peaks, totals, moments = pair_lses(
        ptr_c,
        ptr_u,
        width,
        (target_c, target_u),
        (held_c, held_u),
        share_c,
        share_u,
        mix_weight != 0.0,
        vocab_size,
        logit_scale,
        softcap,
        HAS_BIAS,
        MOMENT,
        BLOCK,
        VECTOR,
        STAGES,
    )
    raw_cc, raw_cu = load_float32(ptr_c + target_c), load_float32(ptr_c + target_u)
    raw_uc, raw_uu = load_float32(ptr_u + target_c), load_float32(ptr_u + target_u)
    weight_c, weight_u = tl.load(weight_ptr + row_c), tl.load(weight_ptr + row_u)
    weight_m = weighted(mix_weight, tl.load(mix_ratio_ptr))
    if KIND != 0 or stats_ptr is not None:
        logit_c = transform_logits(raw_cc, logit_scale, softcap)
        logit_u = transform_logits(raw_uu, logit_scale, softcap)
        weight_c = gated_weight(
            weight_c, row_c, 2 * num_pairs, (peaks[0], totals[0], moments[0]), logit_c, vocab_size,
            parameter, old_ptr, stats_ptr, KIND,
        )  # fmt: skip
        weight_u = gated_weight(
            weight_u, row_u, 2 * num_pairs, (peaks[1], totals[1], moments[1]), logit_u, vocab_size,
            parameter, old_ptr, stats_ptr, KIND,
        )  # fmt: skip
    state = pair_state(
        peaks,
        totals,
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
        pair_gradients_(
            ptr_c,
            ptr_u,
            width,
            state,
            share_c,
            share_u,
            vocab_size,
            logit_scale,
            softcap,
            HAS_BIAS,
            BLOCK,
            VECTOR,
            STAGES,
            REVERSED,
        )
        # The targets' columns have just been written, by other threads than those that correct
        # them. The partner's target is right already where the mixture has no share of it.
        tl.debug_barrier()
        mixes = state.factor[2] != 0.0
        tl.store(ptr_c + target_c, state.at_targets[0].to(logits_ptr.dtype.element_ty))
        at_target = state.at_targets[1].to(logits_ptr.dtype.element_ty)
        tl.store(ptr_c + target_u, at_target, mask=mixes & (held_u >= 0))
        at_target = state.at_targets[2].to(logits_ptr.dtype.element_ty)
        tl.store(ptr_u + target_c, at_target, mask=mixes & (held_c >= 0))
        tl.store(ptr_u + target_u, state.at_targets[3].to(logits_ptr.dtype.element_ty))


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
    if objective.kind == Kind.GEM:
        transform = transform.tempered(objective.parameter)
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
                **objective_options(objective),
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
                **objective_options(objective),
            )
    return ntp, mixup
