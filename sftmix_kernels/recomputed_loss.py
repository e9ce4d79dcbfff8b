"""Losses of the ``vocab_tiles`` schedule: backward computes logits again.

Legend: R rows of hidden, P pairs, Q = ceil(R / 2) pairs that hold every row, T targets of a row,
D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference import weighted_loss
from .row_chunks import first_order_only, input_gradients, present, scaled
from .vocab_tiles import mixup_tiles, mixup_tiles_backward, sftmix_tiles, sftmix_tiles_backward


class TileOptions(NamedTuple):
    """What the ops need to know besides tensors."""

    logit_scale: float
    softcap: float | None
    filter_eps: float
    max_bytes: int


class TileRows(torch.autograd.Function):
    """The weighted losses of rows; the upstream gradient of each row is its weight in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_c: Tensor,
        hidden_u: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        share: Tensor,
        row_weight: Tensor,
        options: TileOptions,
    ) -> Tensor:
        loss, *state = mixup_tiles(
            present(hidden_c, hidden_u), weight, bias, targets, share, row_weight, *options
        )
        ctx.save_for_backward(hidden_c, hidden_u, weight, bias, targets, share, row_weight, *state)
        ctx.dtype, ctx.options = weight.dtype, options
        return loss  # type: ignore[no-any-return]

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_c, hidden_u, weight, bias, targets, share, row_weight, *state = ctx.saved_tensors
        hidden, unit = present(hidden_c, hidden_u), unit_of(upstream)
        needs_c, needs_u, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        gradients = mixup_tiles_backward(
            hidden,
            weight,
            bias,
            targets,
            share,
            weighted_loss(row_weight, upstream / unit),
            *state,
            ctx.options.logit_scale,
            ctx.options.softcap,
            ctx.options.max_bytes,
            [needs_c or needs_u, needs_weight, needs_bias],
        )
        return *input_gradients(ctx, gradients, share, unit), *(None,) * 4


def unit_of(upstream: Tensor) -> Tensor:
    """The largest finite upstream gradient: in its unit rows keep off half precision's lower end.

    A uniform upstream, such as that of a mean, is exactly 1 in it.
    """
    if upstream.numel() == 0:
        return upstream.new_ones(())
    unit = upstream.abs().masked_fill(~upstream.isfinite(), 0.0).amax()
    return unit.masked_fill(unit == 0, 1.0)


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
