"""All logits at once where memory allows: their gradients are kept, and backward makes dW of them.

`test_peaks.py` has the memory. The interpreter runs float32, which keeps where one chunk has all
rows; in bfloat16, of which it truncates what it stores, the products are held to the kept rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from sftmix_kernels import RowChunks, fused_cross_entropy, fused_mixup_loss, fused_sftmix_loss
from sftmix_kernels import gradients as made
from sftmix_kernels.mixup_loss import mixup_rows
from sftmix_kernels.schedules import FAST_DTYPES, keeps_gradients
from sftmix_kernels.sftmix_loss import sftmix_rows

from ..budget import assert_same_bits, head_inputs, run, some_labels
from ..kernel_cases import (
    LAST_HEAD,
    cross_entropy_in_budget,
    mixup_in_budget,
    moved,
    sftmix_in_budget,
)

WHOLE = RowChunks(rows=128)


@pytest.fixture
def products() -> Iterator[mock.Mock]:
    """How many dW backward has made."""
    with mock.patch.object(made, "weight_gradient", wraps=made.weight_gradient) as counted:
        yield counted


@pytest.mark.parametrize(
    ("dtype", "size", "chunk_rows", "most"),
    [
        (torch.bfloat16, 4096, 4096, 8192),
        (torch.bfloat16, 2048, 3456, 5504),
        (torch.float32, 4096, 4096, 4096),
    ],
)
@pytest.mark.interpret
def test_as_many_rows_as_take_a_chunk_and_a_float32_dw(
    dtype: torch.dtype, size: int, chunk_rows: int, most: int
) -> None:
    """Either side of the bytes that the rule compares, at any vocabulary."""
    weight, width = torch.empty(0, size, dtype=dtype), dtype.itemsize
    for rows in (1, most, most + 1):
        at_once, in_chunks = width * (rows + size), width * chunk_rows + 4 * size
        assert keeps_gradients(rows, chunk_rows, weight) == (at_once <= in_chunks)
    assert not keeps_gradients(0, chunk_rows, weight)
    assert not keeps_gradients(1, chunk_rows, weight.half())


@pytest.mark.parametrize("head", [{}, LAST_HEAD])
@pytest.mark.parametrize("in_budget", [cross_entropy_in_budget, mixup_in_budget, sftmix_in_budget])
def test_in_budget(device: str, in_budget: Any, head: dict[str, Any], products: mock.Mock) -> None:
    in_budget(device, torch.float32, head, WHOLE)
    assert products.call_count == 1


def sftmix(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    pairs = torch.tensor([[0, 2, 6], [5, 1, 3]], device=hidden.device)
    labels = torch.tensor([3, 5, -100, 7, 0, 122, 7], device=hidden.device)
    return fused_sftmix_loss(hidden, weight, labels, *pairs, lam=0.3, bias=bias).loss


def mixup(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    labels = torch.tensor([3, 5, -100, 7, 0, 122, 7], device=hidden.device)
    return fused_mixup_loss(hidden, hidden.flip(0), weight, labels, labels, 0.3, bias=bias)


def row_losses(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    labels = torch.tensor([3, 5, -100, 7, 0, 122, 7], device=hidden.device)
    return fused_cross_entropy(hidden, weight, labels, bias=bias, reduction="none")


every_loss = pytest.mark.parametrize("loss", [sftmix, mixup, row_losses])


@every_loss
def test_a_kept_graph_gives_equal_bits_whatever_became_of_the_first(
    device: str, loss: Any, products: mock.Mock
) -> None:
    """With an upstream gradient that is not 1, by which a last backward multiplies in place."""
    tensors = moved(head_inputs((7, 24), 123, torch.float32, bias=True), device)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    value = loss(*leaves)
    upstream = torch.linspace(0.3, 0.9, max(1, value.numel()), device=device).view(value.shape)
    found = []
    for keep in (True, True, False):
        gradients = torch.autograd.grad(value, leaves, upstream, retain_graph=keep)
        found.append([gradient.clone() for gradient in gradients])
        for gradient in gradients:
            gradient.zero_()
    assert products.call_count == 3
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@every_loss
def test_backward_may_be_called_again_after_an_out_of_memory(
    device: str, loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is multiplied in place while anything is still to be given room."""
    tensors = moved(head_inputs((7, 24), 123, torch.float32, bias=True), device)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    value = loss(*leaves)
    upstream = torch.full_like(value, 0.3)
    expected = torch.autograd.grad(loss(*leaves), leaves, upstream)
    # The bias' gradient, and then those of hidden states and of the head.
    for owner, room in ((made, "multiplied"), (Tensor, "new_empty")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, room, mock.Mock(side_effect=torch.OutOfMemoryError))
            with pytest.raises(torch.OutOfMemoryError):
                torch.autograd.grad(value, leaves, upstream)
    found = torch.autograd.grad(value, leaves, upstream)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# PyTorch's own tracing of an autograd.Function uses what PyTorch deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@every_loss
