"""The terms of a loss: which rows count, which of them are mixed, and what their sum is divided by.

Legend: R rows of hidden, P pairs, S rows outside of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import both, label_weight
from .schedules import runs_triton


class PairPlan(NamedTuple):
    """The rows of NTP + Mixup, and which of them are mixed. Each row is in one pair at most."""

    labels: Tensor  # (R,) int64 in [0, V)
    row_weight: Tensor  # (R,) float32: 1, 0 or NaN; a row of weight 0 is left out
    pair_c: Tensor  # (P,) int64
    pair_u: Tensor  # (P,) int64
    pair_weight: Tensor  # (P,) float32: 1, 0 or NaN; a pair of weight 0 is not mixed
    share: Tensor  # (P, 2) float32: lam and 1 - lam
    single: Tensor | None = None  # (S,) int64: rows outside of pairs, where they are known

    def without_pairs(self) -> PairPlan:
        """Return the plan of the same rows, none of which is mixed."""
        return PairPlan(self.labels, self.row_weight, *(of_pairs[:0] for of_pairs in self[2:6]))


def label_terms(
    first: Tensor,  # (...) int64
    second: Tensor | None,  # (...) int64; None for one target
    vocab_size: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:  # (..., T), (...)
    """Return targets in ``[0, V)``, and the weight of each row: 1, 0 or NaN.

    A label out of range becomes its nearest neighbour, and its row NaN.
    """
    if runs_triton(first):
        flat = None if second is None else second.reshape(-1)
        targets, weight = label_terms_op(first.reshape(-1), flat, vocab_size, ignore_index)
        return targets.view(*first.shape, targets.shape[1]), weight.view(first.shape)
    labels = [first] if second is None else [first, second]
    weights = [label_weight(some, vocab_size, ignore_index) for some in labels]
    targets = torch.stack(labels, dim=-1).clamp(0, vocab_size - 1)
    return targets, weights[0] if second is None else both(*weights)


@torch.library.custom_op("sftmix_kernels::label_terms", mutates_args=())
def label_terms_op(
    first: Tensor,  # (R,) int64
    second: Tensor | None,  # (R,) int64
    vocab_size: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:  # (R, T), (R,)
    """Do what `label_terms` does, by one kernel."""
    from . import plan_kernels

    return plan_kernels.label_terms(first, second, vocab_size, ignore_index)


@label_terms_op.register_fake
def _(first, second, _vocab_size, _ignore_index):  # type: ignore[no-untyped-def]
    targets = first.new_empty(first.shape[0], 1 if second is None else 2)
    return targets, first.new_empty(first.shape[0], dtype=torch.float32)


@torch.library.custom_op("sftmix_kernels::pair_terms", mutates_args=())
def pair_terms_op(
    row_weight: Tensor,  # (R,)
    pair_c: Tensor,  # (P,) int64
    pair_u: Tensor,  # (P,) int64
    lam: Tensor,  # (P,)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (R,), (R,) int64, (P,), (P, 2)
    """Return row weights, rows in the order of a `PairPlan`, pairs' weights and shares."""
    from . import plan_kernels

    return plan_kernels.pair_terms(row_weight, pair_c, pair_u, lam)


@pair_terms_op.register_fake
def _(row_weight, pair_c, _pair_u, _lam):  # type: ignore[no-untyped-def]
    num_rows, num_pairs = row_weight.shape[0], pair_c.shape[0]
    of_pairs = row_weight.new_empty(num_pairs), row_weight.new_empty(num_pairs, 2)
    return torch.empty_like(row_weight), pair_c.new_empty(num_rows), *of_pairs


def ordered_pairs(
    labels: Tensor,  # (R,) int64 in [0, V)
    row_weight: Tensor,  # (R,)
    pair_c: Tensor,  # (P,)
    pair_u: Tensor,  # (P,)
    lam: Tensor,  # (P,)
) -> PairPlan:
    """Put the lower row of each pair first, and find the weights of pairs.

    The losses are symmetric in c and u, and so is every bit of the gradients when the order of rows
    does not depend on which is called c. A row that does not exist makes its pair NaN; one that is
    in two pairs, or paired with itself, makes everything NaN, since it takes another row's place.
    """
    if runs_triton(row_weight):
        num_pairs = pair_c.shape[0]
        weights, order, weight, share = pair_terms_op(row_weight, pair_c, pair_u, lam)
        first, second, single = order.split([num_pairs, num_pairs, len(order) - 2 * num_pairs])
        return PairPlan(labels, weights, first, second, weight, share, single)
    pairs, order = torch.stack((pair_c, pair_u), dim=-1).sort(dim=-1)
    share = torch.stack((lam, 1.0 - lam), dim=-1).gather(-1, order)
    num_rows = row_weight.numel()
    outside = ((pairs < 0) | (pairs >= num_rows)).any(-1)
    first, second = pairs.clamp(0, max(num_rows - 1, 0)).unbind(-1)
    weight = both(row_weight[first], row_weight[second]).masked_fill(outside, float("nan"))
    # What lam is does not matter where nothing is mixed; not even that it is NaN.
    share = share.masked_fill((weight == 0).unsqueeze(-1), 0.5)
    if first.numel():
        twice = is_paired(row_weight, first, second).sum() != pairs.numel()
        row_weight = row_weight.masked_fill(twice, float("nan"))
        weight = weight.masked_fill(twice, float("nan"))
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
    count = row_weight.numel() - 2 * pair_c.numel()
    if count == 0:
        return pair_c[:0]
    return is_paired(row_weight, pair_c, pair_u).byte().argsort(stable=True)[:count]


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

    A divisor of 0 becomes 1, and one that is infinite NaN.
    """
    if isinstance(divisor, Tensor):
        total = divisor.detach().to(row_weight.device, torch.float32).reshape(())
    elif divisor is not None:
        total = filled((), divisor, row_weight.device)
    else:
        return (row_weight != 0).sum().clamp(min=1.0)
    return total.masked_fill(total == 0, 1.0).masked_fill(total.isinf(), torch.nan)


def divided_sum(losses: Tensor, divisor: Tensor | None) -> Tensor:
    """Return ``sum(losses) / divisor``, added up in float64, as a float32 scalar."""
    total = losses.sum(dtype=torch.float64)
    return (total if divisor is None else total / divisor).float()
