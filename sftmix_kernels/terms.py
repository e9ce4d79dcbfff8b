"""The terms of a loss: which rows count, which of them are mixed, and what their sum is divided by.

Legend: R rows of hidden, P pairs, S rows outside of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import both


class PairPlan(NamedTuple):
    """The rows of NTP + Mixup, and which of them are mixed. Each row is in one pair at most."""

    labels: Tensor  # (R,) int64 in [0, V)
    row_weight: Tensor  # (R,) float32: 1, 0 or NaN; a row of weight 0 is left out
    pair_c: Tensor  # (P,) int64
    pair_u: Tensor  # (P,) int64
    pair_weight: Tensor  # (P,) float32: 1, 0 or NaN; a pair of weight 0 is not mixed
    share: Tensor  # (P, 2) float32: lam and 1 - lam

    def without_pairs(self) -> PairPlan:
        """Return the plan of the same rows, none of which is mixed."""
        return PairPlan(self.labels, self.row_weight, *(of_pairs[:0] for of_pairs in self[2:]))


def ordered_pairs(
    labels: Tensor,  # (R,) int64 in [0, V)
    row_weight: Tensor,  # (R,)
    pair_c: Tensor,  # (P,)
    pair_u: Tensor,  # (P,)
    lam: Tensor,  # (P,)
) -> PairPlan:
    """Put the lower row of each pair first, and find the weights of pairs.

    The losses are symmetric in c and u, and so is every bit of the gradients when the order of rows
    does not depend on which is called c. A row that does not exist makes its pair NaN.
    """
    pairs, order = torch.stack((pair_c, pair_u), dim=-1).sort(dim=-1)
    share = torch.stack((lam, 1.0 - lam), dim=-1).gather(-1, order)
    num_rows = row_weight.numel()
    outside = ((pairs < 0) | (pairs >= num_rows)).any(-1)
    first, second = pairs.clamp(0, max(num_rows - 1, 0)).unbind(-1)
    weight = both(row_weight[first], row_weight[second]).masked_fill(outside, float("nan"))
    # What lam is does not matter where nothing is mixed; not even that it is NaN.
    share = share.masked_fill((weight == 0).unsqueeze(-1), 0.5)
    return PairPlan(labels, row_weight, first, second, weight, share)


def is_paired(row_weight: Tensor, pair_c: Tensor, pair_u: Tensor) -> Tensor:  # (R,) bool
    """Return which rows are in a pair."""
    paired = torch.zeros_like(row_weight, dtype=torch.bool)
    # Not `paired[rows] = True`, which copies True to the device and waits for it.
    return paired.index_fill_(0, pair_c, True).index_fill_(0, pair_u, True)


def single_rows(row_weight: Tensor, pair_c: Tensor, pair_u: Tensor) -> Tensor:  # (S,) int64
    """Return the rows that are in no pair, without waiting for the device.

    How many there are follows from the shapes, since each row is in one pair at most.
    """
    paired = is_paired(row_weight, pair_c, pair_u)
    return paired.byte().argsort(stable=True)[: paired.numel() - 2 * pair_c.numel()]


def filled(shape: Sequence[int], value: float, device: torch.device) -> Tensor:
    """Return a float32 tensor of one number.

    While compiling it is a product, in which a number that changes from call to call becomes an
    input of the graph; ``torch.full`` would be compiled anew for each of its values.
    """
    if torch.compiler.is_compiling():
        return torch.ones(shape, dtype=torch.float32, device=device) * value
    return torch.full(shape, value, dtype=torch.float32, device=device)


def loss_divisor(divisor: float | Tensor | None, row_weight: Tensor) -> Tensor:
    """Return ``divisor`` as a float32 scalar on the device, by default the rows that count.

    A divisor of 0 becomes 1.
    """
    if isinstance(divisor, Tensor):
        total = divisor.detach().to(row_weight.device, torch.float32).reshape(())
    elif divisor is not None:
        total = filled((), divisor, row_weight.device)
    else:
        total = (row_weight != 0).sum().float()
    return total.masked_fill(total == 0, 1.0)


def divided_sum(losses: Tensor, divisor: Tensor) -> Tensor:
    """Return ``sum(losses) / divisor``, added up in float64, as a float32 scalar."""
    total: Tensor = losses.sum(dtype=torch.float64) / divisor
    return total.float()
