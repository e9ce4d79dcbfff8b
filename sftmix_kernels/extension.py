"""The compiled part of the package: loading it, and how it was built."""

import functools
import importlib
import warnings

_EXTENSION = "sftmix_kernels._extension"


def build_info() -> dict[str, str] | None:
    """Return facts about the compiled extension, or None where it was not built.

    The first call loads it, and with that its kernels are registered with torch. Keys: `compiler`
    (name and version), `cxx_standard` (the value of `__cplusplus`), `torch` (version it was built
    beside), `cuda` (toolkit version), `kernels` (which, for which devices), `vectors` (the
    instruction set whose loops run here: the widest that the processor has, or what
    `ATEN_CPU_CAPABILITY` caps it to, as it caps PyTorch's kernels). An empty string means "none".

    Raises:
        ImportError: the extension is there but cannot be loaded, for example because it was built
            for another Python.
    """
    try:
        module = importlib.import_module(_EXTENSION)
    except ModuleNotFoundError as error:
        if error.name != _EXTENSION:
            raise
        return None
    info: dict[str, str] = module.build_info()
    return info


@functools.cache
def warn_of_pytorch_operations() -> None:
    """Say once that an op runs without its compiled kernel."""
    reason = "its extension is not built" if build_info() is None else "not built for this device"
    warnings.warn(
        f"sftmix_kernels: losses run on PyTorch operations, which is slower: {reason}. "
        "`pip install --no-build-isolation` builds it; `sftmix doctor` shows what is there",
        stacklevel=3,
    )
