"""Next-token prediction: the rows of `mixup_loss.py` with one hidden state and one target each.

Its other objectives (`gates.py`) are made in the same two passes over a row's logits.

- Formula: `reference.py`.
- Kernels: `row_chunks/kernels.py`; `vocab_tiles/forward.py`, `vocab_tiles/backward.py`. On the CPU:
  `csrc/row_chunks.h` and `csrc/row_objectives.h`, behind `row_chunks/cpu.py`.
- Proof: `tests/sftmix_kernels/test_cross_entropy.py`; of objectives
  `tests/sftmix_kernels/test_objectives.py`; of the kernels
  `tests/sftmix_kernels/row_chunks/test_row_chunks.py`,
  `tests/sftmix_kernels/vocab_tiles/test_vocab_tiles.py`.
- Time: `benchmarks/bench_loss.py`; of objectives `benchmarks/bench_objectives.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from .checks import (
    autocast,
    check_constant,
    check_divisor,
    check_flag,
    check_ids,
    check_ignore_index,
    check_label_values,
    check_reduction,
    check_row_out,
    values_are_free,
)
from .gates import Gate, Kind, Objective, objective_of
from .mixup_loss import reduced_loss
from .reference import Reduction, TokenStats, present, weighted_labels, weighted_loss
from .schedules import Schedule, VocabTiles, resolve_schedule
from .terms import label_terms
from .vocab_parallel.shard import HeadPart, VocabShard, checked_head

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .keywords import CrossEntropyKeywords


@overload
def fused_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...) int64, already shifted
    *,
    stats: Literal[False] = ...,
    **options: Unpack[CrossEntropyKeywords],
) -> Tensor: ...


@overload
def fused_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...) int64, already shifted
    *,
    stats: Literal[True],
    **options: Unpack[CrossEntropyKeywords],
) -> tuple[Tensor, TokenStats]: ...


def fused_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...) int64, already shifted
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    divisor: float | Tensor | None = None,
    row_weight: Tensor | None = None,  # (...) float32
    gate: Gate | None = None,
    label_smoothing: float = 0.0,
    gem_beta: float | None = None,
    stats: bool = False,
    schedule: Schedule = "auto",
    vocab_parallel: VocabShard | None = None,
    validate: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Return the cross-entropy of the LM head's logits, without ever holding all of them.

    ``a = f(W h + b)`` with ``f(x) = softcap * tanh(logit_scale * x / softcap)``, and
    ``loss = LSE(a) - a[y]`` in nats, for D the hidden size, V the vocabulary and tokens in any
    shape (...), such as (batch, length).

    Example:
        The loss of DFT, with the plain NLL beside it; the last token is ignored.

        >>> from sftmix_kernels import Power
        >>> hidden = torch.eye(3).requires_grad_()
        >>> weight = torch.arange(12.0).reshape(4, 3) / 4  # V = 4 tokens
        >>> labels = torch.tensor([3, 1, -100])
        >>> loss, stats = fused_cross_entropy(
        ...     hidden, weight, labels, gate=Power(1.0), stats=True
        ... )
        >>> print(f"{loss:.3f}")
        0.293
        >>> print(stats.nll, stats.is_top)
        tensor([0.5883, 2.0883, 0.0000]) tensor([ True, False, False])

    Args:
        hidden: (..., D), what the LM head reads; float32, bfloat16 or float16.
        weight: (V, D), the LM head, in hidden's dtype and on its device.
        labels: (...) int64, already shifted: ``labels[t]`` is what ``hidden[t]`` predicts.
            ``ignore_index`` leaves a token out; another label outside ``[0, V)`` makes the row's
            loss and gradients NaN, of which a warning tells on the CPU.
        bias: (V,), in hidden's dtype, or None.
        logit_scale: multiplies the raw logits.
        softcap: bounds them as above; None for no bound.
        ignore_index: the label that leaves a token out.
        reduction: ``"mean"`` over the tokens that count, ``"sum"``, or ``"none"``.
        divisor: replaces the count of tokens in ``"mean"`` (a global count over ranks, say), a
            number or a tensor () of one; a tensor of 0 counts as 1.
        row_weight: (...) float32, multiplies the loss of each token: finite and at least 0, where 0
            leaves a token out of the products, too. Not differentiated: one that requires a
            gradient is refused. The divisor of ``"mean"`` stays the count of valid labels, as
            ``num_items_in_batch`` of transformers and TRL is; for a weighted mean pass
            ``divisor=row_weight.sum()``.
        gate: one of `Power` (DFT), `Threshold`, `Entropy` (EAFT) and `Clipped` (PSFT): the loss of
            a token is the gate, detached, times its NLL.
        label_smoothing: in [0, 1), the share of the label that is spread over all V tokens.
        gem_beta: above 0; GEM-linear of that temperature. It, ``gate`` and ``label_smoothing``
            exclude each other.
        stats: return ``(loss, TokenStats)``, made in the same pass: of each token NLL and entropy
            of the plain softmax, and whether no other token has a larger logit than the label.
        schedule: how full logits are avoided: ``"auto"``, ``"row_chunks"``, ``"vocab_tiles"``
            (CUDA), or `RowChunks` or `VocabTiles` with other numbers.
        vocab_parallel: which part of the head this rank holds, as in `fused_mixup_loss`.
        validate: refuse labels and weights out of range, which waits for the device.

    Of vocabulary tiles and a head shared out over ranks (``vocab_parallel``) there are
    ``row_weight`` and the gates of the label's probability: `Power`, `Threshold`, `Clipped`.

    Returns:
        A float32 scalar in nats, or labels' shape (...) for ``reduction="none"``; with ``stats`` a
        pair. Nothing to average: 0, with gradients 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, and what came.
    """
    hidden, weight, bias = autocast(hidden, weight, bias)  # type: ignore[assignment]
    head = checked_head(hidden, weight, bias, logit_scale, softcap, vocab_parallel, schedule)
    check_reduction(reduction)
    check_divisor("divisor", divisor)
    check_ids("labels", labels, hidden)
    check_ignore_index(ignore_index)
    check_flag("stats", stats)
    check_label_values("labels", labels, head.vocab_size, ignore_index, validate=validate)
    chosen = resolve_schedule(schedule, hidden, head.widest)
    objective = checked_objective(gate, label_smoothing, gem_beta, labels, ignore_index)
    refuse_missing(objective, stats, head, chosen)
    targets, counts = label_terms(labels, None, head.vocab_size, ignore_index)
    weights = counts
    if row_weight is not None:
        weights = checked_weights(row_weight, labels, counts, validate=validate)
        divisor = (counts != 0).sum() if divisor is None else divisor
    loss, found = reduced_loss(
        hidden,
        None,
        head,
        targets,
        torch.empty_like(counts).unsqueeze(-1),  # one target has all: it is not read
        weights,
        reduction,
        divisor,
        chosen,
        objective,
        stats,
    )
    return (loss, token_stats(found, weights)) if stats else loss


