"""The demo: its plan, its table, its failures, and one run of a tiny one from end to end."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftmix import cli
from sftmix.commands.demo import (
    BASE,
    EXPECT,
    NTP,
    SFTMIX,
    DemoSizes,
    ModelResult,
    Step,
    main,
    notes,
    plan,
    result,
    results_table,
    run_demo,
    run_step,
    run_together,
    write_data,
)
from sftmix.demo_data import TRAIN
from sftmix.pairs.partition import Partition, from_scores, read_partition

TINY = DemoSizes(
    max_rows=48,
    vocab_size=300,
    hidden_size=16,
    num_layers=1,
    batch_size=4,
    base_steps=4,
    num_scorings=2,
    epochs=1,
    logging_steps=2,
)
LOG: list[dict[str, Any]] = [
    {"step": 2, "tokens_per_second": 100.0, "peak_memory_gib": 0.5},
    {"step": 4, "tokens_per_second": 900.0, "peak_memory_gib": 0.75},
    {"step": 6, "tokens_per_second": 300.0, "peak_memory_gib": 0.75},
    {"step": 6, "train_runtime": 1.0},
    {"step": 6, "eval_loss": float(np.log(4.0)), "eval_perplexity": 4.0},
]


def scores(*perplexities: float) -> Partition:
    nll = np.log(np.array(perplexities))[:, None]
    return from_scores(range(len(nll)), ["h"] * len(nll), [1] * len(nll), nll)


def test_a_result_is_what_was_measured() -> None:
    found = result(LOG, scores(1.0, 3.0), rates=True)
    assert found.held_out_perplexity == pytest.approx(4.0)
    assert found.confidence_mean == pytest.approx(-2.0)
    assert found.confidence_std == pytest.approx(1.0)
    assert (found.tokens_per_second, found.peak_memory_gib) == (300.0, 0.75)
    assert found.infinite_perplexities == 0
    base = result(LOG, scores(1.0, 3.0), rates=False)
    assert base.tokens_per_second is base.peak_memory_gib is None


def test_infinite_perplexities_are_counted_and_left_out() -> None:
    found = result(LOG, scores(2.0, np.inf, 4.0), rates=True)
    assert found.confidence_mean == pytest.approx(-3.0)
    assert found.infinite_perplexities == 1
    assert any(note.startswith("NTP: 1 examples") for note in notes({NTP: found}))
    nothing = result(LOG, scores(np.inf, np.inf), rates=True)
    assert nothing.confidence_mean is nothing.confidence_std is None


def test_a_log_without_an_evaluation_is_refused() -> None:
    with pytest.raises(ValueError, match="'eval_loss'"):
        result(LOG[:-1], scores(1.0, 3.0), rates=True)


def test_the_table() -> None:
    base = ModelResult(1.5, -4.0, 2.5, 0, None, None)
    tuned = ModelResult(1.0, -2.0, 1.25, 0, 12345.6, 0.6789)
    rows = results_table({BASE: base, NTP: tuned}).rows
    assert rows[0] == ("base", "1.5000", "4.482", "-4.000", "2.500", "-", "-")
    assert rows[1] == ("NTP", "1.0000", "2.718", "-2.000", "1.250", "12,346", "0.679")
    assert notes({BASE: base, NTP: tuned})[-1] == EXPECT


def test_both_methods_differ_in_nothing_else() -> None:
    steps = plan(Path("out"), 3, DemoSizes())
    ntp, sftmix = (list(step.words) for step in steps[-2:])
    differing = [(a, b) for a, b in zip(ntp, sftmix, strict=True) if a != b]
    assert differing == [("out/ntp", "out/sftmix"), ("ntp", "sftmix")]
    assert all(words[words.index("--seed") + 1] == "3" for words in (s.words for s in steps))
    assert all(shlex.split(step.command) == ["python", *step.words] for step in steps)


def test_the_data_is_parted(tmp_path: Path) -> None:
    write_data(tmp_path / "data", 10)
    rows = TRAIN.read_text(encoding="utf-8").splitlines()[:10]
    parts = {path.stem: path.read_text().splitlines() for path in (tmp_path / "data").iterdir()}
    assert parts["pretrain"] == [rows[0], rows[3], rows[6], rows[9]]
    assert parts["train"] == [rows[1], rows[2], rows[4], rows[5], rows[7], rows[8]]
    assert len(parts["held_out"]) == 10


def test_a_failing_step_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    step = Step("Break", ("-c", "import sys; sys.exit('what went wrong')"))
    with pytest.raises(ChildProcessError, match="'break' failed with exit status 1"):
        run_step(step, "[1/1]")
    captured = capfd.readouterr()
    assert captured.out.startswith("\n[1/1] Break\n$ python -c ")
    assert "what went wrong" in captured.err


def test_two_steps_run_side_by_side(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each waits for the other's file; what the first prints comes after what the second does."""
    wait = (
        "import pathlib, sys, time\n"
        "own, other = map(pathlib.Path, sys.argv[1:])\n"
        "own.touch()\n"
        "while not other.exists(): time.sleep(0.01)\n"
        "print('seen', other.name, flush=True)"
    )
    names = [str(tmp_path / name) for name in ("one", "two")]
    first, second = (Step(f"Step {i}", ("-c", wait, *names[:: 1 - 2 * i])) for i in range(2))
    run_together({"[1/2]": first, "[2/2]": second})
    printed = capfd.readouterr().out
    heads = [f"[{i + 1}/2]{beside} Step {i}" for i, beside in enumerate((" beside the next,", ""))]
    places = [printed.index(text) for text in (*heads, "seen one", "Step 0, done", "seen two")]
    assert places == sorted(places)


