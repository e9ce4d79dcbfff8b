"""The kernels that lay out a call's rows say what the PyTorch operations in `terms.py` say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sftmix_kernels.terms import (
    PairPlan,
    label_terms,
    label_terms_op,
    ordered_pairs,
    pair_terms_op,
    single_rows,
)

from .budget import some_labels
from .test_sftmix_loss import random_pairs

pytestmark = pytest.mark.interpret
BAD = torch.tensor([123, -1, 2**31, 2**32 + 3, -(2**32), -100])


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal bits, and NaN where NaN is."""
    return torch.equal(found.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Of which a context makes PyTorch operations run."""
    return monkeypatch


@pytest.mark.parametrize("count", [0, 1, 30, 1100])
@pytest.mark.parametrize("ignore_index", [-100, 5])
@pytest.mark.parametrize("partner", [False, True])
def test_labels(plain: pytest.MonkeyPatch, count: int, ignore_index: int, partner: bool) -> None:
    first, second = some_labels((2, count), 123, ignored=0.3)
    first[: BAD.numel()] = BAD[:count]
    second[10 : 10 + BAD.numel()] = BAD[: max(0, count - 10)]
    arguments = (first, second if partner else None, 123, ignore_index)
    found = label_terms(*arguments)
    with plain.context() as patch:
        patch.delenv("TRITON_INTERPRET")
        expected = label_terms(*arguments)
    assert all(same(*both) for both in zip(found, expected, strict=True))


def plans(
    plain: pytest.MonkeyPatch, weight: Tensor, pair_c: Tensor, pair_u: Tensor, lam: Tensor
) -> tuple[PairPlan, PairPlan]:
    """The plan by the kernel, and by PyTorch."""
    arguments = (torch.arange(weight.numel()), weight, pair_c, pair_u, lam)
    found = ordered_pairs(*arguments)
    with plain.context() as patch:
        patch.delenv("TRITON_INTERPRET")
        return found, ordered_pairs(*arguments)


@pytest.mark.parametrize(
    ("count", "num_pairs"), [(1, 0), (2, 1), (7, 2), (40, 20), (1100, 300), (4700, 2100)]
)
def test_pairs(plain: pytest.MonkeyPatch, count: int, num_pairs: int) -> None:
    """With rows ignored or bad, and an lam that is NaN."""
    weight = torch.tensor([1.0, 1.0, 0.0, torch.nan])[torch.randint(0, 4, (count,))]
    lam = torch.rand(num_pairs)
    lam[::3] = torch.nan
    found, expected = plans(plain, weight, *random_pairs(count, num_pairs).values(), lam)
    assert all(same(*both) for both in zip(found[:6], expected[:6], strict=True))
    assert found.single is not None
    assert expected.single is None
    rows = torch.cat((found.pair_c, found.pair_u, found.single))
    assert torch.equal(rows.sort().values, torch.arange(count))
    assert torch.equal(found.single, single_rows(weight, expected.pair_c, expected.pair_u))


@pytest.mark.parametrize(
    ("pair_c", "pair_u"),
    [([0, 0], [1, 2]), ([0, 3], [1, 0]), ([4, 2], [4, 3]), ([1, 1], [0, 0]), ([0, 9], [5, 1])],
)
def test_rows_paired_twice_make_all_nan(
    plain: pytest.MonkeyPatch, pair_c: list[int], pair_u: list[int]
) -> None:
    """Also a row paired with itself, and one that does not exist and takes another's place."""
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    pairs = (torch.tensor(pair_c), torch.tensor(pair_u))
    for plan in plans(plain, weight, *pairs, torch.rand(2)):
        assert plan.row_weight.isnan().all()
        assert plan.pair_weight.isnan().all()


def test_a_row_that_does_not_exist_makes_its_pair_nan(plain: pytest.MonkeyPatch) -> None:
    pairs = (torch.tensor([0, 2]), torch.tensor([-3, 1]))
    for plan in plans(plain, torch.ones(4), *pairs, torch.rand(2)):
        assert plan.row_weight.isnan().all()
    pairs = (torch.tensor([2, 1]), torch.tensor([9, 0]))
    for plan in plans(plain, torch.ones(4), *pairs, torch.rand(2)):
        assert plan.row_weight.tolist() == [1.0] * 4
        assert plan.pair_weight[0].isnan()
        assert plan.pair_weight[1] == 1.0


def test_opcheck() -> None:
    tests = ("test_schema", "test_faketensor")
    labels, lam = some_labels((6,), 123), torch.rand(2)
    for second in (None, labels.flip(0)):
        torch.library.opcheck(label_terms_op, (labels, second, 123, -100), test_utils=tests)
    pairs = (torch.tensor([0, 2]), torch.tensor([5, 1]))
    torch.library.opcheck(pair_terms_op, (torch.ones(6), *pairs, lam), test_utils=tests)
