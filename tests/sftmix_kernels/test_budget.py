"""The error budget itself: its two rules, and that it catches what it is there for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sftmix_kernels.mixup_loss
from sftmix_kernels import RowChunks, gradients
from sftmix_kernels.budget import added_up, budget
from sftmix_kernels.row_chunks import cpu, pytorch

from .budget import head_inputs, some_labels
from .test_cross_entropy import assert_loss_in_budget

# Gradients of confident tokens are below what float16 holds, unless the loss is scaled.
UPSTREAM = 2.0**12
HALVES = (torch.bfloat16, torch.float16)
EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("factor", "holds"), [(1.9, True), (2.1, False), (float("nan"), False), (float("inf"), False)]
)
def test_the_root_mean_square_is_at_most_twice_pytorchs(
    factor: float, holds: bool, sign: float
) -> None:
    truth, torch_error = torch.zeros(100, dtype=torch.float64), torch.randn(100)
    found = sign * factor * torch_error
    used = budget(found, truth, torch_error)
    assert used.holds == holds
    if factor < 3:
        assert used.rms / used.rms_limit == pytest.approx(factor / 2)
        assert used.largest / used.largest_limit == pytest.approx(factor / 4)


def test_one_element_may_be_off_by_four_times_pytorchs_worst() -> None:
    truth, torch_error = torch.zeros(1000, dtype=torch.float64), torch.ones(1000)
    found = torch.zeros(1000)
    for error, holds in ((3.9, True), (4.1, False)):
        found[7] = error
        assert budget(found, truth, torch_error).holds == holds


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_where_pytorch_is_exact_one_rounding_of_the_dtype_is_left(dtype: torch.dtype) -> None:
    truth, exact = torch.full((50,), 3.0, dtype=torch.float64), torch.zeros(50)
    eps = torch.finfo(dtype).eps
    # The next number above 3 is 2 eps away: within one eps of 3 on average over half of them.
    found = truth.to(dtype)
    found[:20] += 2 * eps
    assert budget(found, truth, exact).holds
    assert not budget(truth.to(dtype) + 2 * 2 * eps, truth, exact).holds


def test_a_scalars_error_does_not_cancel() -> None:
    parts, truth = torch.tensor([1.0, 1.0]), torch.tensor([0.75, 1.25], dtype=torch.float64)
    assert added_up(parts, truth) == 0.5
    assert budget(torch.tensor(2.9), truth.sum(), added_up(parts, truth)).holds
    assert not budget(torch.tensor(3.1), truth.sum(), added_up(parts, truth)).holds


def test_nothing_is_in_budget_and_another_shape_is_refused() -> None:
    nothing = torch.zeros(0, dtype=torch.float64)
    assert budget(nothing.float(), nothing, nothing).holds
    with pytest.raises(ValueError, match=r"found: expected shape \(0,\), got \(2,\)"):
        budget(torch.zeros(2), nothing, nothing)


# What follows are mutants: an op with one fault, which the budget must not let pass.


@pytest.mark.parametrize("dtype", HALVES)
def test_a_weight_gradient_added_up_in_half_precision_is_caught(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rounded(
        total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0, *, overwrite: bool
    ) -> None:
        product = scale * left.float() @ right.float()
        total.copy_((product if overwrite else total + product).to(dtype))

    tensors, labels = head_inputs((4096, 64), 123, dtype), some_labels((4096,), 123)
    options = {"schedule": RowChunks(rows=16), "reduction": "sum"}
    assert_loss_in_budget(tensors, labels, **options)
    monkeypatch.setattr(gradients, "add_product_", rounded)
    with pytest.raises(AssertionError, match="weight is over the error budget"):
        assert_loss_in_budget(tensors, labels, **options)


@pytest.mark.parametrize("dtype", HALVES)
def test_logits_added_up_in_half_precision_are_caught(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rounded(hidden: Tensor, weight: Tensor, bias: Tensor | None, workspace: Tensor) -> Tensor:
        logits = hidden.new_zeros(hidden.shape[0], weight.shape[0], dtype=dtype)
        for column in range(hidden.shape[1]):
            logits.addr_(hidden[:, column].to(dtype), weight[:, column])
        return workspace[: hidden.shape[0]].copy_(logits)

    tensors, labels = head_inputs((64, 4096), 123, dtype), some_labels((64,), 123)
    assert_loss_in_budget(tensors, labels, reduction="sum")
    monkeypatch.setattr(sftmix_kernels.mixup_loss, "project", rounded)
    with pytest.raises(AssertionError, match="is over the error budget"):
        assert_loss_in_budget(tensors, labels, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_probability_read_back_from_bfloat16_is_caught(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = pytorch.TargetColumns.finish

    def rounded(
        self: pytorch.TargetColumns, log_p: Tensor, exp_at: Tensor, rest: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, total, _ = own(self, log_p, exp_at, rest)
        p = (exp_at / total).bfloat16().float()
        return loss, total, (p - self.column_share) * total

    labels, weight = torch.arange(20), (17.0 * torch.eye(20)).to(dtype)
    tensors = {"hidden": torch.eye(20).to(dtype), "weight": weight}
    assert_loss_in_budget(tensors, labels, UPSTREAM)
    monkeypatch.setattr(cpu, "soft_rows_", pytorch.soft_rows_)
    monkeypatch.setattr(pytorch.TargetColumns, "finish", rounded)
    with pytest.raises(AssertionError, match="is over the error budget"):
        assert_loss_in_budget(tensors, labels, UPSTREAM)
