"""Settings shared by all tests."""

import os

import pytest
import torch
from hypothesis import settings

# Shared build machines stall; a slow example is no bug. Derandomised: a run says the same twice.
settings.register_profile("sftmix", deadline=None, derandomize=True)
settings.load_profile("sftmix")
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


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
