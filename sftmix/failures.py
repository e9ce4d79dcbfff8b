"""How a command that fails ends: an exit code and one message that is safe to print."""

from __future__ import annotations

import errno
import unicodedata

REFUSED, FAILED = 2, 1


class RunFailure(RuntimeError):
    """A run failed on its way; the message says why, and what is kept."""


# Mended by another option, file, model or package; the message says which.
REFUSALS = (ValueError, TypeError, OSError, ImportError)
# The run itself failed: the same command may well succeed next time.
RUN_FAILURES = (RunFailure, FloatingPointError, MemoryError, ChildProcessError)
USER_ERRORS = (*REFUSALS, *RUN_FAILURES)
# A disk that is full or broken, whatever was being written.
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def exit_code(error: BaseException) -> int:
    """Return 1 where a run failed on its way, 2 where something that was asked for is refused."""
    failed = isinstance(error, RUN_FAILURES) or getattr(error, "errno", None) in DISK_FAULTS
    return FAILED if failed else REFUSED


def printable(text: str) -> str:
    r"""Return the text with control characters spelled out, and further lines indented.

    Names of files, columns and templates come from others: what a terminal would obey, such as an
    escape sequence or a change of the writing direction, is shown as Python would escape it.

    >>> printable("no file \x1b[31mred\nsftmix: all is well")
    'no file \\x1b[31mred\n  sftmix: all is well'
    """
    return "".join(map(_shown, text)).replace("\n", "\n  ")


def _shown(character: str) -> str:
    # Cc: control characters; Cf: invisible ones, which reorder text; Cs: no text at all.
    if character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cf", "Cs"):
        return character.encode("unicode_escape", "surrogatepass").decode("ascii")
    return character
