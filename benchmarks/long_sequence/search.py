"""The largest length that fits, in few measurements: a line through what fitted gives a guess."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .worker import OutOfTime

GRAIN = 64
# Of the budget, where a line aims.
AIM = 0.99


class Bounds(NamedTuple):
    """``fits`` is the longest that did, 0 where none; ``fails`` the shortest that did not."""

    fits: int
    fails: int | None
    note: str = ""


def step_of(length: int) -> int:
    """How near the bounds come: a 64th of the length, a multiple of 64."""
    return max(GRAIN, length // 64 // GRAIN * GRAIN)


def largest(
    measure: Callable[[int], float | None],
    peaks: dict[int, float],
    fails: int | None,
    budget: float,
    start: int,
    tries: int = 12,
) -> Bounds:
    """The longest that fits and one step more that does not.

    ``measure`` gives a length's peak, None where it did not fit; it may raise `OutOfTime`, which
    leaves the bounds as they are then. ``peaks`` are those that fitted, which are not measured
    again and are added to; ``fails`` one that did not. ``start``: where nothing is known.
    """
    misses = 0
    for _ in range(tries):
        low = max(peaks, default=0)
        if fails is not None and fails - low <= step_of(low):
            return Bounds(low, fails)
        length = following(peaks, fails, budget, start, misses)
        try:
            peak = measure(length)
        except OutOfTime as reason:
            return Bounds(low, fails, f"{length:,}: {reason}")
        if peak is None:
            fails, misses = length, misses + 1
        else:
            peaks[length], misses = peak, 0
    return Bounds(max(peaks, default=0), fails, f"{tries} measurements were not enough")


def following(
    peaks: dict[int, float], fails: int | None, budget: float, start: int, misses: int
) -> int:
    """The length to measure next, between what fits and what fails."""
    low = max(peaks, default=0)
    step = step_of(low)
    guess = line(peaks, AIM * budget) or (2 * low if low else start)
    guess = max(guess, low + step)
    if fails is None:
        return guess
    # The line was wrong: back by one step, then two, four, until the middle is nearer.
    back = fails - step * 2 ** max(0, misses - 1)
    middle = rounded((low + fails) // 2)
    return max(low + GRAIN, min(guess, max(back, middle)))


def line(peaks: dict[int, float], budget: float) -> int | None:
    """Where the line through the two longest meets the budget; None without two, or no slope."""
    if len(peaks) < 2:
        return None
    (x, low), (y, high) = sorted(peaks.items())[-2:]
    slope = (high - low) / (y - x)
    return rounded(int(y + (budget - high) / slope)) if slope > 0 else None


def rounded(length: int) -> int:
    """Down to a multiple of `GRAIN`."""
    return length // GRAIN * GRAIN
