"""The search for blocks of perplexity: what it holds, times and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_blocks, suites
from benchmarks.bench_blocks import SHORT, blocks, chosen, measure_blocks, rows_within
from benchmarks.bench_perplexity import Tokens, chunks_of_logits, folded, make_tokens, ours
from benchmarks.result_file import Results
from benchmarks.settings import Settings
from sftmix_kernels.extension import build_info

QUICK = Settings(device="cpu", quick=True)
# Room for 128 rows of 16 float32 columns.
ROOM = 128 * 16 * 4
built = pytest.mark.skipif(build_info() is None, reason="the extension is not built")


def meta_tokens(num_tokens: int, vocab_size: int, dtype: torch.dtype) -> Tokens:
    """Tokens of which nothing is computed."""
    hidden, weight = (
        torch.empty(size, 0, dtype=dtype, device="meta") for size in (num_tokens, vocab_size)
    )
    ids = torch.empty(num_tokens, device="meta")
    return Tokens(hidden, weight, ids, ids, 1)


def test_blocks_hold_a_tile_of_rows() -> None:
    half, full = (blocks(meta_tokens(8192, 128256, d)) for d in (torch.half, torch.float))
    assert (128, 32768) in half
    # In float32 8 MiB hold no tile of 32,768 columns.
    assert len(half) == len(full) + 1
    assert {chunk for _, chunk in blocks(meta_tokens(8192, 1003, torch.float))} == {1003}


def test_a_short_search_begins_with_what_is_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(multi_processor_count=132, L2_cache_size=60 * 10**6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    hidden: Any = SimpleNamespace(
        is_cuda=True, device=0, shape=(8192, 4096), element_size=lambda: 2
    )
    x = meta_tokens(8192, 128256, torch.bfloat16)._replace(hidden=hidden)
    assert chosen(x, Settings(device="cuda", short=True)) == [(1536, 8448), *SHORT]


def test_chunks_are_the_logits_in_the_blocks_of_ours() -> None:
    x = make_tokens(300, 8, 50)
    assert rows_within(ROOM, x, 16) == 128
    logits = torch.full((300, 50), torch.nan)
    found = set()

    def keep(part: Tensor, rows: slice, start: int) -> None:
        found.add(rows.start)
        logits[rows, start : start + part.shape[1]] = part

    chunks_of_logits(x, keep, 16, 128)
    torch.testing.assert_close(logits, x.hidden @ x.weight.t())
    assert found == {0, 128, 256}


@built
def test_other_blocks_give_the_same_perplexities() -> None:
    x = make_tokens(300, 8, 50)
    found = folded(x, torch.ops.sftmix_kernels, 16, 128)
    torch.testing.assert_close(found, ours(x))


@built
def test_a_block_that_changes_perplexities_fails(
    monkeypatch: pytest.MonkeyPatch, results: Results
) -> None:
    def wrong(*args: Any) -> Tensor:
        return folded(*args) * (1.01 if args[2] == 16 else 1.0)

    monkeypatch.setattr(bench_blocks, "folded", wrong)
    measure_blocks(make_tokens(300, 8, 50), [(128, 16), (128, 32)], QUICK, results)
    (record,) = results.report["records"]
    assert record["who"] == "128 tokens, 32 columns"
    assert record["share"] > 0
    failed = results.report["failed"]
    assert "differ by" in failed["perplexity block, 128 tokens, 16 columns"]


def run(out: Path, device: str, suite: str) -> dict[str, Any]:
    """What a quick run writes."""
    with pytest.raises(SystemExit):
        suites.run_suite(suite, Settings(device, quick=True, threads=1), out, "")
    report: dict[str, Any] = json.loads((out / f"{device}-{suite}-quick.json").read_text())
    assert report["failed"] == {}
    return report


@built
def test_a_run_on_the_cpu_searches_blocks_alone(tmp_path: Path) -> None:
    report = run(tmp_path, "cpu", "tune")
    assert {record["who"] for record in report["records"]} == {"256 tokens, 1003 columns"}
    assert {record["what"] for record in report["records"]} == {"perplexity block"}
    assert report["left_out"] == {"pair_rows_ launch": "Triton kernels need a CUDA device"}


@pytest.mark.gpu
@built
@pytest.mark.parametrize("suite", ["perplexity", "tune"])
def test_a_run_on_a_gpu(suite: str, tmp_path: Path) -> None:
    report = run(tmp_path, "cuda", suite)
    measures = {record.get("what", record["measure"]) for record in report["records"]}
    if suite == "tune":
        assert measures == {"perplexity block", "pair_rows_ launch"}
    else:
        assert measures == {"perplexity", "fold", "scoring"}
