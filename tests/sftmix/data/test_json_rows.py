"""JSON in every shape that files have: values and lines as `json` gives them, read in pieces."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftmix.data import json_rows
from sftmix.data.files import read_file
from sftmix.data.json_rows import read_lines
from sftmix.data.rows import BadRowError

ROWS = [{"question": f"q{i}", "answer": "a"} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CHAT = {"messages": [{"role": "user", "content": "q"}], "tools": [{"name": "add"}]}
TOKENS = {"input_ids": [1, 2], "labels": [1, 2]}
COLUMNS = {"question": ["q0", "q1", "q2"], "answer": ["a", "a", "a"]}


def read(path: Path, content: str) -> list[tuple[int, Any]]:
    path.write_text(content, encoding="utf-8")
    return [(row.line, row.value) for row in read_file(path)]


def line_value(line: str) -> Any:
    # A short line behind it shares its block.
    row, other = read_lines(io.BytesIO(line.encode() + b"\n[1]"))
    assert (row.line, row.problem, other) == (1, None, (2, [1], None))
    return row.value


SHAPES = [
    ("lines", LINES, (1, 2, 3)),
    ("an array", json.dumps(ROWS), (1, 1, 1)),
    ("an indented array", json.dumps(ROWS, indent=1), (2, 6, 10)),
    ("an array of lines", "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]", (2, 3, 4)),
    ("objects in sequence", "\n".join(json.dumps(row, indent=1) for row in ROWS), (1, 5, 9)),
    ("an object around a list", json.dumps({"data": ROWS}), (1, 1, 1)),
    ("a version and a list", json.dumps({"version": 1, "rows": ROWS}, indent=1), (4, 8, 12)),
    ("columns", json.dumps(COLUMNS), (1, 2, 3)),
    ("indented columns", json.dumps(COLUMNS, indent=1), (1, 2, 3)),
    (
        "columns of pandas",
        json.dumps({key: dict(enumerate(value)) for key, value in COLUMNS.items()}),
        (1, 2, 3),
    ),
    (
        "rows by key",
        json.dumps({f"key{i}": row for i, row in enumerate(ROWS)}, indent=1),
        (1, 2, 3),
    ),
]


@pytest.mark.parametrize("piece", [7, json_rows.PIECE])
@pytest.mark.parametrize("large", [10, json_rows.LARGE_OBJECT])
@pytest.mark.parametrize(("content", "lines"), [shape[1:] for shape in SHAPES])
def test_every_shape_gives_its_rows_and_their_lines(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str,
    lines: tuple[int, ...],
    large: int,
    piece: int,
) -> None:
    monkeypatch.setattr(json_rows, "PIECE", piece)
    monkeypatch.setattr(json_rows, "LARGE_OBJECT", large)
    assert read(tmp_path / "rows.json", content) == list(zip(lines, ROWS, strict=True))


@pytest.mark.parametrize("shape", SHAPES[:5])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows", "rows.txt"])
def test_lines_and_arrays_are_told_apart_under_any_name(
    tmp_path: Path, shape: tuple[str, str, tuple[int, ...]], name: str
) -> None:
    _, content, lines = shape
    assert read(tmp_path / name, content) == list(zip(lines, ROWS, strict=True))


@pytest.mark.parametrize("row", [CHAT, TOKENS, ROWS[0], {"prompt": [{}], "completion": [{}]}])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_a_single_object_with_a_format_is_a_row(
    tmp_path: Path, row: dict[str, Any], indent: int | None, ending: str
) -> None:
    assert read(tmp_path / f"row.{ending}", json.dumps(row, indent=indent)) == [(1, row)]


def test_one_line_that_holds_texts_in_turn_is_a_row(tmp_path: Path) -> None:
    row = {"conversations": ["q", "a"]}
    assert read(tmp_path / "row.jsonl", json.dumps(row)) == [(1, row)]
    assert read(tmp_path / "row.json", json.dumps(row)) == [(1, row)]


def test_an_object_with_two_lists_is_refused_by_their_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.json"
    with pytest.raises(ValueError, match=r"expected one list of objects, got 'train' and 'test'"):
        read(path, json.dumps({"train": ROWS, "test": ROWS}))
    assert not caplog.records
    read(path, json.dumps({"version": 1, "data": ROWS, "license": "none"}))
    assert caplog.messages == [f"{path}: read 'data'; not used: 'version', 'license'"]


BROKEN = [
    ('{"data": [\n{"a": 1},\n{"a": 2', 3, "xpecting ',' delimiter; .*is the file cut off"),
    ('{"data": [\n{"a": 1}\n{"a": 2}]}', 3, "xpecting ',' (delimiter|or ']' after a row)"),
    ('{\n"data": [{"a": 1}]\n"b": 2}', 3, "xpecting ',' (delimiter|or '}')"),
    ('{"data": [{"a": 1}],\nb: 2}', 2, "Expecting property name"),
    ('{\n"data" [{"a": 1}]\n}', 2, "Expecting ':' delimiter"),
    ('{\n"data": [{"a": 1}]}\n]', 3, "text after the end of the object"),
    ('{\n"a": 1}\n{\n"a": 2', 4, "xpecting ',' .*is the file cut off"),
    ('{\n"a": 1}\nnull', 3, "text after the end of the object"),
]


@pytest.mark.parametrize(("content", "line", "reason"), BROKEN)
@pytest.mark.parametrize("large", [1, json_rows.LARGE_OBJECT])
def test_broken_objects_name_their_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str,
    line: int,
    reason: str,
    large: int,
) -> None:
    monkeypatch.setattr(json_rows, "LARGE_OBJECT", large)
    with pytest.raises(BadRowError, match=reason) as caught:
        read(tmp_path / "rows.json", content)
    assert caught.value.line == line


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(VALUES, st.booleans())
def test_a_line_has_the_value_that_json_gives(value: Any, ascii_only: bool) -> None:
    line = json.dumps(value, ensure_ascii=ascii_only)
    assert repr(line_value(line + "\r")) == repr(json.loads(line))


@pytest.mark.parametrize(
    "line",
    [
        '{"a": 1, "b": 2, "a": 3}', '"\\ud800"', "-0", "-0.0", "NaN", "[Infinity, -Infinity]",
        "1E400", "12345678901234567890123", "-9223372036854775809", "1.5e-400",
        "0.1234567890123456789012345", '"\\u0000"', "[" * 600 + "]" * 600,
    ],
)  # fmt: skip
def test_what_orjson_reads_in_another_way_is_read_as_before(line: str) -> None:
    assert repr(line_value(line)) == repr(json.loads(line))


@pytest.mark.parametrize("line", ["[1,]", "{'a': 1}", '"\t"', "01", "1 2", "\ufeff1", "tru"])
def test_what_is_no_json_has_the_message_of_json(line: str) -> None:
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(line)
    _, row = read_lines(io.BytesIO(b"1\n" + line.encode()))
    error = expected.value
    assert row.problem == f"invalid JSON: {error.msg} at column {error.colno}"


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(VALUES, max_size=5), st.sampled_from([None, 1]), st.integers(1, 40))
def test_an_array_is_read_in_pieces_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int | None, piece: int
) -> None:
    path = tmp_path_factory.mktemp("pieces") / "rows.json"
    content = json.dumps(values, indent=indent, ensure_ascii=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(json_rows, "PIECE", piece)
        path.write_bytes(content.encode("utf-8"))
        found = list(read_file(path))
    assert repr([row.value for row in found]) == repr(json.loads(content))
    starts = [1] * len(values)
    if indent:
        sizes = [json.dumps(value, indent=1).count("\n") + 1 for value in values]
        starts = [2 + sum(sizes[:i]) for i in range(len(values))]
    assert [row.line for row in found] == starts


@pytest.mark.parametrize("begin", ["[", '{"data": ['])
def test_a_large_file_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: str
) -> None:
    monkeypatch.setattr(json_rows, "LARGE_OBJECT", json_rows.PIECE)
    path = tmp_path / "rows.json"
    row = json.dumps({"question": "q" * 5_000, "answer": "a" * 5_000})
    path.write_text(begin + ",\n".join([row] * 1_500) + "]}"[: len(begin.split())])
    assert path.stat().st_size > 14 * json_rows.PIECE
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_file(path)) == 1_500
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Bytes and text of a piece, and of an object that is looked at before it is known as large.
    assert peak < 8 * json_rows.PIECE


def test_columns_of_conversations_have_one_length(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"messages": [turns, turns], "id": [1]}))
    with pytest.raises(ValueError, match=r"one length, got values: 'messages' 2, 'id' 1$"):
        list(read_file(path))
    path.write_text(json.dumps({"messages": [turns, turns], "id": [1, 2]}))
    assert len(list(read_file(path))) == 2
