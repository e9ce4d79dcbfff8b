"""What README shows works and is there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main, read_reports
from benchmarks.readme import BEGIN, END, readme_block
from benchmarks.tables import replace_block
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


@pytest.mark.parametrize("package", ["sftmix", "sftmix_kernels"])
def test_the_tree_names_every_module(package: str) -> None:
    tree = README.split("## Where things are")[1].split("## ")[0]
    modules = [file.name for file in (ROOT / package).glob("[!_]*.py")]
    assert len(modules) > 10
    assert [name for name in modules if not re.search(rf"(?<!\w){name}", tree)] == []


def test_every_page_of_the_documentation_is_linked() -> None:
    """And every link leads to a page, and to a heading of it."""
    pages = {file.name for file in (ROOT / "docs").glob("*.md")}
    assert pages <= set(re.findall(r"\]\(docs/([\w.]+)", README))
    for page in (
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "recipes").glob("*.md"),
    ):
        text = page.read_text(encoding="utf-8")
        for path, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
            target = page.parent / path if path else page
            assert target.exists(), (page.name, path)
            if heading:
                titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = {
                    re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles
                }
                assert heading in anchors, (page.name, path, heading)


def test_every_command_is_shown() -> None:
    for command in COMMANDS:
        assert re.search(rf"(sftmix|make) {command}\b", README), command


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
