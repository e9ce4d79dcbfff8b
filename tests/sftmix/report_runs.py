"""Run folders made by hand, and what a page holds, for the tests of the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


def make_run(folder: Path, *, finished: bool = True, **changes: Any) -> Path:
    """A folder as `sftmix train` leaves it, without weights.

    ``log``: its lines; ``metrics``: of an evaluation; ``files``: of the manifest; anything else is
    of the recipe.
    """
    folder.mkdir(parents=True)
    log, metrics = changes.pop("log", []), changes.pop("metrics", None)
    recipe = {
        "method": "ntp",
        "model": "base",
        "data": ["rows.jsonl"],
        "data_hash": "0" * 64,
        "template_hash": "1" * 64,
        "max_length": 64,
        "seed": 0,
        "mu": 0.2,
        "alpha": 0.5,
        "partition": None,
        "world_size": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
    }
    extra = {"versions": {"torch": "2.0"}, "files": changes.pop("files", {})}
    write(folder / "manifest.json", {**recipe, **changes, **extra})
    state = folder if finished else folder / "checkpoint-10"
    state.mkdir(exist_ok=True)
    write(state / "trainer_state.json", {"log_history": log})
    if finished:
        write(folder / "config.json", {})
    if metrics is not None:
        write(folder / "evaluation.json", {"metrics": metrics})
    return folder


def write(path: Path, content: Any) -> None:
    """As JSON; Python's own, which knows NaN."""
    path.write_text(json.dumps(content), encoding="utf-8")


def log_lines(
    held_out: float, *, loss: float = 1.0, steps: Sequence[int] = (10, 20)
) -> list[dict[str, Any]]:
    """A log whose NTP term ends at ``loss``."""
    lines: list[dict[str, Any]] = [
        {
            "step": step,
            "loss": loss * steps[-1] / step,
            "ntp_loss": loss * steps[-1] / step,
            "tokens_per_second": 100.0 * step,
            "peak_memory_gib": 0.5 + step / 100,
        }
        for step in steps
    ]
    return [*lines, {"step": steps[-1], "eval_loss": held_out, "eval_perplexity": 2.0}]


class Page(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    def values(self, *names: str) -> list[str]:
        """Of those attributes, wherever they are."""
        return [value for name, value in self.attributes if name in names and value]
