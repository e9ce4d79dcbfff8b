"""Long sequences: ways to train agree, the search ends where it should, the page is the data's."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.long_sequence import runs, worker
from benchmarks.long_sequence.__main__ import main
from benchmarks.long_sequence.loss import loss_workspace
from benchmarks.long_sequence.report import BEGIN, END, Results, markdown, read, targets, write
from benchmarks.long_sequence.runs import beyond, bounds, searched
from benchmarks.long_sequence.settings import (
    CPU,
    CUDA,
    DONE,
    LEAN,
    MODES,
    NO_MEMORY,
    QUICK_SUBJECT,
    SUBJECTS,
    Task,
)
from benchmarks.long_sequence.step import train_pair
from benchmarks.measure import SuiteError
from benchmarks.result_file import OutOfTime
from sftmix.plan.search import GRID, step_of
from sftmix_kernels import RowChunks

# PEFT reads transformers' old name for activation checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks/long_sequence/results"
TOKENS = 24


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """A mode's step on a tiny model, each once."""
    folder, found = str(tmp_path_factory.mktemp("runs")), dict[str, dict[str, Any]]()

    def get(mode: str) -> dict[str, Any]:
        if mode not in found:
            found[mode] = train_pair(QUICK_SUBJECT, mode, TOKENS, CPU, folder)
        return found[mode]

    return get


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "lean-tiles"])
def test_every_way_to_train_has_the_same_loss(
    trained: Callable[[str], dict[str, Any]], mode: str
) -> None:
    expected = trained("dense-ntp" if "ntp" in mode else "dense")["loss"]
    assert trained(mode)["loss"] == pytest.approx(expected, rel=1e-5)
    assert trained(mode)["tokens"] == 2 * TOKENS
    assert trained(mode)["seconds"] > 0


def test_the_two_losses_differ(trained: Callable[[str], dict[str, Any]]) -> None:
    assert trained("dense")["loss"] > 1.1 * trained("dense-ntp")["loss"]


@pytest.mark.gpu
def test_a_step_on_a_gpu_has_a_peak(tmp_path: Path) -> None:
    found = train_pair(QUICK_SUBJECT, "lean-tiles", TOKENS, CUDA, str(tmp_path))
    assert 0 < found["peak_bytes"] <= found["reserved_bytes"]


def test_lean_turns_on_what_the_mode_before_it_has() -> None:
    assert MODES["lean"].options == LEAN
    on_gpu = {name for name, mode in MODES.items() if CPU not in mode.devices}
    assert on_gpu == {"lean-offload", "lean-tiles"}
    assert all(subject.size.batch % 2 == 0 for subject in SUBJECTS.values())


def test_the_losss_workspace_does_not_grow() -> None:
    task = Task("loss", "toy", CPU, True, 1)
    few, many = (loss_workspace(task, rows, RowChunks(rows=16)) for rows in (64, 256))
    assert many["loss_peak_bytes"] > few["loss_peak_bytes"]
    assert many["workspace_bytes"] <= few["workspace_bytes"] * 1.05
    assert many["formula_bytes"] == pytest.approx(many["workspace_bytes"], rel=0.1)


@pytest.mark.parametrize("slope", [1000, 137.5])
@pytest.mark.parametrize("budget", [3_000_000, 50_000_000, 100_000_000])
@pytest.mark.parametrize("known", [(), (1024, 2048)])
@pytest.mark.parametrize("silent", [True, False])
def test_the_largest_length_is_found_in_few_measurements(
    slope: float, budget: int, known: tuple[int, ...], silent: bool
) -> None:
    calls: list[int] = []

    def peak(length: int) -> int:
        return int(2e6 + slope * length * (1 + length / 1e7))

    peaks = {length: peak(length) for length in known if peak(length) <= budget}

    def measure(length: int) -> int:
        calls.append(length)
        found = peak(length)
        peaks[length] = beyond(peaks, length, budget) if silent and found > budget else found
        return peaks[length]

    assert searched(measure, peaks, budget, 4096) == ""
    fits, fails = bounds(peaks, budget)
    assert fails is not None
    assert peak(fits) <= budget < peak(fails)
    assert fails - fits // GRID * GRID <= step_of(fits)
    assert len(calls) == len(set(calls)) <= 12


