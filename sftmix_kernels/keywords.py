"""The keywords of the two losses whose result depends on one of them, ``stats``, for type checkers.

The functions say what they are; a test holds their signatures to these.
"""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor

from .gates import Gate
from .reference import Reduction
from .schedules import Schedule
from .vocab_parallel.shard import VocabShard


class Keywords(TypedDict, total=False):
    """What both take."""

    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None
    ignore_index: int
    row_weight: Tensor | None  # (...) float32
    gate: Gate | None
    schedule: Schedule
    vocab_parallel: VocabShard | None
    validate: bool


class CrossEntropyKeywords(Keywords, total=False):
    """Those of `fused_cross_entropy`."""

    reduction: Reduction
    divisor: float | Tensor | None
    label_smoothing: float
    gem_beta: float | None


class SFTMixKeywords(Keywords, total=False):
    """Those of `fused_sftmix_loss`."""

    mu: float
    ntp_divisor: float | Tensor | None
    mixup_divisor: float | Tensor | None
    row_ntp_out: Tensor | None  # (...) float32
