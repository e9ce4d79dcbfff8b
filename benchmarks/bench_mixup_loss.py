"""Mixup alone: `fused_mixup_loss` beside compositions of losses with hard labels.

`race.py` measures all three tasks at once, `providers.py` says who takes part.
"""

from __future__ import annotations

from collections.abc import Callable

from .providers import MIXUP as TASK


def test_mixup_loss(record_race: Callable[[str], None]) -> None:
    record_race(TASK)
