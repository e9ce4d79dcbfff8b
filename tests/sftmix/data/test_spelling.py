"""Names in every spelling, and texts that are numbers or truth values."""

from __future__ import annotations

from typing import Any

import pytest

from sftmix.data.spelling import bare, spellings, unquoted


@pytest.mark.parametrize(
    "name", ["tool_calls", "Tool_Calls", "toolCalls", " TOOL-CALLS\n", "tool calls"]
)
def test_a_name_is_found_in_every_spelling(name: str) -> None:
    assert spellings(frozenset(["content", "tool_calls"]))[bare(name)] == "tool_calls"
    assert bare(name) != bare("tool_call")


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("False", False), (" true ", True), ("0", 0.0), ("1.0", 1.0), ("0.5", 0.5),
        ("no", "no"), ("", ""), ("1 kg", "1 kg"), (1, 1), (None, None), ([0], [0]),
    ],
)  # fmt: skip
def test_a_text_means_what_it_says(value: object, meant: Any) -> None:
    assert unquoted(value) == meant
    assert isinstance(unquoted(value), type(meant))
