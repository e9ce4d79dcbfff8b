"""Builds `sftmix_kernels._build_info`; everything else is declared in pyproject.toml."""

import os
import shlex
import shutil
import sysconfig
from importlib.metadata import PackageNotFoundError, version

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup


def torch_version() -> str:
    """Version of the installed torch, read from its metadata: importing it would cost seconds."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def has_compiler() -> bool:
    """Whether the C++ compiler that setuptools would call is on this machine."""
    command = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "cl"
    return shutil.which(shlex.split(command)[0]) is not None


build_info = Pybind11Extension(
    "sftmix_kernels._build_info",
    ["csrc/build_info.cpp"],
    cxx_std=17,
    define_macros=[("SFTMIX_TORCH", f'"{torch_version()}"')],
)
# Without a compiler the package is pure Python. With one, a failing build is an error.
# force: setuptools compares only file times and would keep the report of an older torch.
setup(
    ext_modules=[build_info] if has_compiler() else [],
    options={"build_ext": {"force": True}},
)