def test_a_search_says_what_it_did_not_reach() -> None:
    def out_of_time(length: int) -> int:
        raise OutOfTime(f"{length}: not begun")

    peaks = {512: 1, 2048: 11}
    assert searched(out_of_time, peaks, 10, 64) == "1792: not begun"
    assert bounds(peaks, 10) == (512, 2048)
    assert bounds({512: 1}, 10) == (512, None)


def test_nothing_fits_where_the_shortest_length_does_not() -> None:
    peaks: dict[int, int] = {}

    def no_memory(length: int) -> int:
        peaks[length] = beyond(peaks, length, 10_000)
        return peaks[length]

    assert searched(no_memory, peaks, 10_000, 512) == ""
    assert bounds(peaks, 10_000) == (0, 256)


def fake_measure(tokens: dict[str, int]) -> Callable[[Task, float], dict[str, Any]]:
    """1 MiB for each token; a mode has memory for so many."""

    def measure(task: Task, seconds: float) -> dict[str, Any]:
        if seconds <= 0:
            raise OutOfTime("not begun")
        if task.kind == "loss":
            space = {"loss_peak_bytes": 9, "workspace_bytes": 8, "formula_bytes": 8}
            return {"outcome": DONE, "workspaces": [{"rows": n, **space} for n in (64, 128)]}
        if task.length > tokens[task.mode]:
            return {"outcome": NO_MEMORY, "says": "no"}
        size = task.length * 2**20
        common = {"before_bytes": 2**20, "process_bytes": size + 2**20}
        return {
            "outcome": DONE,
            "tokens": 2 * task.length,
            "seconds": 1.0,
            "peak_bytes": size,
        } | common

    return measure


WORDS = ["run", "--model", "toy", "--device", "cpu", "--quick", "--threads", "1", "--commit", "abc"]
TWO = ["--modes", "dense", "lean", "--lengths", "64", "128", "256"]


