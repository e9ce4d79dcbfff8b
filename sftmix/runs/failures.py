"""Exit codes and messages of a command that fails."""

from __future__ import annotations

import argparse
import copy
import difflib
import errno
import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn

from sftmix.runs.redaction import redacted

REFUSED, FAILED = 2, 1


class RunFailure(RuntimeError):
    """A run failed on its way; the message says why, and what is kept."""


class RankError(RuntimeError):
    """Another rank failed, and says why itself."""


# The user mends these with another option, file, model or package; the message says which.
REFUSALS = (ValueError, TypeError, OSError, ImportError)
# The run itself failed: the same command may well succeed next time.
RUN_FAILURES = (RunFailure, FloatingPointError, MemoryError, ChildProcessError)
USER_ERRORS = (*REFUSALS, *RUN_FAILURES)
# The disk is full or broken, whatever was being written.
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def exit_code(error: BaseException) -> int:
    """Return 1 if a run failed on its way, 2 if something that was asked for is refused."""
    failed = isinstance(error, RUN_FAILURES) or getattr(error, "errno", None) in DISK_FAULTS
    return FAILED if failed else REFUSED


def printable(text: str) -> str:
    r"""Return the text without secrets, with control characters spelled out, lines indented.

    Names of files, columns and templates come from others. Characters that a terminal would obey,
    such as an escape sequence or a change of the writing direction, are shown as Python's escapes.

    >>> printable("no file \x1b[31mred\nsftmix: all is well")
    'no file \\x1b[31mred\n  sftmix: all is well'
    """
    return escaped(redacted(text)).replace("\n", "\n  ")


def escaped(text: str) -> str:
    """Return the text with control characters spelled out, except for tabs and line breaks."""
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    # Cc: control characters; Cf: invisible ones, which reorder text; Cs: no text at all.
    if character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cf", "Cs"):
        return character.encode("unicode_escape", "surrogatepass").decode("ascii")
    return character


class OneSpelling(argparse.HelpFormatter):
    """Help that shows a flag with underscores, and not its twin with dashes, which is taken too."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        flags = action.option_strings
        shown.option_strings = [
            flag
            for flag in flags
            if (twin := "--" + flag[2:].replace("-", "_")) == flag or twin not in flags
        ]
        return super()._format_action_invocation(shown)


def told(error: BaseException) -> str:
    """Return an error's message; a missing file's without its number.

    >>> told(FileNotFoundError(2, "No such file or directory", "rows.txt"))
    "no such file or directory: 'rows.txt'"
    """
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror[0].lower()}{error.strerror[1:]}: {str(error.filename)!r}"
    return str(error)


def near(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return the hint that names the nearest of the known words, or ``otherwise``.

    >>> near("trian", ["score", "train"])
    '; did you mean train?'
    """
    # Dashes that all flags begin with would make any two short ones alike.
    bare = {one.lstrip("-"): one for one in known}
    found = difflib.get_close_matches(word.lstrip("-"), bare, n=1)
    return f"; did you mean {bare[found[0]]}?" if found else otherwise


def spelt(text: str, words: Sequence[str]) -> str:
    """Return a text whose flags are spelt as among the typed words, with dashes or underscores.

    >>> spelt("--row_length: only --layout packed has it", ["--row-length=9"])
    '--row-length: only --layout packed has it'
    """
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    typed = {flag.replace("-", "_"): flag for flag in flags}
    return re.sub(
        r"(?<![\w-])--(\w+)(?![\w-])", lambda found: typed.get(f"__{found[1]}", found[0]), text
    )


