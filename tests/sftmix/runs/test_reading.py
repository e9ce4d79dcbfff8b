"""Small files that a user names are read whole, or refused before they are opened."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from sftmix.runs.reading import MAX_BYTES, read_small
from sftmix.templates.files import read_template


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf\xc3\xa9")
    assert read_small(tmp_path / "a", "config") == "é"
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert read_small(tmp_path / "link", "config") == "é"
    (tmp_path / "full").write_bytes(b"x" * MAX_BYTES)
    assert len(read_small(tmp_path / "full", "config")) == MAX_BYTES
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_small(tmp_path / "nowhere", "config")


def test_what_has_no_end_or_is_no_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * (MAX_BYTES + 1))
    (tmp_path / "latin").write_bytes(b"a\xe9")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path, message in (
        (tmp_path / "pipe", "config: expected a file, got the device or a pipe "),
        (tmp_path / "zero", "config: expected a file, got the device or a pipe "),
        (Path("/dev/null"), "config: expected a file, got the device or a pipe "),
        (tmp_path, "config: expected a file, got the folder "),
        (tmp_path / "large", "config: expected at most 1,048,576 bytes, "),
        (tmp_path / "latin", "config: .* is not UTF-8: byte 1 cannot be read; save it as UTF-8"),
    ):
        with pytest.raises(ValueError, match=message):
            read_small(path, "config")


@pytest.mark.parametrize("inside", [False, True])
def test_chat_templates_without_an_end(inside: bool, tmp_path: Path) -> None:
    """Also where a folder holds them."""
    pipe = tmp_path / "chat_template.jinja"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match=r"^chat_template: "):
        read_template(str(tmp_path if inside else pipe))
    pipe.unlink()
    pipe.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"^chat_template: "):
        read_template(str(tmp_path if inside else pipe))
    pipe.unlink()
    pipe.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=re.escape(f"{pipe} is not UTF-8: byte 0")):
        read_template(str(tmp_path if inside else pipe))
