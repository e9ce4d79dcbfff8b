"""Check who computes a loss before it is timed: loss and gradients against float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sftmix_kernels import reference
from sftmix_kernels.budget import added_up, budget, largest

from .inputs import MU, Inputs, Loss
from .measure import SuiteError
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


def both_rows(x: Inputs) -> Tensor:
    """Return the reference of NTP + Mixup, as what adds up to the loss."""
    return torch.cat((ntp_rows(x), MU * mixup_rows(x)))


ROWS: dict[str, Loss] = {NTP: ntp_rows, MIXUP: mixup_rows, BOTH: both_rows}


class Oracle:
    """A reference on some inputs, in float64 and in the inputs' own dtype."""

    def __init__(self, rows: Loss, x: Inputs) -> None:
        """Take what gives the numbers that add up to the loss: of a task that of `ROWS`."""
        self.x = x
        hidden, weight = (t.detach().double().requires_grad_() for t in (x.hidden, x.weight))
        doubles = x._replace(hidden=hidden, weight=weight)
        results = []
        for values in (x, doubles):
            loss = rows(values).sum()
            results.append(
                (loss.detach(), *torch.autograd.grad(loss, (values.hidden, values.weight)))
            )
        plain, self.truth = results
        self.dense = [(p.double() - t).float() for p, t in zip(plain, self.truth, strict=True)]
        with torch.no_grad():
            self.dense[0] = added_up(rows(x), rows(doubles))

    def check(self, found: Sequence[Tensor], limit: float | None = None) -> dict[str, float]:
        """Return the errors of a loss, its dH and dW for these inputs, as records have them.

        Raises:
            SuiteError: they are over the error budget (`sftmix_kernels.budget`), or where ``limit``
                is given over it, relative and by norms. NaN never passes.
        """
        used = [budget(*each) for each in zip(found, self.truth, self.dense, strict=True)]
        relative = [
            float((f.double() - t).norm() / t.norm())
            for f, t in zip(found, self.truth, strict=True)
        ]
        in_budget = all(one.holds for one in used)
        if not (in_budget if limit is None else all(r <= limit for r in relative)):
            allowed = "the error budget" if limit is None else f"{limit:g}"
            raise SuiteError(f"over {allowed}: relative errors of loss, dH, dW {tuple(relative)}")
        gradients = zip(used[1:], self.dense[1:], strict=True)
        return {
            "loss_error": used[0].largest,
            "relative_error": max(relative[1:]),
            "error_of_dense": max(u.largest / max(largest(d), 1e-300) for u, d in gradients),
        }
