"""The suite of perplexity: right before it is timed, and written down with what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_scoring, perplexity_providers
from benchmarks.bench_online_softmax import (
    CHUNKS,
    FOLD_OPERATIONS,
    FOLD_SOFTCAP,
    IN_CACHE,
    IN_HBM,
    IN_HBM_CHUNK,
    IN_L2,
    Chunk,
    measure_folds,
)
from benchmarks.bench_perplexity import EVERYONE, measure_whole, size_of
from benchmarks.bench_row_chunks import COPY
from benchmarks.group import Group
from benchmarks.measure import SuiteError
from benchmarks.perplexity_providers import (
    BARE_CHUNKS,
    DENSE,
    FOLD,
    ONE_PRODUCT,
    OPERATIONS,
    OURS,
    Tokens,
    dense,
    make_fold,
    make_tokens,
    providers,
)
from benchmarks.settings import Settings
from sftmix_kernels.build import build_info

ROOT = Path(__file__).parent.parent.parent
QUICK = Settings(device="cpu", quick=True)
built = pytest.mark.skipif(build_info() is None, reason="the extension is not built")


def run(out: Path, *options: str) -> dict[str, Any]:
    """What a run of the suite on the CPU writes."""
    command = ["-m", "benchmarks", "run", "perplexity", "--device", "cpu", "--quick"]
    subprocess.run(
        [sys.executable, *command, "--threads", "1", "--out", str(out), *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    report: dict[str, Any] = json.loads((out / "cpu-perplexity-quick.json").read_text())
    return report


@built
def test_a_run_writes_down_everyone_or_why_not(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    data = tmp_path / "data.jsonl"
    rows = [{"question": "one " * (i + 1), "answer": "two " * (2 * i + 1)} for i in range(7)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run(tmp_path, "--data", str(data))
    assert report["failed"] == {}
    found: dict[str, dict[str, Any]] = {}
    for record in report["records"]:
        name = f"{record['who']}, {record['kind']}" if "kind" in record else record["who"]
        found.setdefault(record["measure"], {})[name] = record
        assert record["median"] > 0
    assert found.keys() == {"perplexity", "fold", "scoring"}

    whole = found["perplexity"]
    missing = {who for who in EVERYONE if f"{who}, perplexity" in report["left_out"]}
    assert whole.keys() == set(EVERYONE) - missing
    assert ONE_PRODUCT in missing
    assert {OURS, BARE_CHUNKS, DENSE, OPERATIONS} <= whole.keys()
    assert whole[OURS]["operations"] == 2 * 256 * 64 * 1003
    assert whole[OURS]["case"] == "tiny, N = 256"
    assert whole[OURS]["loss_error"] > 0
    # Nothing is kept of a bare product: what it allocates is what ours allocates for the same.
    assert 0 < whole[BARE_CHUNKS]["peak_bytes"] <= whole[OURS]["peak_bytes"]

    kinds = [chunk.kind for chunk in CHUNKS["cpu"]]
    assert kinds == ["float32", "bfloat16", "float16", "float32, softcap and bias"]
    folds = found["fold"]
    assert folds.keys() == {f"{by}, {kind}" for by in (FOLD, FOLD_OPERATIONS) for kind in kinds}
    one = folds[f"{FOLD}, bfloat16"]
    assert (one["rows"], one["columns"], one["bytes"]) == (256, 1003, 2 * 256 * 1003)
    assert one["place"] == IN_CACHE
    assert one["ours"]
    assert "loss_error" not in folds[f"{FOLD_OPERATIONS}, bfloat16"]

    assert found["scoring"].keys() == set(bench_scoring.WAYS)
    score = found["scoring"][bench_scoring.OURS]
    assert (score["examples"], score["distinct_examples"]) == (24, 7)
    assert score["tokens"] > score["response_tokens"] > 0
    assert score["difference"] <= bench_scoring.AGREE
    assert score["data"] == "data.jsonl"
    assert [name for name, way in found["scoring"].items() if way["ours"]] == [bench_scoring.OURS]


def test_without_datasets_scoring_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(pytest.skip.Exception, match="could not import 'datasets'"):
        bench_scoring.measure_scoring(QUICK)


def test_every_provider_finds_the_reference() -> None:
    x = make_tokens(130, 16, 99)
    calls, left_out = providers()
    assert len(calls) + len(left_out) == 4
    for name, call in calls.items():
        if name == OURS and build_info() is None:
            continue
        checked = perplexity_providers.check(call, x)
        assert checked.holds, (name, checked.says)


@pytest.mark.parametrize("factor", [1.0001, float("nan")])
def test_a_provider_that_is_wrong_gets_no_time(factor: float) -> None:
    def wrong(x: Tokens) -> Tensor:
        return dense(x) * factor

    def raises(x: Tokens) -> Tensor:
        raise ValueError("no such dtype")

    group = measure_whole(QUICK, size_of(QUICK), {"wrong": wrong, "raises": raises}, {})
    assert group.samples.keys() == {BARE_CHUNKS}
    assert not group.failed
    assert "FAILED SuiteError: losses are over the error budget" in group.left_out["wrong"]
    assert group.left_out["raises"] == "FAILED ValueError: no such dtype"


@built
def test_ours_that_is_wrong_fails() -> None:
    calls = {OURS: lambda x: dense(x) * 1.0001, DENSE: dense}
    group = measure_whole(QUICK, size_of(QUICK), calls, {})
    assert group.samples.keys() == {BARE_CHUNKS, DENSE}
    assert "error budget" in group.failed[OURS]


def test_a_provider_that_mixes_examples_up_is_caught() -> None:
    x = make_tokens(130, 16, 99)

    def shifted(x: Tokens) -> Tensor:
        return dense(x).roll(1) if x.num_samples < x.labels.shape[0] else dense(x)

    assert not perplexity_providers.check(shifted, x).holds


class Recorder:
    """Stands in for a test's request: keeps what was recorded."""

    def __init__(self) -> None:
        self.node = SimpleNamespace(user_properties=[])
        self.records: list[tuple[Any, dict[str, Any]]] = []

    def getfixturevalue(self, name: str) -> Any:
        assert name == "record"
        return lambda samples, **figures: self.records.append((samples, figures))


