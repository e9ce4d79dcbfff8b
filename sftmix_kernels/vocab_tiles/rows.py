"""The ops of rows: cross-entropy and Mixup in the ``vocab_tiles`` schedule.

Forward costs one pass over the head, backward at most three, and nothing is kept but some numbers
for each row. `reference.py` has the derivation. CUDA only.

Legend: R rows, K rows of one group, T targets of a row (1 or 2), D hidden size, V vocabulary,
B tiles of the vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..gradients import Gradients, first_order_only, input_gradients
from ..reference import weighted_loss
from ..row_chunks.chunks import mixed_rows
from ..schedules import BLOCK_R, BLOCK_V
from ..transform import LogitTransform
from .gradients import TileGradients
from .groups import dense_rows, groups, live_flags, live_of, row_group


@torch.library.custom_op("sftmix_kernels::mixup_tiles", mutates_args=())
def mixup_tiles(
    hidden_c: Tensor,  # (R, D)
    hidden_u: Tensor | None,  # (R, D); None for one hidden state and target
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
    """Return weighted row losses (R,), the rows' state (4, R) for backward, and live flags."""
    from .forward import soft_forward

    hidden_c, hidden_u, weight = *both_dense(hidden_c, hidden_u), dense_rows(weight)
    transform = LogitTransform(logit_scale, softcap, has_bias=bias is not None)
    num_rows = row_weight.numel()
    loss, state = torch.empty_like(row_weight), row_weight.new_empty(4, num_rows)
    live = live_flags(num_rows, BLOCK_R, weight, filter_eps)
    # A row leaves a maximum and a sum for every tile.
    for rows in groups(num_rows, BLOCK_R, 8 * live.shape[1], max_bytes // 2):
        loss[rows], state[:, rows] = soft_forward(
            row_group(hidden_c, hidden_u, targets, share, row_weight, rows),
            weight,
            bias,
            transform,
            live_of(live, rows, BLOCK_R),
            filter_eps,
        )
    return loss, state, live


@mixup_tiles.register_fake
def _(_c, _u, weight, _bias, _targets, _share, row_weight, _scale, _cap, filter_eps, *_):  # type: ignore[no-untyped-def]
    live = live_flags(row_weight.shape[0], BLOCK_R, weight, filter_eps)
    return torch.empty_like(row_weight), row_weight.new_empty(4, row_weight.shape[0]), live


@torch.library.custom_op("sftmix_kernels::mixup_tiles_backward", mutates_args=())
def mixup_tiles_backward(
    hidden_c: Tensor,  # (R, D)
    hidden_u: Tensor | None,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (R, T) int64
    share: Tensor,  # (R, T) float32
    row_weight: Tensor,  # (R,) float32: label weight times upstream gradient
    state: Tensor,  # (4, R) float32
    live: Tensor,  # (row blocks, B) uint8
    needs_gradient: list[bool],  # of hidden, weight, bias
    logit_scale: float,
    softcap: float | None,
    max_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``sum(row_weight * row losses)`` with respect to the mixed rows
    (R, D), weight (V, D) and bias (V,), the last two in float32; empty where not needed."""
    from .backward import soft_gradient_

    hidden_c, hidden_u, weight = *both_dense(hidden_c, hidden_u), dense_rows(weight)
    transform = LogitTransform(logit_scale, softcap, has_bias=bias is not None)
    num_rows = row_weight.numel()
    gradients = TileGradients(hidden_c, weight, needs_gradient, num_rows, max_bytes)
    for rows in gradients.groups(num_rows, BLOCK_R, 1, weight):
        index = torch.arange(rows.start, rows.stop, device=weight.device)
        mixed = mixed_rows(hidden_c, hidden_u, share, index, row_weight)
        group = row_group(hidden_c, hidden_u, targets, share, row_weight, rows)
        group_state, group_live = state[:, rows].contiguous(), live_of(live, rows, BLOCK_R)
        for gradient, first in gradients.tiles(mixed, weight):
            soft_gradient_(
                gradient, group, weight, bias, group_state, group_live, transform, first // BLOCK_V
            )
            gradients.add_tiles(gradient, first, mixed, weight, group_live, BLOCK_R, parts=1)
        gradients.end_group(index)
        del mixed  # before the next group's are made
    return gradients.hidden, gradients.weight, gradients.bias


@mixup_tiles_backward.register_fake
def _(hidden, _u, weight, _bias, _targets, _share, _weights, _state, _live, needs_gradient, *_):  # type: ignore[no-untyped-def]
    gradients = Gradients(hidden, weight, needs_gradient, 0)
    return gradients.hidden, gradients.weight, gradients.bias


def both_dense(hidden_c: Tensor, hidden_u: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return both hidden states contiguous: kernels read them with one stride."""
    return hidden_c.contiguous(), None if hidden_u is None else hidden_u.contiguous()


class TileOptions(NamedTuple):
    """What the ops need to know besides tensors."""

    logit_scale: float
    softcap: float | None
    filter_eps: float
    max_bytes: int

    @property
    def backward(self) -> tuple[float, float | None, int]:
        """The options of the backward ops, which find the filter's flags."""
        return self.logit_scale, self.softcap, self.max_bytes


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
        tensors = (hidden_c, hidden_u, weight, bias, targets, share, row_weight)
        loss, *state = mixup_tiles(*tensors, *options)
        ctx.save_for_backward(*tensors, *state)
        ctx.options = options
        return loss  # type: ignore[no-any-return]

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_c, hidden_u, weight, bias, targets, share, row_weight, *state = ctx.saved_tensors
        unit, needs = unit_of(upstream), ctx.needs_input_grad
        gradients = mixup_tiles_backward(
            hidden_c,
            hidden_u,
            weight,
            bias,
            targets,
            share,
            weighted_loss(row_weight, upstream / unit),
            *state,
            [needs[0] or needs[1], needs[2], needs[3]],
            *ctx.options.backward,
        )
        return input_gradients(gradients, share, unit, needs, weight.dtype)


def unit_of(upstream: Tensor) -> Tensor:
    """Return the largest finite upstream gradient, as the unit in which rows are computed.

    In it rows keep off half precision's lower end, and a uniform upstream, such as that of a mean,
    is exactly 1.
    """
    if upstream.numel() == 0:
        return upstream.new_ones(())
    unit = upstream.abs().masked_fill(~upstream.isfinite(), 0.0).amax()
    return unit.masked_fill(unit == 0, 1.0)
