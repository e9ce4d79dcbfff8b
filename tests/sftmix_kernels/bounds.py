"""What Triton's interpreter does not see: a load or a store outside of the kernel's tensors.

A GPU reads past the end of a tensor in silence, and so does the interpreter. Here each launch notes
which bytes its tensors have, and each access that its mask lets through must lie in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import pytest
from torch import Tensor


class Extent(NamedTuple):
    """The bytes of a tensor, with the padding behind its last row."""

    start: int
    stop: int

    @classmethod
    def of(cls, tensor: Tensor) -> Extent:
        """Return the bytes that a kernel may touch by way of a tensor."""
        storage, start = tensor.untyped_storage(), tensor.data_ptr()
        # An expanded tensor has one element at least.
        rows = zip(tensor.shape, tensor.stride(), strict=True)
        size = max(1, *(count * stride for count, stride in rows), 1) * bool(tensor.numel())
        stop = storage.data_ptr() + storage.nbytes()
        return cls(start, min(start + size * tensor.itemsize, stop))


def tensors_in(arguments: Any) -> Iterator[Tensor]:
    """Yield the tensors of a launch, also those in tuples."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from tensors_in(argument)


class Launch:
    """The launch under way, and what it may touch."""

    def __init__(self) -> None:
        self.kernel, self.extents = "", [Extent(0, 0)]

    def begin(self, kernel: str, arguments: Any) -> None:
        """Note the tensors of a launch."""
        self.kernel = kernel
        self.extents = sorted({Extent.of(tensor) for tensor in tensors_in(arguments)})

    def check(self, access: str, pointers: Any, mask: Any) -> None:
        """Refuse an access that lies in no tensor, unless it is masked off."""
        let_through = np.atleast_1d(np.asarray(mask.data, dtype=bool))
        addresses = np.atleast_1d(pointers.data)[let_through]
        if not addresses.size:
            return
        size = pointers.get_element_ty().primitive_bitwidth // 8
        low, high = int(addresses.min()), int(addresses.max()) + size
        if any(start <= low and high <= stop for start, stop in self.extents):
            return
        inside = np.zeros(addresses.shape, dtype=bool)
        for start, stop in self.extents:
            inside |= (addresses >= start) & (addresses + np.uint64(size) <= stop)
        if not inside.all():
            raise IndexError(
                f"{self.kernel}: {access} outside of all tensors, "
                f"{np.count_nonzero(~inside)} of {inside.size} elements"
            )


@contextmanager
def checked_bounds() -> Iterator[None]:
    """Let the interpreter refuse what lies outside of the tensors of a launch."""
    interpreter = import_module("triton.runtime.interpreter")
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    to_host, load, store = (
        executor._init_args_hst,
        builder.create_masked_load,
        builder.create_masked_store,
    )
    launch = Launch()

    def begin(self: Any, args: Any, kwargs: Any) -> Any:
        found = to_host(self, args, kwargs)
        launch.begin(self.fn.__name__, (*found[0], *found[1].values()))
        return found

    def checked_load(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        launch.check("a load", pointers, mask)
        return load(self, pointers, mask, *more)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        launch.check("a store", pointers, mask)
        return store(self, pointers, value, mask, *more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(executor, "_init_args_hst", begin)
        patched.setattr(builder, "create_masked_load", checked_load)
        patched.setattr(builder, "create_masked_store", checked_store)
        yield