def test_compiled_equals_eager(device: str, loss: Any) -> None:
    tensors = moved(head_inputs((7, 24), 123, torch.float32, bias=True), device)
    upstream = torch.tensor(0.7, device=device)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same_bits(run(compiled, tensors, upstream), run(loss, tensors, upstream))


def op_calls(
    dtype: torch.dtype, device: str, keeps: bool
) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Both ops of rows with the same inputs, one row of which is ignored."""
    tensors = moved(head_inputs((7, 24), 50, dtype, bias=True), device)
    hidden, weight, bias = tensors.values()
    labels = some_labels((7,), 50).to(device)
    counts, share = torch.ones(7, device=device), torch.rand(7, 1, device=device)
    counts[2] = 0.0
    share = torch.cat((share, 1.0 - share), dim=-1)
    rest = (1.5, 3.0, 7, [True, True, True], 0, None, keeps)
    targets = torch.stack((labels, labels.flip(0)), -1)
    order = torch.tensor([0, 4, 2, 6, 1, 3, 5], device=device)
    pairs = (order[:2], order[2:4], counts[order[2:4]], share[:2], order[4:])
    plan = (labels, counts, *pairs, torch.tensor(0.2, device=device))
    return {
        "mixup": (mixup_rows, (hidden, hidden + 1, weight, bias, targets, share, counts, *rest)),
        "sftmix": (sftmix_rows, (hidden, weight, bias, *plan, *rest)),
    }


@pytest.mark.parametrize("op", ["mixup", "sftmix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_rows_make_the_same_gradients(device: str, op: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    call, kept_arguments = op_calls(dtype, device, keeps=True)[op]
    torch.manual_seed(3)
    _, arguments = op_calls(dtype, device, keeps=False)[op]
    *losses, hidden, gradient, bias, gathered, _ = call(*kept_arguments)
    *other_losses, other_hidden, weight, other_bias, nothing, _ = call(*arguments)
    assert nothing.numel() == 0
    for one, other in zip(
        (*losses, hidden, bias), (*other_losses, other_hidden, other_bias), strict=True
    ):
        assert torch.equal(one, other)
    exact = gradient.double().t() @ gathered.double()
    # A CPU with products in bfloat16 rounds each chunk's to it.
    rounds = device == "cpu" and dtype != torch.float32 and dtype in FAST_DTYPES
    near = torch.finfo(dtype).eps if rounds else 1e-6
    assert ((weight.double() - exact).abs().amax() <= near * exact.abs().amax()).all()
    found = made.weight_gradient(gradient, gathered)
    assert found.dtype == dtype
    bound = 4 * torch.finfo(dtype).eps * exact.abs().amax()
    assert ((found.double() - exact).abs().amax() <= bound).all()


@pytest.mark.parametrize("op", ["mixup", "sftmix"])
def test_opcheck(device: str, op: str) -> None:
    """With a vocabulary that is padded, so that what is kept is not contiguous."""
    call, arguments = op_calls(torch.float32, device, keeps=True)[op]
    torch.library.opcheck(call, arguments, test_utils=("test_schema", "test_faketensor"))
