"""The two steps train alike, and one of them finds neither entropy nor accuracy."""

from __future__ import annotations

from typing import Any

import pytest

import sftmix.training.loss
from benchmarks import bench_watching
from benchmarks.bench_step import QUICK
from benchmarks.bench_watching import measure, measure_steps
from benchmarks.measure import SuiteError
from benchmarks.records import OUR_NTP, UNWATCHED
from benchmarks.result_file import Results
from benchmarks.settings import Settings
from sftmix_kernels import fused_cross_entropy

TINY = QUICK._replace(vocab_size=64, hidden_size=16, intermediate_size=24, length=16)
SETTINGS = Settings(quick=True)


def test_every_other_step_is_without_stats(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def watched(*args: Any, **options: Any) -> Any:
        asked.append(options.get("stats", False))
        return fused_cross_entropy(*args, **options)

    for module in (sftmix.training.loss, bench_watching):
        monkeypatch.setattr(module, "fused_cross_entropy", watched)
    measure_steps("quick", TINY, SETTINGS, results)
    # To be compared, to warm up, and three rounds.
    assert [sorted(asked[first : first + 2]) for first in range(0, 10, 2)] == [[False, True]] * 5
    found = {record["who"]: record for record in results.report["records"]}
    assert found.keys() == {OUR_NTP, UNWATCHED}
    assert len(found[UNWATCHED]["seconds"]) == len(found[OUR_NTP]["seconds"]) > 0


def test_steps_that_train_otherwise_are_not_timed(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any, **options: Any) -> Any:
        loss, stats = fused_cross_entropy(*args, **options)
        return 1.1 * loss, stats

    monkeypatch.setattr(sftmix.training.loss, "fused_cross_entropy", wrong)
    with pytest.raises(SuiteError, match="apart"):
        measure_steps("quick", TINY, SETTINGS, results)
    assert results.report["records"] == []


def test_models_that_can_be_told_apart_by_a_percent_are_measured(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    monkeypatch.setattr(bench_watching, "measure_steps", lambda name, *_: ran.append(name))
    measure(Settings(), results)
    measure(Settings("cuda"), results)
    assert ran == ["1M", "60M", "0.27B", "1B"]
