"""Run the tests that other libraries' versions can break, beside sets of versions.

    python -m tests.versions [--venvs FOLDER] [--build] [--record] [SET ...] [-- PYTEST OPTIONS]
    python -m tests.versions --newest

Each set gets a virtual environment of its own in FOLDER, with the pins of constraints.txt but for
what the set names; it is kept, so that a second run installs nothing. One with the pinned torch
lies over the environment that runs this, and holds what differs. The compiled extension in the
checkout is used as it is: what is built beside one torch has to load beside another. With --build
it is built beside the set's torch, in a copy of the checkout, and the kernels' tests run there.

--record writes what came into tests/versions.json, --newest the newest versions for each Python;
both write the tables of docs/integrations.md.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from packaging.requirements import Requirement

from benchmarks.tables import replace_block

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "tests" / "versions.json"
PAGE = ROOT / "docs" / "integrations.md"
BEGIN, END = "<!-- versions: python -m tests.versions -->", "<!-- end of the versions -->"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# The libraries whose versions are searched out.
LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
# What they bound in turn: a pin of it would keep another version of theirs out.
FOLLOWING = (
    *("tokenizers", "huggingface_hub", "hf-xet", "safetensors", "pyarrow", "fsspec", "dill"),
    *("multiprocess", "typer", "numpy", "pandas"),
)


def requirements() -> dict[str, Requirement]:
    """Return what the package, its tests and its integrations need, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["test"], *extras["trl"], *extras["peft"]]
    return {one.name: one for one in map(Requirement, lines)}