@pytest.mark.parametrize("broken", [0, 1])
def test_a_step_that_fails_beside_another_is_named(
    broken: int, capfd: pytest.CaptureFixture[str]
) -> None:
    codes = ["import sys; sys.exit('what went wrong')", "pass"]
    steps = {f"[{i}/2]": Step(f"Step {i}", ("-c", codes[i != broken])) for i in range(2)}
    with pytest.raises(ChildProcessError, match=f"'step {broken}' failed with exit status 1"):
        run_together(steps)
    captured = capfd.readouterr()
    assert "what went wrong" in captured.out + captured.err


def test_a_failing_step_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [Step("Break", ("-c", "import sys; sys.exit(3)"))] * 3
    monkeypatch.setattr("sftmix.commands.demo.plan", lambda *_: broken)
    assert cli.main(["demo", "--output", str(tmp_path / "out")]) == 1
    assert "'break' failed with exit status 3" in capsys.readouterr().err


def test_wrong_input(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        run_demo(str(tmp_path), 0, TINY)
    with pytest.raises(ValueError, match="expected a folder, got the file"):
        run_demo(str(tmp_path / "file"), 0, TINY)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=f"seed: .*got {seed}"):
            run_demo(str(tmp_path / "new"), seed, TINY)
    assert not (tmp_path / "new").exists()


def test_without_matplotlib_nothing_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo", "--output", str(tmp_path / "out")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "two to three minutes" in text
    assert "not the paper's" in text


@pytest.mark.slow
def test_a_tiny_demo(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    run_demo(str(out), 1, TINY)
    printed = capfd.readouterr().out
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert found["seed"] == 1
    assert list(found["models"]) == sorted((BASE, NTP, SFTMIX))
    for model in found["models"].values():
        assert np.exp(model["held_out_loss"]) == pytest.approx(model["held_out_perplexity"])
        assert model["confidence_mean"] < -1
    assert found["models"][NTP]["held_out_loss"] != found["models"][SFTMIX]["held_out_loss"]
    assert len(read_partition(out / "score" / "confidence.parquet").id) == 32
    html = (out / "report.html").read_text(encoding="utf-8")
    assert html.count("<figure>") == 15
    for command in found["commands"]:
        assert f"$ {command}\n" in printed
    assert EXPECT in printed
    assert f"The report: {out / 'report.html'}" in printed
