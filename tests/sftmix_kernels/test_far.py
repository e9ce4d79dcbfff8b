"""Labels and rows far outside, by PyTorch operations and in the reference: NaN, never wrapped.

The compiled ops, both schedules in the interpreter and shared vocabularies have the same labels in
tests of their own.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sftmix_kernels import fused_mixup_loss, fused_sftmix_loss, reference
from sftmix_kernels.perplexity import online_softmax
from sftmix_kernels.perplexity.online_softmax import new_state
from sftmix_kernels.row_chunks import cpu, pytorch
from sftmix_kernels.terms import ordered_pairs

from .budget import FAR, assert_refused, exact

R, D, V = 20, 8, 123
LABELS = torch.arange(R)
BAD, PARTNER = 3, 12
PAIRS = {"pair_c": torch.tensor([0, BAD]), "pair_u": torch.tensor([7, PARTNER]), "lam": 0.3}
OTHERS = torch.arange(R) != BAD


@pytest.fixture
def _pytorch_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "soft_rows_", pytorch.soft_rows_)
    monkeypatch.setattr(cpu, "pair_rows_", pytorch.pair_rows_)


def only_bad_is_nan(losses: Tensor) -> bool:
    return bool(losses[BAD].isnan()) and bool(losses[OTHERS].isfinite().all())


@pytest.mark.usefixtures("_pytorch_operations")
@pytest.mark.parametrize("label", [V, *FAR])
def test_by_pytorch_operations(label: int) -> None:
    hidden, weight, rows = exact(R, D).requires_grad_(), exact(V, D), torch.empty(R)
    labels = LABELS.masked_fill(~OTHERS, label)
    losses = fused_mixup_loss(hidden, hidden, weight, LABELS, labels, 0.3, reduction="none")
    assert only_bad_is_nan(losses)
    loss = fused_sftmix_loss(hidden, weight, labels, **PAIRS, row_ntp_out=rows).loss
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert only_bad_is_nan(rows)
    bad = gradient.isnan().all(-1).nonzero().squeeze(-1)
    assert bad.tolist() == [BAD, PARTNER]
    assert gradient.isnan().any(-1).sum() == 2


@pytest.mark.parametrize("label", [V, *FAR])
def test_in_the_reference(label: int) -> None:
    hidden, weight = exact(R, D), exact(V, D)
    labels = LABELS.masked_fill(~OTHERS, label)
    assert only_bad_is_nan(reference.cross_entropy(hidden, weight, labels, reduction="none"))
    for both in ((labels, LABELS), (LABELS, labels)):
        losses = reference.mixup_loss(hidden, hidden, weight, *both, 0.3, reduction="none")
        assert only_bad_is_nan(losses)
    found = reference.perplexity(hidden, weight, labels, LABELS % 5, 5)
    assert found.isnan().nonzero().tolist() == [[BAD]]


@pytest.mark.parametrize("row", [R, *FAR])
def test_a_row_of_a_pair(row: int) -> None:
    """Refused where that is free; on a device, which nobody waits for, the pair's weight is NaN."""
    hidden, weight = exact(R, D), exact(V, D)
    # Neither the first row nor the last, for one of which the missing row stands.
    there = torch.tensor([2, 3])
    for name in ("pair_c", "pair_u"):
        far = {"pair_c": there, "pair_u": there, "lam": 0.3, name: torch.tensor([row, 1])}
        call = {"hidden": hidden, "weight": weight, "labels": LABELS, **far}
        assert_refused(fused_sftmix_loss, call, ValueError, rf"\[0, {R}\), got {row}")
        pairs = far["pair_c"], far["pair_u"], torch.full((2,), 0.3)
        plan = ordered_pairs(LABELS, torch.ones(R), *pairs)
        assert plan.pair_weight.isnan().tolist() == [True, False]
        for rows in (plan.pair_c, plan.pair_u):
            assert ((rows >= 0) & (rows < R)).all()


@pytest.mark.filterwarnings("ignore:sftmix_kernels. losses run on PyTorch operations")
@pytest.mark.parametrize("sample", FAR)
@pytest.mark.parametrize("compiled", [True, False])
def test_an_example_that_is_not_there_gets_nothing(sample: int, compiled: bool) -> None:
    ops = torch.ops.sftmix_kernels if compiled else online_softmax
    state = new_state(3, torch.zeros(3)).fill_(1.0)
    ids, labels = torch.tensor([1, sample, 0]), torch.zeros(3, dtype=torch.long)
    sums, counts = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    ops.add_token_losses(state, labels, -100, ids, ids.argsort(stable=True), sums, counts)
    assert counts.tolist() == [1, 1, 0, 0]
    assert sums.isfinite().all()
