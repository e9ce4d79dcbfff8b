"""Time what bounds everything else: a large copy and a large product.

Timed are PyTorch's own on random numbers. Figures: "Ceilings of the machine" in RESULTS.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .measure import interleaved_samples
from .records import COPY, PRODUCT
from .result_file import Results
from .settings import Settings

# Bytes copied, and rows of the square product, by device.
CEILINGS = {"cpu": (2**28, 2048), "cuda": (2**32, 8192)}


def measure(settings: Settings, results: Results) -> None:
    """Time a large copy and a large product."""
    num_bytes, rows = (2**20, 128) if settings.quick else CEILINGS[settings.device]
    like = {"dtype": settings.dtype, "device": settings.device}
    source = torch.empty(num_bytes // settings.dtype.itemsize, **like).normal_()
    copied = torch.empty_like(source)
    left, right = torch.randn(2, rows, rows, **like).unbind()
    product = torch.empty_like(left)
    steps: dict[str, Callable[[], object]] = {
        COPY: lambda: copied.copy_(source),
        PRODUCT: lambda: torch.mm(left, right, out=product),
    }
    amounts = {COPY: {"bytes": 2 * source.nbytes}, PRODUCT: {"operations": 2 * rows**3}}
    samples = interleaved_samples(steps, settings.repeats, settings.device, says="ceilings")
    for who, seconds in samples.items():
        results.add_times(seconds, measure="ceiling", who=who, ours=False, **amounts[who])
