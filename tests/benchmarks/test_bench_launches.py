"""The search for launches: what it holds, times and refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_launches
from benchmarks.bench_launches import (
    REVERSED,
    SHORT,
    Launch,
    chosen,
    launches,
    measure_launches,
)
from benchmarks.bench_row_chunks import PASSES, RowKernels
from benchmarks.records import PAIR_ROWS
from benchmarks.result_file import Results
from benchmarks.settings import Settings

QUICK = Settings(device="cpu", quick=True)


def test_the_search_holds_what_is_shipped_and_nothing_that_cannot_launch() -> None:
    row_chunks = pytest.importorskip("sftmix_kernels.row_chunks.kernels")
    for dtype in (torch.bfloat16, torch.float32):
        shipped = row_chunks.launch_options(torch.empty(0, dtype=dtype))
        names = ("BLOCK", "num_warps", "STAGES", "maxnreg")
        one = Launch(*(shipped[name] for name in names), shipped.get(REVERSED, False))
        assert one in launches()
    assert all(32 * one.warps * one.registers <= 65536 for one in [*launches(), *SHORT])


def test_a_short_search_has_one_two_or_four_programs_an_sm_in_both_directions() -> None:
    found = chosen(Settings(device="cuda", short=True))
    programs = [65536 // (32 * one.warps * one.registers) for one in found]
    assert programs == [4, 4, 2, 2, 1, 1]
    assert [one.backwards for one in found] == [False, True] * 3
    assert len({one.name for one in found}) == 6
    assert len(chosen(Settings(device="cuda", short=True, quick=True))) == 3


def test_a_direction_that_the_kernel_does_not_know_is_left_out() -> None:
    one = Launch(1024, 4, 5, 128, backwards=True)
    launched = {"BLOCK": 1024, "num_warps": 4, "STAGES": 5, "maxnreg": 128}
    assert one.options({"VECTOR": 8}) == {"VECTOR": 8, **launched}
    assert one.options({REVERSED: False}) == {REVERSED: True, **launched}
    assert one._replace(backwards=None).options({REVERSED: True}) == {REVERSED: True, **launched}


@pytest.mark.interpret
def test_a_wrong_launch_fails_and_a_right_one_is_timed(
    monkeypatch: pytest.MonkeyPatch, results: Results
) -> None:
    rows = RowKernels(8, 300, torch.float32, "cpu")
    right, wrong = Launch(1024, 4, 3, 64), Launch(4096, 16, 6, 128)

    def launch(values: Launch, rows: RowKernels) -> list[Tensor]:
        found = bench_launches_launch(values, rows)
        found[0].add_(values == wrong)
        return found

    bench_launches_launch = bench_launches.launch
    monkeypatch.setattr(bench_launches, "launch", launch)
    measure_launches(rows, [right, wrong], QUICK, results)
    assert [record["who"] for record in results.report["records"]] == [right.name]
    failed = results.report["failed"]
    assert failed.keys() == {f"{PAIR_ROWS} launch, {wrong.name}"}
    assert "AssertionError" in next(iter(failed.values()))


def test_share_of_copy_counts_the_bytes_of_each(
    monkeypatch: pytest.MonkeyPatch, results: Results
) -> None:
    expected = [torch.ones(3)] * 3

    def samples(steps: dict[str, Any], *_: object) -> dict[str, list[float]]:
        return {name: [2.0 if name == "copy" else 3.0] for name in steps}

    monkeypatch.setattr(bench_launches, "interleaved_samples", samples)
    monkeypatch.setattr(bench_launches, "launch", lambda values, rows: expected)
    rows: Any = SimpleNamespace(restore=lambda: None, copy=None, logits=expected[2])
    rows.pair_rows = lambda: expected[:2]
    measure_launches(rows, [Launch(1024, 4, 5, 128)], QUICK, results)
    (figures,) = results.report["records"]
    assert PASSES[PAIR_ROWS] == 3
    assert figures["share"] == 1.0
    assert figures["what"] == "pair_rows_ launch"
