"""Check providers before anything is timed: loss and gradients against float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sftmix_kernels import reference
from sftmix_kernels.budget import added_up, budget, largest

from .inputs import Inputs
from .providers import MU, Loss
from .records import BOTH, MIXUP, NTP


def ntp_rows(x: Inputs) -> Tensor:
    """Return the reference of NTP, as what adds up to the loss."""
    rows = reference.cross_entropy(x.hidden, x.weight, x.labels, reduction="none")
    return rows / rows.numel()


def mixup_rows(x: Inputs) -> Tensor:
    """Return the reference of Mixup, as what adds up to the loss."""
    hidden, labels = x.hidden.chunk(2), x.labels.chunk(2)
    rows = reference.mixup_loss(*hidden, x.weight, *labels, x.lam, reduction="none")
    return rows / rows.numel()


def sftmix_rows(x: Inputs) -> Tensor:
    """Return the reference of NTP + Mixup, as what adds up to the loss."""
    return torch.cat((ntp_rows(x), MU * mixup_rows(x)))


ROWS: dict[str, Loss] = {NTP: ntp_rows, MIXUP: mixup_rows, BOTH: sftmix_rows}


def step(loss: Loss, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Run forward and backward: return the loss and two gradients."""
    value = loss(x)
    return value.detach(), *torch.autograd.grad(value, (x.hidden, x.weight))


class Errors(NamedTuple):
    """The errors of the loss, dH and dW in turn, against float64."""

    largest: tuple[float, ...]
    dense_largest: tuple[float, ...]  # of the reference in the inputs' own dtype
    relative: tuple[float, ...]  # of norms
    in_budget: bool

    def passed(self, limit: float | None) -> bool:
        """Tell whether they are in the error budget, or within ``limit``. NaN never is."""
        return self.in_budget if limit is None else all(r <= limit for r in self.relative)

    def says(self, limit: float | None) -> str:
        """Return why they did not pass."""
        allowed = "the error budget" if limit is None else f"{limit:g}"
        return f"over {allowed}: relative errors of loss, dH, dW {self.relative}"

    def of_dense(self) -> float:
        """Return the worst of the gradients' errors, by those of dense PyTorch."""
        pairs = zip(self.largest[1:], self.dense_largest[1:], strict=True)
        return max(own / max(other, 1e-300) for own, other in pairs)


class Oracle:
    """The reference of a task on some inputs, in float64 and in the inputs' own dtype.

    It holds loss and gradients to the error budget (`sftmix_kernels.budget`).
    """

    def __init__(self, task: str, x: Inputs) -> None:
        self.x, rows = x, ROWS[task]
        hidden, weight = (t.detach().double().requires_grad_() for t in (x.hidden, x.weight))
        doubles = x._replace(hidden=hidden, weight=weight)
        plain, self.truth = (step(lambda v: rows(v).sum(), values) for values in (x, doubles))
        self.torch_errors = [
            (p.double() - t).float() for p, t in zip(plain, self.truth, strict=True)
        ]
        with torch.no_grad():
            self.torch_errors[0] = added_up(rows(x), rows(doubles))

    def errors(self, found: Sequence[Tensor]) -> Errors:
        """Return the errors of loss and gradients that `step` gave for these inputs."""
        used = [budget(*each) for each in zip(found, self.truth, self.torch_errors, strict=True)]
        relative = [
            float((f.double() - t).norm() / t.norm())
            for f, t in zip(found, self.truth, strict=True)
        ]
        return Errors(
            largest=tuple(one.largest for one in used),
            dense_largest=tuple(largest(error) for error in self.torch_errors),
            relative=tuple(relative),
            in_budget=all(one.holds for one in used),
        )
