"""Reading examples: every format, every kind of bad row, and where each stands."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftmix.data import examples as examples_module
from sftmix.data import json_rows
from sftmix.data.examples import BadRowError, data_hash, load_examples

REAL_DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_real_data = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason="no real data beside the project"
)


def _chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


PAIR = _chat(("user", "Add 1 and 2."), ("assistant", "3"))


def _jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


GOOD_ROWS = [
    ({"messages": PAIR}, PAIR),
    ({"prompt": "Add 1 and 2.", "completion": "3"}, PAIR),
    ({"prompt": PAIR[:1], "completion": PAIR[1:]}, PAIR),
    ({"instruction": "Add 1 and 2.", "output": "3"}, PAIR),
    ({"instruction": "Add 1 and 2.", "input": "", "output": "3"}, PAIR),
    ({"instruction": "Add 1 and 2.", "input": None, "output": "3"}, PAIR),
    (
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        _chat(("user", "Add.\n\n1 and 2"), ("assistant", "3")),
    ),
    ({"question": "Add 1 and 2.", "answer": "3", "extra": [1, None]}, PAIR),
    ({"prompt": PAIR[:1], "completion": "3"}, PAIR),
    ({"messages": PAIR[:1], "answer": "3"}, PAIR),
]


@pytest.mark.parametrize(("row", "messages"), GOOD_ROWS)
def test_every_format_becomes_messages(
    tmp_path: Path, row: dict[str, Any], messages: list[dict[str, str]]
) -> None:
    path = _jsonl(tmp_path / "data.jsonl", [row])
    [example] = load_examples([path])
    assert example.messages == tuple(messages)
    assert (example.id, example.source) == (0, f"{path}:1")
    assert example.input_ids is None
    assert example.labels is None


def test_pretokenised_rows(tmp_path: Path) -> None:
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    [example] = load_examples([_jsonl(tmp_path / "data.jsonl", [row])])
    assert example.messages is None
    assert (example.input_ids, example.labels) == ([5, 6, 7], [-100, 6, 7])


def test_json_array_gives_the_line_each_row_begins_on(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    rows = [{"question": f"q{i}\nr", "answer": "a"} for i in range(3)]
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    assert [e.source for e in load_examples([path])] == [f"{path}:{n}" for n in (2, 6, 10)]


def test_json_with_one_row_per_line_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "data.JSON"
    path.write_bytes(
        b'\xef\xbb\xbf{"question": "q", "answer": "a"}\n\n{"question": "r", "answer": "b"}'
    )
    assert [e.source for e in load_examples([path])] == [f"{path}:1", f"{path}:3"]


def test_parquet_counts_rows_from_one(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    rows = [{"messages": PAIR, "n": 1}, {"messages": PAIR, "n": 2}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    examples = load_examples([path])
    assert [e.messages for e in examples] == [tuple(PAIR)] * 2
    assert [e.source for e in examples] == [f"{path}:1", f"{path}:2"]


def test_a_name_goes_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> datasets.Dataset:
        assert (name, split) == ("someone/sums", "test")
        return datasets.Dataset.from_list([{"question": "Add 1 and 2.", "answer": "3"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("sftmix.data.hub.is_reached", lambda path, revision: True)
    [example] = load_examples(["someone/sums"], split="test")
    assert example.messages == tuple(PAIR)
    assert example.source == "someone/sums:1"


def test_content_hash_ignores_format_and_key_order(tmp_path: Path) -> None:
    swapped = [{"content": m["content"], "role": m["role"], "extra": 1} for m in PAIR]
    rows = [{"messages": PAIR}, {"messages": swapped}]
    one, two = load_examples([_jsonl(tmp_path / "a.jsonl", rows)])
    [three] = load_examples([_jsonl(tmp_path / "b.jsonl", [GOOD_ROWS[3][0]])])
    [other] = load_examples([_jsonl(tmp_path / "c.jsonl", [GOOD_ROWS[6][0]])])
    assert one.content_hash == two.content_hash == three.content_hash
    assert other.content_hash != one.content_hash
    assert len(one.content_hash) == 64
    assert data_hash([one.content_hash, other.content_hash]) == data_hash(
        [three.content_hash, other.content_hash]
    )
    assert data_hash([one.content_hash, other.content_hash]) != data_hash(
        [other.content_hash, one.content_hash]
    )


def test_ids_run_over_all_files_and_count_bad_rows(tmp_path: Path) -> None:
    good, bad = {"question": "q", "answer": "a"}, {"question": "q", "answer": " "}
    paths = [
        _jsonl(tmp_path / "a.jsonl", [good, bad, good]),
        _jsonl(tmp_path / "b.jsonl", [bad, good]),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"b\.jsonl"):
        load_examples([paths[1]], on_bad_row="error")
    assert [e.id for e in load_examples(paths, on_bad_row="skip")] == [0, 2, 4]


BAD_ROWS: list[tuple[Any, str]] = [
    ("text", "a row must be an object, got str"),
    ({"instruction": "i"}, "'output' is missing"),
    ({"instruction": "i", "output": None}, "'output' must be a string, got null"),
    ({"instruction": "i", "output": 3}, "'output' must be a string, got int"),
    ({"instruction": "i", "output": " \n"}, "'output' is empty"),
    ({"instruction": "", "output": "o"}, "'instruction' is empty"),
    ({"instruction": "i", "input": 1, "output": "o"}, "'input' must be a string, got int"),
    ({"instruction": "i", "output": "a\ud800"}, "'output' holds a lone surrogate"),
    (
        {"prompt": "p", "completion": PAIR[1:]},
        "'prompt' must be a list of messages, as 'completion' i",
    ),
    (
        {"prompt": ["Q", "R"], "completion": ["A"]},
        "'prompt' has 2 and 'completion' has 1 texts, expected one each; columns of lists are read",
    ),
    ({"prompt": PAIR[:1], "completion": []}, "'completion' is empty"),
    ({"prompt": PAIR[:1], "completion": " "}, "'completion' is empty"),
    ({"messages": PAIR[:1], "answer": "3", "output": "4"}, "'output' and 'answer' differ; say wh"),
    ({"messages": None}, "'messages' must be a list of messages, got null"),
    ({"messages": []}, "'messages' has no assistant message"),
    ({"messages": PAIR[:1]}, "'messages' has no assistant message"),
    ({"messages": PAIR + PAIR[:1]}, "must end with the assistant, ends with user"),
    ({"messages": PAIR[1:]}, "must not begin with the assistant"),
    ({"messages": ["hello"]}, r"'messages\[0\]' must be an object"),
    ({"messages": [*PAIR, {"role": "tool", "content": "x"}]}, "must end with the assistant, ends"),
    ({"messages": [*PAIR, {"role": "bot", "content": "x"}]}, "must be one of system, developer, u"),
    (
        {"messages": [PAIR[0], {"role": "assistant", "content": ""}]},
        r"'messages\[1\].content' is e",
    ),
    ({"messages": [PAIR[0], {"role": "assistant"}]}, r"content' must be a string, got null"),
    ({"input_ids": [1, 2], "labels": [-100]}, "must be of one length, got 2 and 1"),
    ({"input_ids": [1, 2], "labels": [1, -100]}, "'labels' has nothing to learn"),
    ({"input_ids": [], "labels": []}, "'labels' has nothing to learn"),
    ({"input_ids": [1, 2.0], "labels": [1, 2]}, r"'input_ids\[1\]' must be an integer, got 2.0"),
    ({"input_ids": [1, 2], "labels": [1, True]}, r"'labels\[1\]' must be an integer, got True"),
    ({"input_ids": "12", "labels": [1, 2]}, "'input_ids' must be a list of integers, got str"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_a_bad_row_names_file_line_and_reason(tmp_path: Path, row: Any, reason: str) -> None:
    columns = row if isinstance(row, dict) else {"instruction": 1}
    good = next(g for g, _ in GOOD_ROWS if set(g) & set(columns)) if "input_ids" not in row else {
        "input_ids": [1, 2], "labels": [1, 2]
    }  # fmt: skip
    path = _jsonl(tmp_path / "data.jsonl", [good, good, row])
    with pytest.raises(BadRowError, match=reason) as caught:
        load_examples([path])
    assert (caught.value.file, caught.value.line) == (str(path), 3)
    assert str(caught.value) == f"{path}:3: {caught.value.reason}"
    assert caught.value.reason.endswith(" (--on_bad_row skip leaves such rows out)")
    assert len(load_examples([path], on_bad_row="skip")) == 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"question": "q", "answer": ', "invalid JSON: Expecting value at column 29"),
        (b"\xff\xfe", "not valid UTF-8: byte 0xff"),
        (b"[" * 100_000, "unreadable JSON"),
        (b'{"question": ' + b"9" * 5000 + b"}", "unreadable JSON|must be a string"),
    ],
)
def test_an_unreadable_line(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"question": "q", "answer": "a"}\n' + line + b"\n")
    with pytest.raises(BadRowError, match=reason) as caught:
        load_examples([path])
    assert caught.value.line == 2
    assert len(load_examples([path], on_bad_row="skip")) == 1


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        (b'[\n{"question": "q", "answer": "a"},\n{"question": "q",', 3, "file cut off"),
        (b'[\n{"question": "q", "answer": "a"},\n', 2, "cut off"),
        (b'[\n{"question": "q", "answer": "a"}\n', 2, "file cut off"),
        (b'[\n{"question": "q", "answer": "a', 2, "row begins on line 2 .is the file cut off"),
        (b'[\n{"question": "q",\n "answer": a}]', 3, "Expecting value; the row begins on line 2"),
        (b'[\n{"question": "q", "answer": "a"}\n{}]', 3, "expecting ',' or ']'"),
        (b'[\n{"question": "q", "answer": "a"}]\n{}', 3, "text after the end of the array"),
        (b'[\n{"question": "q", "answer": "\xe9"}]', 2, "not valid UTF-8: byte 0xe9"),
    ],
)
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_broken_array_is_never_skipped(
    tmp_path: Path, text: bytes, line: int, reason: str, on_bad_row: Any
) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(text)
    with pytest.raises(BadRowError, match=reason) as caught:
        load_examples([path], on_bad_row=on_bad_row)
    assert caught.value.line == line


def test_skipping_logs_one_warning_with_five_reasons(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"question": "q", "answer": "a" if i == 0 else ""} for i in range(9)]
    load_examples([_jsonl(tmp_path / "data.jsonl", rows)], on_bad_row="skip")
    [record] = [r for r in caplog.records if r.name.startswith("sftmix")]
    assert record.levelname == "WARNING"
    text = record.getMessage()
    assert "left out 8 of 9 rows" in text
    assert text.count("'answer' is empty") == 5
    assert "data.jsonl:2: " in text
    assert text.endswith("and 3 more")


def test_no_warning_without_bad_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_examples([_jsonl(tmp_path / "data.jsonl", [GOOD_ROWS[0][0]])], on_bad_row="skip")
    assert not caplog.records


def test_unknown_columns(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "data.jsonl", [{"text": "a", "prompt": "b"}])
    with pytest.raises(ValueError, match=r"data\.jsonl: columns \['prompt', 'text'\].*question"):
        load_examples([path])


QUESTION, INSTRUCTION = {"question": "q", "answer": "a"}, {"instruction": "i", "output": "o"}


@pytest.mark.parametrize(
    ("before", "bad", "good"),
    [
        (QUESTION, "'instruction' is missing", INSTRUCTION),  # another format than all rows tell
        ({"text": "t"}, "'instruction' is missing", INSTRUCTION),  # none
        ([1], "a row must be an object, got list", QUESTION),
    ],
)
def test_all_rows_tell_the_format_not_the_first_ones(
    tmp_path: Path,
    before: Any,
    bad: str,
    good: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The rows are read once more then; nothing is counted twice, and ids are those of the file."""
    monkeypatch.setattr(examples_module, "FIRST_ROWS", 2)
    first = _jsonl(tmp_path / "a.jsonl", [{**QUESTION, "n": 1}])
    path = _jsonl(tmp_path / "b.jsonl", [before] * 3 + [{**good, "extra": 1}] * 4)
    with pytest.raises(BadRowError, match=bad) as caught:
        load_examples([first, path])
    assert (caught.value.file, caught.value.line) == (str(path), 1)
    caplog.clear()
    examples = load_examples([first, path], on_bad_row="skip")
    assert examples.ids.tolist() == [0, 4, 5, 6, 7]
    assert [one.source for one in examples][1:] == [f"{path}:{line}" for line in (4, 5, 6, 7)]
    assert "left out 3 of 8 rows" in caplog.text
    reading = examples.reading
    assert reading.rows == {str(first): 1, str(path): 7}
    assert reading.unused == {"n": 1, "extra": 4}
    assert [(one.count, one.first) for one in reading.refused.values()] == [(3, f"{path}:1: {bad}")]
    assert reading.sources == [(str(first), 0, 1), (str(path), 1, 8)]


