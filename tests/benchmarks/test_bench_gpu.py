"""What of the GPU suite needs no GPU: providers, the check before the race, verdicts, tables."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import __main__ as command
from benchmarks.bench_gpu import Notes, Settings, race
from benchmarks.bench_row_kernels import (
    LAUNCH,
    PAIR_ROWS,
    PASSES,
    PRODUCTS,
    Products,
    bandwidths,
    launches,
)
from benchmarks.gpu_report import (
    BARE,
    IN_HBM,
    IN_HBM_CHUNK,
    IN_L2,
    ONE_PRODUCT,
    PEAKED,
    RANDOM,
    targets,
)
from benchmarks.measure import Seconds, interleaved_seconds
from benchmarks.perplexity_providers import BARE_CHUNKS, FOLD, OURS
from benchmarks.providers import (
    BOTH,
    FILTERED,
    NTP,
    ORACLES,
    ROW_CHUNKS,
    VOCAB_TILES,
    Inputs,
    Provider,
    composed,
    errors,
    make_inputs,
    our_providers,
    peakedness,
    peer_providers,
)
from sftmix_kernels.build import build_info

ROOT = Path(__file__).parent.parent.parent
TINY = Settings(
    device="cpu",
    rows=64,
    hidden_size=16,
    vocab_size=101,
    check_rows=64,
    long_rows=96,
    repeats=2,
    same_bits=2,
    compile_dense=False,
)
built = pytest.mark.skipif(build_info() is None, reason="the extension is not built")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def hard_labels(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels)


@built
def test_the_suite_on_the_cpu_writes_figures_and_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, tables = tmp_path / "gpu.json", tmp_path / "gpu.md"
    files = ["--json", str(figures), "--markdown", str(tables), "--commit", "abc"]
    command.main(["gpu", "--device", "cpu", "--quick", "--threads", "1", *files])
    report = json.loads(figures.read_text())
    result = report["gpu"]
    assert report["facts"]["commit"] == "abc"
    assert result["failed"] == {}
    for kind in (RANDOM, PEAKED):
        providers = result[kind]["providers"]
        assert {f"{BOTH}: {ROW_CHUNKS}", f"{NTP}: {ROW_CHUNKS}", BARE} <= providers.keys()
        assert all(row["median"] > 0 for row in providers.values())
    assert {"products", "forward", "memory", "same bits"} <= result.keys()
    assert result["same bits"][f"{BOTH}: {ROW_CHUNKS}"]["equal"]
    assert result["left_out"]["row kernels"] == "needs CUDA"
    # Figures of tiny sizes are held to no target.
    assert [target["reached"] for target in result["targets"]] == [None] * 11
    assert f"{BOTH}: {ROW_CHUNKS}" in tables.read_text()
    assert "sizes too small" in capsys.readouterr().out


@built
def test_perplexity_alone_on_the_cpu(tmp_path: Path) -> None:
    figures, tables = tmp_path / "gpu.json", tmp_path / "gpu.md"
    files = ["--json", str(figures), "--markdown", str(tables)]
    options = ["--device", "cpu", "--quick", "--threads", "1", "--only", "perplexity", "--tune"]
    command.main(["gpu", *options, *files])
    result = json.loads(figures.read_text())["gpu"]
    assert result["failed"] == {}
    assert RANDOM not in result
    assert {OURS, BARE_CHUNKS, ONE_PRODUCT} <= result["perplexity"]["providers"].keys()
    folds = result["perplexity fold"].values()
    found = {(row["step"], row["place"], row["dtype"]) for row in folds}
    assert {(FOLD, place, "float16") for place in (IN_HBM, IN_HBM_CHUNK, IN_L2)} <= found
    assert all(row["share_of_copy"] > 0 for row in folds)
    assert len(result["perplexity tuning"]) > 1
    text = tables.read_text()
    assert all(title in text for title in ("## Perplexity", "## Fold of", "## Workspaces"))


@no_gpu
def test_without_a_gpu_the_suite_is_skipped_and_refused_where_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "SUITES", {})
    command.main([])
    assert "gpu: skipped" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["gpu"])
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("ours", [True, False])
def test_a_provider_that_is_wrong_gets_no_time(ours: bool) -> None:
    def wrong(x: Inputs) -> Tensor:
        return 1.1 * hard_labels(x.hidden, x.weight, x.labels)

    def raises(x: Inputs) -> Tensor:
        raise RuntimeError("no kernel")

    providers = [
        Provider("wrong", NTP, wrong, ours=ours, limit=None if ours else 0.02),
        Provider("raises", NTP, raises, ours=ours),
        Provider("right", NTP, lambda x: hard_labels(x.hidden, x.weight, x.labels), limit=0.02),
    ]
    notes = Notes()
    table = race(TINY, providers, False, notes)
    assert table["providers"].keys() == {BARE, f"{NTP}: right"}
    assert notes.failed.keys() == {f"{NTP}: wrong ({RANDOM})", f"{NTP}: raises ({RANDOM})"}
    assert notes.ours_failed == ours
    assert {one.who for one in notes.wrong} == {"wrong", "raises"}


def test_what_does_not_fit_is_left_out_and_no_failure() -> None:
    def call() -> None:
        raise torch.OutOfMemoryError("tried to allocate 1 TiB\nand more")

    notes = Notes()
    assert notes.attempt("large", call) is None
    assert notes.left_out == {"large": "does not fit: tried to allocate 1 TiB"}
    assert not notes.failed


def test_ntp_and_mixup_composed_from_hard_labels_is_the_reference() -> None:
    one = Provider("composed", BOTH, composed(hard_labels), one_lam=True)
    x = one.inputs(make_inputs(16, 8, 50))
    assert (x.lam == x.lam[0]).all()
    assert max(errors(one.loss, ORACLES[BOTH], x).relative) < 1e-5


def test_nan_never_passes() -> None:
    x = make_inputs(8, 8, 50)
    found = errors(lambda x: ORACLES[NTP](x).sum() * float("nan"), ORACLES[NTP], x)
    assert not found.passed(None)
    assert not found.passed(0.05)


def test_every_schedule_and_peer_is_there_or_left_out_with_a_reason() -> None:
    ours, missing = our_providers("cpu")
    assert {one.who for one in ours} | missing.keys() == {ROW_CHUNKS, VOCAB_TILES, FILTERED}
    for device in ("cpu", "cuda"):
        peers, absent = peer_providers(device, compile_dense=False)
        names = {one.who for one in peers} | absent.keys()
        assert {"Liger-Kernel", "cut-cross-entropy", "torch.compile of dense"} <= names
        assert all(absent.values())
        assert not {one.who for one in peers} & absent.keys()


def test_peaked_inputs_favour_the_label() -> None:
    flat, peaked = (peakedness(make_inputs(64, 64, 500, peaked=p)) for p in (False, True))
    assert flat["mean_target_probability"] < 0.05
    assert 0.3 < peaked["mean_target_probability"] < 0.95
    assert peaked["mean_tokens_above_filter"] < flat["mean_tokens_above_filter"]


def test_bare_products_are_the_gradients_of_the_sum_of_losses() -> None:
    x = make_inputs(8, 8, 50)
    products = Products(x)
    products.all_three()
    loss = F.cross_entropy(F.linear(x.hidden, x.weight), x.labels, reduction="sum")
    of_hidden, of_weight = torch.autograd.grad(loss, (x.hidden, x.weight))
    torch.testing.assert_close(products.of_hidden, of_hidden)
    torch.testing.assert_close(products.of_weight, of_weight)
    assert products.operations == 2 * 16 * 8 * 50


def test_the_search_holds_what_is_shipped_and_nothing_that_cannot_launch() -> None:
    row_chunks = pytest.importorskip("sftmix_kernels.triton.row_chunks")
    for dtype in (torch.bfloat16, torch.float32):
        shipped = [getattr(row_chunks, name) for name in LAUNCH]
        shipped[2] = shipped[2](torch.empty(0, dtype=dtype))
        assert tuple(shipped) in launches()
    assert all(32 * warps * registers <= 65536 for _, warps, _, registers in launches())


def test_share_of_copy_counts_the_bytes_of_each() -> None:
    time_of = {"copy": Seconds(2.0, 2.0, 2.0), PAIR_ROWS: Seconds(3.0, 3.0, 3.0)}
    found = bandwidths(time_of, 10**9)
    assert found[PAIR_ROWS]["bytes"] == PASSES[PAIR_ROWS] * 10**9 == 3 * 10**9
    assert found[PAIR_ROWS]["share_of_copy"] == found["copy"]["share_of_copy"] == 1.0


class HostEvent:
    """Stands in for a CUDA event."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: HostEvent) -> float:
        return 1e3 * (end.at - self.at)


