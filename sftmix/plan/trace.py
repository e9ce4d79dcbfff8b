"""Measure what PyTorch code holds at its peak, on tensors that have no values.

Under a `MemoryTrace` an op makes tensors of the right shapes and computes nothing. The trace counts
their memory, from the op that makes one until nobody holds it. So views and in-place ops count
nothing, and tensors that autograd saves count until they are freed.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sftmix.plan.hollow import Block, run

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
ACTIVATIONS, LOSS = "activations", "loss workspace"
PARTS = (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOSS)

# The fused losses are ops that allocate inside, unseen.
LOSS_OPS = "sftmix_kernels::"

# Name and positional arguments of a fused loss's op -> its own bytes, and its products' operations.
LossCost = Callable[[str, Sequence[Any]], tuple[int, int]]


VALUE = torch.ops.aten._local_scalar_dense.default


class Op(NamedTuple):
    """What a trace asks of an op whenever it runs."""

    func: Any  # held, so that its id stays its own
    loss: str  # the name of a fused loss, "" for any other op
    operations: Callable[..., int] | None  # of its matrix products
    share: int  # a causal attention multiplies half of what its shapes say


_ops: dict[int, Op] = {}  # by id: an op's own hash is Python code


def op_of(func: Any) -> Op:
    """Return what is asked of an op."""
    op = _ops.get(id(func))
    if op is None:
        name = func.name()
        loss = name.removeprefix(LOSS_OPS) if name.startswith(LOSS_OPS) else ""
        operations = flop_registry.get(func.overloadpacket)
        op = _ops[id(func)] = Op(func, loss, operations, 2 if "attention" in name else 1)
    return op


class MemoryTrace(TorchDispatchMode):
    """Count bytes held now and at each moment's peak, by part, and matrix products' operations.

    New storages count as `part`, and peaks are kept under the name `moment`; the caller sets both
    as the code goes on. Code that asks for a value gets True: nothing is padded, all is finite.
    """

    def __init__(self, loss_cost: LossCost) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.loss_cost = loss_cost
        self.part, self.moment = ACTIVATIONS, ""
        self.held: Counter[str] = Counter()
        self.total = 0
        self.peaks: dict[str, dict[str, int]] = {}
        self.highest: dict[str, int] = {}  # total of each of `peaks`
        self.host = self.host_peak = 0
        self.products, self.times = 0, 1.0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing here is compiled, and a guard around each op would take a tenth of the time.
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is VALUE:
            return True
        kwargs = kwargs or {}
        op = op_of(func)
        if op.loss:
            result = run(func, args, kwargs, lambda size: self.hold(size, LOSS))
            inside, products = self.loss_cost(op.loss, args)
            self.hold_briefly(inside, LOSS)
            self.products += products
            return result
        result = run(func, args, kwargs, self.hold)
        if op.operations is not None:
            count = op.operations(*args, **kwargs, out_val=result)
            self.products += int(self.times * count) // op.share
        return result

    def hold(self, size: int, part: str | None = None) -> Block:
        """Count bytes until the block that is returned is gone."""
        part = part or self.part
        self.held[part] += size
        self.total += size
        self.note_peak()
        return Block(size, part, self.release)

    def release(self, block: Block) -> None:
        """Count a block's bytes no longer."""
        self.held[block.part] -= block.size
        self.total -= block.size

    def recount(self, tensor: Any, part: str) -> None:
        """Count a tensor that is held already as another part from now on."""
        block = tensor.block
        self.held[block.part] -= block.size
        block.part = part
        self.held[part] += block.size

    def hold_briefly(self, size: int, part: str) -> None:
        """Count bytes that an op takes and gives back before it returns."""
        self.held[part] += size
        self.total += size
        self.note_peak()
        self.held[part] -= size
        self.total -= size

    def note_peak(self) -> None:
        """Keep the bytes held now if they are the most so far in this moment."""
        if self.total > self.highest.get(self.moment, -1):
            self.highest[self.moment] = self.total
            self.peaks[self.moment] = dict(self.held)

    def forget_peaks(self) -> None:
        """Count only the peaks from here on."""
        self.highest.clear()
        self.peaks.clear()

    @contextlib.contextmanager
    def counting_as(self, part: str) -> Iterator[None]:
        """Count new storages as this part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    @contextlib.contextmanager
    def standing_for(self, times: float) -> Iterator[None]:
        """Count matrix products so many times, when only some of several equal ones are made."""
        before, self.times = self.times, times
        try:
            yield
        finally:
            self.times = before

    def __enter__(self) -> MemoryTrace:
        _active.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _active.pop()


_active: list[MemoryTrace] = []


def active_trace() -> MemoryTrace:
    """Return the trace that is running, for ops that report to it."""
    return _active[-1]


class OnHost:
    """A tensor that was moved to the host: its bytes count there while this object lives."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        trace, size = active_trace(), tensor.nbytes
        trace.host += size
        trace.host_peak = max(trace.host_peak, trace.host)
        weakref.finalize(self, _leave_host, trace, size)

    def back(self) -> Tensor:
        """Return a new tensor on the device; the bytes on the host stay."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


def _leave_host(trace: MemoryTrace, size: int) -> None:
    trace.host -= size


def planned_on_host() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which autograd saves on the host, as `save_on_cpu` does on a GPU."""
    return torch.autograd.graph.saved_tensors_hooks(OnHost, OnHost.back)
