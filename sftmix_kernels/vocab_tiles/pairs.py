"""The ops of pairs: NTP + Mixup in the ``vocab_tiles`` schedule.

Legend: R rows of hidden, P pairs, Q = ceil(R / 2) pairs that hold every row, D hidden size,
V vocabulary, C columns of the tiles at hand, B tiles of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..gradients import Gradients, first_order_only, scaled
from ..row_chunks.chunks import gather_rows
from ..schedules import BLOCK_P, BLOCK_V
from ..transform import LogitTransform
from .gradients import TileGradients, dense_rows, groups, live_flags, live_of
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
    """Weighted losses (3, P) of c, u and their mixtures, the pairs' state (10, P) for backward,
    and live flags."""
    from .forward import pair_forward

    hidden, weight = dense_rows(hidden), dense_rows(weight)
    transform = LogitTransform(logit_scale, softcap, has_bias=bias is not None)
    num_pairs = rows.shape[1]
    loss, state = torch.empty_like(weights), weights.new_empty(10, num_pairs)
    live = live_flags(num_pairs, BLOCK_P, weight, filter_eps)
    # A pair leaves three maxima and three sums for every tile.
    for pairs in groups(num_pairs, BLOCK_P, 24 * live.shape[1], max_bytes // 2):
        loss[:, pairs], state[:, pairs] = pair_forward(
            hidden,
            rows[:, pairs].contiguous(),
            share[:, pairs].contiguous(),
            labels[:, pairs].contiguous(),
            weights[:, pairs].contiguous(),
            mix_ratio,
            weight,
            bias,
            transform,
            live_of(live, pairs, BLOCK_P),
            filter_eps,
        )
    return loss, state, live


@sftmix_tiles.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    labels: Tensor,
    weights: Tensor,
    share: Tensor,
    mix_ratio: Tensor,
    logit_scale: float,
    softcap: float | None,
    filter_eps: float,
    max_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
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
    logit_scale: float,
    softcap: float | None,
    max_bytes: int,
    needs_gradient: list[bool],  # of hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``sum(ntp) + mix_ratio * sum(mixup)`` with respect to hidden (R, D), weight
    (V, D) and bias (V,), the last two in float32; empty where not needed."""
    from .backward import pair_gradient_

    hidden, weight = dense_rows(hidden), dense_rows(weight)
    transform = LogitTransform(logit_scale, softcap, has_bias=bias is not None)
    num_rows = hidden.shape[0]
    gradients = TileGradients(hidden, weight, needs_gradient, num_rows, max_bytes)
    for pairs in gradients.groups(rows.shape[1], BLOCK_P, 2, weight):
        index = rows[:, pairs].reshape(-1)
        gathered = gather_rows(
            hidden, index.clamp(max=num_rows - 1), weights[:2, pairs].reshape(-1)
        )
        rows_here, share_here, labels_here, weights_here, state_here = (
            tensor[:, pairs].contiguous() for tensor in (rows, share, labels, weights, state)
        )
        live_here = live_of(live, pairs, BLOCK_P)
        for gradient, first in gradients.tiles(gathered, weight):
            pair_gradient_(
                gradient,
                hidden,
                rows_here,
                share_here,
                labels_here,
                weights_here,
                weight,
                bias,
                state_here,
                live_here,
                transform,
                first // BLOCK_V,
            )
            gradients.add_tiles(gradient, first, gathered, weight, live_here, BLOCK_P, parts=2)
        # The partner that fills up an odd number of rows is the last of all.
        partner = pairs.stop == rows.shape[1] and rows.numel() > num_rows
        gradients.end_group(index[: index.numel() - partner])
        del gathered  # before the next group's are made
    return gradients.hidden, gradients.weight, gradients.bias


