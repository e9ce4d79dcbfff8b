"""Find what form a file has, by its content and its ending, and read its rows.

Files are known by how they begin, whatever their names; where that leaves a doubt, the ending tells
JSON, JSON lines and CSV apart.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import lzma
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow as pa

from sftmix.data.json_rows import BOM, has_lines, read_lines, read_values
from sftmix.data.rows import BadRowError, Row
from sftmix.data.table_rows import (
    ARROW_FILE,
    ARROW_STREAM,
    FEATHER_1,
    PARQUET,
    is_table,
    read_arrow,
    read_csv,
    read_parquet,
)

TEXTS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
ENDINGS = (*TEXTS, ".parquet", ".arrow", ".feather")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
EXPECTED = f"{', '.join(ENDINGS)}; texts also {', '.join(COMPRESSED)}"
HEAD = 1 << 20  # bytes that tell what a file is

_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
}
# How files begin that hold no rows, what they are, and the way out.
_UNPACK = "unpack it, and give what it holds"
_SAVE = "save its rows as JSON lines or parquet"
_DECRYPT = "decrypt it first"
_FOREIGN = (
    (b"version https://git-lfs.github.com/", "a Git LFS pointer; `git lfs pull` gets the file"),
    (b"PK\x03\x04", f"a zip archive, or a workbook of Excel; {_UNPACK}, or {_SAVE}"),
    (b"7z\xbc\xaf\x27\x1c", f"a 7z archive; {_UNPACK}"),
    (b"Rar!", f"a rar archive; {_UNPACK}"),
    (b"%PDF", "a PDF document; give its text as rows"),
    (b"\xd0\xcf\x11\xe0", f"a document of Microsoft Office; {_SAVE}"),
    (b"SQLite format 3\x00", f"an SQLite database; {_SAVE}"),
    (b"\x89HDF", f"an HDF5 file; {_SAVE}"),
    (b"\x93NUMPY", f"an array of NumPy; {_SAVE}"),
    (b"GGUF", "the weights of a model; give data"),
    (b"\x89PNG", "an image; only text is learnt from"),
    (b"\xff\xd8\xff", "an image; only text is learnt from"),
    (b"\x7fELF", "a program; give data"),
    (b"PARE", f"an encrypted parquet file; {_DECRYPT}"),
    (b"-----BEGIN PGP", f"encrypted; {_DECRYPT}"),
    (b"age-encryption.org/", f"encrypted; {_DECRYPT}"),
    (b"Salted__", f"encrypted; {_DECRYPT}"),
    *((bytes([0x80, version]), f"a pickle, which can run code; {_SAVE}") for version in range(6)),
)  # fmt: skip
# No header of a table begins so.
_JSON = re.compile(rb"\s*(\[\s*)?\{\s*[\"}]")
_HTML = (b"<!doctype", b"<html", b"<head", b"<?xml")
# The longer marks first: UTF-32 begins as UTF-16 does.
_UTF = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def ending_of(path: Path) -> str:
    """Return the ending that says what a file holds, without that of its compression.

    >>> ending_of(Path("rows.JSONL.gz"))
    '.jsonl'
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def check_encoding(encoding: str) -> None:
    """Refuse what is no encoding of text.

    Raises:
        ValueError: Python has no such encoding.
    """
    try:
        " ".encode(encoding)
    except (LookupError, ValueError):
        raise ValueError(
            f"encoding: expected utf-8, latin-1, cp1252, utf-16 or another encoding of Python, "
            f"got {encoding!r}"
        ) from None


def read_file(
    path: Path, *, encoding: str = "utf-8", numbers: Collection[str] = ()
) -> Iterator[Row]:
    """Yield the rows of a file.

    A line that cannot be read is a row with a `problem`. `encoding` is that of texts. A CSV file
    has only text, and numbers in the columns of `numbers`.

    Raises:
        BadRowError: the syntax of a JSON array or of a CSV file is broken.
        ValueError: the file is none of the forms, broken, or changes while it is read.
    """
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path}: a link to {path.readlink()}, which does not exist")
    before = path.stat()
    if not stat.S_ISREG(before.st_mode):
        raise ValueError(f"{path}: expected a file, got {special(before.st_mode)}")
    with path.open("rb") as file:
        compression = _compression(file.read(HEAD))
    try:
        yield from _rows(path, compression, encoding, numbers)
    except UnicodeDecodeError:
        raise _not_encoded(path, compression, encoding) from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        if not compression or getattr(error, "errno", None):
            raise
        raise ValueError(
            f"{path}: a {compression} file that is cut off or damaged: {error}"
        ) from error
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError(f"{path}: it changed while it was read; read it when it is whole")


