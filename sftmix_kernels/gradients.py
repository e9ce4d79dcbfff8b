"""Gradients of an op call: products added up in float32, and what backward hands out.

Legend: R rows of hidden, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .schedules import FAST_DTYPES, is_fake, runs_triton

Backward = Callable[..., tuple[Tensor | None, ...]]


# Bytes of the float32 copy of some tokens' rows of a weight in half precision, or of a gradient's.
TILE_BYTES = 2**23


class Gradients:
    """The gradients of one op call, filled chunk by chunk; what is not needed is not allocated.

    ``hidden`` (R, D) in its own dtype, or in float32 where ranks add theirs up; ``weight`` (V, D)
    and ``bias`` (V,) in float32, since sums over many chunks diverge in bfloat16. ``scale``
    multiplies all of them, at no cost: a product has a factor of its own.
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
    ) -> None:
        self.needs_hidden, self.needs_weight, self.needs_bias = needs_gradient
        self.needed = any(needs_gradient)
        self.first, self.scale = True, scale
        dtype = torch.float32 if partial else hidden.dtype
        self.hidden = hidden.new_zeros(hidden.shape if self.needs_hidden else 0, dtype=dtype)
        # The first chunk overwrites dW, so that only an op without rows has to clear it.
        shape = weight.shape if self.needs_weight else (0,)
        self.weight = weight.new_empty(shape, dtype=torch.float32)
        if num_rows == 0:
            self.weight.zero_()
        self.bias = weight.new_zeros(weight.shape[0] if self.needs_bias else 0, dtype=torch.float32)

    def add_chunk(self, gradient: Tensor, hidden: Tensor, weight: Tensor, rows: Tensor) -> None:
        """Add ``dH[rows] = G W``, ``dW += G^T H`` and ``db += sum G`` of one chunk's ``G``."""
        if self.needs_hidden:
            of_rows = product(gradient, weight, self.hidden.dtype, self.scale)
            self.hidden.index_copy_(0, rows, of_rows)
        if self.needs_weight:
            add_product_(self.weight, gradient.t(), hidden, self.scale, overwrite=self.first)
        if self.needs_bias:
            self.bias.add_(gradient.sum(0, dtype=torch.float32), alpha=self.scale)
        self.first = False


def weight_tiles(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield some tokens and their rows of the weight in float32, a few MiB at a time.

    All of them are written into the same room.
    """
    step = max(1, TILE_BYTES // (4 * weight.shape[1]))
    room = weight.new_empty(min(step, weight.shape[0]), weight.shape[1], dtype=torch.float32)
    for first in range(0, weight.shape[0], step):
        tokens = slice(first, min(first + step, weight.shape[0]))
        yield tokens, room[: tokens.stop - first].copy_(weight[tokens])


def product(left: Tensor, right: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Return ``scale * left @ right`` in ``dtype``, without rounding to half precision before."""
    if left.dtype == right.dtype == dtype:
        result = left @ right
        return result if scale == 1.0 else result.mul_(scale)
    total = left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32)
    if left.dtype == right.dtype or left.is_cuda:
        add_product_(total, left, right, scale, overwrite=True)
    else:
        # G in float32, the weight not.
        total.zero_()
        for tokens, tile in weight_tiles(right):
            total.addmm_(left[:, tokens].float(), tile, alpha=scale)
    return total.to(dtype)


def add_product_(
    total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0, *, overwrite: bool
) -> None:
    """Add ``scale * left @ right`` to ``total`` in float32, with no temporary of total's size.

    On a GPU ``scale`` is 1: there backward divides (`divides_early`).
    """
    beta = 0 if overwrite else 1
    if left.dtype == torch.float32:
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


def divides_early(weight: Tensor) -> bool:
    """Say whether the forward op divides the gradients by the loss's divisor.

    Backward then has nothing left to do to them where the upstream gradient is 1. The CPU knows
    the divisor; an accelerator would have to wait for it. In float16 they might vanish before
    backward multiplies them by a loss scale.
    """
    return on_plain_cpu(weight) and weight.dtype != torch.float16


def on_plain_cpu(tensor: Tensor) -> bool:
    """Say whether a tensor is on the CPU for its own sake, and not for an accelerator's."""
    return tensor.device.type == "cpu" and not runs_triton(tensor)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``factor * gradient``, computed in float32 and rounded once to ``dtype``.

    On the CPU, where looking at the factor is free, a factor of 1 in the same dtype gives the
    gradient itself: a copy of dW would double what the loss holds. A graph that is kept for another
    backward needs it once more, whatever its receiver does to it.
    """
    if on_plain_cpu(factor) and not is_traced(factor):
        # A fake tensor has no values: it stands for the upstream gradient of a training step.
        is_one = factor.numel() == 1 and (is_fake(factor) or float(factor) == 1.0)
        if is_one and gradient.dtype == dtype:
            kept = torch._C._autograd._get_current_graph_task_keep_graph()
            return gradient.clone() if kept else gradient
        if {gradient.dtype, dtype} != {torch.float32} and gradient.dim() == 2:
            # PyTorch multiplies across dtypes by way of whole float32 tensors.
            step = max(1, TILE_BYTES // (4 * max(1, gradient.shape[1])))
            result = torch.empty_like(gradient, dtype=dtype)
            factors = factor.expand(gradient.shape[0], 1)
            parts = zip(*(t.split(step) for t in (result, gradient, factors)), strict=True)
            for part, some, some_factors in parts:
                part.copy_(some * some_factors)
            return result
    # With a dimension the factor takes part in type promotion; without, it would be rounded to
    # the gradient's dtype before the product.
    factor = factor if factor.dim() else factor.reshape(1)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def unit_of(upstream: Tensor) -> Tensor:
    """Return the largest finite upstream gradient, as the unit in which rows are computed.

    In it rows keep off half precision's lower end, and a uniform upstream, such as that of a mean,
    is exactly 1.
    """
    if upstream.numel() == 0:
        return upstream.new_ones(())
    unit = upstream.abs().masked_fill(~upstream.isfinite(), 0.0).amax()
    return unit.masked_fill(unit == 0, 1.0)


def handed_out(
    gradients: Sequence[Tensor],  # of the first inputs of a Function
    factors: Sequence[Tensor],  # one for each
    needs: Sequence[bool],  # whether each input of the Function needs a gradient
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """Return what a Function's backward returns: the gradients, scaled, and None for all others."""
    some = (
        scaled(gradient, factor, dtype) if needed else None
        for gradient, factor, needed in zip(gradients, factors, needs, strict=False)
    )
    return *some, *(None for _ in needs[len(gradients) :])


def input_gradients(
    gradients: Sequence[Tensor],  # of the mixed rows, weight and bias
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