def test_events_time_the_step_and_not_what_prepares_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    order = []
    steps = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}

    def prepare() -> None:
        order.append("prepare")
        time.sleep(0.02)

    seconds = interleaved_seconds(steps, 2, "cuda", prepare)
    assert order == ["a", "b", *["prepare", "a", "prepare", "b"] * 2]
    assert seconds["a"].high < 0.02


def measured(milliseconds: dict[str, float]) -> dict[str, Any]:
    """A race's table from medians; ours are those under a schedule."""
    rows = {}
    for name, median in milliseconds.items():
        task, _, who = name.partition(": ")
        ours = who in (ROW_CHUNKS, VOCAB_TILES, FILTERED, "")
        rows[name] = {"task": task, "who": who, "ours": ours, "median": median}
    return {"providers": rows}


def test_targets_without_figures_are_not_measured() -> None:
    assert [target.reached for target in targets({})] == [None] * 8


def test_targets_take_the_best_peer_and_the_limits() -> None:
    random = {
        BARE: 100.0,
        f"{BOTH}: {ROW_CHUNKS}": 104.0,
        f"{NTP}: {ROW_CHUNKS}": 99.0,
        f"{BOTH}: {VOCAB_TILES}": 170.0,
        f"{NTP}: slow": 120.0,
        f"{NTP}: fast": 98.0,
        f"{BOTH}: slow": 130.0,
        f"{BOTH}: fast": 160.0,
    }
    peaked = {f"{BOTH}: {ROW_CHUNKS}": 104.0, f"{BOTH}: {FILTERED}": 80.0}
    result = {
        RANDOM: measured(random),
        PEAKED: measured(peaked),
        "row kernels": {PAIR_ROWS: {"share_of_copy": 0.9}},
        "memory": {f"{BOTH}: {VOCAB_TILES}": {"rows": 32768, "workspace_bytes": 65 * 2**20}},
        "forward": {
            PRODUCTS[0]: {"who": "", "tflops": 700.0},
            "one": {"who": VOCAB_TILES, "tflops": 430.0},
            "other": {"who": VOCAB_TILES, "tflops": 421.0},
        },
    }
    found = targets(result)
    assert [t.reached for t in found] == [True, False, True, True, False, True, False, True]
    assert found[1].note == "best peer: fast"
    assert found[2].value == 104.0 / 160.0
    assert found[5].value == 421.0 / 700.0


