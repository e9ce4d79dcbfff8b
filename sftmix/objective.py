"""The loss of a batch: ``NTP + mu * Mixup`` over the rows that a `PairedCollator` names.

Legend: N tokens with loss, P pairs of them, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftmix.config import SFTMixOptions
from sftmix.head import HeadAdapter
from sftmix.stand_in import HeadOutput
from sftmix_kernels import fused_sftmix_loss

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


class BatchLoss(NamedTuple):
    """Scalars in nats, of which ``loss`` is differentiable, and every token's own NTP loss."""

    loss: Tensor
    ntp: Tensor
    mixup: Tensor
    row_ntp: Tensor  # (N,) float32 or better
    router: Tensor | None  # a router's auxiliary loss, differentiable, not in ``loss``


def batch_loss(
    model: nn.Module,
    head: HeadAdapter,
    batch: dict[str, Tensor],
    options: SFTMixOptions,
    ntp_divisor: Tensor,
    mixup_divisor: Tensor,
) -> BatchLoss:
    """A micro-batch's share of ``NTP + mu * Mixup``; with ``method="ntp"`` pairs are left alone.

    ``model`` is what is called: the model that ``head`` was made for, or a wrapper of it. The
    divisors are the counts of tokens and of mixed pairs that the loss is a mean over.
    """
    rows, mixed = batch["rows"], options.method == "sftmix"
    mix_c, mix_u, lam = (
        batch[name] if mixed else rows.new_empty(0) for name in ("mix_c", "mix_u", "lam")
    )
    pairs = (mix_c, mix_u, lam.float())
    mu = options.mu if mixed else 0.0
    tokens = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    call = functools.partial(model, **tokens, use_cache=False, rows=rows)
    if not head.fused:
        output = call(head_input=lambda hidden: with_mixed(hidden, *pairs))
        divisors = (ntp_divisor, mixup_divisor)
        return dense_loss(output, batch["targets"], *pairs, mu, *divisors)
    row_ntp = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    terms: list[Tensor] = []

    def head_function(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        found = fused_sftmix_loss(
            hidden,
            weight,
            batch["targets"],
            *pairs,
            mu=mu,
            ntp_divisor=ntp_divisor,
            mixup_divisor=mixup_divisor,
            bias=bias,
            schedule=options.loss_schedule,
            row_ntp_out=row_ntp,
            **head.options,
        )
        # FSDP2's mixed precision rounds what a module returns; these are logged as they are.
        terms[:] = [term.detach() for term in found[:3]]
        return found

    output = call(head_function=head_function)
    return BatchLoss(output.value[0], terms[1], terms[2], row_ntp, output.router_loss)


def with_mixed(
    hidden: Tensor,  # (N, D)
    pair_c: Tensor,  # (P,) int64
    pair_u: Tensor,  # (P,) int64
    lam: Tensor,  # (P,) float32
) -> Tensor:  # (N + P, D)
    """The rows with loss, then ``lam h_c + (1 - lam) h_u`` of each pair."""
    share = lam.unsqueeze(-1)
    mixed = share * hidden[pair_c] + (1 - share) * hidden[pair_u]
    return torch.cat([hidden, mixed.to(hidden.dtype)])


def dense_loss(
    output: HeadOutput,  # of logits (N + P, V)
    targets: Tensor,  # (N,) int64
    pair_c: Tensor,
    pair_u: Tensor,
    lam: Tensor,  # (P,) float32
    mu: float,
    ntp_divisor: Tensor,
    mixup_divisor: Tensor,
) -> BatchLoss:
    """The same from the model's own logits, in float32 or better; slow, and of any model."""
    logits: Tensor = output.value
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    row_logits, mixed_logits = logits.split([targets.numel(), lam.numel()])
    row_ntp = F.cross_entropy(row_logits, targets, reduction="none")
    loss_c, loss_u = (
        F.cross_entropy(mixed_logits, targets[pair], reduction="none") for pair in (pair_c, pair_u)
    )
    ntp = row_ntp.sum() / ntp_divisor
    mixup = (lam * loss_c + (1 - lam) * loss_u).sum() / mixup_divisor
    loss = ntp + mu * mixup
    return BatchLoss(loss, ntp.detach(), mixup.detach(), row_ntp.detach(), output.router_loss)
