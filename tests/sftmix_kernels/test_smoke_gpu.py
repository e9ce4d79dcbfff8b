"""The first tests on a GPU: every kernel in every dtype once, in less than a minute.

`benchmarks/gpu/parts.py` names them beside those of graphs, waiting and int32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sftmix_kernels import reference

from .budget import check, head_inputs, some_labels
from .conftest import DTYPES, SCHEDULES
from .kernel_cases import cross_entropy_in_budget, mixup_in_budget, sftmix_in_budget
from .perplexity.test_streaming import token_losses
from .test_sftmix_loss import assert_sftmix_in_budget, random_pairs

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES["cuda"], ids=str)


@every_schedule
@every_dtype
def test_sftmix(dtype: torch.dtype, schedule: Any) -> None:
    """Pairs and rows outside of them, over several chunks or groups; V is odd."""
    sftmix_in_budget(DEVICE, dtype, {}, schedule)


@every_schedule
def test_cross_entropy_and_mixup(schedule: Any) -> None:
    cross_entropy_in_budget(DEVICE, torch.bfloat16, {}, schedule)
    mixup_in_budget(DEVICE, torch.bfloat16, {}, schedule)


@every_schedule
def test_softcap_and_scale(schedule: Any) -> None:
    sftmix_in_budget(DEVICE, torch.bfloat16, {"softcap": 3.0, "logit_scale": 0.5}, schedule)


@every_schedule
@pytest.mark.parametrize("masked", [0, 16])
def test_bias_of_an_even_vocabulary(masked: int, schedule: Any) -> None:
    """Contiguous logits take the product with the bias in its epilogue; entries may be -inf."""
    tensors = head_inputs((96, 64), 512, torch.bfloat16, bias=True)
    tensors["bias"][512 - masked :] = -torch.inf
    tensors = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    plan = {**random_pairs(96, 40), "lam": torch.rand(40)}
    plan = {name: tensor.to(DEVICE) for name, tensor in plan.items()}
    labels = some_labels((96,), 512 - masked, ignored=0.2).to(DEVICE)
    assert_sftmix_in_budget(tensors, labels, plan, schedule=schedule)


@every_dtype
def test_perplexity(dtype: torch.dtype) -> None:
    tensors = head_inputs((211, 64), 515, dtype, bias=True)
    tensors = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    labels = some_labels((211,), 515, ignored=0.2).to(DEVICE)
    plain, truth = (
        reference.cross_entropy(**values, labels=labels, reduction="none")
        for values in (tensors, {name: tensor.double() for name, tensor in tensors.items()})
    )
    check("loss", token_losses(tensors, labels, vocab_chunk=256), truth, plain - truth)
