"""The loss of a batch over the rows that a `PairedCollator` names, for every method.

    sftmix    NTP + mu * Mixup                                          arXiv 2410.05248
    equal     NTP + Mixup                                               its ablation
    mixup     Mixup alone                                               its ablation
    ntp       NTP alone
    ir_dro    sum_i w_i L_i, w = softmax(L / kl_reg), not differentiated; L_i the mean token loss of
              example i. IR-DRO, Chen et al. 2024

The softmax is over the examples of one micro-batch on all ranks together; accumulated micro-batches
count by their examples. Legend: N tokens with loss, P pairs of them, B examples, D hidden size, V
vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftmix.model.head import HeadAdapter
from sftmix.model.stand_in import HeadOutput
from sftmix.runs.ranks import joined_ranks, rank
from sftmix.training.config import MIXED, SFTMixOptions
from sftmix_kernels import fused_cross_entropy, fused_mixup_loss, fused_sftmix_loss

# Each has a branch of its own below: another one would be trained as NTP.
METHODS = (*MIXED, "ntp", "ir_dro")
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def refuse_unknown(method: str) -> None:
    """Refuse a method that the losses here do not know.

    Raises:
        ValueError: it has none.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected {', '.join(METHODS)}; {method!r} has no loss")


class Counts(NamedTuple):
    """What the means of a loss are over: of a step's micro-batches on all ranks, 0-dim tensors."""

    tokens: Tensor
    pairs: Tensor
    examples: Tensor
    micro_batches: Tensor


def batch_counts(batches: Sequence[dict[str, Tensor]], device: torch.device) -> Counts:
    """The counts of micro-batches; fillers are no examples."""
    known = (
        sum(batch["rows"].numel() for batch in batches),
        sum(batch["pair_c"].numel() for batch in batches if "pair_c" in batch),
        sum(bool(batch["rows"].numel()) for batch in batches),
    )
    tokens, pairs, micro_batches = torch.tensor(known, dtype=torch.float32, device=device)
    # Lengths are on the device: the host does not wait to count them.
    examples = torch.zeros_like(tokens)
    for batch in batches:
        examples = examples + batch["lengths"].count_nonzero().to(device)
    return Counts(tokens, pairs, examples, micro_batches)


class Pairs(NamedTuple):
    """Places in the rows with loss, and the share of the first."""

    c: Tensor  # (P,) int64
    u: Tensor  # (P,) int64
    lam: Tensor  # (P,) float32


class BatchLoss(NamedTuple):
    """Scalars in nats, of which ``loss`` is differentiable, and every token's own NTP loss."""

    loss: Tensor
    ntp: Tensor | None  # None with Mixup alone
    mixup: Tensor | None  # None without Mixup
    row_ntp: Tensor | None  # (N,) float32 or better; None with Mixup alone
    router: Tensor | None = None  # a router's auxiliary loss, differentiable, not in ``loss``


def batch_loss(
    model: nn.Module,
    head: HeadAdapter,
    batch: dict[str, Any],
    options: SFTMixOptions,
    counts: Counts,
) -> BatchLoss:
    """A micro-batch's share of the loss of ``options.method``.

    ``model`` is what is called: the model that ``head`` was made for, or a wrapper of it. Without
    Mixup pairs are left alone.
    """
    refuse_unknown(options.method)
    rows, targets = batch["rows"], batch["targets"]
    pairs, mu = None, {"sftmix": options.mu, "equal": 1.0}.get(options.method, 0.0)
    if options.method in MIXED:
        pairs = Pairs(batch["mix_c"], batch["mix_u"], batch["lam"].float())
    tokens = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    ways = {"parts": batch.get("parts"), "saving": head.saving}
    call = functools.partial(model, **tokens, **ways, use_cache=False, rows=rows)
    weighted = functools.partial(hard_examples_loss, batch, counts, options.kl_reg)
    if not head.fused:
        alone = options.method == "mixup"
        output = call(head_input=lambda hidden: with_mixed(hidden, pairs, alone=alone))
        return dense_loss(output, targets, pairs, counts, mu, weighted, options.method)
    found: list[BatchLoss] = []

    def head_function(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        head_call = {"bias": bias, "schedule": options.loss_plan, **head.options}
        if options.method == "mixup" and pairs is not None:
            loss = mixup_loss(hidden, weight, targets, pairs, counts, head_call)
        elif options.method == "ir_dro":
            row_ntp = fused_cross_entropy(hidden, weight, targets, reduction="none", **head_call)
            loss = weighted(row_ntp)
        else:
            loss = joint_loss(hidden, weight, targets, pairs, counts, mu, head_call)
        # FSDP2's mixed precision rounds what a module returns; these are logged as they are.
        found.append(detached(loss))
        return loss.loss

    output = call(head_function=head_function)
    return found[-1]._replace(loss=output.value, router=output.router_loss)


def detached(loss: BatchLoss) -> BatchLoss:
    """The same numbers without gradients."""
    return BatchLoss(*(part if part is None else part.detach() for part in loss))  # type: ignore[arg-type]


def joint_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,) int64
    pairs: Pairs | None,
    counts: Counts,
    mu: float,
    head_call: dict[str, Any],
) -> BatchLoss:
    """``NTP + mu * Mixup`` at the matrix products of NTP; without pairs NTP alone."""
    empty = targets.new_empty(0)
    row_ntp = torch.empty(targets.shape, dtype=torch.float32, device=targets.device)
    loss, ntp, mixup = fused_sftmix_loss(
        hidden,
        weight,
        targets,
        *(pairs or (empty, empty, empty.float())),
        mu=mu,
        ntp_divisor=counts.tokens,
        mixup_divisor=counts.pairs,
        row_ntp_out=row_ntp,
        **head_call,
    )
    return BatchLoss(loss, ntp, mixup if pairs else None, row_ntp)


