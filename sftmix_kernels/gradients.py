"""Gradients of an op call: products added up in float32, and what backward hands out.

Legend: R rows of hidden, K rows of one chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .schedules import FAST_DTYPES, is_fake, rounds_once, runs_triton

Backward = Callable[..., tuple[Tensor | None, ...]]


# Bytes of the float32 copy of some tokens' rows of a weight in half precision, or of a gradient's.
TILE_BYTES = 2**23


class Gradients:
    """The gradients of one op call, filled chunk by chunk; what is not needed is not allocated.

    ``hidden`` (R, D) in its own dtype, or in float32 where ranks add theirs up; ``weight`` (V, D)
    and ``bias`` (V,) in float32, since sums over many chunks diverge in bfloat16; of one chunk it
    may be made in bfloat16 (`rounds_once`). ``scale`` multiplies all of them, at no cost: a product
    has a factor of its own.

    With ``keeps`` one chunk has all rows, and ``weight`` is its ``G`` (R, V). Backward multiplies
    it with ``gathered``, the rows of hidden (R, D): `weight_gradient`.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        needs_gradient: list[bool],
        num_rows: int,
        *,
        partial: bool = False,
        scale: float = 1.0,
        keeps: bool = False,
        chunk_rows: int | None = None,
    ) -> None:
        self.needs_hidden, self.needs_weight, self.needs_bias = needs_gradient
        self.needed = any(needs_gradient)
        self.first, self.scale, self.keeps = True, scale, keeps
        shape = hidden.shape if self.needs_hidden else torch.Size((0,))
        self.hidden = unwritten(hidden, shape, torch.float32 if partial else hidden.dtype)
        # The first chunk overwrites dW, so that only an op without rows has to clear it.
        shape = weight.shape if self.needs_weight and not keeps else torch.Size((0,))
        rounds = chunk_rows is not None and rounds_once(hidden.shape[0], chunk_rows, weight)
        dtype = weight.dtype if rounds and not partial else torch.float32
        self.weight = weight.new_empty(shape, dtype=dtype)
        if num_rows == 0:
            self.weight.zero_()
        self.bias = weight.new_zeros(weight.shape[0] if self.needs_bias else 0, dtype=torch.float32)
        self.gathered = hidden.new_empty(0)

    def add_chunk(
        self, gradient: Tensor, hidden: Tensor, weight: Tensor, rows: Tensor | slice
    ) -> None:
        """Add ``dH[rows] = G W``, ``dW += G^T H`` and ``db += sum G`` of one chunk's ``G``."""
        if self.needs_hidden:
            place = self.hidden[rows] if isinstance(rows, slice) else None
            of_rows = product(gradient, weight, self.hidden.dtype, self.scale, out=place)
            if isinstance(rows, Tensor):
                self.hidden.index_copy_(0, rows, of_rows)
        if self.keeps:
            self.weight, self.gathered = gradient, hidden
        elif self.needs_weight:
            add_product_(self.weight, gradient.t(), hidden, self.scale, overwrite=self.first)
        if self.needs_bias:
            self.bias.add_(gradient.sum(0, dtype=torch.float32), alpha=self.scale)
        self.first = False

    @property
    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What an op of rows returns: ``dH``, ``dW`` or ``G``, ``db``, and ``gathered``."""
        return self.hidden, self.weight, self.bias, self.gathered


def unwritten(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return room for a number of each row, or for several, all of which are still to be written.

    The CPU leaves out rows that do not count: they are 0. Elsewhere every row is written once, and
    one that is not, since another was paired twice, stays NaN.
    """
    return like.new_full(shape, 0.0 if on_plain_cpu(like) else torch.nan, dtype=dtype)


def weight_tiles(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield some tokens and their rows of the weight in float32, a few MiB at a time.

    All of them are written into the same room.
    """
    step = max(1, TILE_BYTES // (4 * weight.shape[1]))
    room = weight.new_empty(min(step, weight.shape[0]), weight.shape[1], dtype=torch.float32)
    for first in range(0, weight.shape[0], step):
        tokens = slice(first, min(first + step, weight.shape[0]))
        yield tokens, room[: tokens.stop - first].copy_(weight[tokens])


def product(
    left: Tensor,
    right: Tensor,
    dtype: torch.dtype,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``scale * left @ right`` in ``dtype``, without rounding to half precision before.

    It is written into ``out``, where that is given.
    """
    if left.dtype == right.dtype == dtype:
        result = torch.mm(left, right, out=out)
        return result if scale == 1.0 else result.mul_(scale)
    total = left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32)
    if left.dtype == right.dtype or left.is_cuda:
        add_product_(total, left, right, scale, overwrite=True)
    else:
        # G in float32, the weight not.
        total.zero_()
        for tokens, tile in weight_tiles(right):
            total.addmm_(left[:, tokens].float(), tile, alpha=scale)
    return total.to(dtype) if out is None else out.copy_(total)


