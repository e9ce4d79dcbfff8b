"""Read small files that a user names, with a limit on their size."""

from __future__ import annotations

import os
import stat
from pathlib import Path

# A recipe has 1 kB, the longest chat template in use 20 kB.
MAX_BYTES = 2**20


def read_small(path: Path, name: str) -> str:
    """Return the text of the file `path`, which the option `name` gave.

    A device or a pipe is refused before it is opened: it may never end, or never answer.

    Raises:
        ValueError: it is no regular file, is larger than `MAX_BYTES`, or is not UTF-8.
        OSError: it cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        kind = "folder" if path.is_dir() else "device or a pipe"
        raise ValueError(f"{name}: expected a file, got the {kind} {path}")
    # The file could have become a pipe since, and opening a pipe would wait for its writer.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{name}: expected at most {MAX_BYTES:,} bytes, {path} has more")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: {path} is not UTF-8: byte {error.start} cannot be read; save it as UTF-8"
        ) from None