def pins() -> dict[str, str]:
    """Return the lines of constraints.txt by the package that each pins."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {line.partition("==")[0]: line for line in lines if "==" in line}


def lowest(name: str) -> str:
    """Return the lowest version that pyproject.toml allows of a library."""
    [version] = [one.version for one in requirements()[name].specifier if one.operator == ">="]
    return version


def read_record() -> dict[str, Any]:
    """Return what was recorded."""
    record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return record


def newest_of(python: str) -> list[str]:
    """Return the newest versions there are for a Python, as --newest found them."""
    return [f"{name}=={version}" for name, version in read_record()["newest"][python].items()]


class Set(NamedTuple):
    """What a set asks for instead of the pins."""

    wants: Sequence[str] = ()
    trl: bool = True  # false where the set's TRL is too old for our integration
    kernels: bool = False  # whether the kernels' tests run, which touch torch alone


SETS = {
    # Of TRL axolotl has the lowest.
    "lowest": Set(
        [f"{name}=={lowest(name)}" for name in LIBRARIES[1:] if name != "trl"], trl=False
    ),
    "newest": Set(newest_of("3.13")),
    # Whichever Python runs them.
    "newest of Python 3.10": Set(newest_of("3.10")),
    "axolotl 0.19.0": Set(
        [
            *("transformers==5.16.1", "trl==1.9.0", "peft==0.20.0", "datasets==4.8.4"),
            *("accelerate==1.13.0", "tokenizers==0.23.1"),
        ]
    ),
    # The newest that it allows. Its TRL is 0.24.0 at most.
    "LLaMA-Factory 0.9.5": Set(
        ["transformers==5.6.0", "peft==0.18.1", "datasets==4.0.0", "accelerate==1.11.0"], trl=False
    ),
    # It asks for setuptools below 82 itself; our pyproject.toml is read by 77 and later.
    "torch 2.11": Set(["torch==2.11.0", "setuptools>=77,<82", "ninja"], kernels=True),
    "torch 2.14": Set(["torch==2.14.1"], kernels=True),
}
# What touches torch's, transformers', trl's, peft's or datasets' own code.
FILES = {
    "commands": "end_to_end refused_models",
    "data": "sources",
    "integrations": "trl trl_data trl_options trl_reporting",
    "model": "head saved_config",
    "pairs": "layouts",
    "recipe": "lora",
    "runs": "checkpoints",
    "templates": "tokenizing",
    "training": "memory_options methods option_checks peft scoring trainer trainer_options",
}
TESTS = [
    "tests/tools/test_families.py",
    *(
        f"tests/sftmix/{room}/test_{name}.py"
        for room, names in FILES.items()
        for name in names.split(" ")
    ),
]
KERNELS = "tests/sftmix_kernels"


def tests_of(one: Set) -> list[str]:
    """Return the tests that a set runs."""
    chosen = [path for path in TESTS if one.trl or "/test_trl" not in path]
    return [KERNELS, *chosen] if one.kernels else chosen


def installed(name: str, folder: Path) -> Path:
    """Return the Python of a set's environment, made where it is not there yet.

    Raises:
        subprocess.CalledProcessError: pip refused; it has said why.
    """
    place = folder / name.replace(" ", "-")
    python, done = place / "bin/python", place / "installed"
    if done.exists():
        return python
    one, pinned = SETS[name], pins()
    wanted = {Requirement(line).name: line for line in one.wants}
    # A CUDA build of torch brings a Triton of its own.
    free = {*wanted, *(("triton",) if "torch" in wanted else FOLLOWING if wanted else ())}
    constraints = Path(f"{place}.txt")
    folder.mkdir(parents=True, exist_ok=True)
    constraints.write_text("\n".join(pinned[name] for name in pinned if name not in free))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    needed = [str(line) for key, line in requirements().items() if one.trl or key != "trl"]
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "-c", constraints]
    if "torch" in wanted:
        # First: a range that the pinned one satisfies brings no other.
        subprocess.run([*install, wanted["torch"]], check=True)
    else:
        # Over this environment, which has the pinned torch and what the tests need.
        below = sysconfig.get_path("purelib")
        site = sysconfig.get_path("purelib", "venv", {"base": str(place)})
        Path(site, "below.pth").write_text(f"{below}\n", encoding="utf-8")
    subprocess.run([*install, *one.wants, *needed], check=True)
    done.touch()
    return python


def built(python: Path, folder: Path) -> Path:
    """Return a copy of the checkout with an extension built beside the set's torch.

    Raises:
        subprocess.CalledProcessError: it does not build.
    """
    copy = folder / "checkout"
    shutil.rmtree(copy, ignore_errors=True)
    left_out = shutil.ignore_patterns(".*", "*.so", "__pycache__", "build", "runs", "site")
    shutil.copytree(ROOT, copy, ignore=left_out)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    # One chip is enough where torch has CUDA and nvcc is here: 6 s in place of 60.
    environment = {"TORCH_CUDA_ARCH_LIST": "9.0", **os.environ, "PATH": path}
    # torch takes the folder over an nvcc on PATH for the toolkit, also of one that calls it.
    for nvcc in sorted(Path("/usr/local").glob("cuda*/bin/nvcc")):
        environment.setdefault("CUDA_HOME", str(nvcc.parents[1]))
    build = [python, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=copy, env=environment, check=True)
    return copy


def imported() -> dict[str, list[str]]:
    """Return what the packages take from the libraries but torch: by module, names and theirs."""
    found: dict[str, set[str]] = {}
    for path in (path for name in ("sftmix", "tools") for path in (ROOT / name).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        known = {name: at for node in nodes for name, at in imports(node)}
        for module, name in known.values():
            found.setdefault(module, set()).add(name)
        for node in (one for one in nodes if isinstance(one, ast.Attribute)):
            if isinstance(node.value, ast.Name) and node.value.id in known:
                module, name = known[node.value.id]
                found[module].add(f"{name}.{node.attr}".lstrip("."))
    return {module: sorted(names - {""}) for module, names in sorted(found.items())}


def imports(node: ast.AST) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield what a statement imports from the libraries: its name here, its module and name there.

    The name of a module itself is empty.
    """
    if isinstance(node, ast.ImportFrom) and node.module is not None:
        if node.module.partition(".")[0] in LIBRARIES[1:]:
            for one in node.names:
                yield one.asname or one.name, (node.module, one.name)
    elif isinstance(node, ast.Import):
        for one in node.names:
            if one.name.partition(".")[0] in LIBRARIES[1:]:
                here = one.asname or one.name.partition(".")[0]
                yield here, (one.name if one.asname else here, "")


# Runs in a set's environment; its input are the imported names.
LOOK = f"""
import importlib, importlib.metadata, json, operator, platform, sys

def has(module, name):
    try:
        operator.attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError):
        return False
    return True

kept = {{name: importlib.metadata.version(name).partition("+")[0] for name in {LIBRARIES}}}
print(json.dumps({{
    "versions": {{"python": platform.python_version(), **kept}},
    "names": {{module: " ".join(found) for module, names in json.load(sys.stdin).items()
               if (found := [name for name in names if has(module, name)])}},
}}))
"""