def add_product_(
    total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0, *, overwrite: bool
) -> None:
    """Add ``scale * left @ right`` to ``total`` in its dtype, with no temporary of total's size.

    On a GPU ``scale`` is 1 (`DividedBy`).
    """
    beta = 0 if overwrite else 1
    if left.dtype == total.dtype == right.dtype:
        torch.addmm(total, left, right, beta=beta, alpha=scale, out=total)
    elif left.dtype == torch.float32:
        torch.addmm(total, left, right.float(), beta=beta, alpha=scale, out=total)
    elif not left.is_cuda:
        # A fast product in half precision is rounded to it, once a chunk.
        dtype = left.dtype if left.dtype in FAST_DTYPES else torch.float32
        right, step = right.to(dtype), max(1, TILE_BYTES // (4 * total.shape[1]))
        for part, some in zip(total.split(step), left.split(step), strict=True):
            partial = some.to(dtype) @ right
            if overwrite:
                part.copy_(partial).mul_(scale)
            else:
                part.add_(partial, alpha=scale)
    elif overwrite:
        torch.mm(left, right, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def is_traced(tensor: Tensor) -> bool:
    """Say whether what happens to a tensor is written down, for inputs with other values."""
    if torch.compiler.is_compiling():
        return True
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    return mode is not None or not (type(tensor) is Tensor or is_fake(tensor))


class DividedBy(Enum):
    """Who divides the gradients by a loss's divisor, so that backward has little left to do."""

    PRODUCTS = "on the CPU, which knows the divisor, the factors of products"
    ROWS = "elsewhere the row weights, so that neither the host waits nor a rounding is added"
    BACKWARD = "in float16, where they might vanish before the loss scale multiplies them, backward"


def divided_by(weight: Tensor) -> DividedBy:
    """Return who divides the gradients of a call with this head."""
    if weight.dtype == torch.float16:
        return DividedBy.BACKWARD
    return DividedBy.PRODUCTS if on_plain_cpu(weight) else DividedBy.ROWS


def on_plain_cpu(tensor: Tensor) -> bool:
    """Say whether a tensor is on the CPU for its own sake, and not for an accelerator's."""
    return tensor.device.type == "cpu" and not runs_triton(tensor)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``factor * gradient``, computed in float32 and rounded once to ``dtype``.

    In the same dtype that is the gradient itself where it costs nothing: with any factor where a
    kernel multiplies in place, on the CPU with a factor of 1, which is free to look at. A copy of
    dW would double what the loss holds. A graph that is kept for another backward needs it once
    more, whatever its receiver does to it.
    """
    if not is_traced(factor):
        in_place = multiplies_in_place(gradient, factor, dtype)
        # A fake tensor has no values: it stands for the upstream gradient of a training step.
        if in_place or (gradient.dtype == dtype and is_one(factor)):
            kept = torch._C._autograd._get_current_graph_task_keep_graph()
            if not kept:
                return scale_(gradient, factor) if in_place else gradient
            if not in_place:
                return gradient.clone()
    if gradient.dim() == 2:
        return scaled_copy(gradient, factor, dtype)  # type: ignore[no-any-return]
    return multiplied(gradient, factor, dtype)


def multiplies_in_place(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> bool:
    """Say whether a kernel can multiply a matrix by one number where it is."""
    one_number = factor.dim() == 0 and gradient.dim() == 2
    return one_number and gradient.dtype == dtype and runs_triton(gradient)


def is_one(factor: Tensor) -> bool:
    """Say whether a factor is 1, where looking at it is free."""
    if is_fake(factor):
        return factor.numel() == 1
    return on_plain_cpu(factor) and factor.numel() == 1 and float(factor) == 1.0


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply a gradient in place; the kernel looks at the factor and does nothing if it is 1."""
    if not is_fake(gradient):
        from .scaling import scaled_rows

        scaled_rows(gradient, factor, out=gradient)
    return gradient


@torch.library.custom_op("sftmix_kernels::scaled_copy", mutates_args=())
def scaled_copy(
    gradient: Tensor,  # (R, D)
    factor: Tensor,  # () or (R, 1) float32
    dtype: torch.dtype,
) -> Tensor:  # (R, D)
    """Return ``factor * gradient`` in ``dtype``, and never the gradient itself."""
    if runs_triton(gradient):
        from .scaling import scaled_rows

        return scaled_rows(gradient, factor, out=gradient.new_empty(gradient.shape, dtype=dtype))
    if gradient.device.type != "cpu" or gradient.dtype == dtype == torch.float32:
        return multiplied(gradient, factor, dtype)
    # PyTorch multiplies across dtypes by way of whole float32 tensors.
    step = max(1, TILE_BYTES // (4 * max(1, gradient.shape[1])))
    result = torch.empty_like(gradient, dtype=dtype)
    factors = factor.expand(gradient.shape[0], 1)
    parts = zip(*(t.split(step) for t in (result, gradient, factors)), strict=True)
    for part, some, some_factors in parts:
        part.copy_(some * some_factors)
    return result


@scaled_copy.register_fake
def _(gradient: Tensor, _factor: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty(gradient.shape, dtype=dtype)


def multiplied(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``factor * gradient`` by PyTorch, in ``dtype``."""
    # With a dimension the factor takes part in type promotion; without, it would be rounded to
    # the gradient's dtype before the product.
    factor = factor if factor.dim() else factor.reshape(1)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


@torch.library.custom_op("sftmix_kernels::weight_gradient", mutates_args=())
def weight_gradient(
    gradient: Tensor,  # (K, V)
    hidden: Tensor,  # (K, D)
) -> Tensor:  # (V, D)
    """Return ``dW = G^T H`` of all rows, by one product."""
    with torch.autocast(gradient.device.type, enabled=False):
        return gradient.t() @ hidden


@weight_gradient.register_fake
def _(gradient: Tensor, hidden: Tensor) -> Tensor:
    return hidden.new_empty(gradient.shape[1], hidden.shape[1])


def unit_of(upstream: Tensor) -> Tensor:
    """Return the largest finite upstream gradient, as the unit in which rows are computed.

    In it rows keep off half precision's lower end, and a uniform upstream, such as that of a mean,
    is exactly 1.
    """
    if upstream.numel() == 0:
        return upstream.new_ones(())
    unit = upstream.abs().masked_fill(~upstream.isfinite(), 0.0).amax()
    return unit.masked_fill(unit == 0, 1.0)


class KeptRows(NamedTuple):
    """The gradient rows that backward makes dW of."""

    gradient: Tensor  # (R, V)
    gathered: Tensor  # (R, D), the rows of hidden

    def weight_gradient(self, factor: Tensor) -> Tensor:  # (V, D)
        """Return ``factor * G^T H``; the factor is in ``H``, which are fewer numbers than dW."""
        # Room for dW is there before ``H`` is multiplied in place (`handed_out`).
        self.gathered.new_empty(self.gradient.shape[1], self.gathered.shape[1])
        hidden = scaled(self.gathered, factor, self.gathered.dtype)
        return weight_gradient(self.gradient, hidden)  # type: ignore[no-any-return]


def kept_or_made(results: Sequence[Tensor], *, keeps: bool) -> list[Tensor | KeptRows]:
    """Return dH, dW or what backward makes it of, and db, from `Gradients.results`."""
    hidden, weight, bias, gathered = results
    return [hidden, KeptRows(weight, gathered) if keeps else weight, bias]


def handed_out(
    gradients: Sequence[Tensor | KeptRows],  # of the first inputs of a Function
    factors: Sequence[Tensor],  # one for each
    needs: Sequence[bool],  # whether each input of the Function needs a gradient
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """Return what a Function's backward returns: the gradients, scaled, and None for all others.

    Those that need room come first, and those that are multiplied in place last: backward may be
    called again after an out of memory.
    """

    def needs_no_room(i: int) -> int:
        gradient = gradients[i]
        if isinstance(gradient, KeptRows):
            return 1
        return 2 * multiplies_in_place(gradient, factors[i], dtype)

    found: list[Tensor | None] = [None] * len(needs)
    for i in sorted(range(len(gradients)), key=needs_no_room):
        gradient, factor = gradients[i], factors[i]
        if not needs[i]:
            continue
        if isinstance(gradient, KeptRows):
            found[i] = gradient.weight_gradient(factor)
        else:
            found[i] = scaled(gradient, factor, dtype)
    return tuple(found)


def input_gradients(
    gradients: Sequence[Tensor | KeptRows],  # of the mixed rows, weight and bias
    share: Tensor,  # (R, T)
    scale: Tensor,
    needs: Sequence[bool],
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """Hand out the gradients of hidden_c, hidden_u, weight, bias: the mixed rows' to both."""
    mixed, weight, bias = gradients
    of_both = [scale, scale]
    if share.shape[1] == 2:
        of_both = [share_t * scale for share_t in share.tensor_split(2, dim=-1)]
    return handed_out((mixed, mixed, weight, bias), (*of_both, scale, scale), needs, dtype)


def first_order_only(backward: Backward) -> Backward:
    """Refuse ``create_graph=True`` in a Function's backward.

    PyTorch's ``once_differentiable`` lets it pass where the upstream gradient is a constant, and a
    gradient penalty would then silently be without gradient.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the fused losses cannot be differentiated twice: expected create_graph=False, "
                "or `sftmix_kernels.reference` for second derivatives"
            )
        return backward(ctx, *upstream)

    return checked