def mixup_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,) int64
    pairs: Pairs,
    counts: Counts,
    head_call: dict[str, Any],
) -> BatchLoss:
    """Mixup alone: one row of products for each pair, and none for the other tokens."""
    mixup = fused_mixup_loss(
        hidden[pairs.c],
        hidden[pairs.u],
        weight,
        targets[pairs.c],
        targets[pairs.u],
        pairs.lam,
        divisor=counts.pairs,
        **head_call,
    )
    return BatchLoss(mixup, None, mixup, None)


def hard_examples_loss(
    batch: dict[str, Tensor], counts: Counts, kl_reg: float, row_ntp: Tensor
) -> BatchLoss:
    """IR-DRO's loss from the token losses (N,) of this micro-batch; see the module."""
    num_examples, owner = batch["lengths"].numel(), batch["owner"]
    # In float64: the softmax turns absolute errors of the losses into relative ones of weights.
    nothing = row_ntp.new_zeros(num_examples, dtype=torch.float64)
    # Not `bincount`, for whose largest value the host waits.
    tokens = nothing.index_add(0, owner, torch.ones_like(row_ntp, dtype=torch.float64))
    means = nothing.index_add(0, owner, row_ntp.double()) / tokens.clamp(min=1)
    # Fillers have no tokens, and no weight. What other ranks are told has no gradient.
    hardness = (means / kl_reg).masked_fill(tokens == 0, -torch.inf)
    everyone = joined_ranks(hardness)
    mine = everyone.softmax(0)[rank() * num_examples :][:num_examples]
    weights = mine.masked_fill(tokens == 0, 0.0)
    share = everyone.isfinite().sum() / counts.examples
    loss = (share * (weights * means).sum()).float()
    return BatchLoss(loss, row_ntp.sum() / counts.tokens, None, row_ntp)


def with_mixed(
    hidden: Tensor,  # (N, D)
    pairs: Pairs | None,
    *,
    alone: bool,
) -> Tensor:  # (N + P, D), or (P, D)
    """The rows with loss, unless ``alone``; then ``lam h_c + (1 - lam) h_u`` of each pair."""
    if pairs is None:
        return hidden
    share = pairs.lam.unsqueeze(-1)
    mixed = (share * hidden[pairs.c] + (1 - share) * hidden[pairs.u]).to(hidden.dtype)
    return mixed if alone else torch.cat([hidden, mixed])


def dense_loss(
    output: HeadOutput,  # of the logits of `with_mixed`
    targets: Tensor,  # (N,) int64
    pairs: Pairs | None,
    counts: Counts,
    mu: float,
    weighted: Callable[[Tensor], BatchLoss],
    method: str,
) -> BatchLoss:
    """The same from the model's own logits, in float32 or better; slow, and of any model."""
    logits: Tensor = output.value
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    mixup, num_mixed = None, 0
    if pairs is not None:
        num_mixed = pairs.lam.numel()
        mixed_logits = logits[logits.shape[0] - num_mixed :]
        loss_c, loss_u = (
            F.cross_entropy(mixed_logits, targets[places], reduction="none")
            for places in (pairs.c, pairs.u)
        )
        mixup = (pairs.lam * loss_c + (1 - pairs.lam) * loss_u).sum() / counts.pairs
        if method == "mixup":
            return BatchLoss(mixup, None, mixup.detach(), None, output.router_loss)
    row_ntp = F.cross_entropy(logits[: targets.numel()], targets, reduction="none")
    if method == "ir_dro":
        return weighted(row_ntp)._replace(router=output.router_loss)
    ntp = row_ntp.sum() / counts.tokens
    loss = ntp if mixup is None else ntp + mu * mixup
    terms = (ntp.detach(), None if mixup is None else mixup.detach(), row_ntp.detach())
    return BatchLoss(loss, *terms, output.router_loss)
