"""The loss of a batch over the rows that a `PairedCollator` names, for every method."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sftmix.methods import method_of
from sftmix.model.head import HeadAdapter
from sftmix.training.config import SFTMixOptions
from sftmix.training.heads import BatchLoss, Counts, DenseHead, FusedHead

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def batch_counts(batches: Sequence[dict[str, Tensor]], device: torch.device) -> Counts:
    """Count tokens, pairs, examples and micro-batches; fillers are no examples."""
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


def batch_loss(
    model: nn.Module,
    head: HeadAdapter,
    batch: dict[str, Any],
    options: SFTMixOptions,
    counts: Counts,
) -> BatchLoss:
    """Return a micro-batch's share of the loss of ``options.method``.

    ``model`` is what is called: the model that ``head`` was made for, or a wrapper of it.

    Raises:
        ValueError: there is no such method.
    """
    method = method_of(options.method)
    tokens = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    ways = {"parts": batch.get("parts"), "saving": head.saving}
    call = functools.partial(model, **tokens, **ways, use_cache=False, rows=batch["rows"])
    if not head.fused:
        dense = DenseHead(batch, counts, options, method)
        output = call(head_input=dense.rows)
        logits: Tensor = output.value
        dense.logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss: BatchLoss = method.loss(dense)
        return detached(loss)._replace(loss=loss.loss, router=output.router_loss)
    found: list[BatchLoss] = []

    def head_function(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        keywords = {"bias": bias, "schedule": options.loss_plan, **head.options}
        loss: BatchLoss = method.loss(FusedHead(batch, counts, options, hidden, weight, **keywords))
        # FSDP2's mixed precision rounds what a module returns; these are logged as they are.
        found.append(detached(loss))
        return loss.loss

    output = call(head_function=head_function)
    return found[-1]._replace(loss=output.value, router=output.router_loss)


def detached(loss: BatchLoss) -> BatchLoss:
    """Return the same numbers without gradients."""
    return BatchLoss(*(part if part is None else part.detach() for part in loss))  # type: ignore[arg-type]
