"""What a trace counts is held to bytes and operations counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sftmix.plan.trace import ACTIVATIONS, GRADIENTS, LOSS, WEIGHTS, MemoryTrace, planned_on_host

KB = 1024


def nothing_inside(name: str, args: Any) -> tuple[int, int]:
    return 0, 0


def test_a_trace_counts_storages_until_they_are_freed() -> None:
    with MemoryTrace(nothing_inside) as trace:
        first = torch.empty(256)  # 1 KiB
        view = first.view(16, 16)[2:]
        first.add_(1.0)
        torch.add(first, 1.0, out=first)
        assert trace.held == {ACTIVATIONS: KB}
        trace.moment = "sum"
        total = first + first + first  # of two results one is freed
        assert trace.held.total() == 2 * KB
        assert sum(trace.peaks["sum"].values()) == 3 * KB
        del first
        assert trace.held.total() == 2 * KB  # the view is there
        del view
        assert trace.held.total() == KB
        trace.recount(total, GRADIENTS)
        with trace.counting_as(WEIGHTS):
            weight = torch.empty(512)
        trace.moment = "inside"
        trace.hold_briefly(5 * KB, LOSS)
        trace.hold_briefly(4 * KB, LOSS)
        assert trace.held == {ACTIVATIONS: 0, GRADIENTS: KB, WEIGHTS: 2 * KB, LOSS: 0}
        assert trace.peaks["inside"] == {
            ACTIVATIONS: 0,
            GRADIENTS: KB,
            WEIGHTS: 2 * KB,
            LOSS: 5 * KB,
        }
        del total, weight
        assert trace.held.total() == 0


def test_a_trace_sees_what_autograd_keeps_and_what_lies_on_the_host() -> None:
    with MemoryTrace(nothing_inside) as trace:
        x = torch.empty(4, 256, requires_grad=True)  # 4 KiB
        kept = x.sin().cos()  # keeps x and its sine
        assert trace.held.total() == 12 * KB
        kept.sum().backward()
        del kept
        assert trace.held.total() == 8 * KB  # x and its gradient
        with planned_on_host():
            moved = x.sin().cos()
        assert (trace.host, trace.held.total()) == (8 * KB, 12 * KB)
        moved.sum().backward()
        del moved
        assert (trace.host, trace.host_peak, trace.held.total()) == (0, 8 * KB, 8 * KB)


def test_a_trace_counts_matrix_products() -> None:
    with MemoryTrace(nothing_inside) as trace:
        torch.empty(3, 5) @ torch.empty(5, 7)
        with trace.standing_for(2.5):
            torch.empty(3, 5) @ torch.empty(5, 7)
    assert trace.products == 3.5 * 2 * 3 * 5 * 7


OPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "products": lambda x, w: (x @ w, torch.addmm(w[0], x, w), x.half() @ w.half()),
    "views": lambda x, w: (x.t(), x[1:, ::2], x.view(2, -1), w.expand(3, 8, 8), x.unbind(0)[1]),
    "reductions": lambda x, w: (x.sum(0), x.double().mean(), x.max(1), (x > 0).any()),
    "strides": lambda x, w: (x.t() + 1, x.t().clone(), torch.empty_like(x.t()), x.t().reshape(-1)),
    "promotion": lambda x, w: (x.int() + 1.0, x.int() + 1, x.half() * w[:4, :8], x * 2j),
    "in place": lambda x, w: (x.add_(1), x.t().mul_(2), w.copy_(w[0].clone())),
    "new": lambda x, w: (torch.arange(5), torch.zeros(2, 3, dtype=torch.half), x.new_ones(7)),
    "joined": lambda x, w: (torch.cat([x, w]), torch.stack([x[0], w[0]]), x.split(3)),
    "norms": lambda x, w: torch.nn.functional.layer_norm(x, (8,), w[0], w[1]),
    "indices": lambda x, w: (x[torch.arange(3)], x.gather(1, torch.zeros(4, 2).long())),
}


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_tensors_without_values_have_the_shapes_of_real_ones(
    ops: Callable[[Tensor, Tensor], Any],
) -> None:
    def looks(found: Any) -> list[Any]:
        return [(t.shape, t.stride(), t.dtype, t.device) for t in tree_leaves(found)]

    real = looks(ops(torch.zeros(4, 8), torch.zeros(8, 8)))
    for _ in range(2):  # the second time from memory
        with MemoryTrace(nothing_inside):
            assert looks(ops(torch.zeros(4, 8), torch.zeros(8, 8))) == real


def test_autocast_sees_tensors_without_values() -> None:
    with MemoryTrace(nothing_inside), torch.autocast("cpu", dtype=torch.bfloat16):
        product = torch.zeros(4, 8) @ torch.zeros(8, 8)
    assert (product.dtype, product.device.type) == (torch.bfloat16, "cpu")


def test_a_shape_that_hangs_on_values_is_refused() -> None:
    with MemoryTrace(nothing_inside):
        tensor = torch.zeros(4)
        for op in (torch.nonzero, torch.unique, lambda t: t[t > 0]):
            with pytest.raises(NotImplementedError):
                op(tensor)
    with pytest.raises(AssertionError, match="outside of a trace"):
        tensor + 1
