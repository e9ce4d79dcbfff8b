"""The loss of a batch: ``NTP + mu * Mixup`` over the rows that a `PairedCollator` names.

Legend: N tokens with loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sftmix.config import SFTMixOptions
from sftmix.head import HeadAdapter
from sftmix_kernels import fused_sftmix_loss

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


class BatchLoss(NamedTuple):
    """Scalars in nats, of which ``loss`` is differentiable, and every token's own NTP loss."""

    loss: Tensor
    ntp: Tensor
    mixup: Tensor
    row_ntp: Tensor  # (N,) float32


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
    row_ntp = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    terms: list[Tensor] = []

    def head_function(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        found = fused_sftmix_loss(
            hidden,
            weight,
            batch["targets"],
            mix_c,
            mix_u,
            lam.float(),
            mu=options.mu if mixed else 0.0,
            bias=bias,
            ntp_divisor=ntp_divisor,
            mixup_divisor=mixup_divisor,
            schedule=options.loss_schedule,
            row_ntp_out=row_ntp,
            **head.options,
        )
        # FSDP2's mixed precision rounds what a module returns; these are logged as they are.
        terms[:] = [term.detach() for term in found[:3]]
        return found

    tokens = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    loss = model(**tokens, use_cache=False, rows=rows, head_function=head_function)[0]
    return BatchLoss(loss, terms[1], terms[2], row_ntp)
