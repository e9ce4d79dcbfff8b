"""The scripts of `examples/` run, at toy sizes, and the cells of the notebook in their order."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
# What a first run on a CPU warns of, and TRL's own defaults.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning"),
]


def script(name: str) -> dict[str, Any]:
    """Return what a script defines."""
    return runpy.run_path(str(EXAMPLES / name))


def test_the_loss_in_a_loop_learns() -> None:
    main = script("loss_in_a_loop.py")["main"]
    first, later = main(1), main(12)
    assert later < first < math.log(256) + 0.5


def test_the_trainer_leaves_a_model(tmp_path: Path) -> None:
    assert math.isfinite(script("trainer.py")["main"](tmp_path, 20))
    assert (tmp_path / "sftmix" / "model.safetensors").is_file()


def test_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.setenv("CI", "1")  # else TRL tells its makers
    assert math.isfinite(script("trl_trainer.py")["main"](tmp_path, 20))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("loss_in_a_loop.py", ["many"]),
        ("trainer.py", []),
        ("trainer.py", ["folder", "all"]),
        ("trl_trainer.py", ["folder", "10", "more"]),
    ],
)
def test_wrong_words_show_how_a_script_is_called(
    name: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [name, *words])
    with pytest.raises(SystemExit, match=rf"python examples/{name} "):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.slow
def test_the_notebook() -> None:
    notebook = json.loads((EXAMPLES / "sftmix.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for cell in cells:
        exec(cell, names)
    assert set(names["results"]) == {"ntp", "sftmix"}
    assert all(math.isfinite(loss) for loss in names["results"].values())
