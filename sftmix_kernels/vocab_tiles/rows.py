"""The ops of rows: cross-entropy and Mixup in the ``vocab_tiles`` schedule.

Forward costs one pass over the head, backward at most three, and nothing is kept but some numbers
for each row. `reference.py` has the derivation. CUDA only.

Legend: R rows, K rows of one group, T targets of a row (1 or 2), D hidden size, V vocabulary,
C columns of the tiles at hand, B tiles of the vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..gradients import Gradients, first_order_only, input_gradients, present
from ..reference import weighted_loss
from ..row_chunks.chunks import mixed_rows
from ..schedules import BLOCK_R, BLOCK_V
from ..transform import LogitTransform
from .gradients import TileGradients, dense_rows, groups, live_flags, live_of


@torch.library.custom_op("sftmix_kernels::mixup_tiles", mutates_args=())
def mixup_tiles(
    hidden: list[Tensor],  # T of (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (R, T) int64 in [0, V)
    share: Tensor,  # (R, T) float32
    row_weight: Tensor,  # (R,) float32
    logit_scale: float,
    softcap: float | None,
    filter_eps: float,
    max_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted row losses (R,), the rows' state (4, R) for backward, and live flags."""
    from .forward import soft_forward

    hidden, weight = [h.contiguous() for h in hidden], dense_rows(weight)
    transform = LogitTransform(logit_scale, softcap, has_bias=bias is not None)
    num_rows = row_weight.numel()
    loss, state = torch.empty_like(row_weight), row_weight.new_empty(4, num_rows)
    live = live_flags(num_rows, BLOCK_R, weight, filter_eps)
    # A row leaves a maximum and a sum for every tile.
    for rows in groups(num_rows, BLOCK_R, 8 * live.shape[1], max_bytes // 2):
        loss[rows], state[:, rows] = soft_forward(
            [h[rows] for h in hidden],
            share_by_target(share, rows),
            by_target(targets, rows),
            row_weight[rows].contiguous(),
            weight,
            bias,
            transform,
            live_of(live, rows, BLOCK_R),
            filter_eps,
        )
    return loss, state, live


@mixup_tiles.register_fake
def _(
    hidden: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    share: Tensor,
    row_weight: Tensor,
    logit_scale: float,
    softcap: float | None,
    filter_eps: float,
    max_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    live = live_flags(row_weight.shape[0], BLOCK_R, weight, filter_eps)
    return torch.empty_like(row_weight), row_weight.new_empty(4, row_weight.shape[0]), live


@torch.library.custom_op("sftmix_kernels::mixup_tiles_backward", mutates_args=())
def mixup_tiles_backward(
    hidden: list[Tensor],  # T of (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (R, T) int64
    share: Tensor,  # (R, T) float32
    row_weight: Tensor,  # (R,) float32: label weight times upstream gradient
    state: Tensor,  # (4, R) float32
    live: Tensor,  # (row blocks, B) uint8
    logit_scale: float,
    softcap: float | None,
    max_bytes: int,
    needs_gradient: list[bool],  # of hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``sum(row_weight * row losses)`` with respect to the mixed rows (R, D), weight
    (V, D) and bias (V,), the last two in float32; empty where not needed."""
    from .backward import soft_gradient_

    hidden, weight = [h.contiguous() for h in hidden], dense_rows(weight)
    transform = LogitTransform(logit_scale, softcap, has_bias=bias is not None)
    num_rows = row_weight.numel()
    gradients = TileGradients(hidden[0], weight, needs_gradient, num_rows, max_bytes)
    for rows in gradients.groups(num_rows, BLOCK_R, 1, weight):
        index = torch.arange(rows.start, rows.stop, device=weight.device)
        mixed = mixed_rows(hidden, share, index, row_weight)
        here = [h[rows] for h in hidden]
        targets_here, share_here = by_target(targets, rows), share_by_target(share, rows)
        state_here, live_here = state[:, rows].contiguous(), live_of(live, rows, BLOCK_R)
        for gradient, first in gradients.tiles(mixed, weight):
            soft_gradient_(
                gradient,
                here,
                share_here,
                targets_here,
                row_weight[rows],
                weight,
                bias,
                state_here,
                live_here,
                transform,
                first // BLOCK_V,
            )
            gradients.add_tiles(gradient, first, mixed, weight, live_here, BLOCK_R, parts=1)
        gradients.end_group(index)
        del mixed  # before the next group's are made
    return gradients.hidden, gradients.weight, gradients.bias


@mixup_tiles_backward.register_fake
def _(
    hidden: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    share: Tensor,
    row_weight: Tensor,
    state: Tensor,
    live: Tensor,
    logit_scale: float,
    softcap: float | None,
    max_bytes: int,
    needs_gradient: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = Gradients(hidden[0], weight, needs_gradient, 0)
    return gradients.hidden, gradients.weight, gradients.bias


def by_target(targets: Tensor, rows: slice) -> Tensor:
    """Targets of some rows, (T, K)."""
    return targets[rows].t().contiguous()


def share_by_target(share: Tensor, rows: slice) -> Tensor | None:
    """Shares of some rows, (2, K); None for one target, which has all."""
    return None if share.shape[1] == 1 else share[rows].t().contiguous()


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
