"""The checks of numbers that the host holds, in the precision in which kernels take them."""

from __future__ import annotations

import math
import numbers
from fractions import Fraction

import torch

# Of the numbers above 0 that float32, in which kernels take numbers, holds in full precision.
SMALLEST = torch.finfo(torch.float32).tiny
LARGEST = torch.finfo(torch.float32).max


def check_real(name: str, value: object) -> None:
    """Refuse what is not a number that PyTorch takes: a bool and a fraction are none."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool | Fraction):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def is_finite(value: float) -> bool:
    """Say whether a number is finite in float32, by comparisons: ``torch.compile`` keeps a number
    that changes from call to call symbolic, which ``math.isfinite`` does not take."""
    return -LARGEST <= value <= LARGEST


def check_number(
    name: str, value: float, low: float, high: float = math.inf, *, open_end: bool = False
) -> None:
    """Refuse what is not a finite float32 number in ``[low, high]``, or in ``[low, high)``."""
    check_real(name, value)
    if not (is_finite(value) and low <= value <= high) or (open_end and value == high):
        end = ")" if open_end else "]"
        bounds = f"of at least {low:g}" if high == math.inf else f"in [{low}, {high}{end}"
        raise ValueError(f"{name}: expected a finite float32 number {bounds}, got {value}")
