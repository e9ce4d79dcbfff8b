"""`python -m benchmarks`: result files, tables, pictures and comparison."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import suites
from benchmarks.__main__ import main
from benchmarks.result_file import Results
from benchmarks.settings import Settings
from benchmarks.suites import SUITES

ROOT = Path(__file__).parent.parent.parent
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suite of losses at tiny sizes, in a process of its own as all suites are."""
    out = tmp_path_factory.mktemp("out")
    options = ("--device", "cpu", "--quick", "--threads", "1", "--commit", "abc")
    assert main(["run", "loss", *options, "--out", str(out)]) == 0
    return out


def test_a_run_leaves_one_file_that_says_all(quick_run: Path) -> None:
    (file,) = quick_run.iterdir()
    assert file.name == "cpu-loss-quick.json"
    report = json.loads(file.read_text())
    assert report["suite"] == "loss"
    assert report["facts"]["commit"] == "abc"
    assert report["facts"]["command"].startswith("python -m benchmarks run loss --device cpu")
    # Nor where on this machine it lies.
    assert "/" not in report["facts"]["command"]
    assert report["settings"]["quick"] is True
    assert report["failed"] == {}
    assert "needs a CUDA device" in report["left_out"]["sftmix, vocab_tiles"]
    assert "cuda" in report["left_out"]["Liger-Kernel"]
    found = {(r["measure"], r.get("task"), r["who"]) for r in report["records"]}
    ours = "sftmix, row_chunks"
    for measure in ("forward", "forward + backward"):
        for task in ("NTP", "Mixup", "NTP + Mixup"):
            assert {(measure, task, ours), (measure, task, "dense PyTorch")} <= found
        assert (measure, "NTP", "bare matrix products") in found
    assert {("ceiling", None, "copy"), ("ceiling", None, "matrix product")} <= found
    for record in report["records"]:
        assert 0 < record["q1"] <= record["median"] <= record["q3"]
        assert record["rounds"] == report["settings"]["repeats"]


def test_tables_and_pictures_come_from_the_files(
    quick_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    for file in quick_run.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert main(["plot", str(tmp_path)]) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert "sftmix, row_chunks" in text
    assert "needs a CUDA device" in text
    assert main(["compare", str(tmp_path), "--baseline", str(tmp_path)]) == 0
    assert "as before" in capsys.readouterr().out
    assert main(["compare", str(tmp_path), "--baseline", str(tmp_path / "none")]) == 0


def test_a_folder_without_results_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plot", str(tmp_path)]) == 2
    assert "no result file" in capsys.readouterr().err


@no_gpu
def test_without_a_gpu_its_suites_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "loss", "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["run", "loss"], ["run", "all", "--device", "tpu"]])
def test_wrong_options_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_a_suite_that_fails_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def fails(suite: str, *_: Any) -> int:
        calls.append(suite)
        return int(suite == "loss")

    monkeypatch.setattr("benchmarks.__main__.run_apart", fails)
    assert main(["run", "all", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert calls == ["loss", "objectives", "perplexity", "step", "memory"]
    assert "failed: loss" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("only", "benchmarks"), [("memory", ["memory"]), ("not memory", []), ("", ["memory"])]
)
def test_benchmarks_are_chosen_by_name(
    only: str, benchmarks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(suites, "measure", lambda name, *_: ran.append(name))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as ended:
        suites.run_suite("memory", Settings(threads=1), tmp_path, only)
    assert ended.value.code == 0
    assert ran == benchmarks


def test_a_benchmark_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "loss", "--device", "cpu", "--out", str(tmp_path), "-k", "losses"]) == 2
    assert "-k: expected NAME or 'not NAME', got 'losses'" in capsys.readouterr().err


def test_nothing_is_begun_when_the_time_is_over(tmp_path: Path) -> None:
    settings = Settings(quick=True, peers=False, threads=1, seconds=-1)
    with pytest.raises(SystemExit) as ended:
        suites.run_suite("loss", settings, tmp_path, "")
    assert ended.value.code == 0
    report = json.loads((tmp_path / "cpu-loss-quick.json").read_text())
    assert report["records"] == []
    late = dict.fromkeys(("ceilings", "row_chunks", "loss"), "out of time")
    assert report["left_out"] == late


def test_a_suite_that_needs_what_is_missing_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit) as ended:
        suites.run_suite("step", Settings(quick=True, threads=1), tmp_path, "")
    assert ended.value.code == 0
    report = json.loads((tmp_path / "cpu-step-quick.json").read_text())
    assert report["records"] == []
    assert report["left_out"] == {"step": "datasets is not installed"}