def test_a_tie_of_formats_is_decided_by_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples_module, "FIRST_ROWS", 2)
    rows = [QUESTION, QUESTION, INSTRUCTION, INSTRUCTION]
    examples = load_examples([_jsonl(tmp_path / "a.jsonl", rows)], on_bad_row="skip")
    assert [one.messages[0]["content"] for one in examples if one.messages] == ["i", "i"]


def test_broken_syntax_at_the_end_comes_before_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[{"question": "q", "answer": ""},\n{"question": "q", "answer": "a"},\n{"q')
    with pytest.raises(BadRowError, match="Unterminated") as caught:
        load_examples([path])
    assert caught.value.line == 3


def test_what_reading_found(tmp_path: Path) -> None:
    rows = [QUESTION, {**QUESTION, "n": 1}, INSTRUCTION, {"question": 3, "answer": "a"}, QUESTION]
    path = _jsonl(tmp_path / "a.jsonl", rows)
    reading = load_examples([path], on_bad_row="skip").reading
    assert reading.numbers() == {
        "rows": {str(path): 5}, "refused": 2, "forgiven": {}, "unused": {"n": 1}, "duplicates": 2
    }  # fmt: skip
    assert reading.duplicates_line() == (
        "2 of 5 rows have the content of an earlier one, and are learnt again: the first is "
        f"example 1 ({path}:2), with that of example 0 ({path}:1)"
    )
    assert load_examples([_jsonl(path, [QUESTION])]).reading.duplicates_line() is None


def test_examples_take_less_than_twice_the_memory_of_their_arrow_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "BLOCK", 1 << 12)  # of a file much larger than a block
    text = "all work and no play makes Jack a dull boy "
    rows = [
        {"messages": _chat(("user", f"{i} {text * 60}"), ("assistant", f"{text * 60} {i}"))}
        for i in range(1000)
    ]
    path = _jsonl(tmp_path / "data.jsonl", rows)
    size = pa.Table.from_pylist(rows).nbytes
    load_examples([path])  # imports
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    examples = load_examples([path])
    kept, peak = (one - before for one in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    assert len(examples) == 1000
    assert kept < 1.4 * size
    assert peak < 2 * size


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        load_examples([tmp_path / "absent.jsonl"])
    (tmp_path / "data.txt").write_text("question,answer\n")
    with pytest.raises(ValueError, match=r"data\.txt: a data file must end in \.json"):
        load_examples([tmp_path / "data.txt"])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(ValueError, match=r"broken\.parquet: not a readable parquet file"):
        load_examples([tmp_path / "broken.parquet"])
    for name, text in (("empty.jsonl", "\n"), ("empty.json", "[ ]"), ("nothing.json", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}: holds no rows"):
            load_examples([tmp_path / name])
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(BadRowError, match="must be an object, got list; no row"):
        load_examples([tmp_path / "list.jsonl"], on_bad_row="skip")


def test_wrong_arguments(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "data.jsonl", [{"question": "q", "answer": ""}])
    with pytest.raises(ValueError, match="no examples are left: all 1 rows are bad"):
        load_examples([path], on_bad_row="skip")
    with pytest.raises(
        ValueError, match=r"^on_bad_row: expected 'error', 'skip' or 'mend', got 'warn'"
    ):
        load_examples([path], on_bad_row="warn")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^data: expected a list of files or names"):
        load_examples(str(path))
    with pytest.raises(ValueError, match=r"^data: expected at least one file or name, got none"):
        load_examples([])


def test_a_bad_row_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadRowError("a.jsonl", 3, "bad")))
    assert (str(error), error.line) == ("a.jsonl:3: bad", 3)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.text(min_size=1), st.text(min_size=1)).filter(
            lambda pair: all(part.strip() for part in pair)
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([None, 1]),
)
def test_any_text_survives(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]], indent: int | None
) -> None:
    folder = tmp_path_factory.mktemp("text")
    rows = [{"question": q, "answer": a} for q, a in pairs]
    (folder / "a.json").write_text(json.dumps(rows, indent=indent), encoding="utf-8")
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "b.jsonl").write_bytes(lines.encode("utf-8"))
    expected = [tuple(_chat(("user", q), ("assistant", a))) for q, a in pairs]
    examples = [load_examples([folder / name]) for name in ("a.json", "b.jsonl")]
    assert [[e.messages for e in part] for part in examples] == [expected, expected]
    assert data_hash(e.content_hash for e in examples[0]) == data_hash(
        e.content_hash for e in examples[1]
    )


@needs_real_data
def test_real_alpaca(caplog: pytest.LogCaptureFixture) -> None:
    path = REAL_DATA / "alpaca_9k.json"
    with pytest.raises(BadRowError, match="'output' is empty") as caught:
        load_examples([path])
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[caught.value.line - 1].strip() == "{"
    assert lines[caught.value.line + 2].strip() == '"output": ""'
    examples = load_examples([path], on_bad_row="skip")
    assert len(examples) == 9225
    assert examples[-1].id == 9228
    assert "left out 4 of 9229" in caplog.text


@needs_real_data
def test_real_gsm8k() -> None:
    examples = load_examples([REAL_DATA / "gsm8k_train.jsonl"])
    assert len(examples) == 7473
    assert examples[7472].source.endswith("gsm8k_train.jsonl:7473")
    assert examples[0].messages is not None
    assert examples[0].messages[1]["content"].endswith("#### 72")
