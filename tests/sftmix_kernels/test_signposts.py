"""Where a reader is sent from an op: to its formula, kernels, proof and benchmark, all there."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import sftmix_kernels

from .test_layers import MODULES, PACKAGE, USES_TRITON, imported

ROOT = Path(__file__).parents[2]
FILE = re.compile(r"`([\w/]+\.(?:py|cpp|cuh?|h))`")
SIGNPOST = re.compile(r"^- (Formula|Kernels|Proof|Time): ((?:.|\n  )*)", re.MULTILINE)
FOLDERS = (PACKAGE, ROOT, ROOT / "tests/sftmix_kernels", ROOT / "benchmarks")

PUBLIC = [getattr(sftmix_kernels, name) for name in sftmix_kernels.__all__]
OPS = {function.__name__: function for function in PUBLIC if inspect.isfunction(function)}


def exists(file: str) -> bool:
    return any((folder / file).is_file() for folder in FOLDERS)


def signposts(module: ModuleType) -> dict[str, list[str]]:
    return {kind: FILE.findall(text) for kind, text in SIGNPOST.findall(module.__doc__ or "")}


@pytest.mark.parametrize("op", OPS)
def test_an_op_names_formula_kernels_proof_and_benchmark(op: str) -> None:
    module = inspect.getmodule(OPS[op])
    assert module is not None
    found = signposts(module)
    assert found.keys() == {"Formula", "Kernels", "Proof", "Time"}
    for files in found.values():
        assert files
        assert all(exists(file) for file in files), files
    assert op in (ROOT / found["Proof"][0]).read_text()
    assert any(op in (ROOT / file).read_text() for file in found["Time"])
    # The Triton kernels named are those that the file calls, by itself or through what it imports.
    name = module.__name__.removeprefix("sftmix_kernels.")
    imports = imported(name, ast.walk(MODULES[name]))
    called = imports & USES_TRITON
    reached = called.union(*(imported(file, ast.walk(MODULES[file])) for file in imports))
    named = {file.removesuffix(".py").replace("/", ".") for file in found["Kernels"]} & USES_TRITON
    assert not called or called <= named <= reached


def test_the_package_names_files_that_are_there() -> None:
    files = FILE.findall(sftmix_kernels.__doc__ or "")
    assert all(exists(file) for file in files), files
    for name, function in OPS.items():
        (row,) = re.findall(rf"^\| `{name}` .*$", sftmix_kernels.__doc__ or "", re.MULTILINE)
        own = Path(inspect.getfile(function)).relative_to(PACKAGE)
        assert FILE.findall(row)[0] == own.as_posix()
