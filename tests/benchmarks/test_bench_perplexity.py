"""The suites of perplexity and of scoring: right before they are timed, and written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_scoring, perplexity_providers
from benchmarks.__main__ import main
from benchmarks.bench_perplexity import FOLD_OPERATIONS, FOLDS, measure_whole
from benchmarks.gpu_perplexity import with_shares, within
from benchmarks.gpu_report import IN_HBM, IN_L2, perplexity_targets
from benchmarks.measure import SuiteError
from benchmarks.perplexity_providers import (
    BARE_CHUNKS,
    DENSE,
    FOLD,
    OPERATIONS,
    OURS,
    Tokens,
    chunks_of_logits,
    dense,
    make_fold,
    make_tokens,
    ours,
    providers,
)
from sftmix_kernels import perplexity
from sftmix_kernels.build import build_info

built = pytest.mark.skipif(build_info() is None, reason="the extension is not built")


def run(suite: str, file: Path, *options: str) -> dict[str, Any]:
    main([suite, "--threads", "1", "--json", str(file), *options])
    found: dict[str, Any] = json.loads(file.read_text())[suite]
    return found


@built
def test_perplexity_suite_measures_the_whole_and_the_fold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--tokens", "70", "--hidden-size", "16", "--vocab-size", "99", "--repeats", "2")
    found = run("perplexity", tmp_path / "out.json", *sizes)
    assert {OURS, BARE_CHUNKS, DENSE, OPERATIONS} <= found["providers"].keys()
    assert all(row["median"] > 0 for row in found["providers"].values())
    # Nothing is kept of a bare product: what it allocates is what ours allocates for the same.
    peaks = {name: row["peak_bytes"] for name, row in found["providers"].items()}
    assert 0 < peaks[BARE_CHUNKS] <= peaks[OURS]
    assert found["folds"].keys() == FOLDS.keys()
    row = found["folds"]["bfloat16"][FOLD]
    assert row["logits"] == [70, 99]
    assert row["gb_per_second"] == pytest.approx(2 / row["ns_per_logit"])
    assert [(target["of"], target["limit"]) for target in found["targets"]] == [
        (BARE_CHUNKS, 1.2),
        (DENSE, 0.5),
        (DENSE, 0.1),
        (FOLD_OPERATIONS, 1 / 3),
    ]
    assert "target seconds of a fold <= 0.333 x PyTorch operations" in capsys.readouterr().out


def test_every_provider_finds_the_reference() -> None:
    x = make_tokens(130, 16, 99)
    calls, left_out = providers()
    assert len(calls) + len(left_out) == 4
    for name, call in calls.items():
        if name == OURS and build_info() is None:
            continue
        checked = perplexity_providers.check(call, x)
        assert checked.passed, (name, checked.says)


@pytest.mark.parametrize("factor", [1.0001, float("nan")])
def test_a_provider_that_is_wrong_gets_no_time(
    factor: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(x: Tokens) -> Tensor:
        return dense(x) * factor

    monkeypatch.setattr("benchmarks.bench_perplexity.providers", lambda: ({"wrong": wrong}, {}))
    found = measure_whole(make_tokens(70, 16, 99), 1)
    assert found["providers"].keys() == {BARE_CHUNKS}
    assert "error budget" in found["left_out"]["wrong"]
    assert "wrong" in capsys.readouterr().out


def test_a_provider_that_mixes_examples_up_is_caught() -> None:
    x = make_tokens(130, 16, 99)

    def shifted(x: Tokens) -> Tensor:
        return dense(x).roll(1) if x.num_samples < x.labels.shape[0] else dense(x)

    assert not perplexity_providers.check(shifted, x).passed


def test_chunks_are_the_logits_in_the_blocks_of_ours() -> None:
    x = make_tokens(300, 8, 50)
    logits = torch.full((300, 50), torch.nan)

    def keep(part: Tensor, rows: slice, start: int) -> None:
        logits[rows, start : start + part.shape[1]] = part

    # Room for 128 rows of 16 float32 columns.
    within(128 * 16 * 4, lambda x, chunk: chunks_of_logits(x, chunk, keep), x, 16)
    torch.testing.assert_close(logits, x.hidden @ x.weight.t())


@built
def test_another_workspace_gives_the_same_perplexities_and_is_taken_back() -> None:
    x, before = make_tokens(300, 8, 50), perplexity.block_rows
    found = within(128 * 16 * 4, ours, x, 16)
    torch.testing.assert_close(found, ours(x))
    assert perplexity.block_rows is before


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fold_is_checked(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    fold = make_fold(300, 101, dtype, softcap=30.0, bias=True)
    assert fold.check().passed
    monkeypatch.setattr(perplexity_providers.Fold, "compiled", lambda self: None)
    assert not fold.check().passed


def test_without_the_extension_a_suite_stops_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(perplexity_providers, "build_info", lambda: None)
    file = tmp_path / "out.json"
    with pytest.raises(SystemExit) as ended:
        main(["perplexity", "--json", str(file)])
    assert ended.value.code == 1
    assert "is not built" in capsys.readouterr().err
    assert "is not built" in json.loads(file.read_text())["perplexity"]["failed"]


def test_an_extension_without_cuda_does_not_do_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity_providers, "build_info", lambda: {"cuda": ""})
    assert perplexity_providers.require_compiled("cpu") == {"cuda": ""}
    with pytest.raises(SuiteError, match="no CUDA kernels"):
        perplexity_providers.require_compiled("cuda")


@built
def test_scoring_suite_compares_with_the_obvious_loop(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"question": "one " * (i + 1), "answer": "two " * (2 * i + 1)} for i in range(7)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--data", str(data), "--rows", "18", "--scoring-repeats", "1")
    found = run("scoring", tmp_path / "out.json", *options)
    assert (found["examples"], found["distinct_examples"]) == (18, 7)
    assert found["difference"] <= bench_scoring.AGREE
    assert found["tokens"] > found["response_tokens"] > 0
    ways = found["ways"]
    assert ways.keys() == {
        bench_scoring.OURS,
        bench_scoring.FORWARD,
        bench_scoring.BACKBONE,
        bench_scoring.LOOP,
        bench_scoring.MEANS,
    }
    rate = ways[bench_scoring.LOOP]["tokens_per_second"]
    assert rate == pytest.approx(found["tokens"] / ways[bench_scoring.LOOP]["median"])
    assert [target["limit"] for target in found["targets"]] == [1.1, 1.0]


def test_scores_that_differ_from_the_obvious_loop_get_no_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_scoring, "obvious_loop", lambda task: torch.tensor([1.0, 2.0]))
    task: Any = None
    for values in ([1.0, 2.001], [1.0, float("nan")]):
        monkeypatch.setattr(bench_scoring, "ours", lambda task, v=values: torch.tensor(v))
        with pytest.raises(SuiteError, match="differ"):
            bench_scoring.check(task)


def test_rates_are_held_beside_the_copy_of_all_logits() -> None:
    def row(step: str, place: str, rate: float) -> dict[str, Any]:
        return {"step": step, "place": place, "dtype": "bfloat16", "gb_per_second": rate}

    rows = {
        "a": row("copy", IN_HBM, 400.0),
        "b": row(FOLD, IN_HBM, 360.0),
        "c": row(FOLD, IN_L2, 300.0),
    }
    shares = with_shares(rows, "bfloat16")
    assert [one["share_of_copy"] for one in shares.values()] == [1.0, 0.9, 0.75]
    whole = {OURS: {"median": 1.04}, BARE_CHUNKS: {"median": 1.0}}
    result = {"perplexity": {"providers": whole}, "perplexity fold": shares}
    assert [target.reached for target in perplexity_targets(result)] == [True, True, False]
    assert [target.reached for target in perplexity_targets({})] == [None] * 3