@sftmix_tiles_backward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    labels: Tensor,
    weights: Tensor,
    share: Tensor,
    state: Tensor,
    live: Tensor,
    logit_scale: float,
    softcap: float | None,
    max_bytes: int,
    needs_gradient: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
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
        mix_ratio = mu * ntp_divisor / mixup_divisor
        losses, *state = sftmix_tiles(
            hidden, weight, bias, rows, labels, weights, share, mix_ratio, *options
        )
        ctx.save_for_backward(
            hidden, weight, bias, rows, labels, weights, share, ntp_divisor, *state
        )
        ctx.dtype, ctx.options = weight.dtype, options
        row_ntp = losses.new_zeros(rows.numel())
        row_ntp[rows.reshape(-1)] = losses[:2].reshape(-1)
        row_ntp = row_ntp[: hidden.shape[0]].clone()
        ntp = (row_ntp.sum(dtype=torch.float64) / ntp_divisor).float()
        mixup = (losses[2].sum(dtype=torch.float64) / mixup_divisor).float()
        ctx.mark_non_differentiable(ntp, mixup, row_ntp)
        return ntp + mu * mixup, ntp, mixup, row_ntp

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, divisor, state, live = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        gradients = sftmix_tiles_backward(
            *tensors,
            state,
            live,
            ctx.options.logit_scale,
            ctx.options.softcap,
            ctx.options.max_bytes,
            needs,
        )
        scale = upstream / divisor
        inputs = (
            scaled(gradient, scale, ctx.dtype) if needed else None
            for gradient, needed in zip(gradients, needs, strict=True)
        )
        return *inputs, *(None,) * 8


def every_row_paired(
    labels: Tensor,  # (R,)
    row_weight: Tensor,  # (R,)
    pair_c: Tensor,  # (P,)
    pair_u: Tensor,  # (P,)
    pair_weight: Tensor,  # (P,)
    share: Tensor,  # (P, 2)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows (2, Q), their labels (2, Q), the weights (3, Q) of both and of the pair, shares (2, Q).

    Rows outside of pairs are paired among themselves and not mixed; an odd one with row R, which
    does not exist and counts for nothing.
    """
    num_rows, num_pairs = labels.numel(), pair_c.numel()
    paired = torch.zeros_like(row_weight, dtype=torch.bool)
    # How many are single is known from the shapes, and index_fill_ copies nothing to the device:
    # the host need not wait.
    paired.index_fill_(0, pair_c, True).index_fill_(0, pair_u, True)
    single = paired.byte().argsort(stable=True)[: num_rows - 2 * num_pairs]
    if num_rows % 2:
        single = torch.cat((single, single.new_full((1,), num_rows)))
    rows = torch.cat((torch.stack((pair_c, pair_u)), single.view(2, -1)), dim=1)
    more = rows.shape[1] - num_pairs
    mix_weight = torch.cat((pair_weight, pair_weight.new_zeros(more)))
    shares = torch.cat((share.t(), share.new_full((2, more), 0.5)), dim=1)
    existing = rows.clamp(max=num_rows - 1)
    weights = row_weight[existing].masked_fill(rows == num_rows, 0.0)
    return rows, labels[existing], torch.cat((weights, mix_weight[None])), shares


def tile_losses(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,
    labels: Tensor,  # (R,) int64 in [0, V)
    row_weight: Tensor,  # (R,)
    pair_c: Tensor,  # (P,)
    pair_u: Tensor,  # (P,)
    pair_weight: Tensor,  # (P,)
    share: Tensor,  # (P, 2)
    mu: float,
    ntp_divisor: Tensor,
    mixup_divisor: Tensor,
    options: TileOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, NTP, Mixup, and the row losses of NTP; without pairs, bitwise those of NTP alone."""
    if pair_c.numel() == 0:
        one = torch.ones_like(row_weight).unsqueeze(-1)
        row_ntp = TileRows.apply(  # type: ignore[no-untyped-call]
            hidden, None, weight, bias, labels.unsqueeze(-1), one, row_weight, options
        )
        loss = (row_ntp.sum(dtype=torch.float64) / ntp_divisor).float()
        return loss, loss.detach(), torch.zeros_like(loss), row_ntp.detach()
    plan = every_row_paired(labels, row_weight, pair_c, pair_u, pair_weight, share)
    return TilePairs.apply(  # type: ignore[no-any-return, no-untyped-call]
        hidden, weight, bias, *plan, mu, ntp_divisor, mixup_divisor, options
    )
