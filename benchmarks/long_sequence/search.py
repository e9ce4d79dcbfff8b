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

    ``measure`` gives a length's peak, which may be over the budget, or None where it ran out of
    memory; it may raise `OutOfTime`, which leaves the bounds as they are then. ``peaks`` are those
    that are known, which is added to; ``fails`` a length that ran out of memory. ``start``: where
    nothing is known.
    """
    misses = 0
    for _ in range(tries):
        low, high = bounds(peaks, fails, budget)
        if high is not None and high - low <= step_of(low):
            return Bounds(low, high)
        length = following(peaks, low, high, budget, start, misses)
        try:
            peak = measure(length)
        except OutOfTime as reason:
            return Bounds(low, high, f"{length:,}: {reason}")
        if peak is None:
            fails, misses = length, misses + 1
        else:
            peaks[length], misses = peak, 0
    return Bounds(*bounds(peaks, fails, budget), f"{tries} measurements were not enough")


def bounds(peaks: dict[int, float], fails: int | None, budget: float) -> tuple[int, int | None]:
    """The longest length that fits below the shortest that does not, and that one."""
    over = [length for length, peak in peaks.items() if peak > budget]
    high = min([*over, *([] if fails is None else [fails])], default=None)
    fitting = (n for n, peak in peaks.items() if peak <= budget and (high is None or n < high))
    return max(fitting, default=0), high


def following(
    peaks: dict[int, float],
    low: int,
    high: int | None,
    budget: float,
    start: int,
    misses: int,
) -> int:
    """The length to measure next, between what fits and what does not."""
    step = step_of(low)
    guess = line(peaks, low, budget)
    if high is None:
        return max(guess or (2 * low or start), low + step)
    if guess is None or guess >= high:
        # The line is wrong: back by a step, then two, four, no further than to the middle.
        middle = rounded((low + high) // 2)
        guess = max(high - step_of(high) * 2 ** (misses - 1), middle) if low and misses else middle
    return min(max(guess, low + step), high - GRAIN)


def line(peaks: dict[int, float], low: int, budget: float) -> int | None:
    """Where a line meets the budget: through ``low`` and the point after it, or the one before.

    None without two points, or where the line does not rise.
    """
    lengths = sorted(peaks)
    if len(lengths) < 2:
        return None
    place = lengths.index(low) if low in peaks else 0
    first = min(place, len(lengths) - 2)
    x, y = lengths[first : first + 2]
    slope = (peaks[y] - peaks[x]) / (y - x)
    # Between two points the line is sure; beyond them it aims a little lower.
    aim = budget if x <= low < y else AIM * budget
    return rounded(int(x + (aim - peaks[x]) / slope)) if slope > 0 else None


def rounded(length: int) -> int:
    """Down to a multiple of `GRAIN`."""
    return length // GRAIN * GRAIN
