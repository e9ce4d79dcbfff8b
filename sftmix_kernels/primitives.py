"""The maths that the kernels of both schedules share; `reference.py` has the derivation.

All of it but the LSEs is elementwise, so that it serves scalars, rows and tiles alike.
Half-precision values become float32 as soon as they are loaded, and stay so until a gradient is
stored. Kernels that make losses are compiled without fused multiply-adds, since two kernels might
use them in different places, and a row's bits must not depend on which kernel it is in. Where a
fused multiply-add is worth it, the code says `tl.fma`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra import libdevice

LOG2E = tl.constexpr(1.4426950216293335)  # log2(e) in float32
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Where a running maximum starts. Finite: a lane that has seen nothing but -inf holds (LOWEST, 0)
# and adds 0 to its row, where (-inf, 0) would add NaN. A power of two, so that `unit` of it is 1.
LOWEST = tl.constexpr(-(2.0**127))


@triton.jit
def load_float32(pointers, mask=None, other=None):
    """Load any float dtype, as float32."""
    return tl.load(pointers, mask=mask, other=other).to(tl.float32)


@triton.jit
def exp2(x):
    """Return ``2^x``, and 0 where that is below 1e-38.

    ``tl.exp2`` rescales around such numbers, with three instructions more for each (SASS, sm_90).
    """
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return libdevice.exp2(x)


@triton.jit
def exp(x):
    """Return ``e^x``, and 0 where that is below 1e-38."""
    if INTERPRETED:
        return tl.exp(x)
    else:
        return exp2(x * LOG2E)


@triton.jit
def exp_above(x, top, FUSED: tl.constexpr):
    """Return ``e^(x - top)``, or with FUSED ``unit(top) e^(x - top)``.

    One instruction less for each x: ``x log2(e) - base`` is rounded once, and that ``base`` is
    itself ``top log2(e)`` rounded is the same factor for all x of one top. `without_unit` has it.
    It is near 1; a top beyond 1e9 would make it infinite.
    """
    if not FUSED:
        return exp(x - top)
    elif INTERPRETED:  # whose fma rounds twice
        return tl.exp2((x.to(tl.float64) * LOG2E - top * LOG2E).to(tl.float32))
    else:
        return exp2(tl.fma(x, LOG2E, -(top * LOG2E)))


@triton.jit
def without_unit(top, FUSED: tl.constexpr):
    """Return ``1 / unit(top)``, by which a sum of `exp_above` is one of ``e^(x - top)``."""
    return exp_above(-top, -top, FUSED) if FUSED else 1.0


@triton.jit
def rescale(old, top, FUSED: tl.constexpr):
    """Return what makes a sum of `exp_above` an old top one above another."""
    return exp2(old * LOG2E - top * LOG2E) if FUSED else exp(old - top)


@triton.jit
def add_dot(left, right, total):
    """Return ``total + left @ right`` in float32, without TF32.

    The interpreter multiplies the bit patterns of bfloat16, so that there both are upcast first.
    """
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def log1p(x):
    """Return ``log(1 + x)``: ``x / (u - 1)`` undoes what rounding ``u = 1 + x`` does to the log."""
    u = 1.0 + x
    rounded = tl.where(u == 1.0, 1.0, u - 1.0)
    return tl.where(u == 1.0, x, tl.log(u) * (x / rounded))


@triton.jit
def tanh_and_slope(x):
    """Return ``tanh(x)`` and its derivative, to float32's own relative precision.

    Up to 0.6 an odd polynomial (fitted to a relative error of 3e-9), since ``1 - e`` cancels there;
    the derivative is ``4 e / (1 + e)^2``, since ``1 - tanh^2`` cancels where tanh comes near 1.
    `tanh_of` in ``csrc/online_softmax.h`` has the same polynomial: change both.
    """
    e = exp(-2.0 * tl.abs(x))
    large = 1.0 - 2.0 * e / (1.0 + e)
    y = x * x
    polynomial = 0.02079596 - 0.00589515 * y
    polynomial = 0.13331924 + y * (-0.05378383 + y * polynomial)
    small = x + x * (y * (-0.33333298 + y * polynomial))
    tanh = tl.where(tl.abs(x) < 0.6, small, tl.where(x < 0.0, -large, large))
    return tanh, 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def scale_logits(raw, logit_scale):
    """Return ``logit_scale * raw``; None stands for 1, and spares a product for each logit."""
    if logit_scale is None:
        return raw
    else:
        return raw * logit_scale


@triton.jit
def transform_logits(raw, logit_scale, softcap):
    """Return ``f(raw) = softcap * tanh(logit_scale * raw / softcap)``, or ``logit_scale * raw``."""
    if softcap is None:
        return scale_logits(raw, logit_scale)
    else:
        return softcap * tanh_and_slope(raw * scale_logits(1.0 / softcap, logit_scale))[0]


@triton.jit
def transform_slope(raw, logit_scale, softcap):
    """Return ``f'(raw) / logit_scale``."""
    if softcap is None:
        return 1.0
    else:
        return tanh_and_slope(raw * scale_logits(1.0 / softcap, logit_scale))[1]


