"""What the tests of the ops share: inputs, and the error budget that replaces tolerances.

`sftmix_kernels.budget` states the budget and computes it. Here it is applied to the loss and each
gradient, with ``torch`` the dense reference run in the tensors' own dtype and ``truth`` the same in
float64 on the same inputs. For a scalar loss PyTorch's error is taken row by row and added up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sftmix_kernels.budget import added_up, budget

Loss = Callable[..., Tensor]
Tensors = dict[str, Tensor]

# Labels and rows that no vocabulary and no batch has. In the lower 32 bits some of them do.
FAR = (-1, 2**31, 2**32, -(2**32), 2**32 + 3, 2**63 - 1, -(2**63))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Every option of the head each alone, and all together.
HEADS: tuple[dict[str, Any], ...] = (
    {},
    {"bias": True},
    {"logit_scale": 0.5},
    {"softcap": 5.0},
    {"bias": True, "logit_scale": 1.5, "softcap": 3.0},
)

# Ragged in rows, hidden size and vocabulary; one row alone; vocabularies of real models. No tensor
# has less than 65 numbers: errors of 8 beside those of 8 others used up to 0.92 of the budget in
# float32 (of 8 draws), of 4 x 8 with a large vocabulary 1.14, of these 0.56 on AVX2 and SSE2.
SHAPES = ((1, 65, 123), (211, 65, 123), (12, 17, 50257), (6, 17, 128256))


def head_inputs(
    shape: tuple[int, ...],  # leading shape and D
    vocab_size: int,
    dtype: torch.dtype,
    *,
    names: tuple[str, ...] = ("hidden",),
    bias: bool = False,
) -> Tensors:
    """Random hidden states, a weight that gives logits of about unit size, perhaps a bias."""
    tensors = {name: torch.randn(shape) for name in names}
    tensors["weight"] = torch.randn(vocab_size, shape[-1]) / shape[-1] ** 0.5
    if bias:
        tensors["bias"] = torch.randn(vocab_size)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def exact(*shape: int) -> Tensor:
    """Random quarters in [-1, 1]: products of these add up without rounding, in any order.

    What a GEMM's choice of kernel may change, for another number of rows say, is gone; what is
    left is ours and must agree to the bit.
    """
    return torch.randint(-4, 5, shape).float() / 4


def some_labels(shape: tuple[int, ...], vocab_size: int, *, ignored: float = 0.0) -> Tensor:
    """Random labels, a share of them ignored."""
    labels = torch.randint(0, vocab_size, shape)
    return labels.masked_fill(torch.rand(shape) < ignored, -100)


class Result(NamedTuple):
    """A loss and the gradients of the tensors it was given, by name."""

    loss: Tensor
    gradients: dict[str, Tensor | None]


def run(loss: Loss, tensors: Mapping[str, Tensor], upstream: float | Tensor = 1.0) -> Result:
    """Loss and gradients of fresh leaves with the values, strides and dtypes of ``tensors``."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    value = loss(**leaves)
    upstream = torch.as_tensor(upstream, dtype=value.dtype, device=value.device)
    value.backward(upstream.expand_as(value))
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    return Result(value.detach(), gradients)


def assert_in_budget(
    ours: Loss,
    dense: Loss,
    tensors: Mapping[str, Tensor],
    *,
    upstream: float | Tensor = 0.37,
    rows: Loss | None = None,
) -> None:
    """Hold loss and gradients to the budget; ``rows`` gives what adds up to a scalar loss."""
    found = run(ours, tensors, upstream)
    assert_result_in_budget(found, dense, tensors, upstream=upstream, rows=rows)


def assert_result_in_budget(
    found: Result,
    dense: Loss,
    tensors: Mapping[str, Tensor],
    *,
    upstream: float | Tensor,
    rows: Loss | None = None,
) -> None:
    """`assert_in_budget` of what has been found elsewhere, in another process say."""
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    plain, truth = (run(dense, values, upstream) for values in (tensors, doubles))
    assert found.loss.dtype == torch.float32
    error = plain.loss - truth.loss
    if rows is not None:
        error = added_up(rows(**tensors), rows(**doubles))
    check("loss", found.loss, truth.loss, error)
    for name, tensor in tensors.items():
        gradient, dense_gradient = found.gradients[name], plain.gradients[name]
        true_gradient = truth.gradients[name]
        assert gradient is not None
        assert dense_gradient is not None
        assert true_gradient is not None
        assert gradient.dtype == tensor.dtype
        check(name, gradient, true_gradient, dense_gradient - true_gradient)


def check(name: str, found: Tensor, truth: Tensor, torch_error: Tensor) -> None:
    """One quantity against its budget."""
    used = budget(found, truth, torch_error)
    assert used.holds, f"{name} is over the error budget: {used.says}"


def assert_same_bits(found: Result, expected: Result) -> None:
    """Loss and all gradients equal to the bit; NaN equals NaN."""
    pairs = [("loss", found.loss, expected.loss)]
    for name, gradient in expected.gradients.items():
        other = found.gradients[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            pairs.append((name, other, gradient))
    for name, one, other in pairs:
        assert torch.equal(one.nan_to_num(nan=12345.0), other.nan_to_num(nan=12345.0)), name


def same_class(found: Tensor, expected: Tensor) -> bool:
    """Whether NaN, +inf, -inf and finite numbers sit in the same places."""
    kinds = (torch.isnan, torch.isposinf, torch.isneginf)
    return all(torch.equal(kind(found), kind(expected)) for kind in kinds)


def assert_refused(
    call: Callable[..., object], changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    """The call with one argument changed is refused with words that name it."""
    with pytest.raises(error, match=message):
        call(**changed)
