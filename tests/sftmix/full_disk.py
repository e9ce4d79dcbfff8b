"""A disk that is full, for the tests."""

from __future__ import annotations

import contextlib
import io
import resource
import signal
from collections.abc import Iterator

LIMIT = resource.RLIMIT_FSIZE


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes, which fails as a full disk does.

    The limit is the process's: what it prints meanwhile is kept from standard output and error,
    which may be files too.
    """
    own, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(LIMIT)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            resource.setrlimit(LIMIT, (size, limits[1]))
            yield
    finally:
        resource.setrlimit(LIMIT, limits)
        signal.signal(signal.SIGXFSZ, own)
