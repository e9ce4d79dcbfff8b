"""Means, spreads and the paired t-test against numbers worked out by hand."""

from __future__ import annotations

import math
import sys

import pytest

from sftmix.report.comparison import compare

pytest.importorskip("scipy")


def test_three_common_seeds() -> None:
    # Differences 1, 2, 3: mean 2, standard deviation 1, t = 2 sqrt(3), two degrees of freedom,
    # where p = 1 - t / sqrt(t^2 + 2) and the 97.5 % point of t is 4.302653 (a printed table's).
    found = compare({0: 11.0, 1: 14.0, 2: 12.0, 9: 99.0}, {2: 9.0, 0: 10.0, 1: 12.0, 5: 0.0})
    assert (found.n, found.paired_n) == (4, 3)
    assert found.mean == 34.0
    assert found.std == pytest.approx(math.sqrt((23**2 + 20**2 + 22**2 + 65**2) / 3))
    assert found.difference == pytest.approx(2.0)
    assert found.p_value == pytest.approx(1 - math.sqrt(12 / 14))
    assert found.interval == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert found.significant is False


def test_what_a_seed_does_to_both_cancels() -> None:
    baseline = {seed: 100.0 * seed for seed in range(5)}
    values = {seed: value + 1 + 0.01 * seed for seed, value in baseline.items()}
    found = compare(values, baseline)
    assert found.significant is True
    assert found.p_value is not None
    assert found.p_value < 1e-6
    # The other way round it is the same with other signs.
    back = compare(baseline, values)
    assert back.p_value == pytest.approx(found.p_value)
    assert (back.difference, found.difference) == pytest.approx((-1.02, 1.02))


def test_too_few_seeds_say_nothing() -> None:
    one = compare({3: 1.5}, {3: 1.0})
    assert (one.std, one.difference, one.interval, one.p_value) == (None, 0.5, None, None)
    assert one.significant is None
    apart = compare({0: 1.0, 1: 3.0}, {2: 1.0, 3: 2.0})
    assert (apart.mean, apart.std) == (2.0, pytest.approx(math.sqrt(2)))
    assert (apart.paired_n, apart.difference, apart.p_value) == (0, None, None)
    assert compare({0: 1.0}, {}).paired_n == 0


def test_equal_differences_cannot_be_tested() -> None:
    for shift in (0.0, 1.0):
        found = compare({0: 1.0 + shift, 1: 2.0 + shift}, {0: 1.0, 1: 2.0})
        assert (found.difference, found.p_value, found.interval) == (shift, None, None)
    assert compare({0: 1.1, 1: 2.1}, {0: 1.0, 1: 2.0}).p_value is None  # apart in the last bit


def test_values_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="values: expected at least one seed"):
        compare({}, {0: 1.0})
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"baseline: .* got {bad} for seed 4"):
            compare({0: 1.0}, {4: bad})
        with pytest.raises(ValueError, match=f"values: .* got {bad} for seed 2"):
            compare({2: bad}, {})


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert compare({0: 1.0}, {0: 2.0}).difference == -1.0
    with pytest.raises(ImportError, match=r"pip install scipy"):
        compare({0: 1.0, 1: 2.0}, {0: 2.0, 1: 4.0})