def test_a_group_records_fails_or_says_why_not() -> None:
    def fails() -> None:
        raise RuntimeError("no kernel")

    def fits_not() -> None:
        raise torch.OutOfMemoryError("tried to allocate 1 TiB\nand more")

    group, recorder = Group({"absent": "not installed"}), Recorder()
    request: Any = recorder
    assert group.attempt("right", lambda: 3, ours=True) == 3
    group.add("right", [1.0, 2.0], who="right")
    assert group.attempt("ours", fails, ours=True) is None
    assert group.attempt("other", fails, ours=False) is None
    assert group.attempt("large", fits_not, ours=True) is None
    group.write("right", "right, perplexity", request)
    assert recorder.records == [([1.0, 2.0], {"who": "right"})]
    assert recorder.node.user_properties == [("name", "right, perplexity")]
    with pytest.raises(pytest.fail.Exception, match="RuntimeError: no kernel"):
        group.write("ours", "ours", request)
    reasons = {
        "other": "FAILED RuntimeError: no kernel",
        "large": "does not fit: tried to allocate 1 TiB$",
        "absent": "not installed",
    }
    for name, reason in reasons.items():
        with pytest.raises(pytest.skip.Exception, match=reason):
            group.write(name, name, request)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fold_is_checked(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    fold = make_fold(300, 101, dtype, softcap=30.0, bias=True)
    assert fold.check().holds
    monkeypatch.setattr(perplexity_providers.Fold, "compiled", lambda self: None)
    assert not fold.check().holds
    group = measure_folds(Chunk(IN_CACHE, str(dtype).removeprefix("torch.")), QUICK)
    assert group.samples.keys() == {FOLD_OPERATIONS}
    assert "error budget" in group.failed[FOLD]


@built
@pytest.mark.parametrize(
    ("place", "who"),
    [
        (IN_HBM, {FOLD, FOLD_SOFTCAP, COPY}),
        (IN_HBM_CHUNK, {FOLD, FOLD_SOFTCAP, COPY}),
        (IN_L2, {FOLD, FOLD_SOFTCAP}),
    ],
)
def test_a_copy_moves_twice_the_bytes_of_a_fold(place: str, who: set[str]) -> None:
    group = measure_folds(Chunk(place, "float16"), QUICK)
    assert group.samples.keys() == who
    assert {name: row["bytes"] for name, row in group.figures.items()} == {
        name: 2 * 256 * 1003 * (2 if name == COPY else 1) for name in who
    }
    assert group.figures[FOLD_SOFTCAP]["kind"] == "float16, softcap"
    assert [row["ours"] for row in group.figures.values()] == [n != COPY for n in group.figures]


def test_without_the_extension_ours_fails_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity_providers, "build_info", lambda: None)
    whole = measure_whole(QUICK, size_of(QUICK), {OURS: dense, DENSE: dense}, {})
    assert "is not built" in whole.failed[OURS]
    assert whole.samples.keys() == {BARE_CHUNKS, DENSE}
    folds = measure_folds(Chunk(IN_CACHE, "float32"), QUICK)
    assert "is not built" in folds.failed[FOLD]
    assert folds.samples.keys() == {FOLD_OPERATIONS}


def test_an_extension_without_cuda_does_not_do_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity_providers, "build_info", lambda: {"cuda": ""})
    assert perplexity_providers.require_compiled("cpu") == {"cuda": ""}
    with pytest.raises(SuiteError, match="no CUDA kernels"):
        perplexity_providers.require_compiled("cuda")


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