class OneMessage(argparse.ArgumentParser):
    """A parser that refuses in one message, without the usage of a hundred options."""

    words: Sequence[str] = ()  # as they were typed
    called: Mapping[str, str] = {}  # names of options in other tools, and ours

    def __init__(self, *args: Any, **keywords: Any) -> None:
        """Take what argparse takes; a flag is never cut short."""
        super().__init__(*args, **{"allow_abbrev": False, **keywords})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the namespace of the words, as argparse does."""
        self.words = sys.argv[1:] if args is None else args
        found, rest = self.parse_known_args(self.words, namespace)
        if unknown := self.unknown(rest):
            self.exit(REFUSED, f"{self.prog}: error: {printable(unknown)}\n")
        return found

    def unknown(self, rest: Sequence[str]) -> str:
        """Return the message of the first flag that is no option, or else of the first word."""
        flags = [word for word in rest if word.startswith("--")]
        for word in (one.partition("=")[0] for one in [*flags, *rest]):
            flag = f"--{word.lstrip('-')}"
            ours = self.called.get(f"--{flag[2:].replace('-', '_')}")
            known = [one for one in self._option_string_actions if one.startswith("--")]
            hint = near(flag, known, f"; `{self.prog} --help` lists them")
            hint = f"; did you mean {ours}?" if ours else hint
            shown = word if word.startswith("-") else repr(word)
            return f"{shown}: {self.prog} has no such option{hint}"
        return ""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2, as argparse does."""
        known = self._option_string_actions
        flags = [word for word in self.words if word.startswith("--")]
        others = [word for word in flags if len(word) > 2 and word.partition("=")[0] not in known]
        # A misspelt flag is missing under its own name: its hint says more.
        if message.startswith("the following arguments are required") and others:
            self.exit(REFUSED, f"{self.prog}: error: {printable(self.unknown(others))}\n")
        hint = ""
        if choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message):
            hint = near(choice[1], re.findall(r"[\w.-]+", choice[2]))
        # argparse names both spellings of an option, with underscores and with dashes.
        message = re.sub(r"^argument (--\w+)(/\S+)?: ", r"\1: ", message)
        message = spelt(printable(message), self.words)
        hint = hint or f"; see `{self.prog} --help`"
        self.exit(REFUSED, f"{self.prog}: error: {message}{hint}\n")


class Naming:
    """A context that names the value at fault in what a library raises.

    `ValueError`, `OSError` and `ImportError` keep their kind. Other errors of libraries become a
    `ValueError`: wrong keywords, keys and attributes, and the plain `Exception` of tokenizers. A
    message that begins with the name, or with `other`, is not named twice.

    >>> with Naming("seed"):
    ...     int("three")
    Traceback (most recent call last):
    ValueError: seed: invalid literal for int() with base 10: 'three'
    """

    def __init__(
        self,
        name: str,
        what: str = "",
        *,
        other: str | None = None,
        among: Mapping[str, str] | None = None,
    ) -> None:
        """See the class.

        Args:
            name: what the value is called, an option or an argument.
            what: what was being done, for the message.
            other: another name that a message may begin with, which is replaced.
            among: names that replace `name` if a message matches their pattern.
        """
        self.name, self.what, self.other = name, f"{what}: " if what else "", other
        self.among = among or {}

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None or exit_code(error) != REFUSED or not is_library_error(error):
            return
        text = told(error)
        if text.startswith(f"{self.name}: "):
            return
        if self.other and text.startswith(f"{self.other}: "):
            text = text.removeprefix(f"{self.other}: ")
        elif not isinstance(error, ValueError | OSError | ImportError):
            text = f"{self.what}{type(error).__name__}: {text}"
        else:
            text = f"{self.what}{text}"
        kinds = (FileNotFoundError, OSError, ImportError)
        raised = next((one for one in kinds if isinstance(error, one)), ValueError)
        mentioned = (name for name, pattern in self.among.items() if re.search(pattern, text))
        name = next(mentioned, self.name)
        text = text.removeprefix(f"--{name} ").removeprefix(f"{name}: ")
        raise raised(f"{name}: {text}") from error


def is_library_error(error: BaseException) -> bool:
    """Tell whether a library may raise this error for a wrong value or file."""
    # tokenizers raises Exception itself, huggingface_hub and datasets have bases of their own.
    own = {base.__name__ for base in type(error).__mro__}
    return (
        isinstance(error, (*REFUSALS, LookupError, AttributeError, RuntimeError, AssertionError))
        or type(error) is Exception
        or bool(own & {"StrictDataclassError", "DatasetsError", "HTTPError"})
    ) and not own & {"OutOfMemoryError", "DistError", "RankError"}
