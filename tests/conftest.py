"""Settings shared by all tests."""

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
