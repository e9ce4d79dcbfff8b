"""Read what a command says when it refuses its words."""

from __future__ import annotations

import pytest

from sftmix.cli import main


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The message of a refused command, without the words before it."""
    capsys.readouterr()
    try:
        code = main(words)
    except SystemExit as ended:  # argparse ends by itself
        code = int(str(ended.code))
    error = capsys.readouterr().err
    assert code == 2, error
    assert "Traceback" not in error
    begin = f"sftmix {words[0]}: error: "
    assert error.count(begin) == 1, error
    return error[error.index(begin) + len(begin) :].rstrip("\n")
