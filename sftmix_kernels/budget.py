"""The error budget: how far from float64 a result may lie. Tests and benchmarks use it alike.

With ``truth`` the dense reference in float64 and ``torch_error`` what dense PyTorch in the inputs'
own dtype is off by, over a tensor

    rms(ours - truth) <= 2 rms(torch_error) + eps rms(truth)
    max|ours - truth| <= 4 max|torch_error| + 4 eps max|truth|

where eps is that of our result's dtype. The root mean square judges; the maximum, which differs by
chance from one instruction set to the next, only keeps single elements from being far off.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Budget(NamedTuple):
    """The errors of one result, and the limit of each."""

    rms: float
    rms_limit: float
    largest: float
    largest_limit: float

    @property
    def holds(self) -> bool:
        """Say whether both errors are within their limits. NaN never is."""
        return self.rms <= self.rms_limit and self.largest <= self.largest_limit

    @property
    def says(self) -> str:
        """Write the errors beside their limits."""
        return (
            f"rms {self.rms:.3g} of at most {self.rms_limit:.3g}, "
            f"largest {self.largest:.3g} of at most {self.largest_limit:.3g}"
        )


def budget(
    found: Tensor,
    truth: Tensor,  # float64, of the same shape
    torch_error: Tensor,  # of any shape
) -> Budget:
    """Hold a result to the error budget.

    For a scalar loss, ``torch_error`` is the sum of the errors of what adds up to it, each by its
    magnitude (`added_up`): in a single scalar they may cancel by chance.

    Raises:
        ValueError: the shapes differ.
    """
    if found.shape != truth.shape:
        raise ValueError(f"found: expected shape {tuple(truth.shape)}, got {tuple(found.shape)}")
    found, truth, torch_error = found.detach(), truth.detach(), torch_error.detach()
    error, eps = found.double() - truth, torch.finfo(found.dtype).eps
    return Budget(
        rms=rms(error),
        rms_limit=2 * rms(torch_error) + eps * rms(truth),
        largest=largest(error),
        largest_limit=4 * largest(torch_error) + 4 * eps * largest(truth),
    )


def added_up(parts: Tensor, true_parts: Tensor) -> Tensor:
    """Return the errors of a scalar's parts, added up by magnitude so that none cancel."""
    return (parts.double() - true_parts).abs().sum().detach()


def rms(tensor: Tensor) -> float:
    """Return the root mean square, which is 0 for an empty tensor."""
    norm = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return float(norm) / math.sqrt(max(1, tensor.numel()))


def largest(tensor: Tensor) -> float:
    """Return the largest absolute value: NaN where there is one, 0 for an empty tensor."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0