def test_a_run_is_saved_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "measure", fake_measure({"dense": 64, "lean": 1000}))
    assert main([*WORDS, *TWO, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.iterdir()
    assert file.name == "cpu-long_sequence-toy-quick.json"
    report = json.loads(file.read_text())
    steps = [(r["mode"], r["length"], r["outcome"]) for r in report["records"][:-2]]
    # The first length without memory is the last of its mode.
    assert steps == [
        ("dense", 64, DONE),
        ("lean", 64, DONE),
        ("dense", 128, NO_MEMORY),
        ("lean", 128, DONE),
        ("lean", 256, DONE),
    ]
    assert [r["workspace_bytes"] for r in report["records"][-2:]] == [8, 8]
    # A search alone is what is new; its points do not lengthen the table.
    monkeypatch.setattr(runs, "CPU_BUDGET", 300 * 2**20)
    more = ["--largest", "--out", str(tmp_path)]
    assert main([*WORDS, *TWO, *more]) == 0
    (one,) = read(tmp_path)
    lean = one.largest("lean")
    assert lean is not None
    assert (lean["length"], lean["fails"]) == (256, 512)
    assert "| dense SFTMix | 64 | no memory | no memory |" in markdown([one], [])
    assert "| lean | 64 | 128 | 256 |" in markdown([one], [])
    assert "| lean | 256 | 512 |" in markdown([one], [])
    assert main([*WORDS[:-1], "other", *TWO, "--out", str(tmp_path)]) == 2
    assert "was made with commit = 'abc', now it is 'other'" in capsys.readouterr().err


def test_what_time_does_not_allow_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "measure", fake_measure({"dense": 64, "lean": 1000}))
    assert main([*WORDS, *TWO, "--seconds", "0", "--out", str(tmp_path)]) == 0
    report = json.loads(next(tmp_path.iterdir()).read_text())
    assert not report["records"]
    assert report["left_out"]["lean, 256"] == "out of time"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--lengths", "1"], "expected at least 2 tokens, got 1"),
        (["--modes", "lean-tiles"], "lean-tiles is for cuda"),
    ],
)
def test_wrong_input_is_refused(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, *words, "--out", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_how_a_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task("step", "toy", CPU, True, 1, 64)

    def ends(status: int) -> None:
        done = subprocess.CompletedProcess([], status, 'noise\n{"outcome": "done"}\n', "because")
        monkeypatch.setattr(worker.subprocess, "run", lambda *_, **__: done)

    ends(0)
    assert worker.measure(task, 1) == {"outcome": DONE}
    ends(-9)
    assert worker.measure(task, 1)["outcome"] == NO_MEMORY
    ends(1)
    with pytest.raises(SuiteError, match="exit status 1: because"):
        worker.measure(task, 1)
    with pytest.raises(OutOfTime, match="not begun"):
        worker.measure(task, 0)


def test_what_says_that_memory_is_used_up() -> None:
    with pytest.raises(RuntimeError) as cpu:
        torch.empty(2**50)
    assert worker.is_out_of_memory(cpu.value)
    assert worker.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not worker.is_out_of_memory(RuntimeError("shapes differ"))


def results_of(device: str, model: str, records: list[dict[str, Any]], quick: bool) -> Results:
    settings = {"device": device, "model": model, "quick": quick}
    return Results(model, device, {"settings": settings, "records": records}, None)


def step(mode: str, length: int, size: int, outcome: str = DONE) -> dict[str, Any]:
    found = {"measure": "step", "mode": mode, "length": length, "outcome": outcome}
    return found | ({"peak_bytes": size, "process_bytes": size} if outcome == DONE else {})


def verdicts(results: Results) -> dict[str, str]:
    return {target.says: target.verdict for target in targets(results)}


def test_promises_are_judged() -> None:
    records = [step("lean", 16384, 24), step("dense", 16384, 100)]
    says = "lean / dense SFTMix, the process' peak at 16,384 tokens"
    assert verdicts(results_of(CPU, "toy", records, False))[says] == "reached"
    assert verdicts(results_of(CPU, "toy", records, True))[says] == "not judged"
    records[0] = step("lean", 16384, 26)
    assert verdicts(results_of(CPU, "toy", records, False))[says] == "MISSED"
    gpu = [step("lean", 131072, 9), step("dense", 32768, 0, NO_MEMORY)]
    found = verdicts(results_of(CUDA, "8B", gpu, False))
    assert found["lean, tokens of each sequence without offload"] == "reached"
    assert found["lean, tokens of each sequence without offload, stretch"] == "MISSED"
    assert found["dense SFTMix fails at, tokens"] == "reached"
    assert found["dense SFTMix, activation checkpointing fails at, tokens"] == "not measured"


def test_the_page_and_the_pictures_are_those_of_the_committed_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "benchmarks/long_sequence/results"
    folder.mkdir(parents=True)
    for file in RESULTS.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    document = tmp_path / "docs/memory.md"
    document.parent.mkdir()
    text = (ROOT / "docs/memory.md").read_text("utf-8")
    lines = text.splitlines()
    cut = [*lines[: lines.index(BEGIN) + 1], *lines[lines.index(END) :]]
    document.write_text("\n".join(cut) + "\n", encoding="utf-8")
    pictures = write(folder, document)
    assert document.read_text("utf-8") == text
    assert {picture.name for picture in pictures} == {file.name for file in RESULTS.glob("*.svg")}
    for picture in pictures:
        assert picture.read_bytes() == (RESULTS / picture.name).read_bytes()


def test_predictions_are_no_measurements(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = ["predict", "--model", "toy", "--device", CPU, "--quick", "--modes", "lean"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    (one,) = read(tmp_path)
    assert one.measured is None
    assert one.predictions("lean")[64] > 0
    said = markdown([one], [picture.name for picture in write(tmp_path, None)])
    assert "**Predicted, not measured**" in said
    assert "(cpu-toy.svg)" in said
