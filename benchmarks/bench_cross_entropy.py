"""NTP alone: `fused_cross_entropy` beside what a user would pick instead.

`race.py` measures all three tasks at once, `providers.py` says who takes part.
"""

from __future__ import annotations

from collections.abc import Callable

from .providers import NTP as TASK


def test_cross_entropy(record_race: Callable[[str], None]) -> None:
    record_race(TASK)
