"""The rows of a chunk in PyTorch operations: what the ops of `cpu.py` mean, and run uncompiled.

`soft_rows_` and `pair_rows_` have the arguments of the Triton kernels' launchers. They work block
by block, while a block sits in cache; `vocab_parallel/` takes parts of them on any device.
`reference.py` has the derivation.

Legend: K rows of one chunk, B rows of one cache block, P pairs, T targets of a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..gates import PLAIN, Kind, Objective
from ..reference import weighted_loss
from ..transform import LogitTransform

# MKL's vector maths gets ready at its first call. Where that was made by two threads at once, one
# half of an `exp` was off by 1.5e-4 in about one process of five (torch 2.13): one number takes one
# thread.
torch.exp(torch.zeros(1))
torch.tanh(torch.zeros(1))
torch.log1p(torch.zeros(1))


class TargetColumns(NamedTuple):
    """The shares of rows' targets. Two may be the same token, whose column carries both shares."""

    share: Tensor  # (B, T) float32, summing to 1
    column_share: Tensor  # (B, T): of all targets in this target's column
    same: Tensor  # (B, T, T): 1 where two targets are the same token

    def held(self, exp_at: Tensor) -> Tensor:
        """Return what the row's sum leaves out: the exponentials of targets that have a share.

        A target without a share (lam is 0 or 1) stays in the sum like any other column, which makes
        the row bitwise the plain cross-entropy.
        """
        return exp_at.masked_fill(self.column_share == 0, 0.0)

    def finish(
        self, log_p: Tensor, exp_at: Tensor, rest: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:  # (B,), (B, 1), (B, T)
        """Return the loss, the sum of all exponentials, and that times the gradient at the targets.

        ``log_p`` are the targets' logits less the row's peak, ``exp_at`` their exponentials, and
        ``rest`` (B, 1) is the sum of all exponentials but those held.
        """
        held = self.held(exp_at)
        held_sum = (held / self.same.sum(-1)).sum(-1, keepdim=True)
        log_p = log_p - torch.log1p(rest + (held_sum - 1.0))
        others = rest + ((1.0 - self.same) * held.unsqueeze(-2)).sum(-1)
        at_targets = exp_at * (1.0 - self.column_share) - self.column_share * others
        return -(self.share * log_p).sum(-1), rest + held_sum, at_targets


def target_columns(targets: Tensor, share: Tensor) -> TargetColumns:
    """Return the columns of token ids (B, T) with shares (B, T)."""
    same = (targets.unsqueeze(-1) == targets.unsqueeze(-2)).float()
    return TargetColumns(share, (same * share.unsqueeze(-2)).sum(-1), same)


def soft_cross_entropy_(
    logits: Tensor,  # (B, V) float32 raw logits; holds the gradient afterwards
    targets: Tensor,  # (B, T) int64 in [0, V)
    share: Tensor,  # (B, T) float32, summing to 1
    weight: Tensor,  # (B,) float32
    transform: LogitTransform,
    needs_gradient: bool,
    objective: Objective = PLAIN,  # of one target
) -> Tensor:  # (B,) float32
    """Return ``-sum_t share_t log p[target_t]`` of rows, or what their objective makes of it;
    logits become ``weight d loss / d raw``.

    The exponentials of targets are kept out of the row's sum. What is left is the sum of all
    others, from which ``p - 1`` and ``log p`` of a confident token follow without cancelling.
    """
    if objective.kind == Kind.GEM:
        if objective.stats is not None:
            plain = Objective(stats=objective.stats)
            soft_cross_entropy_(logits.clone(), targets, share, weight, transform, False, plain)
            objective = objective._replace(stats=None)
        transform = transform.tempered(objective.parameter)
    slope = transform.apply_(logits, needs_gradient)
    sums = row_sums(logits, targets, objective)
    peak = logits.amax(-1, keepdim=True)
    log_p = logits.gather(-1, targets) - peak
    exp_at = logits.sub_(peak).exp_().gather(-1, targets)
    columns = target_columns(targets, share)
    rest = logits.scatter_(-1, targets, exp_at - columns.held(exp_at)).sum(-1, keepdim=True)
    loss, total, at_targets = columns.finish(log_p, exp_at, rest)
    row = Row(loss, weight, at_targets)
    if not objective.is_plain:
        row = row.judged(objective, sums, log_p, total, logits.shape[1])
    if needs_gradient:
        factor = (row.weight * transform.scale).unsqueeze(-1) / total
        logits.mul_(factor)
        if row.flat:
            logits.add_((row.weight * transform.scale * row.flat).unsqueeze(-1))
        logits.scatter_(-1, targets, factor * row.at_targets)
        if slope is not None:
            logits.mul_(slope)
    return row.loss


class RowSums(NamedTuple):
    """The sums of an objective over rows' logits, where it needs them."""

    moment: Tensor | None = None  # (B,): sum_j exp(a_j - top) (a_j - top)
    gap: Tensor | None = None  # (B,): sum_j (a_j - a_target)


def row_sums(logits: Tensor, targets: Tensor, objective: Objective) -> RowSums:
    """Return what an objective needs of logits (B, V) with one target."""
    moment = gap = None
    if objective.needs_moment:
        # exp is 0 there, and 0 * -inf would be NaN.
        below = (logits - logits.amax(-1, keepdim=True)).clamp_(min=-104.0)
        moment = below.exp().mul_(below).sum(-1)
    if objective.kind == Kind.SMOOTHED:
        gap = (logits - logits.gather(-1, targets)).sum(-1)
    return RowSums(moment, gap)


class Row(NamedTuple):
    """What rows' losses and gradients follow from, once the sums over their columns are known."""

    loss: Tensor  # (B,)
    weight: Tensor  # (B,)
    at_targets: Tensor  # (B, T)
    flat: float = 0.0  # what the gradient has in every column, before weight and slope

    def judged(
        self, objective: Objective, sums: RowSums, log_p: Tensor, total: Tensor, vocab_size: int
    ) -> Row:
        """Return the rows of an objective; these are the plain cross-entropy's."""
        loss, weight, at_targets, _ = self
        below = log_p.squeeze(-1)  # of the target's logit: the top's
        entropy = mean = loss
        if sums.moment is not None:
            mean = sums.moment / total.squeeze(-1)
            # Where the label is the top choice, the loss is this logarithm without cancelling.
            entropy = torch.where(below == 0, loss, total.squeeze(-1).log()) - mean
        if objective.stats is not None:
            torch.stack((loss, entropy, (below == 0).to(loss)), out=objective.stats)
        if objective.kind == Kind.SMOOTHED:
            assert sums.gap is not None
            each = objective.parameter / vocab_size
            at_targets = at_targets + (objective.parameter - each) * total
            return Row(loss - each * sums.gap, weight, at_targets, -each)
        if objective.kind == Kind.GEM:
            beta = objective.parameter
            return Row(beta * (mean - below), beta * weight, at_targets)
        if objective.kind != Kind.PLAIN:
            # One token has no entropy.
            gate = objective.gate(loss, entropy / math.log(max(2, vocab_size)))
            return Row(weighted_loss(gate, loss), weighted_loss(weight, gate), at_targets)
        return self


def pair_cross_entropy_(
    logits: tuple[Tensor, Tensor],  # two (B, V) float32 raw logits; gradients afterwards
    labels: tuple[Tensor, Tensor],  # two (B,) int64 in [0, V)
    share: Tensor,  # (B, 2) float32: lam and 1 - lam
    ntp_weight: tuple[Tensor, Tensor],  # two (B,) float32
    mix_weight: Tensor,  # (B,) float32
    transform: LogitTransform,
    workspace: Tensor,  # (>= B, V) float32, for the mixed logits
    needs_gradient: bool,
    objectives: tuple[Objective, Objective] = (PLAIN, PLAIN),  # of NTP: gates, or none
) -> tuple[Tensor, Tensor, Tensor]:  # NTP of c, NTP of u, Mixup: (B,) float32 each
    """Return the three losses of pairs; turn both logits into ``G_c`` and ``G_u`` in place."""
    share_c, share_u = share.tensor_split(2, dim=-1)
    mixed = mixed_logits(logits, share, transform.has_bias, workspace)
    mixup = soft_cross_entropy_(
        mixed, torch.stack(labels, dim=-1), share, mix_weight, transform, needs_gradient
    )
    ntp_c, ntp_u = (
        cross_entropy_(a, y, w, transform, needs_gradient, o)
        for a, y, w, o in zip(logits, labels, ntp_weight, objectives, strict=True)
    )
    if needs_gradient:
        logits[0].addcmul_(mixed, share_c)
        logits[1].addcmul_(mixed, share_u)
    return ntp_c, ntp_u, mixup


def mixed_logits(
    logits: tuple[Tensor, Tensor],  # two (B, V)
    share: Tensor,  # (B, 2)
    has_bias: bool,
    workspace: Tensor,  # (>= B, V)
) -> Tensor:  # (B, V)
    """Write ``share_c a_c + share_u a_u`` of raw logits into the workspace's first rows."""
    share_c, share_u = share.tensor_split(2, dim=-1)
    mixed = torch.mul(logits[0], share_c, out=workspace[: share.shape[0]])
    mixed.addcmul_(logits[1], share_u)
    if has_bias:
        # 0 * -inf is NaN: where one share is 0, the mixture is the other row.
        torch.where(share_u == 0, logits[0], mixed, out=mixed)
        torch.where(share_c == 0, logits[1], mixed, out=mixed)
    return mixed


def cross_entropy_(
    logits: Tensor,  # (B, V) float32
    labels: Tensor,  # (B,) int64 in [0, V)
    weight: Tensor,  # (B,) float32
    transform: LogitTransform,
    needs_gradient: bool,
    objective: Objective = PLAIN,
) -> Tensor:  # (B,) float32
    """Do what `soft_cross_entropy_` does, with one target."""
    targets = labels.unsqueeze(-1)
    share = torch.ones_like(targets, dtype=torch.float32)
    return soft_cross_entropy_(logits, targets, share, weight, transform, needs_gradient, objective)


def cache_blocks(
    start: int, stop: int, logits: Tensor, block_bytes: int = 2**21
) -> Iterator[slice]:
    """Yield slices of rows whose float32 logits take about 2 MiB, so that every pass hits a cache.

    NTP + Mixup at D = 512, V = 32000 on two cores with 2 MiB of L2 each, in turns: 2.15 s with
    1 MiB, 2.19 s with 2 MiB, quartiles overlapping.

    A single last row joins the block before it: PyTorch sums a single long row over threads, in
    another order, and then the bits of a row's loss would hang on its place in the chunk.
    """
    step = max(2, block_bytes // (4 * logits.shape[1]))
    while start < stop:
        end = stop if stop - start <= step + 1 else start + step
        yield slice(start, end)
        start = end


def load_rows(logits: Tensor, rows: slice) -> Tensor:
    """Return some rows of logits in float32: a view where they are float32 already."""
    return logits[rows].float()


def store_rows_(logits: Tensor, rows: slice, gradient: Tensor) -> None:
    """Put the gradient of `load_rows`'s rows back, rounded once; a view is there already."""
    if logits.dtype != torch.float32:
        logits[rows] = gradient


def soft_rows_(
    logits: Tensor,  # (K, V) raw logits; gradients afterwards
    targets: Tensor,  # (K, T) int64 in [0, V)
    share: Tensor | None,  # (K, T) float32; None for one target
    row_weight: Tensor,  # (K,) float32
    transform: LogitTransform,
    needs_gradient: bool,
    objective: Objective = PLAIN,
) -> Tensor:  # (K,) float32
    """Return weighted row losses; turn the logits into the gradients of their sum in place."""
    share = torch.ones_like(targets, dtype=torch.float32) if share is None else share
    loss = torch.empty_like(row_weight)
    for rows in cache_blocks(0, loss.numel(), logits):
        raw = load_rows(logits, rows)
        of_rows = objective.rows(rows)
        loss[rows] = soft_cross_entropy_(
            raw, targets[rows], share[rows], row_weight[rows], transform, needs_gradient, of_rows
        )
        objective.put_stats(rows, of_rows)
        store_rows_(logits, rows, raw)
    return weighted_loss(row_weight, loss)


def pair_rows_(
    logits: Tensor,  # (>= 2 P, V) as in `soft_rows_`, rows of c before rows of u
    labels: Tensor,  # (>= 2 P,) int64 in [0, V)
    row_weight: Tensor,  # (>= 2 P,) float32
    share: Tensor,  # (P, 2) float32: lam and 1 - lam
    pair_weight: Tensor,  # (P,) float32
    mix_ratio: Tensor,  # () float32
    transform: LogitTransform,
    needs_gradient: bool,
    objective: Objective = PLAIN,  # of NTP: a gate, or none
) -> tuple[Tensor, Tensor]:  # NTP (2 P,), Mixup (P,)
    """Return weighted losses; make logits the gradients of ``sum(ntp) + mix_ratio sum(mixup)``."""
    mixup = torch.empty_like(pair_weight)
    ntp = mixup.new_empty(2 * mixup.numel())
    blocks = list(cache_blocks(0, mixup.numel(), logits))
    largest = max((block.stop - block.start for block in blocks), default=0)
    mixed = torch.empty(largest, logits.shape[1], device=logits.device)
    for pair in blocks:
        both_rows = (pair, slice(pair.start + mixup.numel(), pair.stop + mixup.numel()))
        raw_c, raw_u = (load_rows(logits, rows) for rows in both_rows)
        label_c, label_u = (labels[rows] for rows in both_rows)
        weight_c, weight_u = (row_weight[rows] for rows in both_rows)
        objective_c, objective_u = (objective.rows(rows) for rows in both_rows)
        ntp[both_rows[0]], ntp[both_rows[1]], mixup[pair] = pair_cross_entropy_(
            (raw_c, raw_u),
            (label_c, label_u),
            share[pair],
            (weight_c, weight_u),
            pair_weight[pair] * mix_ratio,
            transform,
            mixed,
            needs_gradient,
            (objective_c, objective_u),
        )
        objective.put_stats(both_rows[0], objective_c)
        objective.put_stats(both_rows[1], objective_u)
        store_rows_(logits, both_rows[0], raw_c)
        store_rows_(logits, both_rows[1], raw_u)
    return weighted_loss(row_weight[: ntp.numel()], ntp), weighted_loss(pair_weight, mixup)
