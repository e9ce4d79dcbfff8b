r"""The losses of a chunk of rows where the vocabulary is shared out over ranks.

All ranks have the same hidden states and labels and get the same loss; each has rows of the head.

Legend: S rows of logits, K rows of one chunk, B rows of one cache block, T targets of a row,
P pairs of a chunk, D hidden size, V vocabulary of the group, W tokens of this rank.

Rank r knows the logits ``z_j`` of its own tokens j. With ``M_r`` the largest of them and
``M = max_r M_r``, the sums that a row needs are

    rest = sum_r exp(M_r - M) sum_(j of r, not held) exp(z_j - M_r)
    z_t  = sum_r (z_t where t is of r, else 0)                       for each target t
    LSE  = M + log(rest + sum_(t held) exp(z_t - M))

``held`` are the targets that have a share. They are left out of the sum, as in one process, so
that ``p - 1`` and ``log p`` of a confident token do not cancel. One MAX gives M, one SUM gives
``rest`` and ``z_t``, and both serve the three losses of a chunk together. From these numbers each
rank finds the whole loss and, in place, its own columns of the logit gradient ``G``
(`reference.py`), so that

    dW_r = G_r^T H,   db_r = sum G_r      are its own,      dH = sum_r G_r W_r

where dH is added up once for each op call, in float32. That makes two collectives for each chunk
and one more where hidden needs a gradient, all in the forward pass (in forward and in backward with
``reduction="none"``). Nothing waits for the device, and the number of collectives follows from
numbers that all ranks share.

**Memory**, beside inputs and the gradients handed out: float32 dW (W, D) and dH (rows, D); a chunk
of ``K = min(rows, max_bytes / (W_max * bytes))`` rows, that is ``K W`` logits, with ``W_max`` the
widest shard, and K rows of hidden twice, once in float32; at most seven cache blocks. Half
precision on the CPU adds float32 copies of what is multiplied: K rows of logits and the weight. A
head with padding is handed a gradient that has been copied once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..gates import PLAIN, Objective
from ..reference import weighted_loss
from ..row_chunks.pytorch import (
    TargetColumns,
    cache_blocks,
    load_rows,
    mixed_logits,
    store_rows_,
    target_columns,
)
from ..transform import LogitTransform


def all_reduce_(tensor: Tensor, operation: str, group: str) -> None:
    """All-reduce in place over the group of that name, since an op's schema has no groups."""
    ops = torch.ops._c10d_functional
    ops.wait_tensor(ops.all_reduce_(tensor, operation, group))


def add_over_ranks_(gradient: Tensor, group: str | None) -> None:
    """Add up the ranks' parts of dH; do nothing where there are no parts or none is needed."""
    if group is not None and gradient.numel():
        all_reduce_(gradient, "sum", group)


class OwnColumns(NamedTuple):
    """The targets of rows, and the columns of those that are this rank's."""

    shares: TargetColumns
    column: Tensor  # (S, T) int64
    own: Tensor  # (S, T) bool

    def rows(self, block: slice) -> OwnColumns:
        """Return the targets and columns of some rows."""
        shares = TargetColumns(*(tensor[block] for tensor in self.shares))
        return OwnColumns(shares, self.column[block], self.own[block])

    def put_(self, logits: Tensor, values: Tensor) -> None:
        """Write (S, T) values where targets are this rank's.

        Two writes to one column come in any order. So a target of another rank writes what its
        row's other target writes, and in a row without targets of this rank both write what is
        there.
        """
        values = torch.where(self.own, values, values.flip(-1))
        there = logits.gather(-1, self.column)
        logits.scatter_(-1, self.column, torch.where(self.own.any(-1, True), values, there))


def own_columns(targets: Tensor, share: Tensor, start: int, width: int) -> OwnColumns:
    """Return where global token ids (S, T) with shares (S, T) are on a rank.

    The rank holds the tokens ``start + [0, width)``.
    """
    column = targets - start
    own = (column >= 0) & (column < width)
    column = torch.where(own, column, column.flip(-1)).masked_fill(~own.any(-1, True), 0)
    return OwnColumns(target_columns(targets, share), column, own)


class PartSoftmax(NamedTuple):
    """What rows' softmax needs of their logits: those of one rank, or of all ranks."""

    peak: Tensor  # (S, 1)
    rest: Tensor  # (S, 1): sum of exp(z - peak) over columns that no held target is in
    targets: Tensor  # (S, T): the targets' logits; 0 where they are another rank's


def nothing_seen(columns: OwnColumns) -> PartSoftmax:
    """Return the softmax state of a rank that holds no tokens, which others are written into."""
    targets = torch.zeros_like(columns.shares.share)
    peak = torch.full_like(targets[:, :1], -torch.inf)
    return PartSoftmax(peak, torch.zeros_like(peak), targets)


