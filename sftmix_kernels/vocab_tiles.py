"""The ``vocab_tiles`` schedule: logits never leave registers, and backward computes them again.

Forward costs one pass over the head, backward at most three, and nothing is kept but some numbers
for each row. `reference.py` has the derivation, `triton/vocab_tiles_*.py` the kernels. CUDA only.

Legend: R rows, K rows of one group, P pairs, T targets of a row (1 or 2), D hidden size,
V vocabulary, C columns of the tiles at hand, B tiles of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .row_chunks import Gradients, LogitTransform, add_product_, gather_rows, mixed_rows

# Rows, pairs and vocabulary entries of a tile; `triton/tiles.py` has the reason.
BLOCK_R, BLOCK_P, BLOCK_V = 128, 64, 128


def groups(count: int, block: int, bytes_each: int, max_bytes: int) -> Iterator[slice]:
    """Slices of whole blocks, as many rows each as ``max_bytes`` allows."""
    step = max(block, max_bytes // bytes_each // block * block)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def live_flags(count: int, block: int, weight: Tensor, filter_eps: float) -> Tensor:
    """Room for a flag of each block of rows and tile, (blocks, B); no blocks without a filter."""
    blocks = -(-count // block) if filter_eps else 0
    return weight.new_empty(blocks, -(-weight.shape[0] // BLOCK_V), dtype=torch.uint8)


def live_of(live: Tensor, rows: slice, block: int) -> Tensor | None:
    """The flags of a group's blocks; None without a filter."""
    return live[rows.start // block : -(-rows.stop // block)] if live.shape[0] else None


class TileGradients(Gradients):
    """Gradients filled by groups of rows and, in a group, by some tiles of the vocabulary at once.

    Half of the workspace holds a group's float32 ``dH`` and its hidden rows, half its logit
    gradient in those tiles.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        needs_gradient: list[bool],
        num_rows: int,
        max_bytes: int,
    ) -> None:
        super().__init__(hidden, weight, needs_gradient, num_rows)
        self.like, self.max_bytes = weight, max_bytes
        self.row_bytes = weight.shape[1] * (4 + weight.element_size())
        self.group = self.hidden

    def tiles(self, num_rows: int) -> Iterator[tuple[Tensor, int]]:
        """Room (K, C) for the gradient of some whole tiles, and the first of their columns."""
        vocab_size = self.like.shape[0]
        all_columns = -(-vocab_size // BLOCK_V) * BLOCK_V
        row_bytes = num_rows * self.like.element_size()
        step = max(BLOCK_V, self.max_bytes // 2 // row_bytes // BLOCK_V * BLOCK_V)
        workspace = self.like.new_empty(num_rows * min(step, all_columns))
        for first in range(0, vocab_size, step):
            width = min(step, all_columns - first)
            yield workspace[: num_rows * width].view(num_rows, width), first

    def add_tiles(
        self,
        gradient: Tensor,  # (K, C) of whole tiles
        first: int,  # column
        hidden: Tensor,  # (K, D)
        weight: Tensor,  # (V, D)
        live: Tensor | None,  # (blocks, B) uint8
        block: int,
        parts: int,
    ) -> None:
        """Add ``dH += G W``, ``dW += G^T H`` and ``db += sum G`` of these tiles.

        The group's rows come in ``parts`` of equal size, of which each has the blocks of ``live``.
        """
        columns = slice(first, min(first + gradient.shape[1], weight.shape[0]))
        gradient, head = gradient[:, : columns.stop - first], weight[columns]
        if first == 0 and self.needs_hidden:
            self.group = hidden.new_empty(hidden.shape, dtype=torch.float32)
        if live is not None:
            live = live[:, first // BLOCK_V : -(-columns.stop // BLOCK_V)]
        for part in range(parts if live is not None else 1):
            rows = slice(None) if live is None else part_of(gradient.shape[0], part, parts)
            if self.needs_hidden:
                add_blocks_(
                    self.group[rows], gradient[rows], head, live, (block, BLOCK_V), first == 0
                )
            if self.needs_weight:
                add_blocks_(
                    self.weight[columns],
                    gradient[rows].t(),
                    hidden[rows],
                    None if live is None else live.t(),
                    (BLOCK_V, block),
                    self.first and part == 0,
                )
        if self.needs_bias:
            self.bias[columns] += gradient.sum(0, dtype=torch.float32)

    def end_group(self, rows: Tensor) -> None:
        """Put the group's ``dH`` in its place, rounded once."""
        if self.needs_hidden:
            self.hidden.index_copy_(0, rows, self.group.to(self.hidden.dtype))
        self.first = False


def part_of(count: int, part: int, parts: int) -> slice:
    """One of ``parts`` equal parts of ``count`` rows."""
    return slice(part * count // parts, (part + 1) * count // parts)


def add_blocks_(
    total: Tensor,  # (M, N) float32
    left: Tensor,  # (M, K)
    right: Tensor,  # (K, N)
    live: Tensor | None,  # (blocks of M, blocks of K) uint8
    blocks: tuple[int, int],
    overwrite: bool,
) -> None:
    """``total += left @ right``, by the vendor GEMM or, with a filter, over live blocks alone."""
    if live is None:
        add_product_(total, left, right, overwrite=overwrite)
    else:
        from .triton.vocab_tiles_backward import add_live_product_

        add_live_product_(total, left, right, live, *blocks, overwrite=overwrite)


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

    transform = LogitTransform(logit_scale, softcap, has_bias=bias is not None)
    num_rows = row_weight.numel()
    loss, state = torch.empty_like(row_weight), row_weight.new_empty(4, num_rows)
    live = live_flags(num_rows, BLOCK_R, weight, filter_eps)
    # A row leaves a maximum and a sum for every tile.
    for rows in groups(num_rows, BLOCK_R, 8 * live.shape[1], max_bytes):
        loss[rows], state[:, rows] = soft_forward(
            [h[rows] for h in hidden],
            share_by_target(share, rows),
            by_target(targets, rows),
            row_weight[rows],
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

    transform = LogitTransform(logit_scale, softcap, has_bias=bias is not None)
    num_rows = row_weight.numel()
    gradients = TileGradients(hidden[0], weight, needs_gradient, num_rows, max_bytes)
    for rows in groups(num_rows, BLOCK_R, gradients.row_bytes, max_bytes // 2):
        index = torch.arange(rows.start, rows.stop, device=weight.device)
        mixed = mixed_rows(hidden, share, index, row_weight)
        here = [h[rows] for h in hidden]
        targets_here, share_here = by_target(targets, rows), share_by_target(share, rows)
        state_here, live_here = state[:, rows].contiguous(), live_of(live, rows, BLOCK_R)
        for gradient, first in gradients.tiles(index.numel()):
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

    transform = LogitTransform(logit_scale, softcap, has_bias=bias is not None)
    num_pairs = rows.shape[1]
    loss, state = torch.empty_like(weights), weights.new_empty(10, num_pairs)
    live = live_flags(num_pairs, BLOCK_P, weight, filter_eps)
    # A pair leaves three maxima and three sums for every tile.
    for pairs in groups(num_pairs, BLOCK_P, 24 * live.shape[1], max_bytes):
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

    transform = LogitTransform(logit_scale, softcap, has_bias=bias is not None)
    num_rows = hidden.shape[0]
    gradients = TileGradients(hidden, weight, needs_gradient, num_rows, max_bytes)
    # The partner that fills up an odd number of rows has a row of its own behind the others.
    gradients.hidden = gradients.hidden.new_zeros(
        (rows.numel(), hidden.shape[1]) if gradients.needs_hidden else 0
    )
    for pairs in groups(rows.shape[1], BLOCK_P, 2 * gradients.row_bytes, max_bytes // 2):
        index = rows[:, pairs].reshape(-1)
        gathered = gather_rows(
            hidden, index.clamp(max=num_rows - 1), weights[:2, pairs].reshape(-1)
        )
        rows_here, share_here, labels_here, weights_here, state_here = (
            tensor[:, pairs].contiguous() for tensor in (rows, share, labels, weights, state)
        )
        live_here = live_of(live, pairs, BLOCK_P)
        for gradient, first in gradients.tiles(index.numel()):
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
        gradients.end_group(index)
    return gradients.hidden[:num_rows], gradients.weight, gradients.bias


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


def by_target(targets: Tensor, rows: slice) -> Tensor:
    """Targets of some rows, (T, K)."""
    return targets[rows].t().contiguous()


def share_by_target(share: Tensor, rows: slice) -> Tensor | None:
    """Shares of some rows, (2, K); None for one target, which has all."""
    return None if share.shape[1] == 1 else share[rows].t().contiguous()
