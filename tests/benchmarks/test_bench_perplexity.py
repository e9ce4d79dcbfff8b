"""The suite of perplexity: right before it is timed, and written down with what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_perplexity, bench_scoring, suites
from benchmarks.bench_online_softmax import CHUNKS, Chunk, Fold, make_fold, measure_folds
from benchmarks.bench_perplexity import (
    Tokens,
    calls,
    checked,
    dense,
    make_tokens,
    measure_whole,
    require_compiled,
    size_of,
)
from benchmarks.measure import SuiteError
from benchmarks.records import (
    BARE_CALL,
    BARE_CHUNKS,
    COPY,
    DENSE_PERPLEXITY,
    FOLD,
    FOLD_OPERATIONS,
    FOLD_SOFTCAP,
    IN_CACHE,
    IN_HBM,
    IN_HBM_CHUNK,
    IN_L2,
    OPERATIONS,
    SCORE,
    SCORE_BACKBONE,
    SCORE_EQUAL,
    SCORE_FORWARD,
    SCORE_LOOP,
    SCORE_MEANS,
    STREAMING,
    TORCH_PERPLEXITY,
)
from benchmarks.result_file import Results
from benchmarks.settings import Settings
from sftmix.training.scoring import MOST_PADDING
from sftmix_kernels.extension import build_info

QUICK = Settings(device="cpu", quick=True)
EVERYONE = {STREAMING, BARE_CHUNKS, BARE_CALL, DENSE_PERPLEXITY, OPERATIONS, TORCH_PERPLEXITY}
built = pytest.mark.skipif(build_info() is None, reason="the extension is not built")


def run(out: Path, data: Path) -> dict[str, Any]:
    """What a quick run of the suite writes."""
    settings = Settings(quick=True, threads=1, data=data)
    with pytest.raises(SystemExit):
        suites.run_suite("perplexity", settings, out, "")
    report: dict[str, Any] = json.loads((out / "cpu-perplexity-quick.json").read_text())
    return report


@built
def test_a_run_writes_down_everyone_or_why_not(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    data = tmp_path / "data.jsonl"
    rows = [{"question": "one " * (i + 1), "answer": "two " * (2 * i + 1)} for i in range(7)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run(tmp_path, data)
    assert report["failed"] == {}
    found: dict[str, dict[str, Any]] = {}
    for record in report["records"]:
        name = f"{record['who']}, {record['kind']}" if "kind" in record else record["who"]
        found.setdefault(record["measure"], {})[name] = record
        assert record["median"] > 0
    assert found.keys() == {"perplexity", "fold", "scoring"}

    whole = found["perplexity"]
    missing = {who for who in EVERYONE if f"{who}, perplexity" in report["left_out"]}
    assert whole.keys() == EVERYONE - missing
    assert BARE_CALL in missing
    assert {STREAMING, BARE_CHUNKS, DENSE_PERPLEXITY, OPERATIONS} <= whole.keys()
    assert whole[STREAMING]["operations"] == 2 * 256 * 64 * 1003
    assert whole[STREAMING]["case"] == "tiny, N = 256"
    assert whole[STREAMING]["loss_error"] > 0
    # Nothing is kept of a bare product: what it allocates is what ours allocates for the same.
    assert 0 < whole[BARE_CHUNKS]["peak_bytes"] <= whole[STREAMING]["peak_bytes"]

    kinds = [chunk.kind for chunk in CHUNKS["cpu"]]
    assert kinds == ["float32", "bfloat16", "float16", "float32, softcap and bias"]
    folds = found["fold"]
    assert folds.keys() == {f"{by}, {kind}" for by in (FOLD, FOLD_OPERATIONS) for kind in kinds}
    one = folds[f"{FOLD}, bfloat16"]
    assert (one["rows"], one["columns"], one["bytes"]) == (256, 1003, 2 * 256 * 1003)
    assert one["place"] == IN_CACHE
    assert one["ours"]
    assert "loss_error" not in folds[f"{FOLD_OPERATIONS}, bfloat16"]

    assert found["scoring"].keys() == {
        SCORE,
        SCORE_FORWARD,
        SCORE_EQUAL,
        SCORE_BACKBONE,
        SCORE_LOOP,
        SCORE_MEANS,
    }
    score = found["scoring"][SCORE]
    assert (score["examples"], score["distinct_examples"]) == (24, 7)
    assert score["tokens"] > score["response_tokens"] > 0
    assert score["difference"] <= bench_scoring.AGREE
    assert score["case"] == "toy, 24 examples"
    assert 0 < score["batches"] < 24
    assert 0 < score["padding"] <= MOST_PADDING
    assert score["data"] == "data.jsonl"
    assert [name for name, way in found["scoring"].items() if way["ours"]] == [SCORE]


def test_every_provider_finds_the_reference() -> None:
    x = make_tokens(130, 16, 99)
    found, left_out = calls()
    assert len(found) + len(left_out) == 4
    for name, call in found.items():
        if name == STREAMING and build_info() is None:
            continue
        assert 0 < checked(name, call, x, "cpu") < 1e-5


@pytest.mark.parametrize("factor", [1.0001, float("nan")])
def test_a_provider_that_is_wrong_gets_no_time(factor: float, results: Results) -> None:
    def wrong(x: Tokens) -> Tensor:
        return dense(x) * factor

    def raises(x: Tokens) -> Tensor:
        raise ValueError("no such dtype")

    measure_whole(QUICK, size_of(QUICK), {"wrong": wrong, "raises": raises}, results)
    assert providers_of(results) == {BARE_CHUNKS}
    assert not results.report["failed"]
    left_out = results.report["left_out"]
    said = "FAILED SuiteError: losses are over the error budget"
    assert said in left_out["wrong, perplexity"]
    assert left_out["raises, perplexity"] == "FAILED ValueError: no such dtype"


@built
def test_ours_that_is_wrong_fails(results: Results) -> None:
    found = {STREAMING: lambda x: dense(x) * 1.0001, DENSE_PERPLEXITY: dense}
    measure_whole(QUICK, size_of(QUICK), found, results)
    assert providers_of(results) == {BARE_CHUNKS, DENSE_PERPLEXITY}
    assert "error budget" in results.report["failed"][f"{STREAMING}, perplexity"]


def test_a_provider_that_mixes_examples_up_is_caught() -> None:
    x = make_tokens(130, 16, 99)

    def shifted(x: Tokens) -> Tensor:
        return dense(x).roll(1) if x.num_samples < x.labels.shape[0] else dense(x)

    with pytest.raises(SuiteError, match="error budget"):
        checked("shifted", shifted, x, "cpu")


def providers_of(results: Results) -> set[str]:
    """Return who was timed."""
    return {record["who"] for record in results.report["records"]}


def test_what_fails_is_noted_and_only_ours_is_a_failure(results: Results) -> None:
    def fails() -> None:
        raise RuntimeError("no kernel")

    def fits_not() -> None:
        raise torch.OutOfMemoryError("tried to allocate 1 TiB\nand more")

    assert results.attempt("right", lambda: 3, ours=True) == 3
    assert results.attempt("ours", fails, ours=True) is None
    assert results.attempt("other", fails, ours=False) is None
    assert results.attempt("large", fits_not, ours=True) is None
    results.leave_out({"absent": "not installed"})
    assert results.report["failed"] == {"ours": "RuntimeError: no kernel"}
    assert results.report["left_out"] == {
        "other": "FAILED RuntimeError: no kernel",
        "large": "does not fit: tried to allocate 1 TiB",
        "absent": "not installed",
    }


def test_times_are_written_with_their_quartiles(
    results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    results.add_times([4.0, 1.0, 2.0, 3.0, 5.0], who="right")
    results.add_times([2.0], who="once")
    times = [{n: r[n] for n in ("q1", "median", "q3", "rounds")} for r in results.report["records"]]
    assert times == [
        {"q1": 2, "median": 3, "q3": 4, "rounds": 5},
        {"q1": 2, "median": 2, "q3": 2, "rounds": 1},
    ]
    assert "3.00 s (2.00 s to 4.00 s): right" in capsys.readouterr().out


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fold_is_checked(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, results: Results
) -> None:
    fold = make_fold(300, 101, dtype, softcap=30.0, bias=True)
    assert fold.check().holds
    monkeypatch.setattr(Fold, "compiled", lambda self, times=1: None)
    assert not fold.check().holds
    chunk = Chunk(IN_CACHE, str(dtype).removeprefix("torch."))
    measure_folds(chunk, QUICK, results)
    assert providers_of(results) == {FOLD_OPERATIONS}
    assert "error budget" in results.report["failed"][f"{FOLD}, {chunk.place}, {chunk.kind}"]


@built
@pytest.mark.parametrize(
    ("place", "who"),
    [
        (IN_HBM, {FOLD, FOLD_SOFTCAP, COPY}),
        (IN_HBM_CHUNK, {FOLD, FOLD_SOFTCAP, COPY}),
        (IN_L2, {FOLD, FOLD_SOFTCAP}),
    ],
)
def test_a_copy_moves_twice_the_bytes_of_a_fold(
    place: str, who: set[str], results: Results
) -> None:
    measure_folds(Chunk(place, "float16"), QUICK, results)
    found = {record["who"]: record for record in results.report["records"]}
    assert {name: record["bytes"] for name, record in found.items()} == {
        name: 2 * 256 * 1003 * (2 if name == COPY else 1) for name in who
    }
    assert found[FOLD_SOFTCAP]["kind"] == "float16, softcap"
    assert [record["ours"] for record in found.values()] == [name != COPY for name in found]


def test_without_the_extension_ours_fails_and_says_so(
    monkeypatch: pytest.MonkeyPatch, results: Results
) -> None:
    monkeypatch.setattr(bench_perplexity, "build_info", lambda: None)
    found = {STREAMING: dense, DENSE_PERPLEXITY: dense}
    measure_whole(QUICK, size_of(QUICK), found, results)
    assert providers_of(results) == {BARE_CHUNKS, DENSE_PERPLEXITY}
    chunk = Chunk(IN_CACHE, "float32")
    measure_folds(chunk, QUICK, results)
    assert providers_of(results) == {BARE_CHUNKS, DENSE_PERPLEXITY, FOLD_OPERATIONS}
    failed = results.report["failed"]
    assert failed.keys() == {f"{STREAMING}, perplexity", f"{FOLD}, {chunk.place}, {chunk.kind}"}
    assert all("is not built" in reason for reason in failed.values())


def test_an_extension_without_cuda_does_not_do_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_perplexity, "build_info", lambda: {"cuda": ""})
    require_compiled("cpu")
    with pytest.raises(SuiteError, match="no CUDA kernels"):
        require_compiled("cuda")


@built
def test_scores_that_differ_from_the_obvious_loop_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_scoring, "obvious_loop", lambda task: torch.tensor([1.0, 2.0]))
    task: Any = None
    for values in ([1.0, 2.001], [1.0, float("nan")]):
        monkeypatch.setattr(bench_scoring, "ours", lambda task, v=values: torch.tensor(v))
        with pytest.raises(SuiteError, match="differ"):
            bench_scoring.check(task)
