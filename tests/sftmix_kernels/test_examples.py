"""The examples in docstrings do what they say."""

from __future__ import annotations

import doctest

import pytest

from sftmix_kernels import cross_entropy, gates, mixup_loss, sftmix_loss


@pytest.mark.parametrize("module", [cross_entropy, gates, mixup_loss, sftmix_loss])
def test_examples(module: object) -> None:
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed
