"""NTP + Mixup: `fused_sftmix_loss` beside what a user would write instead.

`race.py` measures all three tasks at once, `providers.py` says who takes part.
"""

from __future__ import annotations

from collections.abc import Callable

from .providers import BOTH as TASK


def test_sftmix_loss(record_race: Callable[[str], None]) -> None:
    record_race(TASK)
