"""How many kernels one forward and backward launches on an accelerator, products included.

Counted are operations of PyTorch that are no views and make or fill something, inside of our ops
too, and Triton's launches. A sort or a sum may be several kernels of a device, but counts as one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from sftmix_kernels import (
    RowChunks,
    checks,
    fused_cross_entropy,
    fused_mixup_loss,
    fused_sftmix_loss,
)

pytestmark = pytest.mark.interpret


class Launches(TorchDispatchMode):
    """Counts launches by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = OPDEFS.get(func._schema.name)
        if own is not None:
            with self:
                return own._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        empty = isinstance(result, Tensor) and result.numel() == 0
        if not (func.is_view or empty or "empty" in func._schema.name):
            self.names[func._schema.name] += 1
        return result


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """What an accelerator launches: it does not read the values of tensors."""
    counted, launch = Launches(), GridExecutor.__call__

    def launch_uncounted(self: GridExecutor, *args: Any, **options: Any) -> None:
        # The interpreter uses PyTorch operations of its own.
        counted.names[self.fn.__name__] += 1
        with _disable_current_modes():
            launch(self, *args, **options)

    monkeypatch.setattr(GridExecutor, "__call__", launch_uncounted)
    monkeypatch.setattr(checks, "values_are_free", lambda tensor: False)
    return counted


R, D, V, P = 24, 16, 123, 8
LABELS, LAM = torch.arange(R) * 5, torch.linspace(0, 1, P)
PAIRS = {"pair_c": torch.arange(P), "pair_u": torch.arange(P, 2 * P)}


def sftmix(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """With pairs, and rows outside of them."""
    return fused_sftmix_loss(hidden, weight, LABELS, **PAIRS, lam=LAM, **options).loss


def mixup(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return fused_mixup_loss(hidden, hidden, weight, LABELS, LABELS, 0.3, **options)


def ntp(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return fused_cross_entropy(hidden, weight, LABELS, **options)


# At most half of what they were before labels and pairs had kernels of their own: 90, 54 and 37,
# of which a product across dtypes was one. A second chunk of 16 rows comes on top.
@pytest.mark.parametrize(
    ("loss", "schedule", "most"),
    [
        (sftmix, RowChunks(), 45),
        (mixup, RowChunks(), 27),
        (ntp, RowChunks(), 18),
    ],
)
def test_launches_of_one_step(
    launches: Launches, loss: Callable[..., Tensor], schedule: RowChunks, most: int
) -> None:
    hidden, weight = (torch.randn(rows, D, requires_grad=True) for rows in (R, V))
    with launches:
        torch.autograd.grad(loss(hidden, weight, schedule=schedule), (hidden, weight))
    assert sum(launches.names.values()) <= most, launches.names
    waits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}
    assert not waits & launches.names.keys()
