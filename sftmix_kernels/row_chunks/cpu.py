"""The rows of a chunk on the CPU: one compiled op each for single rows and for pairs.

The loops are in ``csrc/row_chunks_cpu.cpp``: a thread takes a row and goes over it twice, in one
parallel region a call. `pytorch.py` says the same in some forty PyTorch operations a cache block,
and runs where the ops were not compiled. Of each of those operations every thread waits for the
slowest, which a second busy process makes slow.

Legend: K rows of one chunk, P pairs, T targets of a row (1 or 2), V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..extension import build_info, warn_of_pytorch_operations
from ..gates import PLAIN, Objective
from ..transform import LogitTransform
from . import pytorch

torch.library.define(
    "sftmix_kernels::soft_rows_",
    "(Tensor(a!) logits, Tensor targets, Tensor? share, Tensor row_weight, float logit_scale, "
    "float? softcap, bool needs_gradient, Tensor(b!) loss, int kind=0, float parameter=0.0, "
    "Tensor? old_log_probs=None, Tensor(c!)? stats=None) -> ()",
)
torch.library.define(
    "sftmix_kernels::pair_rows_",
    "(Tensor(a!) logits, Tensor labels, Tensor row_weight, Tensor share, Tensor pair_weight, "
    "Tensor mix_ratio, float logit_scale, float? softcap, bool has_bias, bool needs_gradient, "
    "Tensor(b!) ntp, Tensor(c!) mixup, int kind=0, float parameter=0.0, "
    "Tensor? old_log_probs=None, Tensor(d!)? stats=None) -> ()",
)
# Loading the extension registers the compiled ops.
build_info()


def soft_rows_(
    logits: Tensor,  # (K, V) raw logits; gradients afterwards
    targets: Tensor,  # (K, T) int64 in [0, V)
    share: Tensor | None,  # (K, T) float32; None for one target
    row_weight: Tensor,  # (K,) float32
    transform: LogitTransform,
    needs_gradient: bool,
    objective: Objective = PLAIN,  # of one target
) -> Tensor:  # (K,) float32
    """Return weighted row losses; turn the logits into the gradients of their sum in place."""
    loss = torch.empty_like(row_weight)
    torch.ops.sftmix_kernels.soft_rows_(
        logits,
        targets,
        share,
        row_weight,
        transform.scale,
        transform.softcap,
        needs_gradient,
        loss,
        *objective,
    )
    return loss


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
    num_rows = 2 * pair_weight.numel()
    ntp, mixup = torch.empty_like(row_weight[:num_rows]), torch.empty_like(pair_weight)
    torch.ops.sftmix_kernels.pair_rows_(
        logits[:num_rows],
        labels[:num_rows],
        row_weight[:num_rows],
        share,
        pair_weight,
        mix_ratio,
        transform.scale,
        transform.softcap,
        transform.has_bias,
        needs_gradient,
        ntp,
        mixup,
        *objective,
    )
    return ntp, mixup


def soft_rows_of_pytorch(
    logits: Tensor,
    targets: Tensor,
    share: Tensor | None,
    row_weight: Tensor,
    logit_scale: float,
    softcap: float | None,
    needs_gradient: bool,
    loss: Tensor,
    *objective: Any,
) -> None:
    """Do what the compiled op does."""
    warn_of_pytorch_operations()
    # Whether raw logits may be -inf matters only where two are mixed.
    transform = LogitTransform(logit_scale, softcap, has_bias=False)
    found = pytorch.soft_rows_(
        logits, targets, share, row_weight, transform, needs_gradient, Objective(*objective)
    )
    loss.copy_(found)


def pair_rows_of_pytorch(
    logits: Tensor,
    labels: Tensor,
    row_weight: Tensor,
    share: Tensor,
    pair_weight: Tensor,
    mix_ratio: Tensor,
    logit_scale: float,
    softcap: float | None,
    has_bias: bool,
    needs_gradient: bool,
    ntp: Tensor,
    mixup: Tensor,
    *objective: Any,
) -> None:
    """Do what the compiled op does."""
    warn_of_pytorch_operations()
    transform = LogitTransform(logit_scale, softcap, has_bias)
    pairs = (labels, row_weight, share, pair_weight, mix_ratio)
    found_ntp, found_mixup = pytorch.pair_rows_(
        logits, *pairs, transform, needs_gradient, Objective(*objective)
    )
    ntp.copy_(found_ntp)
    mixup.copy_(found_mixup)


torch.library.impl("sftmix_kernels::soft_rows_", "default", soft_rows_of_pytorch)
torch.library.impl("sftmix_kernels::pair_rows_", "default", pair_rows_of_pytorch)
