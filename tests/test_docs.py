"""Pages: what they show is run or says why not, their flags exist, their links lead somewhere.

A block of `sh` or `python` runs here, page by page and in order, unless the line before it is

    <!-- not run: the reason -->
    <!-- tested: tests/file.py::the_test_that_does_the_same -->
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import re
import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from sftmix import toy
from sftmix.cli import COMMANDS, main
from tools.architecture import DOORS

ROOT = Path(__file__).parent.parent
PAGES = {
    str(page.relative_to(ROOT)): page.read_text(encoding="utf-8")
    for folder in (".", "docs", "recipes", "benchmarks")
    for page in sorted((ROOT / folder).glob("*.md"))
}
BLOCK = re.compile(
    r"(?:^<!-- (not run|tested): ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
# Flags on these pages that belong to other programs: pip, launchers, benchmarks, tools.
OTHERS = shlex.split(
    "--no-build-isolation --no-deps --multi_gpu --num_processes --nproc_per_node "
    "--document --gsm8k-train --gsm8k-test --alpaca --seeds --systems --quick --out --device "
    "--sdist --no-binary --largest --seconds --markdown --build --gpu --prepare --kit --renew "
    "--next --all --data-folder --cache --record --study --other-model"
)


class Block(NamedTuple):
    """A fenced block, with what the comment before it says."""

    mark: str
    says: str
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page."""
    return [Block(*found) for found in BLOCK.findall(PAGES[page])]


def is_code(block: Block) -> bool:
    """Return whether somebody may copy the block into a shell or a script."""
    return block.language in ("sh", "python")


RUN = [page for page in PAGES if any(is_code(block) and not block.mark for block in blocks(page))]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_its_language_and_every_mark_a_test_that_exists(page: str) -> None:
    assert PAGES[page].count("\n```") == 2 * len(blocks(page))
    assert len(re.findall("<!-- (?:not run|tested):", PAGES[page])) == sum(
        is_code(block) and bool(block.mark) for block in blocks(page)
    )
    for block in blocks(page):
        assert block.language, block
        if block.mark == "tested":
            file, _, name = block.says.partition("::")
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), block.says


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
@pytest.mark.parametrize("page", RUN)
def test_what_a_page_shows_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sftmix").symlink_to(ROOT / "sftmix")
    names: dict[str, Any] = {}
    for block in blocks(page):
        if is_code(block) and not block.mark:
            if block.language == "python":
                exec(block.text, names)
            else:
                run_lines(block.text)


def run_lines(text: str) -> None:
    """Run lines of a shell, those of this package in this process."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[0] == "sftmix":
            assert main([*words[1:], "--disable_tqdm", "true"]) == 0, line
        elif words[:3] == ["python", "-m", "sftmix.toy"]:
            toy.main(words[3:])
        else:
            subprocess.run(line, shell=True, check=True)


@functools.cache
def flags(command: str) -> frozenset[str]:
    """Return the flags of a command, those that it inherits too."""
    inherits = command in ("score", "train", "plan")
    call = toy.main if command == "toy" else lambda words: main([command, *words])
    with contextlib.redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
        call(["--help-all" if inherits else "--help"])
    return frozenset(re.findall(r"(?<![\w-])--[a-z]\w*", text.getvalue()))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_takes_the_flags_that_are_shown(page: str) -> None:
    """Whether it runs here or not; spelt with underscores."""
    shown = PAGES[page].replace("\\\n", " ")
    lines = re.findall(r"^ *(?:.* -m )?sftmix[ .](\w+)( .*)$", shown, re.MULTILINE)
    for command, words in lines:
        if command in (*COMMANDS, "toy") and "error:" not in words:
            given = set(re.findall(r" (--[\w-]+)", words.partition("  #")[0]))
            assert given <= flags(command) | {"--help", "--config", "--traceback"}, words


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("benchmarks")])
def test_every_flag_that_is_named_exists(page: str) -> None:
    known = {flag for command in (*COMMANDS, "toy") for flag in flags(command)}
    known |= {*OTHERS, "--help", "--help-all", "--traceback", "--version"}
    named = set(re.findall(r"(?<![\w<!-])--[a-z][\w-]*", PAGES[page]))
    assert named <= known | ({"--debug", "--learing_rate"} if "command_line" in page else set())


def test_every_command_is_shown() -> None:
    text = "\n".join(PAGES.values())
    for command in COMMANDS:
        assert re.search(rf"(sftmix|make) {command}\b", text), command


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version("sftmix")
    assert citation["license"] == "Apache-2.0"


def test_the_architecture_names_every_room_and_files_that_exist() -> None:
    page = PAGES["docs/architecture.md"]
    places = [ROOT, *(ROOT / name for name in ("sftmix", "sftmix_kernels", "csrc", "docs"))]
    for name in re.findall(r"`([\w/]+(?:\.py|\.h|/))`", page):
        assert any((place / name).exists() for place in places), name
    for room in (ROOT / "sftmix").glob("*/__init__.py"):
        assert room.parent.name in DOORS or f"`sftmix/{room.parent.name}/`" in page, room


def defined(file: Path) -> set[str]:
    """Return the names that a file defines, those in its classes as `Class.name`."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            names |= {one.id for one in node.targets if isinstance(one, ast.Name)}
        elif isinstance(node, ast.ClassDef):
            own = [one.name for one in node.body if isinstance(one, ast.FunctionDef)]
            names |= {node.name, *(f"{node.name}.{name}" for name in own)}
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
    return names


def test_the_walks_lead_through_functions_that_exist() -> None:
    walks = PAGES["docs/architecture.md"].split("## Walks")[1].split("## Where things are")[0]
    for file, name in re.findall(r"`([\w/]+\.py)::([\w.]+)`", walks):
        assert name in defined(ROOT / file), f"{file}::{name}"
    steps = re.findall(r"^\d\. (\S+)", walks, re.MULTILINE)
    assert all(re.fullmatch(r"`[\w./]+(::[\w.]+)?`:", step) for step in steps)
    assert all((ROOT / step.strip("`:").split("::")[0]).exists() for step in steps)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_to_a_heading_of_it(page: str) -> None:
    here = (ROOT / page).parent
    for path, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", PAGES[page]):
        target = here / path if path else ROOT / page
        assert target.exists(), path
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, (path, heading)


def test_every_page_of_docs_is_in_the_sites_navigation() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = re.findall(r"[\w./-]+\.md", str(site["nav"]))
    assert sorted(named) == sorted(page.removeprefix("docs/") for page in PAGES)
