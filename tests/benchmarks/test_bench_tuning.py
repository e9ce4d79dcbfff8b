"""The search for constants: what it holds, that it puts back what it changes, and refuses."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_tuning, suites
from benchmarks.bench_row_chunks import PASSES
from benchmarks.bench_tuning import (
    LAUNCH,
    launch_name,
    launches,
    measure_launches,
    measure_workspaces,
    within,
    workspace_name,
    workspaces,
)
from benchmarks.perplexity_providers import Tokens, chunks_of_logits, make_tokens, ours
from benchmarks.records import PAIR_ROWS
from benchmarks.result_file import Results
from benchmarks.settings import Settings
from sftmix_kernels.extension import build_info
from sftmix_kernels.perplexity import streaming as perplexity

QUICK = Settings(device="cpu", quick=True)
# Room for 128 rows of 16 float32 columns.
ROOM = 128 * 16 * 4
built = pytest.mark.skipif(build_info() is None, reason="the extension is not built")


def test_the_search_holds_what_is_shipped_and_nothing_that_cannot_launch() -> None:
    row_chunks = pytest.importorskip("sftmix_kernels.row_chunks.kernels")
    for dtype in (torch.bfloat16, torch.float32):
        shipped = [getattr(row_chunks, name) for name in LAUNCH]
        shipped[2] = shipped[2](torch.empty(0, dtype=dtype))
        assert tuple(shipped) in launches()
    assert all(32 * warps * registers <= 65536 for _, warps, _, registers in launches())


class HostRows:
    """Stands in for the kernels: right under every launch but one."""

    def __init__(self, wrong: int) -> None:
        self.wrong = wrong
        self.seen: list[tuple[Any, ...]] = []

    def pair_rows(self) -> tuple[Tensor, Tensor]:
        from sftmix_kernels.row_chunks import kernels as row_chunks

        block = row_chunks.BLOCK
        stages = row_chunks.num_stages(torch.empty(0))
        self.seen.append((block, row_chunks.NUM_WARPS, stages, row_chunks.MAX_REGISTERS))
        self.logits = torch.full((3,), 2.0 if block == self.wrong else 1.0)
        return torch.ones(3), torch.ones(3)

    def restore(self) -> None:
        pass

    def copy(self) -> None:
        pass


def test_a_wrong_launch_fails_and_constants_are_taken_back(results: Results) -> None:
    row_chunks = pytest.importorskip("sftmix_kernels.row_chunks.kernels")
    before = [getattr(row_chunks, name) for name in LAUNCH]
    right, wrong = (1024, 4, 3, 64), (4096, 16, 6, 128)
    kernels: Any = HostRows(wrong=4096)
    measure_launches(kernels, [right, wrong], QUICK, results)
    assert {right, wrong} <= set(kernels.seen)
    assert [record["who"] for record in results.report["records"]] == [launch_name(right)]
    failed = results.report["failed"]
    assert "AssertionError" in failed[f"{PAIR_ROWS} launch, {launch_name(wrong)}"]
    assert [getattr(row_chunks, name) for name in LAUNCH] == before


def test_share_of_copy_counts_the_bytes_of_each(
    monkeypatch: pytest.MonkeyPatch, results: Results
) -> None:
    pytest.importorskip("sftmix_kernels.row_chunks.kernels")

    def samples(steps: dict[str, Any], *_: object) -> dict[str, list[float]]:
        return {name: [2.0 if name == "copy" else 3.0] for name in steps}

    monkeypatch.setattr(bench_tuning, "interleaved_samples", samples)
    launch = (1024, 4, 5, 128)
    kernels: Any = HostRows(wrong=0)
    measure_launches(kernels, [launch], QUICK, results)
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
    logits = torch.full((300, 50), torch.nan)
    blocks = set()

    def keep(part: Tensor, rows: slice, start: int) -> None:
        blocks.add(rows.start)
        logits[rows, start : start + part.shape[1]] = part

    within(ROOM, lambda x, chunk: chunks_of_logits(x, chunk, keep), x, 16)
    torch.testing.assert_close(logits, x.hidden @ x.weight.t())
    assert blocks == {0, 128, 256}


@built
def test_another_workspace_gives_the_same_perplexities_and_is_taken_back() -> None:
    x, before = make_tokens(300, 8, 50), perplexity.block_rows
    found = within(ROOM, ours, x, 16)
    torch.testing.assert_close(found, ours(x))
    assert perplexity.block_rows is before


@built
def test_a_workspace_that_changes_perplexities_fails(
    monkeypatch: pytest.MonkeyPatch, results: Results
) -> None:
    x, call = make_tokens(300, 8, 50), partial(ours)

    def wrong(x: Tokens, vocab_chunk: int = 50) -> Tensor:
        return call(x, vocab_chunk) * (1.01 if vocab_chunk == 16 else 1.0)

    monkeypatch.setattr(bench_tuning, "ours", wrong)
    measure_workspaces(x, [(8, 16), (8, 32)], QUICK, results)
    (record,) = results.report["records"]
    assert record["who"] == workspace_name((8, 32))
    assert record["share"] > 0
    failed = results.report["failed"]
    assert "differ by" in failed[f"perplexity workspace, {workspace_name((8, 16))}"]


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
    names = {workspace_name(one) for one in workspaces(1003, 4)}
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