def checked_weights(
    row_weight: Tensor,
    labels: Tensor,
    counts: Tensor,  # (...): 1, 0 or NaN
    *,
    validate: bool,
) -> Tensor:  # (...)
    """Return the weights of labels times those of rows, which must not wait for a gradient.

    Values that are no finite number of at least 0 are refused where they are read, and become NaN
    where they are not.
    """
    check_row_out("row_weight", row_weight, labels)
    check_constant("row_weight", row_weight)
    weights = weighted_labels(counts, row_weight)
    if validate or values_are_free(row_weight):
        bad = weights.isnan() & ~counts.isnan()
        if bad.any():
            raise ValueError(
                "row_weight: expected finite numbers of at least 0, "
                f"got {row_weight[bad][0].item()} at position {bad.nonzero()[0].tolist()}"
            )
    return weights


def checked_objective(
    gate: Gate | None,
    label_smoothing: float,
    gem_beta: float | None,
    labels: Tensor,
    ignore_index: int,
) -> Objective:
    """Return the objective of a call, of which the values of old log-probabilities are checked
    where that is free."""
    objective = objective_of(gate, label_smoothing, gem_beta)
    old = objective.old_log_probs
    if old is None:
        return objective
    check_row_out("old_log_probs", old, labels)
    check_constant("old_log_probs", old)
    if values_are_free(old):
        # 1e-3 is more than rounding makes of the logarithm of 1, also in half precision.
        bad = ~(old <= 1e-3) & (labels != ignore_index)
        if bad.any():
            raise ValueError(
                "old_log_probs: expected logarithms of probabilities, at most 0, "
                f"got {old[bad][0].item()} at position {bad.nonzero()[0].tolist()}"
            )
    return objective._replace(old_log_probs=old.contiguous())


def refuse_missing(
    objective: Objective, stats: bool, head: HeadPart, schedule: int | VocabTiles
) -> None:
    """Refuse what a schedule, or a head that is shared out over ranks, does not have."""
    if head.group is None and not isinstance(schedule, VocabTiles):
        return
    has = "VocabTiles" if isinstance(schedule, VocabTiles) else "vocab_parallel"
    names = {Kind.ENTROPY: "gate", Kind.SMOOTHED: "label_smoothing", Kind.GEM: "gem_beta"}
    missing = ["stats"] * stats + [name for kind, name in names.items() if kind == objective.kind]
    if missing:
        what = "another gate than Entropy" if missing[0] == "gate" else "its default"
        raise ValueError(
            f"{missing[0]}: expected {what} with {has}, which does not have it; "
            "schedule='row_chunks' without vocab_parallel does"
        )


def token_stats(found: Tensor, weights: Tensor) -> TokenStats:
    """Return stats (3, R) of rows in the shape of their weights: 0 where left out, else NaN where
    a weight is NaN."""
    counted = weighted_loss(present(weights.reshape(-1)), found)
    nll, entropy, is_top = counted.reshape(3, *weights.shape)
    return TokenStats(nll, entropy, is_top == 1)
