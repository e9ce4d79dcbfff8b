"""What the command line says of itself."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from sftmix.cli import COMMANDS, main
from sftmix.recipe.arguments import RunArguments, TrainRunArguments
from sftmix.training.config import ScoreConfig, SFTMixConfig, SFTMixOptions


@pytest.mark.parametrize("command", ["score", "split", "train"])
def test_help_says_where_defaults_come_from(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "[paper]" in text
    assert "[ours]" in text
    assert "--adam_beta1" not in text
    # One spelling is shown; dashes are taken, too.
    assert set(re.findall(r"--\w+(?:-\w+)+", text)) <= {"--help-all"}
    for flag in ("--head", "--layout", "--row_length") if command == "train" else ():
        assert re.search(rf"^  {flag}[ ,][^[]*\[ours\]", text, re.MULTILINE), flag
    if command != "split":
        with pytest.raises(SystemExit):
            main([command, "--help-all"])
        assert "--adam_beta1" in capsys.readouterr().out


def test_every_option_of_our_own_has_a_source() -> None:
    own = [
        (cls.__name__, field)
        for cls in (SFTMixOptions, SFTMixConfig, ScoreConfig, RunArguments, TrainRunArguments)
        for field in dataclasses.fields(cls)
        if field.name in cls.__annotations__ and field.name != "remove_unused_columns"
    ]
    assert len(own) > 25
    for name, field in own:
        required = field.default is dataclasses.MISSING
        source = r"\[(paper|ours|arXiv \d{4}\.\d{5})\]$"
        assert required or re.search(source, field.metadata["help"]), (name, field)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: sftmix {command}" in capsys.readouterr().out


def test_help_of_a_light_command_needs_no_torch() -> None:
    """The demo's stays light when it runs: a child's peak memory begins at its parent's."""
    code = """
import sys
from sftmix.cli import main
heavy = {"torch", "transformers", "matplotlib", "sklearn", "scipy"}
for command in ("demo", "split", "report", "data"):
    try:
        main([command, "--help"])
    except SystemExit:
        pass
    assert not heavy & set(sys.modules), command
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.count("usage: sftmix") == 4


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sftmix {version('sftmix')}\n"


def test_the_list_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^  {command} ", text, re.MULTILINE) for command in COMMANDS)
    assert main([]) == 2
    assert main(["trian"]) == 2
    assert "no command 'trian'" in capsys.readouterr().err
