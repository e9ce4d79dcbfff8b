"""Settings shared by all tests."""

import gc
import os
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import settings

# Imports make no garbage: searching what they make for it took a fifth of the time of importing.
# `pytest_collection_finish` turns it on again.
gc.disable()

# Shared build machines stall; a slow example is no bug. Derandomised: a run says the same twice.
settings.register_profile("sftmix", deadline=None, derandomize=True)
settings.load_profile("sftmix")
# Two, so that work is shared out; OMP_NUM_THREADS=1 says that other processes test as well.
torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _replaced_once() -> Iterator[None]:
    """Half of its time, Triton's interpreter replaces what it has replaced already.

    It puts its own functions in the place of Triton's when a kernel begins, and once more at every
    call of a function in it. Where `static_print` is `print`, they are in their places.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    interpreter = import_module("triton.runtime.interpreter")
    tl, replace = interpreter.tl, interpreter._patch_lang

    def replace_once(function: Any) -> Any:
        seen = [one for one in function.__globals__.values() if one is tl or one is tl.core]
        done = seen and all(one.static_print is print for one in seen)
        return interpreter._LangPatchScope() if done else replace(function)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(interpreter, "_patch_lang", replace_once)
        yield


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Leave what was imported out of every later search for garbage: 0.4 s each, and 0.003 s."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU; leave out what runs in the other kind of process.

    Triton decides when it is imported whether it interprets or compiles, for the whole process.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    has_gpu = torch.cuda.is_available()
    stay, leave = [], []
    for item in items:
        stays = (item.get_closest_marker("interpret") is not None) == interpreted
        (stay if stays else leave).append(item)
        if interpreted:
            # The interpreter computes with NumPy, which warns of NaN; a GPU does not.
            item.add_marker(pytest.mark.filterwarnings("ignore:All-NaN slice"))
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if leave and not stay:
        raise pytest.UsageError(
            "tests marked `interpret` run with TRITON_INTERPRET=1 alone, all others without it"
        )
    config.hook.pytest_deselected(items=leave)
    items[:] = stay
