"""What the packaging promises."""

import os
import re
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sftmix_kernels
from sftmix_kernels.extension import build_info

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
EXTENSION = "sftmix_kernels._extension"


def test_build_info_reports_the_build_or_none():
    info = build_info()
    if info is None:
        assert not list((ROOT / "sftmix_kernels").glob("_extension*.so"))
        return
    assert info.keys() == {"compiler", "cxx_standard", "torch", "cuda", "kernels", "vectors"}
    assert re.match(r"(GCC|Clang) \d", info["compiler"])
    assert int(info["cxx_standard"]) >= 201703
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["torch"])
    assert re.fullmatch(r"(\d+\.\d+)?", info["cuda"])
    on_cuda = "online_softmax (CPU, CUDA), row_chunks (CPU)"
    assert info["kernels"] == (on_cuda if info["cuda"] else "online_softmax, row_chunks (CPU)")
    assert info["vectors"] in ("avx512f", "avx2", "sse2", "")


def test_unbuilt_extension_is_none(monkeypatch):
    # None makes the import fail as if there were no such module, whatever is installed here.
    monkeypatch.setitem(sys.modules, EXTENSION, None)
    assert build_info() is None


def test_broken_extension_is_an_error(monkeypatch, tmp_path):
    (tmp_path / f"_extension{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    monkeypatch.delitem(sys.modules, EXTENSION, raising=False)
    monkeypatch.setattr(sftmix_kernels, "__path__", [str(tmp_path)])
    with pytest.raises(ImportError) as raised:
        build_info()
    assert not isinstance(raised.value, ModuleNotFoundError)


def test_extension_that_misses_a_module_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "_extension.py").write_text("import no_such_module_of_sftmix\n")
    monkeypatch.delitem(sys.modules, EXTENSION, raising=False)
    monkeypatch.setattr(sftmix_kernels, "__path__", [str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match="no_such_module_of_sftmix"):
        build_info()


def test_kernels_import_without_the_training_libraries():
    check = (
        "import sys, sftmix_kernels\n"
        "found = {'transformers', 'datasets', 'accelerate', 'sftmix'} & sys.modules.keys()\n"
        "sys.exit(f'imported: {sorted(found)}' if found else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _declared() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = [project["build-system"]["requires"], project["project"]["dependencies"]]
    groups += project["dependency-groups"].values()
    groups += project["project"]["optional-dependencies"].values()
    requirements = (Requirement(line) for group in groups for line in group)
    return {canonicalize_name(r.name): r for r in requirements if r.name != "sftmix"}


def _pinned() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): r for r in requirements}


def test_constraints_pin_every_declared_dependency_within_its_range():
    pinned = _pinned()
    for name, requirement in _declared().items():
        (pin,) = pinned[name].specifier
        assert pin.operator == "==", name
        assert requirement.specifier.contains(pin.version), f"{name}: {pin} is out of range"


def test_constraints_pin_nothing_but_single_versions():
    for name, requirement in _pinned().items():
        assert [pin.operator for pin in requirement.specifier] == ["=="], name
        assert not requirement.extras, name


def test_a_wheel_has_every_file_that_the_packages_read():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]
    for package, patterns in data.items():
        folder = ROOT / package
        packed = [set(folder.glob(pattern)) for pattern in patterns]
        assert all(packed), f"{package}: of {patterns} some name nothing"
        # `sftmix/recipes` is a link.
        files = (
            Path(place, name)
            for place, _, names in os.walk(folder, followlinks=True)
            for name in names
        )
        others = {path for path in files if path.suffix not in (".py", ".pyc", ".so")}
        assert others == set().union(*packed)
