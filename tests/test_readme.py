"""What README shows works and is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sftmix.cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_ten_lines_run() -> None:
    code = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]
    names: dict[str, torch.Tensor] = {}
    exec(code, names)
    assert names["loss"].isfinite()
    assert names["hidden_c"].grad.abs().sum() > 0
    assert names["weight"].grad.abs().sum() > 0


def test_every_file_of_the_tree_exists() -> None:
    tree = README.split("## Where things are")[1].split("## ")[0]
    folder = ROOT
    found = 0
    for line in tree.splitlines():
        if match := re.match(r" {4}(\w+)/", line):
            folder = ROOT / match[1]
            assert folder.is_dir(), line
        elif match := re.match(r" {6}((?:[\w/]+(?:\.py)?,? )+) ", line):
            for name in match[1].replace(",", " ").split():
                assert (folder / name).exists(), name
                found += 1
    assert found > 20


def test_every_command_is_shown() -> None:
    for command in COMMANDS:
        assert re.search(rf"(sftmix|make) {command}\b", README), command


@pytest.mark.parametrize(
    ("file", "suite", "dense"),
    [
        ("cpu.json", "sftmix_loss", "dense PyTorch"),
        ("cpu-perplexity.json", "perplexity", "dense cross_entropy"),
    ],
)
def test_the_figures_are_those_of_the_committed_run(file: str, suite: str, dense: str) -> None:
    run = results(file)
    providers = run[suite]["providers"]
    for found in providers.values():
        ratio, memory = found["median"] / providers[dense]["median"], found["peak_bytes"] / 2**20
        assert f"| {found['median']:.2f} | {ratio:.2f} | {memory:.0f} MiB |" in README
    assert run["facts"]["commit"] in README


def test_the_times_of_scoring_are_those_of_the_committed_run() -> None:
    ways = results("cpu-scoring.json")["scoring"]["ways"]
    for way in ("score_examples", "forward with logits, same batches"):
        assert f"{ways[way]['median']:.1f} s" in README
    assert f"{ways['obvious loop, losses of examples']['median']:.1f} s" in README


def results(file: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks/results" / file).read_text(encoding="utf-8"))
