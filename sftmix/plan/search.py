"""Find the largest length whose peak fits, from few plans.

A peak is piecewise linear in the length, or quadratic where attention makes its scores or a mask:
the line through two lengths next to the limit, or the parabola through a third one, too, points at
the answer, and a plan on either side of it proves it.
"""

from __future__ import annotations

from collections.abc import Callable

GRID = 256
LONGEST = 2**27
# Without a proof, a length whose peak is so near the limit is good enough.
NEAR = 0.01


def step_of(length: int) -> int:
    """Return the step from one length to the next: 256 tokens, or 1/256 of the length if more."""
    return max(GRID, length // 256 // GRID * GRID)


def largest_length(
    peak_of: Callable[[int], int],
    memory: int,
    known: dict[int, int],
    *,
    proven: bool = True,
    longest: int = LONGEST,
) -> int:
    """Return the largest multiple of 256 whose peak fits into `memory` bytes; 0 if 256 is too long.

    Args:
        peak_of: bytes at the peak for a length; it never falls as the length grows.
        memory: bytes there are.
        known: two lengths or more and their peaks.
        proven: go on until the length one step longer is seen not to fit; else the answer may be
            too short by what is 1 % of the memory.
        longest: no longer length is tried; one that ends a step before it may be too short.
    """
    known = dict(known)
    turn = 0
    while True:
        fitting = max((n for n, peak in known.items() if peak <= memory), default=0)
        beyond = min((n for n, peak in known.items() if peak > memory), default=longest)
        step, low = step_of(fitting), fitting // GRID * GRID
        if beyond - low <= step:
            return low
        near = fitting > 0 and known[fitting] >= (1 - NEAR) * memory
        if (near and not proven) or low >= longest:
            return low
        turn += 1
        if turn % 4:
            guess = pointed_at(known, memory, fitting, beyond, bent=turn == 2)
        else:
            guess = (low + beyond) // 2
        if turn % 2 == 0 and near:
            guess = low + step  # the proof
        guess = min(max(guess // step * step, low + step), max(beyond - 1, low + step))
        known[guess] = peak_of(guess)


def ends(largest: int, longest: int) -> bool:
    """Tell whether the search ended at its longest length, with all that it tried."""
    return largest + step_of(largest) >= longest


def pointed_at(known: dict[int, int], memory: int, fitting: int, beyond: int, *, bent: bool) -> int:
    """Return the length at which the line through the two nearest lengths reaches the limit.

    If `bent`, it is the parabola through a third one, too, where that bends upwards.
    """
    lengths = sorted(known)
    below = [n for n in lengths if n <= fitting]
    above = [n for n in lengths if n >= beyond]
    first, second = sorted(
        (below[-1:] + above[:1]) if below and above else (below[-2:] or above[:2])
    )
    slope = slope_of(known, first, second)
    if slope <= 0:
        return 2 * lengths[-1]
    rise = memory - known[first]
    guess = rise / slope
    others = [n for n in lengths if n not in (first, second)] if bent else []
    if others:
        third = min(others, key=lambda n: abs(n - first - guess))
        bend = (slope_of(known, second, third) - slope) / (third - first)
        guess = root_of(bend, slope - bend * (second - first), rise, guess)
    return max(0, min(LONGEST, int(first + guess)))


def slope_of(known: dict[int, int], first: int, second: int) -> float:
    """Return the bytes that a token adds between two lengths."""
    return (known[second] - known[first]) / (second - first)


def root_of(bend: float, slope: float, rise: float, otherwise: float) -> float:
    """Return the larger x at which `bend x^2 + slope x` is `rise`, if it bends upwards."""
    square = slope * slope + 4 * bend * rise
    return (square**0.5 - slope) / (2 * bend) if bend > 0 and square >= 0 else otherwise