@pytest.fixture
def failing_python(tmp_path: Path) -> Path:
    """An interpreter under which every part fails."""
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "ran: $*"\nexit 3\n')
    script.chmod(0o755)
    return script


@pytest.mark.parametrize(
    ("only", "parts"),
    [
        ([], "build tests perplexity loss"),
        (["--only", "tests"], "build tests"),
        (["--only", "loss"], "build loss"),
        (["--only", "perplexity"], "build perplexity"),
    ],
)
def test_a_part_that_fails_does_not_stop_the_next(
    failing_python: Path, tmp_path: Path, only: list[str], parts: str
) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks/gpu.sh"), str(out), *only, "--grid"],
        env={**os.environ, "PYTHON": str(failing_python)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    table = (out / "gpu.md").read_text()
    for part in parts.split():
        assert f"| {part} | FAILED: exit status 3 |" in table
    log = (out / "log.txt").read_text()
    assert ("--grid" in log) == ("loss" in parts or "perplexity" in parts)
    assert table.count("FAILED") == len(parts.split())
    assert (out / "pytest.txt").exists() == ("tests" in parts)
    assert len(list(out.iterdir())) <= 8


@pytest.mark.parametrize("arguments", [[], ["--only", "tests"], ["out", "--only", "else"]])
def test_the_script_says_how_it_is_called(arguments: list[str], tmp_path: Path) -> None:
    script = ["bash", str(ROOT / "benchmarks/gpu.sh"), *arguments]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "bash benchmarks/gpu.sh OUT" in done.stderr
    assert not list(tmp_path.iterdir())
