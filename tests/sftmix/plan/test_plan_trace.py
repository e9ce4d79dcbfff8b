"""What a trace counts is held to bytes and operations counted by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sftmix.plan.trace import ACTIVATIONS, GRADIENTS, LOSS, WEIGHTS, MemoryTrace, planned_on_host

KB = 1024


def nothing_inside(name: str, args: Any) -> tuple[int, int]:
    return 0, 0


def test_a_trace_counts_storages_until_they_are_freed() -> None:
    with FakeTensorMode(), MemoryTrace(nothing_inside) as trace:
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
    with FakeTensorMode(), MemoryTrace(nothing_inside) as trace:
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
    with FakeTensorMode(), MemoryTrace(nothing_inside) as trace:
        torch.empty(3, 5) @ torch.empty(5, 7)
        with trace.standing_for(2.5):
            torch.empty(3, 5) @ torch.empty(5, 7)
    assert trace.products == 3.5 * 2 * 3 * 5 * 7
