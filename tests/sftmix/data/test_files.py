"""Files of every form, compression and encoding, and what is no file of rows."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from sftmix.cli import main
from sftmix.data.examples import load_examples
from sftmix.data.files import check_encoding, ending_of, read_file
from sftmix.data.rows import BadRowError

ROWS = [{"question": f"é{i}", "answer": "a"} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = "question,answer\n" + "".join(f"é{i},a\n" for i in range(3))


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
}
FORMS = {"jsonl": LINES, "json": json.dumps(ROWS, ensure_ascii=False), "csv": CSV}


def read(path: Path, content: bytes, encoding: str = "utf-8") -> list[object]:
    path.write_bytes(content)
    return [row.value for row in read_file(path, encoding=encoding)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", COMPRESS)
def test_a_text_may_be_compressed(tmp_path: Path, form: str, ending: str) -> None:
    packed = COMPRESS[ending](FORMS[form].encode())
    assert read(tmp_path / f"rows.{form}.{ending}", packed) == ROWS
    # The content tells, also of files in one after another, as `cat` makes them.
    assert read(tmp_path / f"rows.{form}", packed) == ROWS
    if form == "jsonl":
        assert read(tmp_path / f"rows.{form}.{ending}", packed + packed) == ROWS * 2


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_compressed_file_that_is_cut_off_is_said_to_be(tmp_path: Path, ending: str) -> None:
    noise = "".join(
        json.dumps({"question": os.urandom(40).hex(), "answer": "a"}) for _ in range(50)
    )
    packed = COMPRESS[ending](noise.replace("}{", "}\n{").encode())
    path = tmp_path / f"rows.jsonl.{ending}"
    with pytest.raises(ValueError, match=rf"{path}: a \w+ file that is cut off or damaged: "):
        read(path, packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=rf"{path}: a \w+ file that is cut off or damaged: "):
        load_examples([path], on_bad_row="skip")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-16-be", "utf-32"])
def test_a_text_may_have_another_encoding(tmp_path: Path, form: str, encoding: str) -> None:
    content = FORMS[form].encode(encoding)
    assert read(tmp_path / f"rows.{form}", content, encoding) == ROWS
    assert read(tmp_path / f"rows.{form}.gz", gzip.compress(content), encoding) == ROWS
    with pytest.raises(ValueError, match="--encoding"):
        load_examples([tmp_path / f"rows.{form}"])
    assert len(load_examples([tmp_path / f"rows.{form}"], encoding=encoding)) == 3


@pytest.mark.parametrize("form", FORMS)
def test_marks_and_ends_of_lines_of_windows(tmp_path: Path, form: str) -> None:
    content = FORMS[form].replace("\n", "\r\n").encode("utf-8-sig")
    assert read(tmp_path / f"rows.{form}", content) == ROWS


def test_a_text_that_is_not_of_the_encoding_names_its_flag(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for content, encoding, line, byte in (
        (LINES.encode(), "ascii", 1, "byte 0xc3"),
        (LINES.encode("cp1252") * 20_000 + b'{"a": "\x81"}\n', "cp1252", 60_001, "byte 0x81"),
        (LINES.encode("utf-16") + b"x", "utf-16", 4, "the text ends within a character"),
    ):
        says = f"jsonl:{line}: not valid {encoding}, as --encoding says it is: {byte}.* or none for"
        for packed in (content, gzip.compress(content, 1)):
            with pytest.raises(BadRowError, match=says):
                read(path, packed, encoding)
    path.write_bytes(LINES.encode("latin-1"))
    with pytest.raises(BadRowError, match=r"not valid UTF-8: byte 0xe9 .*; --encoding reads other"):
        load_examples([path])
    check_encoding("utf-16")
    for encoding in ("utf-99", "base64", "", "\0"):
        with pytest.raises(ValueError, match=r"^encoding: expected utf-8, latin-1, cp1252, utf-16"):
            check_encoding(encoding)


def test_the_encoding_is_a_flag(
    tmp_path: Path, toy_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(CSV.encode("cp1252"))
    words = ["train", "--model", str(toy_model), "--data", str(path), "--method", "ntp"]
    words += ["--output", str(tmp_path / "run"), "--use_cpu", "true", "--encoding"]
    assert main([*words, "nonsense"]) == 2
    assert "--encoding: expected utf-8, latin-1, cp1252, utf-16" in capsys.readouterr().err
    # One row is not a batch.
    assert main([*words, "cp1252", "--data_split", "train[1:2]"]) == 2
    assert f"  read        1 rows: '{path}' 1\n" in capsys.readouterr().out


FOREIGN = [
    (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "a Git LFS pointer; `git lfs p",
    ),
    (b"<!DOCTYPE html>\n<html>", "a page of HTML or XML, maybe an error in place of the file"),
    (b"\xef\xbb\xbf\n <HTML><body>404", "a page of HTML or XML"),
    (b'<?xml version="1.0"?><Error>', "a page of HTML or XML"),
    (b"PK\x03\x04\x14\x00\x06\x00", "a zip archive, or a workbook of Excel"),
    (b"%PDF-1.7", "a PDF document"),
    (b"\x80\x04\x95\x10", "a pickle, which can run code; save its rows as JSON lines or parquet"),
    (b"\x80\x02}q\x00", "a pickle"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1", "a document of Microsoft Office"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"PARE", "an encrypted parquet file; decrypt it first"),
    (b"-----BEGIN PGP MESSAGE-----", "encrypted; decrypt it first"),
    (b"rows.json".ljust(257, b"\0") + b"ustar", "a tar archive; unpack it"),
]


@pytest.mark.parametrize(("content", "what"), FOREIGN)
@pytest.mark.parametrize("name", ["rows.json", "rows.parquet", "rows.csv.gz", "rows"])
def test_a_foreign_file_is_named(tmp_path: Path, content: bytes, what: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(ValueError, match=f"{path}: expected rows, this is {what}"):
        load_examples([path])


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_file_that_is_compressed_twice_is_named(tmp_path: Path, ending: str) -> None:
    packed = COMPRESS[ending](gzip.compress(LINES.encode()))
    with pytest.raises(ValueError, match=r": compressed twice, gzip within \w+; unpack it once$"):
        read(tmp_path / f"rows.jsonl.{ending}", packed)


def test_nul_bytes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES.encode() + b"\0" * 100)
    with pytest.raises(BadRowError, match="it holds NUL bytes: is the file damaged") as caught:
        load_examples([path])
    assert caught.value.line == 4
    assert len(load_examples([path], on_bad_row="skip")) == 3
    with pytest.raises(ValueError, match="its text is in utf-16-le; give --encoding utf-16-le"):
        read(path, LINES.encode("utf-16-le"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(FORMS[name[5:]], encoding="utf-8")
    rows = read_file(path)
    next(rows)
    with path.open("a") as file:
        file.write("\n\n")
    with pytest.raises(ValueError, match=f"{path}: it changed while it was read"):
        list(rows)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(LINES)
    path.chmod(0)
    with pytest.raises(PermissionError, match=r"rows\.jsonl"):
        load_examples([path])


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("a.jsonl", ".jsonl"),
        ("a.JSON.GZ", ".json"),
        ("a.b.csv.xz", ".csv"),
        ("a.gz", ""),
        ("a", ""),
    ],
)
def test_endings(name: str, ending: str) -> None:
    assert ending_of(Path("x.y") / name) == ending
