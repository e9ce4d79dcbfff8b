"""What the source distribution and the wheel hold, built here without a compiler.

`tests/installation.py` installs them, compiled too.
"""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from sftmix import __version__

ROOT = Path(__file__).parent.parent
NO_SOURCE = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "__pycache__")


class Distributions(NamedTuple):
    """Names of the files in each, and the wheel's metadata."""

    source: set[str]
    wheel: set[str]
    metadata: email.message.Message


def no_source(folder: str, names: list[str]) -> set[str]:
    """Return which names in a folder are no source: what was built or installed here."""
    made = {"build", "dist", "runs", "site"} if Path(folder) == ROOT else set()
    return {*NO_SOURCE(folder, names), *made}


def built(hook: str, folder: Path) -> Path:
    """Call a hook of the build backend as pip does; without a compiler, for which it is told."""
    code = f"from setuptools import build_meta; print(build_meta.{hook}('dist'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "CXX": "/no/compiler", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return folder / "dist" / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    folder = tmp_path_factory.mktemp("distributions")
    shutil.copytree(ROOT, folder / "checkout", ignore=no_source, symlinks=True)
    with tarfile.open(built("build_sdist", folder / "checkout")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(folder / "unpacked", **({"filter": "data"} if tarfile_filters() else {}))
    (unpacked,) = (folder / "unpacked").iterdir()
    with zipfile.ZipFile(built("build_wheel", unpacked)) as wheel:
        (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        text = wheel.read(metadata).decode()
        return Distributions(names, set(wheel.namelist()), email.message_from_string(text))


def tarfile_filters() -> bool:
    return hasattr(tarfile, "data_filter")


def files(*patterns: str) -> set[str]:
    """Return files of the repository."""
    found = {str(path.relative_to(ROOT)) for one in patterns for path in ROOT.glob(one)}
    assert found
    return found


def test_the_source_has_what_the_kernels_are_compiled_from_and_what_readme_names(
    made: Distributions,
) -> None:
    assert files("csrc/*.*", "recipes/*.*", "docs/*.md", "examples/*.*") <= made.source
    assert files("*.md", "LICENSE", "CITATION.cff", "constraints.txt", "Dockerfile") <= made.source
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(((?!https?:)[^)#]+)", readme)) <= made.source


def test_the_wheel_has_data_tasks_and_recipes_and_no_tests(made: Distributions) -> None:
    code = files("sftmix/**/*.py", "sftmix_kernels/**/*.py", "sftmix*/py.typed")
    data = files("sftmix/demo_data/*.jsonl", "sftmix/evaluation/tasks/*.yaml", "sftmix/recipes/*")
    rest = made.wheel - code - data
    assert code | data <= made.wheel
    assert {name.split("/")[0] for name in made.wheel} == {
        "sftmix",
        "sftmix_kernels",
        f"sftmix-{__version__}.dist-info",
    }
    assert {name for name in rest if ".dist-info/" not in name} == {
        "sftmix/demo_data/LICENSE",
        "sftmix/report/template.html",
    }


def test_an_index_shows_who_made_it_and_no_dead_link(made: Distributions) -> None:
    assert made.metadata["Version"] == __version__
    assert made.metadata["License-Expression"] == "Apache-2.0"
    assert made.metadata["Author"] == "The maintainers of sftmix"
    assert "fine-tuning" in made.metadata["Keywords"]
    assert "Programming Language :: Python :: 3.13" in made.metadata.get_all("Classifier", [])
    assert made.metadata["Description-Content-Type"] == "text/markdown"
    text = made.metadata.get_payload()
    assert isinstance(text, str)
    assert all(link.startswith("https://") for link in re.findall(r"\]\(([^)]*)", text))
    assert "![" not in text
    assert "## The formula" in text
