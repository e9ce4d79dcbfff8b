"""Build `sftmix_kernels._extension`, and README for an index; pyproject.toml declares the rest."""

import importlib.util
import os
import re
import shlex
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup


def can_build() -> bool:
    """Say whether torch and a C++ compiler are here; the sources are not in MSVC's dialect."""
    command = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or ""
    compiler = shutil.which(shlex.split(command)[0]) if command and os.name == "posix" else None
    return compiler is not None and importlib.util.find_spec("torch") is not None


def extension() -> dict[str, Any]:
    """Return what builds the CPU kernels, and CUDA kernels where torch has CUDA and nvcc is here.

    Whether there is a GPU does not matter.
    """
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    make, macros = CppExtension, []
    sources = [f"csrc/{name}.cpp" for name in ("extension", "online_softmax_cpu", "row_chunks_cpu")]
    if torch.version.cuda and CUDA_HOME:
        # USE_CUDA brings torch's declarations for CUDA.
        make, macros = CUDAExtension, [("USE_CUDA", None)]
        sources += ["csrc/online_softmax_cuda.cu"]
    # Where arithmetic may trap, as GCC assumes, loops with a condition are scalar without AVX-512.
    cxx = ["-O3", "-fopenmp-simd", "-ffp-contract=fast", "-fno-trapping-math"]
    # Without -ftz each exponential takes three instructions more, to keep numbers below 1e-38.
    nvcc = ["-O3", "-ftz=true"]
    # Where torch is told which chips, it says so to nvcc itself.
    nvcc += [] if os.environ.get("TORCH_CUDA_ARCH_LIST") else ["-arch=all-major"]
    options = {"define_macros": macros, "extra_compile_args": {"cxx": cxx, "nvcc": nvcc}}
    module = make("sftmix_kernels._extension", sources, **options)
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


def readme() -> dict[str, str]:
    """Return README as an index shows it, where none of the repository's files are beside it.

    Pictures are left out, and of a link to a file or a heading the text is left.
    """
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    text = re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)
    return {"long_description": text, "long_description_content_type": "text/markdown"}


# Without torch or a compiler the package is pure Python. With both, a failing build is an error.
setup(**readme(), **extension() if can_build() else {})
