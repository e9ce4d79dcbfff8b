"""`scaled_rows`: rows are gathered, multiplied, and rounded once; a factor of 1 writes nothing."""

from __future__ import annotations

import pytest
import torch

from sftmix_kernels.gradients import scaled
from sftmix_kernels.scaling import scaled_rows

pytestmark = pytest.mark.interpret
# The interpreter truncates float32 where it stores bfloat16.
DTYPES = (torch.float32, torch.float16)


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (9, 515), (300, 64)])
def test_rows_are_multiplied_and_rounded_once(
    shape: tuple[int, int], dtype: torch.dtype, source_dtype: torch.dtype
) -> None:
    source, factor = torch.randn(shape).to(source_dtype), torch.tensor(1 / 3)
    expected = (source.double() * factor.double()).to(dtype)
    assert torch.equal(scaled_rows(source, factor, out=torch.empty(shape, dtype=dtype)), expected)


def test_each_row_may_have_a_factor_of_its_own() -> None:
    source, share = torch.randn(20, 7), torch.rand(20, 2)
    factor = share.tensor_split(2, dim=-1)[1]
    assert torch.equal(scaled_rows(source, factor, out=torch.empty(20, 7)), source * factor)


def test_rows_are_gathered_and_those_of_weight_0_are_0_whatever_they_hold() -> None:
    """A row is left out for its own weight, not for its neighbour's; a NaN weight counts."""
    source = torch.randn(12, 2 * 40)[:, :40]
    source[7], source[2] = torch.nan, torch.inf
    rows, weight = torch.tensor([3, 7, 3, 2, 11]), torch.tensor([1.0, 0.0, torch.nan, 0.0, 0.5])
    found = scaled_rows(source, out=torch.full((5, 40), torch.nan), rows=rows, weight=weight)
    expected = source[rows]
    expected[[1, 3]] = 0.0
    assert torch.equal(found, expected)


def test_in_place_with_a_factor_of_1_nothing_is_written() -> None:
    """Where the factor is not 1, all is."""
    values = torch.randn(40, 600)
    stays, whole = values.clone(), values.clone()
    assert torch.equal(scaled_rows(stays, torch.tensor(1.0), out=stays), values)
    assert torch.equal(scaled_rows(whole, torch.tensor(0.3), out=whole), values * 0.3)
    nothing = scaled_rows(whole, torch.tensor(torch.nan), out=whole)
    assert nothing.isnan().all()


def test_programs_go_on_to_further_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftmix_kernels.scaling.PROGRAMS", 2)
    values = torch.randn(50, 1030)
    assert torch.equal(
        scaled_rows(values, torch.tensor(2.0), out=torch.empty(50, 1030)), 2.0 * values
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [torch.tensor(1 / 3), torch.rand(50, 1)])
def test_scaled_rounds_once(dtype: torch.dtype, factor: torch.Tensor) -> None:
    gradient = torch.randn(50, 20)
    expected = (gradient.double() * factor.double()).to(dtype)
    assert torch.equal(scaled(gradient, factor, dtype), expected)