def part_softmax_(
    logits: Tensor,  # (B, W) float32 raw logits; used up
    columns: OwnColumns,
    transform: LogitTransform,
) -> PartSoftmax:
    """Return the softmax state of this rank's columns."""
    transform.apply_(logits, needs_slope=False)
    targets = logits.gather(-1, columns.column).masked_fill(~columns.own, 0.0)
    peak = logits.amax(-1, keepdim=True)
    # Every token of a rank may be masked by its bias: -inf - -inf is NaN.
    exponentials = logits.sub_(peak.masked_fill(peak == -torch.inf, 0.0)).exp_()
    exp_at = exponentials.gather(-1, columns.column)
    columns.put_(exponentials, exp_at.masked_fill(columns.shares.column_share != 0, 0.0))
    return PartSoftmax(peak, exponentials.sum(-1, keepdim=True), targets)


def whole_softmax(parts: list[PartSoftmax], group: str) -> list[PartSoftmax]:
    """Return the softmax states over all ranks, by one MAX and one SUM over all states together."""
    own_peak = torch.cat([part.peak for part in parts])
    peak = own_peak.clone()
    all_reduce_(peak, "max", group)
    rest = torch.cat([part.rest for part in parts]) * torch.exp(own_peak - peak)
    sums = torch.cat([rest.reshape(-1), *(part.targets.reshape(-1) for part in parts)])
    all_reduce_(sums, "sum", group)
    rest, *targets = sums.split([rest.numel(), *(part.targets.numel() for part in parts)])
    rows = [part.peak.shape[0] for part in parts]
    peaks, rests = peak.split(rows), rest.unsqueeze(-1).split(rows)
    return [
        PartSoftmax(peaks[i], rests[i], targets[i].view_as(parts[i].targets))
        for i in range(len(parts))
    ]


class SoftRows(NamedTuple):
    """The rows of logits that have one loss each: the rows of a chunk, or its mixed pairs."""

    columns: OwnColumns
    peak: Tensor  # (S, 1)
    factor: Tensor  # (S, 1): weight * scale / sum of exponentials
    at_targets: Tensor  # (S, T): gradient at targets

    def gradient_(self, logits: Tensor, rows: slice, transform: LogitTransform) -> None:
        """Turn raw logits (B, W) of some rows into ``weight * d loss / d raw`` in place."""
        slope = transform.apply_(logits, needs_slope=True)
        logits.sub_(self.peak[rows]).exp_().mul_(self.factor[rows])
        self.columns.rows(rows).put_(logits, self.at_targets[rows])
        if slope is not None:
            logits.mul_(slope)


def soft_rows(
    whole: PartSoftmax,
    columns: OwnColumns,
    weight: Tensor,
    transform: LogitTransform,
    objective: Objective = PLAIN,  # a gate of the label's probability, or none
) -> tuple[Tensor, SoftRows]:
    """Return row losses (S,) and what the gradient needs, as `soft_cross_entropy_` ends."""
    log_p = whole.targets - whole.peak
    loss, total, at_targets = columns.shares.finish(log_p, log_p.exp(), whole.rest)
    if not objective.is_plain:
        gate = objective.gate(loss)
        loss, weight = weighted_loss(gate, loss), weighted_loss(weight, gate)
    factor = (weight * transform.scale).unsqueeze(-1) / total
    return loss, SoftRows(columns, whole.peak, factor, factor * at_targets)


class Chunk(NamedTuple):
    """The logits of a chunk on this rank: ``[c | u | single]`` rows, P pairs first."""

    logits: Tensor  # (K, W)
    share: Tensor  # (P, 2)
    transform: LogitTransform

    def blocks(self, start: int, stop: int) -> list[slice]:
        """Return slices of rows to work on at a time: on the CPU as many as a cache holds.

        On an accelerator a block has 64 MiB: reading and writing that takes ten times as long as
        launching a kernel (30 us at 4 TB/s, 3 us), and seven blocks are less than half of the
        chunk's bytes.
        """
        if self.logits.shape[1] == 0:
            return []
        block_bytes = 2**21 if self.logits.device.type == "cpu" else 2**26
        return list(cache_blocks(start, stop, self.logits, block_bytes))

    def pair(self, rows: slice) -> tuple[tuple[slice, Tensor], tuple[slice, Tensor], Tensor]:
        """Return rows and float32 logits of c and of u for some pairs, and the mixed logits."""
        later = slice(rows.start + self.share.shape[0], rows.stop + self.share.shape[0])
        raw_c, raw_u = load_rows(self.logits, rows), load_rows(self.logits, later)
        has_bias = self.transform.has_bias
        mixed = mixed_logits((raw_c, raw_u), self.share[rows], has_bias, torch.empty_like(raw_c))
        return (rows, raw_c), (later, raw_u), mixed

    def part_softmaxes(self, of_rows: OwnColumns, of_pairs: OwnColumns) -> list[PartSoftmax]:
        """Return this rank's softmax states of the rows and of the mixed pairs."""
        rows, pairs = nothing_seen(of_rows), nothing_seen(of_pairs)
        for block in self.blocks(0, self.logits.shape[0]):
            raw = self.logits[block].to(torch.float32, copy=True)
            found = part_softmax_(raw, of_rows.rows(block), self.transform)
            for whole, some in zip(rows, found, strict=True):
                whole[block] = some
        for block in self.blocks(0, self.share.shape[0]):
            _, _, mixed = self.pair(block)
            found = part_softmax_(mixed, of_pairs.rows(block), self.transform)
            for whole, some in zip(pairs, found, strict=True):
                whole[block] = some
        return [rows, pairs]

    def gradients_(self, rows: SoftRows, pairs: SoftRows) -> None:
        """Turn the logits into the gradients of the rows' and the pairs' weighted losses."""
        num_pairs = self.share.shape[0]
        for block in self.blocks(0, num_pairs):
            *both_rows, mixed = self.pair(block)
            pairs.gradient_(mixed, block, self.transform)
            shares = self.share[block].tensor_split(2, dim=-1)
            for (place, raw), share in zip(both_rows, shares, strict=True):
                rows.gradient_(raw, place, self.transform)
                store_rows_(self.logits, place, raw.addcmul_(mixed, share))
        for block in self.blocks(2 * num_pairs, self.logits.shape[0]):
            raw = load_rows(self.logits, block)
            rows.gradient_(raw, block, self.transform)
            store_rows_(self.logits, block, raw)


