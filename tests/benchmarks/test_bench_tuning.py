"""The search for constants: what it holds, times and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_tuning, suites
from benchmarks.bench_perplexity import chunks_of_logits, folded, make_tokens, ours
from benchmarks.bench_row_chunks import PASSES, RowKernels
from benchmarks.bench_tuning import (
    LAUNCH,
    launch_name,
    launches,
    measure_launches,
    measure_workspaces,
    rows_within,
    workspaces,
)
from benchmarks.records import PAIR_ROWS
from benchmarks.result_file import Results
from benchmarks.settings import Settings
from sftmix_kernels.extension import build_info

QUICK = Settings(device="cpu", quick=True)
# Room for 128 rows of 16 float32 columns.
ROOM = 128 * 16 * 4
built = pytest.mark.skipif(build_info() is None, reason="the extension is not built")


def test_the_search_holds_what_is_shipped_and_nothing_that_cannot_launch() -> None:
    row_chunks = pytest.importorskip("sftmix_kernels.row_chunks.kernels")
    for dtype in (torch.bfloat16, torch.float32):
        shipped = row_chunks.launch_options(torch.empty(0, dtype=dtype))
        assert tuple(shipped[name] for name in LAUNCH) in launches()
    assert all(32 * warps * registers <= 65536 for _, warps, _, registers, _ in launches())


@pytest.mark.interpret
def test_a_wrong_launch_fails_and_a_right_one_is_timed(
    monkeypatch: pytest.MonkeyPatch, results: Results
) -> None:
    rows = RowKernels(8, 300, torch.float32, "cpu")
    right, wrong = (1024, 4, 3, 64, False), (4096, 16, 6, 128, True)

    def launch(values: tuple[int, ...], rows: RowKernels) -> list[Tensor]:
        found = bench_tuning_launch(values, rows)
        found[0].add_(values == wrong)
        return found

    bench_tuning_launch = bench_tuning.launch
    monkeypatch.setattr(bench_tuning, "launch", launch)
    measure_launches(rows, [right, wrong], QUICK, results)
    assert [record["who"] for record in results.report["records"]] == [launch_name(right)]
    failed = results.report["failed"]
    assert failed.keys() == {f"{PAIR_ROWS} launch, {launch_name(wrong)}"}
    assert "AssertionError" in next(iter(failed.values()))


def test_share_of_copy_counts_the_bytes_of_each(
    monkeypatch: pytest.MonkeyPatch, results: Results
) -> None:
    expected = [torch.ones(3)] * 3

    def samples(steps: dict[str, Any], *_: object) -> dict[str, list[float]]:
        return {name: [2.0 if name == "copy" else 3.0] for name in steps}

    monkeypatch.setattr(bench_tuning, "interleaved_samples", samples)
    monkeypatch.setattr(bench_tuning, "launch", lambda values, rows: expected)
    rows: Any = SimpleNamespace(restore=lambda: None, copy=None, logits=expected[2])
    rows.pair_rows = lambda: expected[:2]
    measure_launches(rows, [(1024, 4, 5, 128)], QUICK, results)
    (figures,) = results.report["records"]
    assert PASSES[PAIR_ROWS] == 3
    assert figures["share"] == 1.0
    assert figures["what"] == "pair_rows_ launch"


def test_workspaces_hold_a_tile_of_rows() -> None:
    found = workspaces(128256, 2)
    assert (8, 32768) in found
    assert (8, 32768) not in workspaces(128256, 4)
    assert {chunk for _, chunk in workspaces(1003, 4)} == {1003}


def test_chunks_are_the_logits_in_the_blocks_of_ours() -> None:
    x = make_tokens(300, 8, 50)
    assert rows_within(ROOM, x, 16) == 128
    logits = torch.full((300, 50), torch.nan)
    blocks = set()

    def keep(part: Tensor, rows: slice, start: int) -> None:
        blocks.add(rows.start)
        logits[rows, start : start + part.shape[1]] = part

    chunks_of_logits(x, keep, 16, 128)
    torch.testing.assert_close(logits, x.hidden @ x.weight.t())
    assert blocks == {0, 128, 256}


@built
def test_another_workspace_gives_the_same_perplexities() -> None:
    x = make_tokens(300, 8, 50)
    found = folded(x, torch.ops.sftmix_kernels, 16, 128)
    torch.testing.assert_close(found, ours(x))


@built
def test_a_workspace_that_changes_perplexities_fails(
    monkeypatch: pytest.MonkeyPatch, results: Results
) -> None:
    def wrong(*args: Any) -> Tensor:
        return folded(*args) * (1.01 if args[2] == 16 else 1.0)

    monkeypatch.setattr(bench_tuning, "folded", wrong)
    measure_workspaces(make_tokens(300, 8, 50), [(8, 16), (8, 32)], QUICK, results)
    (record,) = results.report["records"]
    assert record["who"] == "8 MiB, chunks of 32"
    assert record["share"] > 0
    failed = results.report["failed"]
    assert "differ by" in failed["perplexity workspace, 8 MiB, chunks of 16"]


def run(out: Path, device: str, suite: str) -> dict[str, Any]:
    """What a quick run writes."""
    with pytest.raises(SystemExit):
        suites.run_suite(suite, Settings(device, quick=True, threads=1), out, "")
    report: dict[str, Any] = json.loads((out / f"{device}-{suite}-quick.json").read_text())
    assert report["failed"] == {}
    return report


@built
def test_a_run_on_the_cpu_searches_workspaces_alone(tmp_path: Path) -> None:
    report = run(tmp_path, "cpu", "tune")
    names = {f"{size} MiB, chunks of {chunk}" for size, chunk in workspaces(1003, 4)}
    assert {record["who"] for record in report["records"]} == names
    assert {record["what"] for record in report["records"]} == {"perplexity workspace"}
    assert report["left_out"] == {"pair_rows_ launch": "Triton kernels need a CUDA device"}


@pytest.mark.gpu
@built
@pytest.mark.parametrize("suite", ["perplexity", "tune"])
def test_a_run_on_a_gpu(suite: str, tmp_path: Path) -> None:
    report = run(tmp_path, "cuda", suite)
    measures = {record.get("what", record["measure"]) for record in report["records"]}
    if suite == "tune":
        assert measures == {"perplexity workspace", "pair_rows_ launch"}
    else:
        assert measures == {"perplexity", "fold", "scoring"}
