"""The tables of formats in the docs are made from the code and from the tests' rows."""

from __future__ import annotations

from tests.sftmix.data.published import PUBLISHED
from tools.formats_page import learnt, pages


def test_the_pages_of_formats_are_current() -> None:
    for page, text in pages().items():
        assert page.read_text(encoding="utf-8") == text, "run: python -m tools.formats_page"


def test_what_is_learnt_is_the_answers_without_the_questions() -> None:
    """Calls and thoughts are the assistant's, what a tool says is not."""
    assert learnt(PUBLISHED["ShareGPT"][0]) == ["3<|im_end|>", "7<|im_end|>"]
    call = '{"name": "add", "arguments": {"a": 1, "b": 2}}<|im_end|>'
    assert learnt(PUBLISHED["LLaMA-Factory's tools"][0]) == [call, "3<|im_end|>"]
    assert learnt(PUBLISHED["reasoning"][0]) == ["<think>1 + 2</think>3<|im_end|>"]
