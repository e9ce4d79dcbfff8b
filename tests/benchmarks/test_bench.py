"""The benchmarks run at tiny sizes, check before they time, and write what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.bench_sftmix_loss import OURS, loss_error, make_inputs, sftmix_rows
from benchmarks.measure import peak_extra_bytes, summary
from benchmarks.tables import verdicts

TINY = ["--pairs", "8", "--hidden-size", "16", "--vocab-size", "64", "--repeats", "2"]


def test_suite_prints_a_table_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    main(["sftmix_loss", *TINY, "--json", str(file)])
    report = json.loads(file.read_text())
    assert {"cpu", "torch", "commit", "date"} <= report["facts"].keys()
    assert report["sftmix_loss"]["providers"][OURS]["median"] > 0
    assert OURS in capsys.readouterr().out


def test_step_suite_compares_both_methods(capsys: pytest.CaptureFixture[str]) -> None:
    main(["step", "--batch", "2", "--length", "8", "--step-repeats", "2"])
    assert "of sftmix <= 1.1 x ntp" in capsys.readouterr().out


def test_a_wrong_provider_is_caught() -> None:
    x = make_inputs(8, 16, 64)
    _, passed = loss_error(lambda inputs: 1.01 * sftmix_rows(inputs).sum(), sftmix_rows, x)
    assert not passed


def test_wrong_options_are_refused() -> None:
    with pytest.raises(SystemExit):
        main(["--pairs", "0"])


def test_peak_counts_what_is_alive_at_once() -> None:
    def step() -> None:
        for _ in range(3):
            torch.empty(1000, 1000)

    assert peak_extra_bytes(step) == 4_000_000


def test_summary_of_one_value_and_of_five() -> None:
    assert summary([2.0]) == (2.0, 2.0, 2.0)
    assert summary([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)


def test_a_target_is_reached_missed_or_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    targets = (("seconds", "slow", 0.5), ("seconds", "fast", 0.5), ("seconds", "absent", 0.5))
    found = verdicts({"seconds": {"ours": 1.0, "slow": 4.0, "fast": 1.0}}, "ours", targets)
    assert [verdict["ratio"] for verdict in found] == [0.25, 1.0]
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit(" ", 1)[-1] for line in lines] == ["met", "MISSED", "measured"]
