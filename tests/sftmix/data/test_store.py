"""Examples are built from compact bytes, equal to what was put in, in any choice and order."""

from typing import Any

import pytest

from sftmix.data.formats import Content
from sftmix.data.store import Example, Examples

TOOL = {"name": "t", "arguments": {"z": 1, "a": 1e16, "big": 2**70, "m": [None, True]}}
CONTENTS = [
    Content(({"role": "user", "content": "q\u2028"}, {"role": "assistant", "content": "a"})),
    Content(({"role": "user", "content": "q"}, {"role": "assistant", "content": None,
             "tool_calls": [TOOL]}), tools=[TOOL], learnt=(False, True)),
    Content(input_ids=[1, 2, 2**70], labels=[-100, 2, 3]),
    Content(input_ids=[5, 6], labels=[-100, 6]),
]  # fmt: skip


def table(contents: list[Content]) -> Examples:
    examples = Examples()
    examples.begin_file("a.jsonl")
    for place, content in enumerate(contents):
        examples.append(10 * place, place + 1, content, {"score": place / 2})
    return examples


def expected(place: int, content: Content) -> Example:
    return Example(
        10 * place, f"a.jsonl:{place + 1}", content.digest(), **vars(content),
        numbers={"score": place / 2},
    )  # fmt: skip


def keys(value: Any) -> Any:
    """Return the keys of all objects in their order, which templates write."""
    if isinstance(value, dict):
        return [(key, keys(part)) for key, part in value.items()]
    return [keys(part) for part in value] if isinstance(value, list | tuple) else None


def test_an_example_is_what_was_put_in() -> None:
    examples = table(CONTENTS)
    assert len(examples) == 4
    for place, (example, content) in enumerate(zip(examples, CONTENTS, strict=True)):
        assert example == expected(place, content)
        assert keys(example.messages) == keys(content.messages)
        assert keys(example.tools) == keys(content.tools)
    assert examples[-1] == examples[3]
    for outside in (4, -5):
        with pytest.raises(IndexError, match="expected an example below 4"):
            examples[outside]


def test_slices_and_choices() -> None:
    examples = table(CONTENTS)
    all_of_them = list(examples)
    assert list(examples[1:]) == all_of_them[1:]
    assert list(examples[::-1][:2]) == all_of_them[:1:-1]
    assert list(examples.take([3, 0, 3]).take([2, 1])) == [all_of_them[3], all_of_them[0]]
    named = examples.take([1, 1], ids=[7, 8])
    assert [one.id for one in named] == named.ids.tolist() == [7, 8]
    assert named[1:].ids.tolist() == [8]
    assert named[1].source == "a.jsonl:2"
    assert named.content_hashes == [CONTENTS[1].digest()] * 2
    assert named.numbers("score").tolist() == [0.5, 0.5]
    assert not examples[:0]


def test_duplicates_name_the_first_of_their_content() -> None:
    a, b, c = CONTENTS[:3]
    places, first = table([a, b, a, c, b, a]).find_duplicates()
    assert places.tolist() == [2, 4, 5]
    assert first.tolist() == [0, 1, 0]
    places, first = table([a, b, a, c, b, a]).take([4, 3, 1]).find_duplicates()
    assert (places.tolist(), first.tolist()) == ([2], [0])
    assert table([a, b, c]).find_duplicates()[0].size == 0


def test_a_forgotten_file_leaves_nothing() -> None:
    examples = table(CONTENTS)
    examples.begin_file("b.jsonl")
    for content in CONTENTS:
        examples.append(99, 1, content, {"score": 0.0})
    examples.forget_file(4)
    assert list(examples) == list(table(CONTENTS))
    examples.forget_file(0)
    examples.begin_file("c.jsonl")
    examples.append(0, 5, CONTENTS[3], {"score": 1.0})
    assert [one.source for one in examples] == ["c.jsonl:5"]
    assert dict(examples.counts_by_file()) == {"c.jsonl": 1}
