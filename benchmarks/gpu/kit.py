"""What is carried to a GPU, so that nothing is built or compiled there: made here, unpacked there.

KIT/kit.json                what it was made of and beside
KIT/_extension.*.so         the extension for sm_90
KIT/triton.tar.xz           Triton's cache: compiled kernels of `compiling.py`, and their launchers
KIT/wheels/*.whl            peers that the machine lacks
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = "_extension*.so"
CACHE, FACTS, WHEELS = "triton.tar.xz", "kit.json", "wheels"
# The GPU machine's: an extension and a cache are of use beside these alone.
PYTHON, TORCH, TRITON, CAPABILITY = "3.12", "2.11.0", "3.6.0", "9.0"
# setuptools below 77 does not read pyproject.toml's license; torch 2.11 asks for one below 82.
BESIDE = (
    "setuptools>=77,<82",
    "ninja",
    "wheel",
    "numpy",
    "pytest",
    "hypothesis",
    "tqdm",
    "safetensors",
)
# Peers, and what scoring and the trainers need there; versions are those of constraints.txt.
CARRIED = (
    *("liger-kernel", "cut-cross-entropy"),
    *("datasets", "dill", "multiprocess", "httpx2", "httpcore2"),
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
# Of 64 MiB that are carried, the rest is the checkout's.
MOST_BYTES = 56 * 2**20


class Kit:
    """A folder that `make_kit` has made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = folder / FACTS
        self.facts: dict[str, str] = json.loads(file.read_text("utf-8")) if file.exists() else {}
        self.commit = self.facts.get("commit", "")

    @property
    def fits(self) -> bool:
        """Tell whether the extension and the cache were made beside what is here."""
        here = {name: version(name) for name in ("torch", "triton")}
        python = sysconfig.get_python_version()
        return {"python": python, **here}.items() <= self.facts.items()

    @property
    def says(self) -> str:
        """Return what it holds, for the log."""
        fits = "" if self.fits else "; made beside others than those here: wheels alone are used"
        return f"{json.dumps(self.facts)}{fits}"

    def unpack(self, scratch: Path, install: bool) -> dict[str, str]:
        """Unpack it into a scratch folder; return the environment that makes use of it.

        ``install`` puts the extension into the checkout, where it is built otherwise.
        """
        for wheel in sorted(self.folder.glob(f"{WHEELS}/*.whl")):
            # A wheel is a zip file of what lies in site-packages.
            with zipfile.ZipFile(wheel) as held:
                held.extractall(scratch / "site")
        if not self.fits:
            return {}
        for file in self.folder.glob(EXTENSION) if install else ():
            shutil.copy(file, ROOT / "sftmix_kernels")
        if not (self.folder / CACHE).exists():
            return {}
        with tarfile.open(self.folder / CACHE) as held:
            held.extractall(scratch / "triton", filter="data")
        move_cache(scratch / "triton")
        return {"TRITON_CACHE_DIR": str(scratch / "triton")}


def version(package: str) -> str:
    """Return the version of a package without its build, empty where there is none."""
    try:
        return metadata.version(package).split("+")[0]
    except metadata.PackageNotFoundError:
        return ""


def move_cache(folder: Path) -> None:
    """Let Triton find a cache where it lies: it looks for files where they were written."""
    for group in folder.glob("*/__grp__*"):
        held = json.loads(group.read_text("utf-8"))
        here = {name: str(group.parent / name) for name in held["child_paths"]}
        group.write_text(json.dumps({**held, "child_paths": here}), encoding="utf-8")


def interpreter() -> str | None:
    """Return the path of the GPU machine's Python; None where PATH has none that runs.

    A shim of a version manager may be there and know of none.
    """
    for folder in os.get_exec_path():
        python = shutil.which(f"python{PYTHON}", path=folder)
        if python and not subprocess.run([python, "-c", ""], capture_output=True).returncode:
            return python
    return None