def losses_over_ranks_(
    chunk: Chunk,
    of_rows: OwnColumns,
    of_pairs: OwnColumns,
    row_weight: Tensor,  # (K,)
    mix_weight: Tensor,  # (P,)
    needs_gradient: bool,
    objective: Objective,
    group: str,
) -> tuple[Tensor, Tensor]:  # (K,), (P,)
    """Return losses of a chunk's rows and mixed pairs; turn its logits into gradients in place."""
    parts = chunk.part_softmaxes(of_rows, of_pairs)
    whole_rows, whole_pairs = whole_softmax(parts, group)
    row_losses, rows = soft_rows(whole_rows, of_rows, row_weight, chunk.transform, objective)
    pair_losses, pairs = soft_rows(whole_pairs, of_pairs, mix_weight, chunk.transform)
    if needs_gradient:
        chunk.gradients_(rows, pairs)
    return row_losses, pair_losses


def sharded_losses_(
    logits: Tensor,  # (K, W) raw logits; gradients afterwards
    targets: Tensor,  # (K, T) int64 in [0, V)
    share: Tensor | None,  # (K, T) float32; None for one target
    row_weight: Tensor,  # (K,)
    transform: LogitTransform,
    needs_gradient: bool,
    objective: Objective,
    start: int,
    group: str,
) -> Tensor:  # (K,)
    """Return weighted losses of a chunk of rows with T targets each; make logits gradients."""
    share = torch.ones_like(targets, dtype=torch.float32) if share is None else share
    pairs = targets.new_empty(0, 2), share.new_empty(0, 2)
    of_rows, of_pairs = (
        own_columns(*some, start, logits.shape[1]) for some in ((targets, share), pairs)
    )
    chunk = Chunk(logits, pairs[1], transform)
    losses, _ = losses_over_ranks_(
        chunk, of_rows, of_pairs, row_weight, row_weight[:0], needs_gradient, objective, group
    )
    return weighted_loss(row_weight, losses)


def sharded_pair_losses_(
    logits: Tensor,  # (K, W): [c | u | single] raw logits; gradients afterwards
    labels: Tensor,  # (K,) int64 in [0, V)
    row_weight: Tensor,  # (K,)
    pair_weight: Tensor,  # (P,)
    share: Tensor,  # (P, 2)
    mix_ratio: Tensor,  # ()
    transform: LogitTransform,
    needs_gradient: bool,
    objective: Objective,
    start: int,
    group: str,
) -> tuple[Tensor, Tensor]:  # NTP losses (K,), Mixup losses (P,)
    """Return weighted losses of a chunk of pairs and single rows; make logits gradients."""
    num_pairs = share.shape[0]
    targets, mixed_targets = labels.unsqueeze(-1), labels[: 2 * num_pairs].view(2, num_pairs).t()
    one = torch.ones_like(targets, dtype=torch.float32)
    of_rows, of_pairs = (
        own_columns(*some, start, logits.shape[1])
        for some in ((targets, one), (mixed_targets, share))
    )
    chunk = Chunk(logits, share, transform)
    mix_weight = pair_weight * mix_ratio
    ntp, mixup = losses_over_ranks_(
        chunk, of_rows, of_pairs, row_weight, mix_weight, needs_gradient, objective, group
    )
    return weighted_loss(row_weight, ntp), weighted_loss(pair_weight, mixup)
