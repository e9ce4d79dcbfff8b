"""Tables: CSV with the lines of its rows, parquet and Arrow by number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from sftmix.data.examples import load_examples
from sftmix.data.files import read_file
from sftmix.data.rows import BadRowError
from sftmix.data.table_rows import BATCH


def read(path: Path, content: str, numbers: tuple[str, ...] = ()) -> list[tuple[Any, ...]]:
    path.write_text(content, encoding="utf-8", newline="")
    return [tuple(row) for row in read_file(path, numbers=numbers)]


@pytest.mark.parametrize(
    ("name", "content", "row"),
    [
        ("a.csv", "question,answer\n2 + 2,4\n", {"question": "2 + 2", "answer": "4"}),
        ("a.csv", 'question,answer\n"a ""b"", c",\n', {"question": 'a "b", c', "answer": ""}),
        ("a.csv", "question;answer\n1,5;2,5\n", {"question": "1,5", "answer": "2,5"}),
        ("a.csv", '"one; two";three\n1;2\n', {"one; two": "1", "three": "2"}),
        ("a.csv", "question\tanswer\na,b\tc\n", {"question": "a,b", "answer": "c"}),
        ("a.csv", "question|answer\na,b|c\n", {"question": "a,b", "answer": "c"}),
        ("a.csv", ",text\n0,a\n", {"": "0", "text": "a"}),
        ("a.csv", "text\na;b\n", {"text": "a;b"}),
        ("a.tsv", 'question\tanswer\n"a\tb"\tc, d\n', {"question": "a\tb", "answer": "c, d"}),
        ("a.csv", "text\n" + "x" * 200_000, {"text": "x" * 200_000}),
        ("a.csv", f"text,{'x' * 200_000}\n1,2", {"text": "1", "x" * 200_000: "2"}),
        ("a.csv", "question,answer\rq,a\r", {"question": "q", "answer": "a"}),
        ("a.csv", 'question,answer\r\n"q\rr",a\0', {"question": "q\rr", "answer": "a\0"}),
        # The content tells, where it is clear.
        ("a.jsonl", "question,answer\n1 + 2,3\n", {"question": "1 + 2", "answer": "3"}),
        ("a.json", "question\tanswer\na, b\tc\n", {"question": "a, b", "answer": "c"}),
    ],
)
def test_cells_are_text(tmp_path: Path, name: str, content: str, row: dict[str, str]) -> None:
    assert read(tmp_path / name, content) == [(2, row, None)]


def test_rows_have_the_lines_they_begin_on(tmp_path: Path) -> None:
    content = '\nquestion,answer\n"a\n\nb",c\n\nd,"e\r\nf"\ng,h\n'
    rows = read(tmp_path / "a.csv", content)
    assert [row[0] for row in rows] == [3, 7, 9]
    assert rows[1][1] == {"question": "d", "answer": "e\r\nf"}
    examples = load_examples([tmp_path / "a.csv"])
    assert examples[2].source == f"{tmp_path}/a.csv:9"


def test_lines_of_an_old_mac_are_counted(tmp_path: Path) -> None:
    content = b"question,answer\rq,a\r\xe9,b\rc\rd,e"
    (tmp_path / "a.csv").write_bytes(content)
    rows = list(read_file(tmp_path / "a.csv"))
    assert [(row.line, row.problem is None) for row in rows] == [
        (2, True), (3, False), (4, False), (5, True)
    ]  # fmt: skip
    assert "not valid UTF-8: byte 0xe9" in str(rows[1].problem)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", '{"question": "q,r", "answer": "a"}\n' * 2),
        ("a.tsv", '[\n{"question": "q,r", "answer": "a"},\n{"question": "q,r", "answer": "a"}]'),
    ],
)
def test_json_is_read_whatever_its_name(tmp_path: Path, name: str, content: str) -> None:
    assert [row[1] for row in read(tmp_path / name, content)] == [
        {"question": "q,r", "answer": "a"}
    ] * 2


def test_prose_before_json_lines_is_a_bad_row(tmp_path: Path) -> None:
    content = 'hello, world\n{"question": "q", "answer": "a"}\n'
    assert [row[0] for row in read(tmp_path / "a.jsonl", content) if row[2]] == [1]
    assert read(tmp_path / "b.csv", "[id],text\n1,2\n") == [(2, {"[id]": "1", "text": "2"}, None)]


def test_a_ragged_row_is_bad_and_the_others_are_read(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.csv", "question,answer\na,b\nc\nd,e,f\ng,h\n")
    problem = "expected 2 cells, as in the header, got"
    assert [row[2] for row in rows] == [None, f"{problem} 1", f"{problem} 3", None]
    with pytest.raises(BadRowError, match=r"a\.csv:3: expected 2 cells"):
        load_examples([tmp_path / "a.csv"])
    assert len(load_examples([tmp_path / "a.csv"], on_bad_row="skip")) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b,a\n1,2,3\n", "expected a name for each column, the header has 'a' twice"),
        (
            'a,b\n1,2\n"3,\n4\n',
            r":3: invalid CSV: unexpected end of data .on line 4.; a cell that begins with a quot",
        ),
        ('a,b\n"1"2,3\n', r":2: invalid CSV: ',' expected after '\"'"),
    ],
)
def test_a_broken_table_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.csv", content)


def test_a_selection_reads_numbers(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.csv", "text,score\na,4.5\nb,none\n", ("score", "other"))
    assert [row[1]["score"] for row in rows] == [4.5, "none"]
    (tmp_path / "a.csv").write_text("question,answer,score\nq,a,4.5\nq,b,2\n")
    examples = load_examples([tmp_path / "a.csv"], numbers=["score"])
    assert [one.numbers for one in examples] == [{"score": 4.5}, {"score": 2.0}]


TABLE = pa.Table.from_pylist(
    [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]}
        for i in range(2 * BATCH + 1)
    ]
)


def write_file(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


def write_stream(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=700)


@pytest.mark.parametrize(
    "write", [pq.write_table, write_file, write_stream, pa.feather.write_feather]
)
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather", "a.json", "a"])
def test_tables_are_known_by_their_content(tmp_path: Path, write: Any, name: str) -> None:
    path = tmp_path / name
    write(TABLE, path)
    rows = list(read_file(path))
    assert [row.line for row in rows] == list(range(1, TABLE.num_rows + 1))
    assert [row.value for row in rows] == TABLE.to_pylist()


@pytest.mark.parametrize("write", [pq.write_table, write_file, write_stream])
def test_a_table_that_is_cut_off_is_refused(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "a.arrow"
    write(TABLE, path)
    path.write_bytes(path.read_bytes()[:-2_000])
    with pytest.raises(ValueError, match=f"{path}: not a readable (parquet|Arrow) file: "):
        list(read_file(path))