def looked_up(python: Path) -> dict[str, Any]:
    """Return the versions in an environment, and which of the imported names are there."""
    said = subprocess.run(
        [python, "-W", "ignore", "-c", LOOK],
        input=json.dumps(imported()),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    return found


def counted(report: Path) -> dict[str, Any]:
    """Return how many tests passed and were skipped, and which failed, from pytest's XML."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    bad = [case for case in cases if {"failure", "error"} & {child.tag for child in case}]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = sorted(f"{case.get('classname')}::{case.get('name')}" for case in bad)
    return {"passed": len(cases) - len(bad) - skipped, "skipped": skipped, "failed": names}


def run(name: str, folder: Path, options: list[str], build: bool) -> dict[str, Any] | None:
    """Install a set and run the tests; return what came, None if they could not run."""
    try:
        python = installed(name, folder)
        root = built(python, python.parents[1]) if build else ROOT
    except subprocess.CalledProcessError as error:
        print(f"{name}: exit status {error.returncode} of {error.cmd[1:4]}")
        return None
    found = looked_up(python)
    print(f"== {name}:", *(" ".join(one) for one in found["versions"].items()), flush=True)
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    shared_out = ["-n", "logical", "--maxprocesses", "8", "--dist", "worksteal"]
    tests = [KERNELS] if build else tests_of(SETS[name])
    with tempfile.TemporaryDirectory() as place:
        report = Path(place, "report.xml")
        command = [python, "-m", "pytest", "-q", f"--junitxml={report}", *shared_out]
        subprocess.run([*command, *(options or tests)], cwd=root, env=environment, check=False)
        if not report.exists():
            return None
        counts = counted(report)
    if not SETS[name].trl:
        del found["versions"]["trl"]  # of the environment below
    return {**found, **counts}


def newest(python: str) -> dict[str, str]:
    """Return the newest versions that are allowed and run on a Python, by what they say of it.

    torch is left out: pip would fetch gigabytes to look at it.

    Raises:
        subprocess.CalledProcessError: there is none; pip has said why.
    """
    where = ["--python-version", python, "--only-binary", ":all:", "--target", "unused"]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--dry-run"]
    wanted = [str(requirements()[name]) for name in LIBRARIES[1:]]
    said = subprocess.run(
        [*command, "--report", "-", *where, *wanted], stdout=subprocess.PIPE, text=True, check=True
    )
    packages = [one["metadata"] for one in json.loads(said.stdout)["install"]]
    return {one["name"]: one["version"] for one in packages}


def row(*cells: object) -> str:
    """Return a table's row."""
    return f"| {' | '.join(map(str, cells))} |"


def tables(record: dict[str, Any]) -> str:
    """Return the page's tables: what is allowed and there is, and what ran."""
    rule = "|---" * (1 + len(LIBRARIES)) + "|"
    ranges = {name: str(one.specifier) or "any" for name, one in requirements().items()}
    lines = [row("", *LIBRARIES), rule, row("allowed", *(ranges[name] for name in LIBRARIES))]
    for python, taken in record["newest"].items():
        found = (taken.get(name, "") for name in LIBRARIES)
        lines.append(row(f"newest on Python {python}", *found))
    lines += ["", row("set", "Python", *LIBRARIES, "passed", "failed"), rule + "---|---:|---:|"]
    # The gate runs beside these.
    gate = (str(Requirement(pins()[name]).specifier).removeprefix("==") for name in LIBRARIES)
    lines.append(row("pinned", "3.11", *gate, "whole suite", 0))
    for name in SETS:
        one = record["sets"].get(name)
        if one is None:
            lines.append(row(name, *["not run"] + [""] * (len(LIBRARIES) + 2)))
            continue
        versions = (one["versions"].get(key, "-") for key in ("python", *LIBRARIES))
        lines.append(row(name, *versions, one["passed"], len(one["failed"])))
    return "\n".join(lines)


def write_record(record: dict[str, Any]) -> None:
    """Write what was recorded, and the page's tables."""
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(replace_block(text, tables(record), BEGIN, END), encoding="utf-8")


def main() -> int:
    """Run the sets that the command line names; return 1 if a test failed or could not run."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__)
    parser.add_argument("--venvs", type=Path, default=ROOT / ".venvs")
    for flag in ("--build", "--record", "--newest"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("sets", nargs="*", default=list(SETS), metavar="SET", help=str(list(SETS)))
    arguments = parser.parse_args(words[:end])
    unknown = [name for name in arguments.sets if name not in SETS]
    if unknown:
        parser.error(f"SET: expected some of {', '.join(SETS)}, got {' '.join(unknown)}")
    if arguments.newest:
        write_record({**read_record(), "newest": {python: newest(python) for python in PYTHONS}})
        return 0
    failed = []
    for name in arguments.sets:
        found = run(name, arguments.venvs.resolve(), words[end + 1 :], arguments.build)
        if found is None or found["failed"]:
            failed.append(name)
        if arguments.record and found is not None:
            record = read_record()
            record["sets"][name] = found
            write_record(record)
    print("failed:", ", ".join(failed) or "none")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
