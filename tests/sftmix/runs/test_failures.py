"""How commands end that fail: the exit code, and what reaches the terminal."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

import pytest

import sftmix.commands.doctor
from sftmix.cli import main
from sftmix.runs.failures import RunFailure, exit_code, printable


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("seed: expected"), 2),
        (TypeError("data: expected"), 2),
        (FileNotFoundError(errno.ENOENT, "No such file"), 2),
        (PermissionError(errno.EACCES, "Permission denied"), 2),
        (ImportError("needs PEFT"), 2),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (OSError(errno.EFBIG, "File too large"), 1),
        (FloatingPointError("loss is nan"), 1),
        (MemoryError("out of memory"), 1),
        (ChildProcessError("'break' failed"), 1),
        (RunFailure("the model is in RUN; the card could not be written"), 1),
    ],
)
def test_exit_codes(
    error: Exception,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_code(error) == code
    monkeypatch.setattr(sftmix.commands.doctor, "main", failing(error))
    assert main(["doctor"]) == code
    assert capsys.readouterr().err == f"sftmix doctor: error: {error}\n"
    for words in (["--traceback", "doctor"], ["doctor", "--traceback"]):
        with pytest.raises(type(error)):
            main(words)


def failing(error: BaseException) -> Callable[[Sequence[str]], None]:
    """A command that fails when it is given no words."""

    def command(words: Sequence[str]) -> None:
        assert not words
        raise error

    return command


@pytest.mark.parametrize("error", [KeyError("name"), AssertionError(), AttributeError("no")])
def test_a_fault_of_our_own_is_shown_whole(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sftmix.commands.doctor, "main", failing(error))
    with pytest.raises(type(error)):
        main(["doctor"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("Grüße, 数据 — 🎉 e\u0301", "Grüße, 数据 — 🎉 e\u0301"),
        ("\x1b]0;title\x07\x1b[2J", r"\x1b]0;title\x07\x1b[2J"),
        ("a\x00b\x7fc\x9bd\re\bf", r"a\x00b\x7fc\x9bd\re\x08f"),
        ("two\nlines\tand a tab", "two\n  lines\tand a tab"),
        ("abc\u202egpj.exe\u200b", r"abc\u202egpj.exe\u200b"),
        ("not UTF-8: \udcff", r"not UTF-8: \udcff"),
    ],
)
def test_names_do_not_steer_the_terminal(
    raw: str,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert printable(raw) == shown
    monkeypatch.setattr(sftmix.commands.doctor, "main", failing(ValueError(raw)))
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == f"sftmix doctor: error: {shown}\n"
