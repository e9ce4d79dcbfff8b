"""The three losses through Triton kernels, held to the error budget: of one schedule at a time.

`row_chunks/test_row_chunks.py` and `vocab_tiles/test_vocab_tiles.py` call these, in the interpreter
on the CPU and on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sftmix_kernels.schedules import Schedule

from .budget import HEADS, Loss, Result, Tensors, head_inputs, run, some_labels
from .conftest import CUDA, DTYPES, INTERPRETER
from .test_cross_entropy import assert_loss_in_budget
from .test_mixup_loss import NAMES, assert_mixup_in_budget, pair_labels
from .test_sftmix_loss import assert_sftmix_in_budget, random_pairs

LAST_HEAD = HEADS[-1]


def moved(tensors: Tensors, device: str) -> Tensors:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def bits(loss: Loss, tensors: Tensors, upstream: float = 1.0) -> Result:
    """`run` with the upstream gradient on the tensors' device."""
    return run(loss, tensors, torch.tensor(upstream, device=tensors["weight"].device))


def every_case(interpreted: tuple[torch.dtype, ...]) -> pytest.MarkDecorator:
    """Device, dtype and head: all on a GPU; in the interpreter float32, which needs many rows, with
    one head."""
    cases = [
        pytest.param(place.values[0], dtype, head, marks=place.marks)
        for place, dtypes in ((INTERPRETER, interpreted), (CUDA, DTYPES["cuda"]))
        for dtype in dtypes
        for head in HEADS
        if place is CUDA or dtype == torch.float16 or head is LAST_HEAD
    ]
    return pytest.mark.parametrize(("device", "dtype", "head"), cases)


def leading(device: str, dtype: torch.dtype) -> tuple[int, int]:
    """Rows enough for the budget of a dtype, and few for the interpreter's sake."""
    few = (4, 21) if dtype == torch.float32 else (3, 7)
    return few if device == "cpu" else (5, 41)


def cross_entropy_in_budget(
    device: str, dtype: torch.dtype, head: dict[str, Any], schedule: Schedule
) -> None:
    shape, options = leading(device, dtype), dict(head)
    tensors = head_inputs((*shape, 64), 515, dtype, bias=options.pop("bias", False))
    labels = some_labels(shape, 515, ignored=0.2).to(device)
    assert_loss_in_budget(moved(tensors, device), labels, schedule=schedule, **options)


def mixup_in_budget(
    device: str, dtype: torch.dtype, head: dict[str, Any], schedule: Schedule
) -> None:
    shape, options = leading(device, dtype), dict(head)
    bias = options.pop("bias", False)
    tensors = head_inputs((*shape, 64), 515, dtype, names=NAMES, bias=bias)
    labels, lam = pair_labels(shape, 515, 0.1), torch.rand(shape).to(device)
    tensors, labels = moved(tensors, device), moved(labels, device)
    assert_mixup_in_budget(tensors, labels, lam, schedule=schedule, **options)


def sftmix_in_budget(
    device: str, dtype: torch.dtype, head: dict[str, Any], schedule: Schedule
) -> None:
    shape, options = leading(device, dtype), dict(head)
    count = shape[0] * shape[1]
    tensors = head_inputs((*shape, 64), 515, dtype, bias=options.pop("bias", False))
    plan = {**random_pairs(count, count // 3), "lam": torch.rand(count // 3)}
    labels = some_labels(shape, 515, ignored=0.2).to(device)
    assert_sftmix_in_budget(
        moved(tensors, device), labels, moved(plan, device), schedule=schedule, mu=0.7, **options
    )


# Rows, hidden size and vocabulary that no block divides.
RAGGED = [(1, 8, 123), (35, 65, 4097), (18, 1, 1), (35, 130, 700)]


def ragged_in_budget(device: str, shape: tuple[int, int, int], schedule: Schedule) -> None:
    rows, size, vocab_size = shape
    tensors = moved(head_inputs((rows, size), vocab_size, torch.float16), device)
    labels = some_labels((rows,), vocab_size)
    labels[-1] = vocab_size - 1
    plan = {**moved(random_pairs(rows, rows // 2), device), "lam": 0.3}
    assert_sftmix_in_budget(tensors, labels.to(device), plan, schedule=schedule)


def other_upstreams_in_budget(device: str, schedule: Schedule) -> None:
    """Each row with an upstream gradient of its own."""
    options: dict[str, Any] = {"reduction": "none", "schedule": schedule}
    upstream = torch.randn(3, 11).to(device)
    tensors = moved(head_inputs((3, 11, 16), 123, torch.float16, bias=True), device)
    labels = moved(pair_labels((3, 11), 123, 0.2), device)
    assert_loss_in_budget(tensors, labels["labels_c"], upstream, **options)
    tensors["hidden_c"] = tensors.pop("hidden")
    tensors["hidden_u"] = tensors["hidden_c"].flip(0)
    assert_mixup_in_budget(tensors, labels, 0.3, upstream, **options)


def confident_tokens_in_budget(device: str, schedule: Schedule) -> None:
    """Tokens with p near 1, and pairs of which both labels are one token."""
    eye, labels = torch.eye(20, device=device), torch.arange(20, device=device)
    tensors = {"hidden": eye.repeat(2, 1), "weight": 17.0 * eye}
    plan = {"pair_c": labels, "pair_u": labels + 20, "lam": torch.rand(20).to(device)}
    assert_sftmix_in_budget(tensors, labels.repeat(2), plan, schedule=schedule)
