"""Gradients of an op call: products added up in float32, and what backward hands out.

Legend: R rows of hidden, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


class Gradients:
    """The gradients of one op call, filled chunk by chunk; what is not needed is not allocated.

    ``hidden`` (R, D) in its own dtype, or in float32 where ranks add theirs up; ``weight`` (V, D)
    and ``bias`` (V,) in float32, since sums over many chunks diverge in bfloat16.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        needs_gradient: list[bool],
        num_rows: int,
        *,
        partial: bool = False,
    ) -> None:
        self.needs_hidden, self.needs_weight, self.needs_bias = needs_gradient
        self.needed = any(needs_gradient)
        self.first = True
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
            self.hidden.index_copy_(0, rows, product(gradient, weight, self.hidden.dtype))
        if self.needs_weight:
            add_product_(self.weight, gradient.t(), hidden, overwrite=self.first)
        if self.needs_bias:
            self.bias += gradient.sum(0, dtype=torch.float32)
        self.first = False


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``left @ right`` in ``dtype``: their own, or float32 without rounding to theirs."""
    if left.dtype == dtype:
        return left @ right
    total = left.new_empty(left.shape[0], right.shape[1], dtype=dtype)
    add_product_(total, left, right, overwrite=True)
    return total


def add_product_(total: Tensor, left: Tensor, right: Tensor, *, overwrite: bool) -> None:
    """Add ``left @ right`` to ``total`` in float32, with no temporary of total's size."""
    if left.is_cuda and left.dtype != torch.float32:
        if overwrite:
            torch.mm(left, right, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, left.float(), right.float(), beta=0 if overwrite else 1, out=total)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``factor * gradient``, computed in float32 and rounded once to ``dtype``."""
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
