"""Tensors without values, made by PyTorch's own rules of shapes.

An op on them makes tensors of the right shapes and computes nothing. It runs on meta tensors once
for each set of shapes, and what came out is remembered. PyTorch's `FakeTensorMode` makes the same
tensors, and asks of each op what a plan has no use for: constants, symbolic shapes, other devices.
A step of two Llama layers takes 0.22 s of an AMD EPYC core here, and 0.90 s there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

CPU, META = torch.device("cpu"), torch.device("meta")


class Block:
    """The memory of a tensor and of its views, until the last of them is gone."""

    __slots__ = ("free", "part", "size")

    def __init__(self, size: int, part: str, free: Callable[[Block], None]) -> None:
        self.size, self.part, self.free = size, part, free

    def __del__(self) -> None:
        self.free(self)


class Hollow(FakeTensor):
    """A tensor on the CPU without values; code that asks takes it for PyTorch's own fake one."""

    block: Block
    form: int
    device = Tensor.device
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[Hollow], result: Result, block: Block) -> Hollow:
        """Make a tensor of the result's shape."""
        tensor: Hollow = Tensor._make_wrapper_subclass(
            cls, result.shape, result.stride, dtype=result.dtype, device=CPU
        )
        tensor.block, tensor.form = block, result.form
        return tensor

    def __init__(self, *_: Any) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        """Refuse to run outside of a trace."""
        raise AssertionError(f"{func} outside of a trace")


class Result(NamedTuple):
    """What an op returns for some shapes: one of its tensors, a view of one, or a new tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    size: int  # bytes of the memory
    source: int | None  # place of the argument's tensor whose memory it shares
    same: bool  # whether it is that tensor itself
    form: int


_known: dict[Any, tuple[Any, Any]] = {}
_forms: dict[Any, int] = {}


def form_of(tensor: Tensor) -> int:
    """Return a number for shape, strides and dtype, which is compared faster than they are."""
    return _forms.setdefault((tensor.shape, tensor.stride(), tensor.dtype), len(_forms))


def run(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], hold: Callable[[int], Block]
) -> Any:
    """Return what an op returns, without its values; `hold` makes the memory of a new tensor.

    Raises:
        NotImplementedError: a shape hangs on values.
    """
    given: list[Tensor] = []
    # By its id, which is its own as long as `_known` holds it: an op's own hash is Python code.
    shapes = described(args, given)
    key = id(func), shapes, described(tuple(kwargs.items()), given) if kwargs else ()
    if not given and not takes_device(func):
        return func(*args, **kwargs)  # a profiler's marks
    try:
        _, found = _known[key]
    except KeyError:
        found = results(func, args, kwargs)
        _known[key] = func, found
    return made(found, given, hold)


@functools.cache
def takes_device(func: Any) -> bool:
    """Tell whether an op has an argument for the device of new tensors."""
    return any(argument.name == "device" for argument in func._schema.arguments)


def described(value: Any, given: list[Tensor]) -> Any:
    """Return all of an argument that decides the shapes of results, and collect its tensors."""
    if type(value) is Hollow:
        given.append(value)
        return value.form
    if isinstance(value, list | tuple):
        return tuple([described(item, given) for item in value])
    if isinstance(value, Tensor):
        given.append(value)
        return form_of(value)
    return type(value), value


def results(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an op on meta tensors; return its results with a `Result` in each tensor's place."""
    metas: list[Tensor] = []
    # Dropped later than the op's results: a freed tensor's memory would be taken for another's.
    on_meta = [hollowed(item, metas) for item in args]
    named = {name: hollowed(item, metas) for name, item in kwargs.items()}
    if takes_device(func):
        named["device"] = META
    memories = [meta.untyped_storage()._cdata for meta in metas]

    def of(out: Any) -> Any:
        if isinstance(out, list | tuple):
            return [of(item) for item in out]
        if not isinstance(out, Tensor):
            return out
        storage = out.untyped_storage()
        shared = storage._cdata in memories
        source = memories.index(storage._cdata) if shared else None
        same = source is not None and out is metas[source]
        form = form_of(out)
        return Result(out.shape, out.stride(), out.dtype, storage.nbytes(), source, same, form)

    return of(func(*on_meta, **named))


def hollowed(value: Any, metas: list[Tensor]) -> Any:
    """Return an argument with meta tensors, which it collects, in place of others."""
    if isinstance(value, Tensor):
        shape, stride = value.shape, value.stride()
        metas.append(torch.empty_strided(shape, stride, dtype=value.dtype, device=META))
        return metas[-1]
    if isinstance(value, list | tuple):
        return [hollowed(item, metas) for item in value]
    return value


def made(found: Any, given: list[Tensor], hold: Callable[[int], Block]) -> Any:
    """Return results with tensors in place of each `Result`."""
    if isinstance(found, list):
        return [made(item, given, hold) for item in found]
    if not isinstance(found, Result):
        return found
    if found.source is None:
        return Hollow(found, hold(found.size))
    tensor = given[found.source]
    if found.same and isinstance(tensor, Hollow):
        return tensor
    # A tensor with values, such as a constant, is held as soon as an op looks at it.
    return Hollow(found, tensor.block if isinstance(tensor, Hollow) else hold(found.size))