@triton.jit
def mixed_hidden(hidden_1, hidden_2, share_1, share_2):
    """Return ``lam z_c + (1 - lam) z_u`` of hidden states."""
    return tl.fma(share_1, hidden_1, share_2 * hidden_2)


@triton.jit
def mixed_logits(raw_c, raw_u, share_c, share_u, HAS_BIAS: tl.constexpr):
    """Return ``lam a_c + (1 - lam) a_u`` of raw logits."""
    mixed = tl.fma(share_c, raw_c, share_u * raw_u)
    if HAS_BIAS:
        # A bias of -inf masks an entry, and 0 * -inf is NaN: where one share is 0, the mixture is
        # the other row.
        mixed = tl.where(share_u == 0.0, raw_c, tl.where(share_c == 0.0, raw_u, mixed))
    return mixed


@triton.jit
def online_lse_update(peak, total, x, FUSED: tl.constexpr = False):
    """Take the columns of ``x`` into each row's ``(peak, total)``, which stands for
    ``peak + log(total)``; with FUSED, ``total`` has the factor ``unit(peak)`` of `exp_above`."""
    top = tl.maximum(peak, tl.max(x, 1))
    new = tl.sum(exp_above(x, top[:, None], FUSED), 1)
    return top, tl.fma(total, rescale(peak, top, FUSED), new)


@triton.jit
def merge_lse(peak, total, axis: tl.constexpr):
    """Merge many ``(peak, total)`` along an axis into one."""
    top = tl.max(peak, axis)
    return top, tl.sum(total * exp(peak - tl.expand_dims(top, axis)), axis)


@triton.jit
def add_lse(peak_1, total_1, peak_2, total_2):
    """Merge two ``(peak, total)`` into one."""
    top = tl.maximum(peak_1, peak_2)
    return top, total_1 * exp(peak_1 - top) + total_2 * exp(peak_2 - top)


@triton.jit
def held_targets(target_1, target_2, share_1, share_2):
    """Return the columns that are kept out of a row's sum: targets with a share, -1 for none.

    What is left is the sum of all *other* exponentials, from which ``p - 1`` and ``log p`` of
    a confident token follow without cancelling. A target without a share (lam is 0 or 1) stays in
    the sum like any other column, which makes the row bitwise the plain cross-entropy.
    """
    held_1 = tl.where(share_1 != 0.0, target_1, -1)
    held_2 = tl.where(share_2 != 0.0, target_2, -1)
    return held_1, held_2


@triton.jit
def soft_cross_entropy(peak, total, logit_1, logit_2, share_1, share_2, same):
    """Return a row's loss from the LSE of the columns that `held_targets` left in.

    ``logit_1, logit_2`` are the targets' logits and ``same`` says that both are one column.
    Returned are the loss ``-sum_t share_t log p_t``, the row's maximum, its sum of exponentials,
    and ``d loss / d logit`` at both targets times that sum.
    """
    held_1 = share_1 != 0.0
    held_2 = (share_2 != 0.0) & ((same & held_1) == 0)
    top = tl.maximum(peak, tl.where(held_1, logit_1, peak))
    top = tl.maximum(top, tl.where(held_2, logit_2, peak))
    rest = total * exp(peak - top)
    exp_1, exp_2 = exp(logit_1 - top), exp(logit_2 - top)
    held_exp_1, held_exp_2 = tl.where(held_1, exp_1, 0.0), tl.where(held_2, exp_2, 0.0)
    held_sum = held_exp_1 + held_exp_2
    log_sum = log1p(rest + (held_sum - 1.0))
    loss = share_1 * (log_sum - (logit_1 - top)) + share_2 * (log_sum - (logit_2 - top))
    # One column carries the shares of both targets where they are the same.
    column_1 = tl.where(same, share_1 + share_2, share_1)
    column_2 = tl.where(same, share_1 + share_2, share_2)
    others_1 = rest + tl.where(same, 0.0, held_exp_2)
    others_2 = rest + tl.where(same, 0.0, held_exp_1)
    at_1 = exp_1 * (1.0 - column_1) - column_1 * others_1
    at_2 = exp_2 * (1.0 - column_2) - column_2 * others_2
    return loss, top, rest + held_sum, at_1, at_2