def test_every_benchmark_is_in_a_suite() -> None:
    files = {file.stem for file in (ROOT / "benchmarks").glob("bench_*.py")}
    assert files == {f"bench_{name}" for names in SUITES.values() for name in names}


def test_results_are_saved_as_they_come_and_whole(tmp_path: Path) -> None:
    results = Results("loss", Settings(), tmp_path / "new")
    results.add(who="a", median=1.0)
    (file,) = (tmp_path / "new").iterdir()
    assert json.loads(file.read_text())["records"] == [{"who": "a", "median": 1.0}]
    results.miss("left_out", "b", "two\n  lines")
    assert json.loads(file.read_text())["left_out"] == {"b": "two lines"}


def test_a_run_adds_to_a_file_that_is_there_if_it_is_told_to(tmp_path: Path) -> None:
    first = Results("loss", Settings(), tmp_path)
    first.add(who="a", median=1.0)
    first.miss("failed", "b", "no kernel")
    more = Results("loss", Settings(keep=True), tmp_path)
    more.add(who="c", median=2.0)
    report = json.loads((tmp_path / "cpu-loss.json").read_text())
    assert [record["who"] for record in report["records"]] == ["a", "c"]
    assert report["failed"] == {"b": "no kernel"}
    Results("loss", Settings(), tmp_path).save()
    assert json.loads((tmp_path / "cpu-loss.json").read_text())["records"] == []
    assert Results("memory", Settings(keep=True), tmp_path).report["records"] == []


def test_a_failure_of_an_earlier_run_is_not_this_ones(tmp_path: Path) -> None:
    Results("loss", Settings(quick=True), tmp_path).miss("failed", "b", "no kernel")
    settings = Settings(quick=True, keep=True, threads=1, seconds=-1)
    with pytest.raises(SystemExit) as ended:
        suites.run_suite("loss", settings, tmp_path, "")
    assert ended.value.code == 0


def test_a_short_run_has_the_headline_ours_and_the_fastest_peer(tmp_path: Path) -> None:
    short = Settings(device="cuda", short=True)
    assert [case.name for case in short.cases()] == ["Llama-3.1-8B, N = 8192, trained-like"]
    options = ("--device", "cpu", "--quick", "--short", "--threads", "1", "-k", "loss")
    assert main(["run", "loss", *options, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "cpu-loss-quick.json").read_text())
    assert {record["task"] for record in report["records"]} == {"NTP", "NTP + Mixup"}
    assert {record["who"] for record in report["records"]} == {
        "sftmix, row_chunks",
        "dense PyTorch",
        "bare matrix products",
    }
    assert report["left_out"].keys() == {"sftmix, vocab_tiles", "Liger-Kernel, 4096 rows"}


def result_files() -> list[Any]:
    return [json.loads(file.read_text()) for file in (ROOT / "benchmarks/results").glob("*.json")]


def test_committed_results_say_where_they_come_from() -> None:
    for report in result_files():
        assert report["facts"].keys() >= {"date", "commit", "command", "machine", "torch", "triton"}
        assert all(report["facts"][name] for name in ("date", "commit", "command", "torch"))
        assert "dirty" not in report["facts"]["commit"]
        assert " /" not in report["facts"]["command"]
        on_gpu = report["settings"]["device"] == "cuda"
        assert not on_gpu or all(report["facts"][name] for name in ("gpu", "driver", "cuda"))
        assert report["failed"] == {}
