"""What `help()` says of every public name: shapes, dtypes, and examples that do what they say."""

from __future__ import annotations

import doctest
import inspect
import re
from typing import Any, get_type_hints

import pytest
import torch
import typing_extensions

import sftmix_kernels
from sftmix_kernels import (
    cross_entropy,
    fused_cross_entropy,
    fused_sftmix_loss,
    gates,
    keywords,
    mixup_loss,
    reference,
    schedules,
    sftmix_loss,
)
from sftmix_kernels.perplexity import streaming

MODULES = [cross_entropy, gates, mixup_loss, reference, schedules, sftmix_loss, streaming]
PUBLIC = {name: getattr(sftmix_kernels, name) for name in sftmix_kernels.__all__}
FUNCTIONS = [name for name, one in PUBLIC.items() if inspect.isfunction(one)]


@pytest.mark.parametrize("module", MODULES)
def test_examples(module: object) -> None:
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example(name: str) -> None:
    assert "Example:" in (inspect.getdoc(PUBLIC[name]) or "")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_help_of_a_function_has_every_argument_and_the_shapes_of_tensors(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name]) or ""
    arguments = text.split("\nArgs:\n")[1].split("\n\n")[0]
    entries = re.split(r"\n    (?=\w)", f"\n{arguments}")[1:]
    told = {
        argument: entry for entry in entries for argument in entry.partition(":")[0].split(", ")
    }
    assert told.keys() == inspect.signature(PUBLIC[name]).parameters.keys()
    assert "Returns:" in text
    for argument, hint in get_type_hints(PUBLIC[name]).items():
        if argument != "return" and hint in (torch.Tensor, torch.Tensor | None):
            assert re.search(r"\((\.\.\.|V|P)[^)]*\)", told[argument]), argument


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (fused_cross_entropy, keywords.CrossEntropyKeywords),
        (fused_sftmix_loss, keywords.SFTMixKeywords),
    ],
)
def test_type_checkers_are_told_of_every_keyword(function: Any, told: Any) -> None:
    """The overloads of ``stats`` have them as one name."""
    hints = get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    names = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    expected = {name: hints[name] for name in names if name != "stats"}
    assert get_type_hints(told) == expected
    shown = typing_extensions.get_overloads(function)
    assert not shown or len(shown) == 2
