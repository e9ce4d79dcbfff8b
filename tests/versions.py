"""Run the tests that other libraries' versions can break, beside versions that are not pinned.

    python tests/versions.py [--venvs FOLDER] [--build] [SET ...] [-- PYTEST OPTIONS]

Each set gets a virtual environment of its own in FOLDER, with the pins of constraints.txt but for
what the set names; it is kept, so that a second run installs nothing. The compiled extension in the
checkout is used as it is: what is built beside one torch has to load beside another. With --build
it is built beside the set's torch, in a copy of the checkout, and the kernels' tests run there.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
# What a set asks for instead of the pins. A name without a version is the newest that pip finds.
SETS = {
    # It asks for setuptools below 82 itself; our pyproject.toml is read by 77 and later.
    "torch-2.11": ["torch==2.11.0", "setuptools>=77,<82", "ninja"],
    "torch-2.14": ["torch==2.14.1"],
    "newest": ["transformers", "trl", "peft", "datasets", "accelerate"],
}
# What touches torch's, transformers', trl's, peft's or datasets' own code.
FILES = {
    "data": "examples",
    "integrations": "trl trl_options",
    "model": "head one_by_one tiled_mlp",
    "pairs": "layouts",
    "recipe": "lora",
    "runs": "checkpoints",
    "training": "memory_options methods peft scoring trainer trainer_options",
}
TESTS = [
    "tests/sftmix_kernels",
    "tests/tools/test_families.py",
    *(
        f"tests/sftmix/{room}/test_{name}.py"
        for room, names in FILES.items()
        for name in names.split(" ")
    ),
]


def requirements() -> list[str]:
    """What the package and its tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras["test"], *extras["trl"], *extras["peft"]]


def installed(name: str, folder: Path) -> Path:
    """The Python of a set's environment, made where it is not there yet.

    Raises:
        subprocess.CalledProcessError: pip refused; it has said why.
    """
    python, done = folder / name / "bin/python", folder / name / "installed"
    if done.exists():
        return python
    wanted = SETS[name]
    free = {re.split(r"[=<>]", one)[0] for one in wanted}
    pins = folder / f"{name}.txt"
    folder.mkdir(parents=True, exist_ok=True)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    # A CUDA build of torch brings a Triton of its own.
    if "torch" in free:
        free.add("triton")
    pins.write_text("\n".join(line for line in lines if line.split("==")[0] not in free))
    subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "-c", pins]
    # torch first: a range that the pinned one satisfies brings no other.
    torch = next((one for one in wanted if one.startswith("torch")), "torch==2.13.0")
    subprocess.run([*install, torch], check=True)
    subprocess.run([*install, torch, *wanted, *requirements()], check=True)
    done.touch()
    return python


def built(python: Path, folder: Path) -> Path:
    """A copy of the checkout with an extension built beside the set's torch.

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


def run(name: str, folder: Path, options: list[str], build: bool) -> int:
    """Install a set, say what it holds and run the tests; pytest's exit status."""
    try:
        python = installed(name, folder)
        root = built(python, folder / name) if build else ROOT
    except subprocess.CalledProcessError as error:
        print(f"{name}: exit status {error.returncode} of {error.cmd[1:4]}")
        return 1
    libraries = "torch transformers trl peft datasets accelerate"
    shown = "from importlib.metadata import version\n" + (
        f"print(*(f'{{name}} {{version(name)}}' for name in {libraries.split()}), sep=', ')"
    )
    print(f"== {name}:", flush=True)
    subprocess.run([python, "-c", shown], check=True)
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    shared_out = ["-n", "logical", "--maxprocesses", "8", "--dist", "worksteal"]
    tests = TESTS[:1] if build else TESTS
    command = [python, "-m", "pytest", "-q", *shared_out, *(options or tests)]
    return subprocess.run(command, cwd=root, env=environment, check=False).returncode


def main() -> int:
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venvs", type=Path, default=ROOT / ".venvs")
    parser.add_argument("--build", action="store_true")
    parser.add_argument("sets", nargs="*", default=list(SETS), metavar="SET", help=str(list(SETS)))
    arguments = parser.parse_args(words[:end])
    unknown = [name for name in arguments.sets if name not in SETS]
    if unknown:
        parser.error(f"SET: expected some of {', '.join(SETS)}, got {' '.join(unknown)}")
    options = words[end + 1 :]
    venvs = arguments.venvs.resolve()
    statuses = {name: run(name, venvs, options, arguments.build) for name in arguments.sets}
    print("failed:", ", ".join(name for name, status in statuses.items() if status) or "none")
    return int(any(statuses.values()))


if __name__ == "__main__":
    raise SystemExit(main())
