"""Groups of rows or of pairs: as many as the workspace has room for, laid out for the kernels.

Legend: R rows, K rows of one group, P pairs, Q = ceil(R / 2) pairs that hold every row, T targets
of a row (1 or 2), D hidden size, V vocabulary, B tiles of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..schedules import BLOCK_V
from ..terms import PairPlan, single_rows


class RowGroup(NamedTuple):
    """Rows of one or two hidden states each, one line of numbers for each target."""

    hidden_c: Tensor  # (K, D)
    hidden_u: Tensor | None  # (K, D); None where nothing is mixed
    targets: Tensor  # (T, K) int64 in [0, V)
    share: Tensor | None  # (2, K) float32; None for one target, which has all
    weight: Tensor  # (K,) float32


class PairGroup(NamedTuple):
    """Pairs of rows of hidden."""

    rows: Tensor  # (2, P) int64 rows of hidden, each once; R is none, of weight 0
    labels: Tensor  # (2, P) int64 in [0, V)
    weights: Tensor  # (3, P) float32: of c, of u, of their mixture
    share: Tensor  # (2, P) float32: lam and 1 - lam

    def part(self, pairs: slice) -> PairGroup:
        """Return the group of some of these pairs."""
        return PairGroup(*(numbers[:, pairs].contiguous() for numbers in self))


def row_group(
    hidden_c: Tensor,  # (R, D)
    hidden_u: Tensor | None,  # (R, D)
    targets: Tensor,  # (R, T)
    share: Tensor,  # (R, T)
    row_weight: Tensor,  # (R,)
    rows: slice,
) -> RowGroup:
    """Return the group of some rows."""
    return RowGroup(
        hidden_c[rows],
        None if hidden_u is None else hidden_u[rows],
        targets[rows].t().contiguous(),
        None if share.shape[1] == 1 else share[rows].t().contiguous(),
        row_weight[rows].contiguous(),
    )


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


def groups(count: int, block: int, bytes_each: int, max_bytes: int) -> Iterator[slice]:
    """Yield slices of whole blocks, each of as many rows as ``max_bytes`` allows."""
    step = max(block, max_bytes // max(1, bytes_each) // block * block)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def live_flags(count: int, block: int, weight: Tensor, filter_eps: float) -> Tensor:
    """Return room for a flag of each block of rows and tile, (blocks, B).

    Without a filter there are no blocks.
    """
    blocks = -(-count // block) if filter_eps else 0
    return weight.new_empty(blocks, -(-weight.shape[0] // BLOCK_V), dtype=torch.uint8)


def live_of(live: Tensor, rows: slice, block: int) -> Tensor | None:
    """Return the flags of a group's blocks, or None without a filter."""
    return live[rows.start // block : -(-rows.stop // block)] if live.shape[0] else None


def dense_rows(matrix: Tensor) -> Tensor:
    """Return the matrix, copied where the numbers of a row do not lie next to each other."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()