@triton.jit
def cross_entropy(peak, total, logit):
    """Return what `soft_cross_entropy` does, for one target: loss, maximum, sum, gradient."""
    top = tl.maximum(peak, logit)
    rest = total * exp(peak - top)
    held = exp(logit - top)
    loss = log1p(rest + (held - 1.0)) - (logit - top)
    return loss, top, rest + held, -rest


@triton.jit
def weighted(weight, value):
    """Return ``weight * value``, exactly 0 where the weight is 0 whatever the value."""
    return tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def row_factor(weight, logit_scale, total):
    """Return ``weight * logit_scale / sum of exponentials``, by which ``exp`` becomes gradient."""
    return tl.where(weight == 0.0, 0.0, scale_logits(weight, logit_scale) / total)


@triton.jit
def exp_slope(raw, top, logit_scale, softcap, FUSED: tl.constexpr):
    """Return `exp_above` of ``f(raw)``, times ``f'(raw) / logit_scale``."""
    logit = transform_logits(raw, logit_scale, softcap)
    return exp_above(logit, top, FUSED) * transform_slope(raw, logit_scale, softcap)


@triton.jit
def row_gradient(raw, top, factor, logit_scale, softcap):
    """Return ``d loss / d raw`` of a column that is no target: ``factor exp(f(raw) - top) f'``."""
    logit = transform_logits(raw, logit_scale, softcap)
    slope = transform_slope(raw, logit_scale, softcap)
    return tl.where(factor == 0.0, 0.0, factor * exp(logit - top) * slope)


@triton.jit
def target_gradient(raw, at, factor, logit_scale, softcap):
    """Return ``d loss / d raw`` of a target's column, from `soft_cross_entropy`'s gradient."""
    slope = transform_slope(raw, logit_scale, softcap)
    return tl.where(factor == 0.0, 0.0, factor * (at * slope))


class PairState(NamedTuple):
    """All that a pair's gradients need besides its logits: of c, of u, of their mixture."""

    loss: Any
    top: Any  # the largest logit
    total: Any  # sum of exponentials
    factor: Any  # `row_factor`
    at_targets: Any  # d loss / d raw of c at both targets, of u at both


@triton.jit
def pair_state(
    peak,  # of c, of u, of their mixture, the targets left out
    total,  # likewise
    raw_cc,  # raw logits: of row c at c's target
    raw_cu,  # of row c at u's target
    raw_uc,
    raw_uu,
    weights,  # of c, of u, of their mixture
    share_c,
    share_u,
    same,  # whether both targets are one column
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
):
    """Return the `PairState` of a pair from its LSEs and its raw logits at both targets."""
    peak_c, peak_u, peak_m = peak
    total_c, total_u, total_m = total
    weight_c, weight_u, weight_m = weights
    raw_mc = mixed_logits(raw_cc, raw_uc, share_c, share_u, HAS_BIAS)
    raw_mu = mixed_logits(raw_cu, raw_uu, share_c, share_u, HAS_BIAS)
    logit_cc = transform_logits(raw_cc, logit_scale, softcap)
    logit_uu = transform_logits(raw_uu, logit_scale, softcap)
    logit_mc = transform_logits(raw_mc, logit_scale, softcap)
    logit_mu = transform_logits(raw_mu, logit_scale, softcap)
    loss_c, top_c, total_c, at_c = cross_entropy(peak_c, total_c, logit_cc)
    loss_u, top_u, total_u, at_u = cross_entropy(peak_u, total_u, logit_uu)
    loss_m, top_m, total_m, at_mc, at_mu = soft_cross_entropy(
        peak_m, total_m, logit_mc, logit_mu, share_c, share_u, same
    )
    factor_c = row_factor(weight_c, logit_scale, total_c)
    factor_u = row_factor(weight_u, logit_scale, total_u)
    factor_m = row_factor(weight_m, logit_scale, total_m)
    of_mc = target_gradient(raw_mc, at_mc, factor_m, logit_scale, softcap)
    of_mu = target_gradient(raw_mu, at_mu, factor_m, logit_scale, softcap)
    of_cc = target_gradient(raw_cc, at_c, factor_c, logit_scale, softcap) + share_c * of_mc
    of_uu = target_gradient(raw_uu, at_u, factor_u, logit_scale, softcap) + share_u * of_mu
    of_cu = row_gradient(raw_cu, top_c, factor_c, logit_scale, softcap) + share_c * of_mu
    of_uc = row_gradient(raw_uc, top_u, factor_u, logit_scale, softcap) + share_u * of_mc
    of_cu, of_uc = tl.where(same, of_cc, of_cu), tl.where(same, of_uu, of_uc)
    return PairState(
        loss=(loss_c, loss_u, loss_m),
        top=(top_c, top_u, top_m),
        total=(total_c, total_u, total_m),
        factor=(factor_c, factor_u, factor_m),
        at_targets=(of_cc, of_cu, of_uc, of_uu),
    )