def _compression(head: bytes) -> str:
    return next((one for magic, one in _COMPRESSIONS.items() if head.startswith(magic)), "")


def _not_encoded(path: Path, compression: str, encoding: str) -> BadRowError:
    """Return the error for the first byte of a text that is not of its encoding."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line, reason, data = 1, "the text ends within a character", b" "
    with _opened(path, compression) as stream:
        while data:
            data, state = stream.read(HEAD), decoder.getstate()
            try:
                line += decoder.decode(data, final=not data).count("\n")
            except UnicodeDecodeError as error:
                left = len(error.object) - error.start
                if left <= len(data):
                    decoder.setstate(state)
                    line += decoder.decode(data[: len(data) - left]).count("\n")
                    reason = f"byte 0x{error.object[error.start]:02x} ({error.reason})"
                break
    return BadRowError(
        str(path),
        line,
        f"not valid {encoding}, as --encoding says it is: {reason}; give another --encoding, or "
        "none for UTF-8",
    )


def special(mode: int) -> str:
    """Return what a thing is that is neither a file nor a folder."""
    kinds = {stat.S_IFIFO: "a pipe (FIFO)", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _rows(path: Path, compression: str, encoding: str, numbers: Collection[str]) -> Iterator[Row]:
    with _opened(path, compression) as stream:
        head = stream.read(HEAD)
    ending = ending_of(path)
    if again := compression and _compression(head):
        raise ValueError(f"{path}: compressed twice, {again} within {compression}; unpack it once")
    _refuse_foreign(path, head)
    is_parquet = head.startswith(PARQUET)
    is_arrow = head.startswith((ARROW_FILE, ARROW_STREAM, FEATHER_1))
    if compression and (is_parquet or is_arrow):
        raise ValueError(f"{path}: a table in a {compression} file; {_UNPACK}")
    expected = "" if is_parquet or is_arrow or compression else ending
    if is_parquet or expected == ".parquet":
        return read_parquet(path)
    if is_arrow or expected in (".arrow", ".feather"):
        return read_arrow(path)
    if codecs.lookup(encoding).name in ("utf-8", "utf-8-sig"):
        encoding = ""
        _refuse_utf16(path, head)
    return _texts(path, ending, compression, encoding, numbers)


def _texts(
    path: Path, ending: str, compression: str, encoding: str, numbers: Collection[str]
) -> Iterator[Row]:
    with _opened(path, compression, encoding) as stream:
        head = stream.read(HEAD)
    begin = head.removeprefix(BOM).lstrip()
    if ending not in TEXTS and not begin.startswith((b"{", b"[")):
        raise ValueError(f"{path}: a data file must end in {EXPECTED}, or hold JSON")
    is_csv = not _JSON.match(begin) if ending in (".csv", ".tsv") else is_table(head)
    with _opened(path, compression, encoding) as stream:
        if is_csv:
            yield from read_csv(stream, path, tabs=ending == ".tsv", numbers=numbers)
        elif has_lines(head, is_whole=len(head) < HEAD, expected=ending in (".jsonl", ".ndjson")):
            yield from read_lines(stream)
        else:
            yield from read_values(stream, path)


@contextlib.contextmanager
def _opened(path: Path, compression: str, encoding: str = "") -> Iterator[io.BufferedReader]:
    """Give a file's content, unpacked, and as UTF-8 if its encoding is given."""
    with contextlib.ExitStack() as stack:
        if not compression and not encoding:
            yield stack.enter_context(path.open("rb"))
            return
        if compression == "xz":  # which Arrow does not know
            source = pa.PythonFile(stack.enter_context(lzma.open(path)), "r")
        else:
            source = pa.input_stream(str(path), compression=compression or None)
        if encoding:
            source = pa.transcoding_input_stream(source, encoding, "utf-8")
        yield stack.enter_context(io.BufferedReader(source, HEAD))


def _refuse_foreign(path: Path, head: bytes) -> None:
    what = next((what for magic, what in _FOREIGN if head.startswith(magic)), None)
    if head[257:262] == b"ustar":
        what = f"a tar archive; {_UNPACK}"
    if head.removeprefix(BOM).lstrip()[:9].lower().startswith(_HTML):
        what = "a page of HTML or XML, maybe an error in place of the file; download it again"
    if what:
        raise ValueError(f"{path}: expected rows, this is {what}")


def _refuse_utf16(path: Path, head: bytes) -> None:
    found = next((name for mark, name in _UTF.items() if head.startswith(mark)), None)
    if found is None and head[:2].count(0) == 1:
        found = "utf-16-le" if head[1] == 0 else "utf-16-be"
    if found:
        raise ValueError(f"{path}: expected UTF-8, its text is in {found}; give --encoding {found}")
