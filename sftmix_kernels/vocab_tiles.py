"""The ``vocab_tiles`` schedule: logits never leave registers, and backward computes them again.

Forward costs one pass over the head, backward at most three, and nothing is kept but some numbers
for each row. `reference.py` has the derivation, `triton/vocab_tiles_*.py` the kernels. CUDA only.

Legend: R rows, K rows of one group, P pairs, T targets of a row (1 or 2), D hidden size,
V vocabulary, C columns of the tiles at hand, B tiles of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .row_chunks import Gradients, LogitTransform, gather_rows, mixed_rows
from .tile_gradients import BLOCK_P, BLOCK_R, BLOCK_V, TileGradients, groups


def live_flags(count: int, block: int, weight: Tensor, filter_eps: float) -> Tensor:
    """Room for a flag of each block of rows and tile, (blocks, B); no blocks without a filter."""
    blocks = -(-count // block) if filter_eps else 0
    return weight.new_empty(blocks, -(-weight.shape[0] // BLOCK_V), dtype=torch.uint8)


def live_of(live: Tensor, rows: slice, block: int) -> Tensor | None:
    """The flags of a group's blocks; None without a filter."""
    return live[rows.start // block : -(-rows.stop // block)] if live.shape[0] else None


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
    from .triton.vocab_tiles_forward import soft_forward

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
    from .triton.vocab_tiles_backward import soft_gradient_

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
    from .triton.vocab_tiles_forward import pair_forward

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
    from .triton.vocab_tiles_backward import pair_gradient_

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


def dense_rows(matrix: Tensor) -> Tensor:
    """The matrix, copied where the numbers of a row do not lie next to each other."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def by_target(targets: Tensor, rows: slice) -> Tensor:
    """Targets of some rows, (T, K)."""
    return targets[rows].t().contiguous()


def share_by_target(share: Tensor, rows: slice) -> Tensor | None:
    """Shares of some rows, (2, K); None for one target, which has all."""
    return None if share.shape[1] == 1 else share[rows].t().contiguous()
