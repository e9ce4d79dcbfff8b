"""What an objective makes of a row between its two passes; `gates.py` has the formulas.

``csrc/row_objectives.h`` says the same for the CPU. All of it is a few numbers for each row.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..gates import Kind, Objective
from ..primitives import LOG2E, cross_entropy, exp, exp2, log1p, scale_logits, weighted
from .sums import moved_moment, row_sums

POWER = tl.constexpr(int(Kind.POWER))
ABOVE = tl.constexpr(int(Kind.ABOVE))
BELOW = tl.constexpr(int(Kind.BELOW))
ENTROPY = tl.constexpr(int(Kind.ENTROPY))
CLIPPED = tl.constexpr(int(Kind.CLIPPED))
SMOOTHED = tl.constexpr(int(Kind.SMOOTHED))
GEM = tl.constexpr(int(Kind.GEM))
LOG2E_REST = tl.constexpr(1.92596299e-8)  # log2(e) less LOG2E
LN2 = tl.constexpr(0.6931471805599453)


def objective_options(objective: Objective) -> dict[str, Any]:
    """Return what both row kernels are told of an objective: nothing of the plain one."""
    return {
        "parameter": None if objective.kind == Kind.PLAIN else float(objective.parameter),
        "old_ptr": objective.old_log_probs,
        "stats_ptr": objective.stats,
        "KIND": int(objective.kind),
        "MOMENT": objective.needs_moment,
    }


@triton.jit
def mean_below_top(sums, logit, top, total):
    """Return ``sum_j p_j (a_j - top)``, from ``(peak, total, moment)`` of all but the target."""
    moment = moved_moment(sums[0], sums[1], sums[2], top)[1]
    held = exp(logit - top)
    return (moment + tl.where(held == 0.0, 0.0, held * (logit - top))) / total


@triton.jit
def entropy_of(sums, logit, top, total, at):
    """Return a row's entropy; ``at`` is minus the sum of all but the target, above the top."""
    log_sum = log1p((exp(logit - top) - 1.0) - at)
    return log_sum - mean_below_top(sums, logit, top, total)


@triton.jit
def power(x, k):
    """Return ``x^k`` for x at least 0; ``0^0`` is 1."""
    return tl.where(k == 0.0, 1.0, exp(k * tl.log(x)))


@triton.jit
def power_of_p(nll, k):
    """Return ``e^(-k nll)``, as precise as the NLL.

    What rounding takes from ``k nll log2(e)``, up to 1e-6 of the result, comes back as a factor.
    """
    exponent = k * nll
    base = exponent * LOG2E
    rest = tl.fma(k, nll, -exponent) * LOG2E
    rest += tl.fma(exponent, LOG2E, -base) + exponent * LOG2E_REST
    # Of an infinite NLL rest is NaN.
    result = tl.where(base > 200.0, 0.0, exp2(-base) * (1.0 - rest * LN2))
    return tl.where(k == 0.0, 1.0, result)


@triton.jit
def write_stats(row, num_rows, sums, logit, stats_ptr):
    """Write a row's NLL, its entropy, and whether no other logit is above the target's."""
    nll, top, total, at = cross_entropy(sums[0], sums[1], logit)
    tl.store(stats_ptr + row, nll)
    tl.store(stats_ptr + num_rows + row, entropy_of(sums, logit, top, total, at))
    # A maximum does not see NaN; the NLL does.
    is_top = (logit >= sums[0]) & (nll == nll)
    tl.store(stats_ptr + 2 * num_rows + row, tl.where(is_top, 1.0, 0.0))


@triton.jit
def gated_weight(
    weight,
    row,
    num_rows,
    sums,  # peak, total, moment of all columns but the target
    logit,  # the target's
    vocab_size,
    parameter,
    old_ptr,  # (num_rows,)
    stats_ptr,  # (3, num_rows) or None
    KIND: tl.constexpr,
):
    """Return a row's weight times its gate, where the kind is one; write stats."""
    if stats_ptr is not None:
        write_stats(row, num_rows, sums, logit, stats_ptr)
    nll, top, total, at = cross_entropy(sums[0], sums[1], logit)
    if KIND == POWER:
        gate = power_of_p(nll, parameter)
    elif KIND == ABOVE:
        gate = tl.where(exp(-nll) >= parameter, 1.0, 0.0)
    elif KIND == BELOW:
        gate = tl.where(exp(-nll) < parameter, 1.0, 0.0)
    elif KIND == ENTROPY:
        # One token has no entropy.
        most = tl.log(tl.maximum(vocab_size, 2) * 1.0)
        entropy = entropy_of(sums, logit, top, total, at)
        gate = power(tl.maximum(entropy, 0.0) / most, parameter)
    elif KIND == CLIPPED:
        ratio = exp(-nll - tl.load(old_ptr + row))
        gate = tl.where(ratio >= 1.0 + parameter, 0.0, ratio)
    if KIND != 0 and KIND != SMOOTHED:
        # A comparison would hide that the NLL is NaN.
        weight = weighted(weight, tl.where(nll != nll, nll, gate))
    return weight


@triton.jit
def objective_row(
    weight,
    row,
    logits_ptr,  # (V,)
    width,
    target,
    logit,  # the target's
    vocab_size,
    logit_scale,
    softcap,
    parameter,
    old_ptr,
    stats_ptr,
    KIND: tl.constexpr,
    MOMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return a row's weight and loss, what `cross_entropy` does besides, and what every column of
    the gradient loses before the slope. For GEM, logits are divided by beta."""
    UNTEMPERED: tl.constexpr = KIND == GEM and stats_ptr is not None
    sums, gap, plain = row_sums(
        logits_ptr,
        width,
        target,
        logit,
        vocab_size,
        logit_scale,
        softcap,
        parameter,
        MOMENT,
        KIND == SMOOTHED,
        UNTEMPERED,
        BLOCK,
        VECTOR,
        STAGES,
    )
    loss, top, total, at = cross_entropy(sums[0], sums[1], logit)
    each = 0.0
    if UNTEMPERED:
        write_stats(row, tl.num_programs(0), plain, logit * parameter, stats_ptr)
    if KIND == GEM:
        loss = mean_below_top(sums, logit, top, total) - (logit - top)
        weight *= parameter
    else:
        weight = gated_weight(
            weight,
            row,
            tl.num_programs(0),
            sums,
            logit,
            vocab_size,
            parameter,
            old_ptr,
            stats_ptr,
            KIND,
        )
    if KIND == SMOOTHED:
        share = parameter / vocab_size
        loss -= share * gap
        at += (parameter - share) * total
        each = scale_logits(weighted(weight, share), logit_scale)
    return weight, loss, top, total, at, each