def make_kit(folder: Path) -> int:
    """Make the folder to carry; return exit status 0, or 1 where it lacks something."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / CACHE, *folder.glob(EXTENSION), *folder.glob(f"{WHEELS}/*.whl")):
        old.unlink(missing_ok=True)
    facts = {"python": PYTHON, "torch": TORCH, "triton": TRITON, "commit": commit()}
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    python = interpreter()
    steps: list[Any] = [lambda: fetch_wheels(folder / WHEELS)]
    lacking = []
    if python is None:
        lacking.append(
            f"no python{PYTHON} that runs is on PATH: the GPU machine builds the extension, in 6 s"
        )
    else:
        environment = ROOT / ".venvs/gpu"
        steps += [
            lambda: make_environment(python, environment),
            lambda: build_extension(environment, folder),
            lambda: fill_cache(environment, folder / CACHE),
        ]
    for step in steps:
        # What one lacks stops no other.
        try:
            step()
        except (subprocess.CalledProcessError, OSError) as error:
            lacking.append(str(error))
    return report(folder, lacking)


def report(folder: Path, lacking: list[str]) -> int:
    """Print what the folder holds and lacks; return the exit status."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in files:
        print(f"{file.stat().st_size:>12,} {file.relative_to(folder)}")
    total = sum(file.stat().st_size for file in files)
    if total > MOST_BYTES:
        lacking.append(f"{total:,} bytes: expected at most {MOST_BYTES:,}, to be carried")
    for one in lacking:
        print(f"--prepare: {one}", file=sys.stderr)
    return int(bool(lacking))


def commit() -> str:
    """Return the checkout's commit, empty outside of git."""
    command = ("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def fetch_wheels(folder: Path) -> None:
    """Download the wheels that the GPU machine lacks, for its Python.

    Raises:
        subprocess.CalledProcessError: pip refused; it has said why.
    """
    pins = dict(
        re.findall(r"^([\w.-]+)==([\w.+-]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    wanted = [f"{name}=={pins[name]}" for name in CARRIED]
    subprocess.run([*command, "--dest", str(folder), *wanted], check=True)


def make_environment(python: str, environment: Path) -> None:
    """Make the GPU machine's Python and torch here, where it is not there yet.

    Raises:
        subprocess.CalledProcessError: pip refused; it has said why.
    """
    done = environment / "installed"
    if done.exists():
        return
    subprocess.run([python, "-m", "venv", str(environment)], check=True)
    install = [str(environment / "bin/python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, f"torch=={TORCH}", f"triton=={TRITON}", *BESIDE], check=True)
    done.touch()


def build_extension(environment: Path, folder: Path) -> None:
    """Build the extension for the GPU's chip.

    Raises:
        subprocess.CalledProcessError: it does not build.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command = [environment / "bin/python", "setup.py", "-q", "build_ext"]
        places = ["--build-lib", f"{scratch}/lib", "--build-temp", f"{scratch}/temp"]
        path = f"{environment / 'bin'}:{os.environ['PATH']}"
        environ = {**os.environ, "TORCH_CUDA_ARCH_LIST": CAPABILITY, "PATH": path}
        # torch takes the folder over an nvcc on PATH for the toolkit, also of one that calls it.
        for nvcc in sorted(Path("/usr/local").glob("cuda*/bin/nvcc")):
            environ.setdefault("CUDA_HOME", str(nvcc.parents[1]))
        subprocess.run([*command, *places], cwd=ROOT, env=environ, check=True)
        for file in Path(scratch, "lib/sftmix_kernels").glob(EXTENSION):
            shutil.copy(file, folder)


def fill_cache(environment: Path, target: Path) -> None:
    """Compile the kernels that a run launches, and pack Triton's cache.

    Raises:
        subprocess.CalledProcessError: a kernel does not compile.
    """
    with tempfile.TemporaryDirectory() as scratch:
        # Programs and launchers alone: a tenth of the bytes.
        own = {"TRITON_CACHE_DIR": scratch, "TRITON_STORE_BINARY_ONLY": "1"}
        command = [environment / "bin/python", "-m", "benchmarks.gpu.compiling"]
        environ = {**os.environ, **own, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=ROOT, env=environ, check=True)
        with tarfile.open(target, "w:xz") as held:
            held.add(scratch, arcname=".")
