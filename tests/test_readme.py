"""What README shows works and is there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main, read_reports
from benchmarks.readme import BEGIN, END, NO_GPU, readme_block
from benchmarks.tables import replace_block

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_ten_lines_run() -> None:
    code = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]
    names: dict[str, torch.Tensor] = {}
    exec(code, names)
    assert names["loss"].isfinite()
    assert names["hidden_c"].grad.abs().sum() > 0
    assert names["weight"].grad.abs().sum() > 0


def test_it_is_one_page() -> None:
    assert len(README.splitlines()) <= 160


def test_it_says_first_what_was_not_found() -> None:
    """In the study's own words and figures, before any command."""
    first = " ".join(README.split("## Two commands")[0].split())
    study = (ROOT / "docs/study.md").read_text(encoding="utf-8")
    for figure in re.findall(r"[+-]0\.\d+ \([^)]*significant\)", first):
        assert figure in study, figure
    assert first.count("significant)") == 3
    assert "SFTMix gained next to nothing" in first
    answers = study.split("<!-- smollm2: begin")[1].split("<!-- smollm2: end")[0]
    assert "- **A gain: no.**" in answers
    assert "- **Confidence helps: no.**" in answers
    assert "- Its difference to NTP is negligible on GSM8K, Alpaca, PubMedQA." in answers
    assert NO_GPU.rstrip(".") in first
    assert NO_GPU in README.split("## What it costs")[1]


def test_its_first_times_are_those_of_its_tables() -> None:
    first, tables = README.split("## Two commands")[0], README.split("## What it costs")[1]
    steps = [float(found) for found in re.findall(r"([\d.]+) of an NTP step", tables)]
    assert f"{min(steps)} to {max(steps)} times as long" in first
    both, alone = re.findall(r"\*\*sftmix, row_chunks\*\*.*?([\d.]+) s .*?([\d.]+) s ", tables)[0]
    assert f"{float(both) / float(alone):.2f} times as long as that of NTP" in " ".join(
        first.split()
    )


def test_figures_and_pictures_are_those_of_the_committed_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = ROOT / "benchmarks/results"
    for file in results.glob("*.json"):
        shutil.copy(file, tmp_path)
    arguments = ["plot", str(tmp_path), "--markdown", str(tmp_path / "RESULTS.md")]
    assert main(arguments) == 0
    written = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert written == (ROOT / "benchmarks/RESULTS.md").read_text(encoding="utf-8")
    pictures = sorted(file.relative_to(ROOT) for file in results.glob("*.svg"))
    assert {file.name for file in pictures} == {file.name for file in tmp_path.glob("*.svg")}
    block = readme_block(read_reports(results), pictures)
    assert replace_block(README, block, BEGIN, END) == README
