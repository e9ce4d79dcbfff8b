"""Numbers that change from call to call under `torch.compile`, and what is still refused there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sftmix_kernels import (
    Clipped,
    Entropy,
    Power,
    Threshold,
    fused_cross_entropy,
    fused_mixup_loss,
    fused_sftmix_loss,
    streaming_perplexity,
)
from sftmix_kernels.gates import Gate

from .budget import assert_refused, assert_same_bits, head_inputs, run

R, D, V = 12, 8, 123
LABELS = torch.arange(R) * 10
PAIRS = {"pair_c": torch.tensor([0, 2, 4, 9]), "pair_u": torch.tensor([1, 3, 11, 8])}


def cross_entropy(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return fused_cross_entropy(hidden, weight, LABELS, **options)


def mixup(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
    other, lam = hidden.detach().flip(0), options.pop("lam", 0.3)
    return fused_mixup_loss(hidden, other, weight, LABELS, LABELS.flip(0), lam, **options)


def sftmix(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
    lam = options.pop("lam", 0.3)
    return fused_sftmix_loss(hidden, weight, LABELS, lam=lam, **PAIRS, **options).loss


def perplexity(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return streaming_perplexity(hidden, weight, LABELS, LABELS % 3, 3, **options).sum().float()


def gated(gate: Callable[..., Gate], hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return fused_cross_entropy(hidden, weight, LABELS, gate=gate(**options))


def psft(eps: float) -> Clipped:
    return Clipped(torch.full((R,), -4.0), eps)


# The numbers of objectives.
OF_OBJECTIVES = {
    "label_smoothing": cross_entropy,
    "gem_beta": cross_entropy,
    "k": partial(gated, Power),
    "tau": partial(gated, Threshold),
    "alpha": partial(gated, Entropy),
    "eps": partial(gated, psft),
}

# Numbers of the loss become inputs of the graph, numbers of the head are compiled in.
OF_THE_LOSS = {
    mixup: ("lam", "divisor"),
    sftmix: ("lam", "mu", "ntp_divisor", "mixup_divisor"),
    cross_entropy: ("divisor",),
}
OF_THE_HEAD = ("logit_scale", "softcap")
Loss = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compilations(
    loss: Loss, numbers: tuple[str, ...], dynamic: bool | None = None, calls: int = 3
) -> int:
    """Call a compiled loss with other numbers each time, hold it to what it is uncompiled, and
    return how often it was compiled."""
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=count, dynamic=dynamic)
    tensors = head_inputs((R, D), V, torch.float32)
    for call in range(1, 1 + calls):
        values = {name: (call + i) / 10 for i, name in enumerate(numbers)}
        if loss is perplexity:
            assert torch.equal(compiled(**tensors, **values), loss(**tensors, **values))
        else:
            found, plain = (run(partial(one, **values), tensors) for one in (compiled, loss))
            assert_same_bits(found, plain)
    return count.frame_count


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("loss", OF_THE_LOSS)
def test_numbers_of_the_loss_are_compiled_for_all_their_values(
    loss: Loss, dynamic: bool | None
) -> None:
    """Once as constants, once as inputs."""
    assert compilations(loss, OF_THE_LOSS[loss], dynamic) <= 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("number", OF_OBJECTIVES)
def test_numbers_of_objectives_are_compiled_for_all_their_values(number: str) -> None:
    assert compilations(OF_OBJECTIVES[number], (number,)) <= 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("loss", [cross_entropy, mixup, sftmix, perplexity])
def test_numbers_of_the_head_may_change(loss: Loss) -> None:
    assert compilations(loss, OF_THE_HEAD, calls=2) > 1


@pytest.mark.parametrize(
    ("loss", "number", "value", "message"),
    [
        (mixup, "lam", 1.5, r"lam: expected a finite float32 number in \[0.0, 1.0\], got 1.5"),
        (sftmix, "mu", -0.5, "mu: expected a finite float32 number of at least 0, got -0.5"),
        (
            cross_entropy,
            "divisor",
            0.0,
            "divisor: expected a finite float32 number above 0, got 0.0",
        ),
        (cross_entropy, "softcap", -1.0, "softcap: .*got -1.0"),
        (perplexity, "logit_scale", float("inf"), "logit_scale: .*got inf"),
    ],
)
def test_a_wrong_number_is_refused_while_compiling(
    loss: Loss, number: str, value: float, message: str
) -> None:
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    tensors = head_inputs((R, D), V, torch.float32)
    assert_refused(loss, {**tensors, number: value}, ValueError, message)
    assert_refused(compiled, {**tensors, number: value}, Exception, message)


@pytest.mark.parametrize(
    ("loss", "number"),
    [
        (mixup, "lam"),
        (mixup, "divisor"),
        (sftmix, "lam"),
        (sftmix, "ntp_divisor"),
        (sftmix, "mixup_divisor"),
        (cross_entropy, "divisor"),
    ],
)
def test_a_number_that_waits_for_a_gradient_is_refused(loss: Loss, number: str) -> None:
    tensors = head_inputs((R, D), V, torch.float32)
    value = torch.tensor(0.5, requires_grad=True)
    message = f"{number}: expected a tensor without requires_grad.*{number}.detach"
    assert_refused(partial(loss, **tensors), {number: value}, ValueError, message)
    with torch.no_grad():
        found = loss(**tensors, **{number: value})
    assert torch.equal(found, loss(**tensors, **{number: value.detach()}))
