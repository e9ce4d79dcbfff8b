"""The ops of pairs: NTP + Mixup in the ``vocab_tiles`` schedule.

Legend: R rows of hidden, P pairs, Q = ceil(R / 2) pairs that hold every row, D hidden size,
V vocabulary, B tiles of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..gradients import Gradients, first_order_only, handed_out
from ..row_chunks.chunks import gather_rows
from ..schedules import BLOCK_P, BLOCK_V
from ..terms import PairPlan, divided_sum, single_rows
from ..transform import LogitTransform
from .gradients import TileGradients
from .groups import PairGroup, dense_rows, groups, live_flags, live_of
from .rows import TileOptions, TileRows


@torch.library.custom_op("sftmix_kernels::sftmix_tiles", mutates_args=())
def sftmix_tiles(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    rows: Tensor,  # (2, P) int64 rows of hidden, each once; R is none, of weight 0
    labels: Tensor,  # (2, P) int64 in [0, V)
    weights: Tensor,  # (3, P) float32: of c, of u, of their mixture
    share: Tensor,  # (2, P) float32: lam and 1 - lam
    mix_ratio: Tensor,  # () float32
    logit_scale: float,
    softcap: float | None,
    filter_eps: float,
    max_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weighted losses (3, P) of c, u and their mixtures, the pairs' state (10, P) for
    backward, and live flags."""
    from .forward import pair_forward

    hidden, weight = dense_rows(hidden), dense_rows(weight)
    transform = LogitTransform(logit_scale, softcap, has_bias=bias is not None)
    whole, num_pairs = PairGroup(rows, labels, weights, share), rows.shape[1]
    loss, state = torch.empty_like(weights), weights.new_empty(10, num_pairs)
    live = live_flags(num_pairs, BLOCK_P, weight, filter_eps)
    # A pair leaves three maxima and three sums for every tile.
    for pairs in groups(num_pairs, BLOCK_P, 24 * live.shape[1], max_bytes // 2):
        loss[:, pairs], state[:, pairs] = pair_forward(
            hidden,
            whole.part(pairs),
            mix_ratio,
            weight,
            bias,
            transform,
            live_of(live, pairs, BLOCK_P),
            filter_eps,
        )
    return loss, state, live


@sftmix_tiles.register_fake
def _(_h, weight, _bias, rows, _labels, weights, _share, _ratio, _scale, _cap, filter_eps, *_):  # type: ignore[no-untyped-def]
    live = live_flags(rows.shape[1], BLOCK_P, weight, filter_eps)
    return torch.empty_like(weights), weights.new_empty(10, rows.shape[1]), live


@torch.library.custom_op("sftmix_kernels::sftmix_tiles_backward", mutates_args=())
def sftmix_tiles_backward(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    rows: Tensor,  # (2, P) int64
    labels: Tensor,  # (2, P) int64
    weights: Tensor,  # (3, P) float32
    share: Tensor,  # (2, P) float32
    state: Tensor,  # (10, P) float32
    live: Tensor,  # (pair blocks, B) uint8
    needs_gradient: list[bool],  # of hidden, weight, bias
    logit_scale: float,
    softcap: float | None,
    max_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``sum(ntp) + mix_ratio * sum(mixup)`` with respect to hidden (R, D),
    weight (V, D) and bias (V,), the last two in float32; empty where not needed."""
    from .backward import pair_gradient_

    hidden, weight = dense_rows(hidden), dense_rows(weight)
    transform = LogitTransform(logit_scale, softcap, has_bias=bias is not None)
    whole, num_rows = PairGroup(rows, labels, weights, share), hidden.shape[0]
    gradients = TileGradients(hidden, weight, needs_gradient, num_rows, max_bytes)
    for pairs in gradients.groups(rows.shape[1], BLOCK_P, 2, weight):
        index = rows[:, pairs].reshape(-1)
        gathered = gather_rows(
            hidden, index.clamp(max=num_rows - 1), weights[:2, pairs].reshape(-1)
        )
        group = whole.part(pairs)
        group_state, group_live = state[:, pairs].contiguous(), live_of(live, pairs, BLOCK_P)
        for gradient, first in gradients.tiles(gathered, weight):
            tile = first // BLOCK_V
            pair_gradient_(
                gradient, hidden, group, weight, bias, group_state, group_live, transform, tile
            )
            gradients.add_tiles(gradient, first, gathered, weight, group_live, BLOCK_P, parts=2)
        # The partner that fills up an odd number of rows is the last of all.
        partner = pairs.stop == rows.shape[1] and rows.numel() > num_rows
        gradients.end_group(index[: index.numel() - partner])
        del gathered  # before the next group's are made
    return gradients.hidden, gradients.weight, gradients.bias


@sftmix_tiles_backward.register_fake
def _(hidden, weight, _bias, _rows, _labels, _weights, _share, _state, _live, needs_gradient, *_):  # type: ignore[no-untyped-def]
    gradients = Gradients(hidden, weight, needs_gradient, 0)
    return gradients.hidden, gradients.weight, gradients.bias


class TilePairs(torch.autograd.Function):
    """NTP + Mixup, its two terms, and the row losses of NTP; only the loss is differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor,
        labels: Tensor,
        weights: Tensor,
        share: Tensor,
        mu: float,
        ntp_divisor: Tensor,
        mixup_divisor: Tensor,
        options: TileOptions,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tensors = (hidden, weight, bias, rows, labels, weights, share)
        losses, *state = sftmix_tiles(*tensors, mu * ntp_divisor / mixup_divisor, *options)
        ctx.save_for_backward(ntp_divisor, *tensors, *state)
        ctx.options = options
        row_ntp = losses.new_zeros(rows.numel())
        row_ntp[rows.reshape(-1)] = losses[:2].reshape(-1)
        row_ntp = row_ntp[: hidden.shape[0]].clone()
        ntp, mixup = divided_sum(row_ntp, ntp_divisor), divided_sum(losses[2], mixup_divisor)
        ctx.mark_non_differentiable(ntp, mixup, row_ntp)
        return ntp + mu * mixup, ntp, mixup, row_ntp

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        divisor, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad
        gradients = sftmix_tiles_backward(*tensors, list(needs[:3]), *ctx.options.backward)
        dtype = tensors[1].dtype
        return handed_out(gradients, [upstream / divisor] * 3, needs, dtype)


def every_row_paired(plan: PairPlan) -> PairGroup:  # of Q pairs
    """Pair up the rows outside of pairs among themselves, not to be mixed.

    An odd one is paired with row R, which does not exist and counts for nothing.
    """
    num_rows, num_pairs = plan.labels.numel(), plan.pair_c.numel()
    single = single_rows(plan.row_weight, plan.pair_c, plan.pair_u)
    if num_rows % 2:
        single = torch.cat((single, single.new_full((1,), num_rows)))
    rows = torch.cat((torch.stack((plan.pair_c, plan.pair_u)), single.view(2, -1)), dim=1)
    more = rows.shape[1] - num_pairs
    mix_weight = torch.cat((plan.pair_weight, plan.pair_weight.new_zeros(more)))
    share = torch.cat((plan.share.t(), plan.share.new_full((2, more), 0.5)), dim=1)
    existing = rows.clamp(max=num_rows - 1)
    weights = plan.row_weight[existing].masked_fill(rows == num_rows, 0.0)
    return PairGroup(rows, plan.labels[existing], torch.cat((weights, mix_weight[None])), share)


def tile_losses(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,
    plan: PairPlan,
    mu: float,
    ntp_divisor: Tensor,
    mixup_divisor: Tensor,
    options: TileOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, NTP, Mixup, and the row losses of NTP.

    Without pairs they are bitwise those of the plain cross-entropy.
    """
    if plan.pair_c.numel() == 0:
        one = torch.ones_like(plan.row_weight).unsqueeze(-1)
        row_ntp = TileRows.apply(  # type: ignore[no-untyped-call]
            hidden, None, weight, bias, plan.labels.unsqueeze(-1), one, plan.row_weight, options
        )
        loss = divided_sum(row_ntp, ntp_divisor)
        return loss, loss.detach(), torch.zeros_like(loss), row_ntp.detach()
    return TilePairs.apply(  # type: ignore[no-any-return, no-untyped-call]
        hidden, weight, bias, *every_row_paired(plan), mu, ntp_divisor, mixup_divisor, options
    )
