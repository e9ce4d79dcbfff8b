"""``dH`` and ``dW`` in the ``vocab_tiles`` schedule, from the logit gradient of some tiles.

Legend: K rows of one group, D hidden size, V vocabulary, C columns of the tiles at hand, B tiles of
the vocabulary, M x K times K x N a matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..gradients import Gradients, add_product_
from ..schedules import BLOCK_V
from .groups import groups


class TileGradients(Gradients):
    """Gradients filled by groups of rows and, in a group, by some tiles of the vocabulary at once.

    Three quarters of the workspace hold a group's hidden rows and its ``dH``, in float32 and
    rounded; one quarter holds its logit gradient in some tiles. Long groups are worth more than
    many tiles, since every group reads and writes all of ``dW``.
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
        self.max_bytes = max_bytes
        self.group = self.tile_columns = weight.new_empty(0)

    def groups(self, count: int, block: int, rows_each: int, weight: Tensor) -> Iterator[slice]:
        """Yield groups of ``count`` rows, or of pairs of rows."""
        row_bytes = weight.shape[1] * (4 + 2 * weight.element_size())
        return groups(count, block, rows_each * row_bytes, self.max_bytes * 3 // 4)

    def tiles(self, hidden: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Yield room (K, C) for the gradient of some whole tiles, and their first column."""
        num_rows, vocab_size = hidden.shape[0], weight.shape[0]
        if self.needs_hidden and self.group.shape[0] < num_rows:
            self.group = hidden.new_empty(hidden.shape, dtype=torch.float32)
        all_columns = -(-vocab_size // BLOCK_V) * BLOCK_V
        fitting = self.max_bytes // 4 // (num_rows * weight.element_size())
        step = min(max(BLOCK_V, fitting // BLOCK_V * BLOCK_V), all_columns)
        if self.tile_columns.numel() < num_rows * step:
            self.tile_columns = weight.new_empty(num_rows * step)
        for first in range(0, vocab_size, step):
            width = min(step, all_columns - first)
            yield self.tile_columns[: num_rows * width].view(num_rows, width), first

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
        if live is not None:
            live = live[:, first // BLOCK_V : -(-columns.stop // BLOCK_V)]
        for part in range(parts if live is not None else 1):
            rows = part_of(gradient.shape[0], part, parts if live is not None else 1)
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
            self.hidden.index_copy_(0, rows, self.group[: rows.numel()].to(self.hidden.dtype))
        self.first = False


def part_of(count: int, part: int, parts: int) -> slice:
    """Return one of ``parts`` equal parts of ``count`` rows."""
    return slice(part * count // parts, (part + 1) * count // parts)


def add_blocks_(
    total: Tensor,  # (M, N) float32
    left: Tensor,  # (M, K)
    right: Tensor,  # (K, N)
    live: Tensor | None,  # (blocks of M, blocks of K) uint8
    blocks: tuple[int, int],
    overwrite: bool,
) -> None:
    """Add ``left @ right`` to ``total``: all of it by the vendor GEMM, or only live blocks."""
    if live is None:
        add_product_(total, left, right, overwrite=overwrite)
    else:
        from .backward import add_live_product_

        add_live_product_(total, left, right, live, *blocks, overwrite=overwrite)
