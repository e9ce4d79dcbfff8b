"""The report: one file, nothing fetched, all text escaped, infinite values counted."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftmix.partition import Partition, from_scores
from sftmix.report import RunLog, Table, outside_note, require_matplotlib, shown_range, write_report

pytest.importorskip("matplotlib")

EVIL = "<script>alert('$x$ & \"y\"')</script>"


def partition(examples: int = 60, infinite: int = 0) -> Partition:
    draws = np.random.default_rng(0).gamma(2.0, 1.0, size=(examples, 5))
    draws[:infinite, 2] = 1e6  # nats per token: exp() overflows
    return from_scores(range(examples), ["h"] * examples, [1] * examples, draws)


def run_log(name: str, *, mixup: bool = True, paired: bool = True) -> RunLog:
    log: list[dict[str, Any]] = [{"step": 0, "train_runtime": 1.0}]
    for step in (10, 20, 30):
        log.append({"step": step, "ntp_loss": 3 / step})
        if paired:
            log[-1] |= {"ntp_loss_confident": 1 / step, "ntp_loss_unconfident": 5 / step}
        if mixup:
            log[-1]["mixup_loss"] = 4 / step
    return RunLog(name, log)


def write(path: Path, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "title": "A title",
        "paragraphs": ["A paragraph."],
        "table": Table(["model", "loss"], [["one", "1.5"], ["two", "0.25"]]),
        "table_notes": ["A note."],
        "runs": [run_log("one", mixup=False), run_log("two")],
        "partition": partition(),
        "groups": ["copy", "sum"] * 30,
        "commands": ["python -m sftmix train --data 'a file'"],
    }
    write_report(path, **(arguments | changes))
    return path.read_text(encoding="utf-8")


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


def test_it_is_complete(tmp_path: Path) -> None:
    page = Page(write(tmp_path / "report.html"))
    for text in ("A title", "A paragraph.", "A note.", "one", "0.25"):
        assert text in page.texts
    for text in (
        "NTP loss (nats per token)",
        "Mixup loss (nats per position)",
        "optimizer steps",
        "confidence (minus perplexity, log scale)",
        "variability (std. dev. of perplexity, log scale)",
        "examples in the confident half (%)",
    ):
        assert text in page.texts, text
    captions = [text for text in page.texts if "All 60 examples are shown." in text]
    assert len(captions) == 2
    assert "python -m sftmix train --data 'a file'" in page.texts
    assert page.tags.count("svg") == page.tags.count("figcaption") == 6
    alts = [value for name, value in page.attributes if name == "aria-label" and value]
    assert len(alts) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_nothing_is_fetched_and_ids_are_unique(tmp_path: Path) -> None:
    html = write(tmp_path / "report.html")
    page = Page(html)
    links = [v for n, v in page.attributes if n in ("src", "href", "xlink:href", "srcset") and v]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "@import" not in html
    assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)", html))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link[0] == "#"} <= set(ids)


def test_both_modes_and_small_screens(tmp_path: Path) -> None:
    html = write(tmp_path / "report.html")
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    assert "var(--ink)" in html.split("<body>")[1]
    assert "#010203" not in html


def test_text_is_escaped(tmp_path: Path) -> None:
    html = write(
        tmp_path / "report.html",
        title=EVIL,
        paragraphs=[EVIL],
        table=Table([EVIL], [[EVIL]]),
        table_notes=[EVIL],
        runs=[run_log(EVIL)],
        groups=[EVIL] * 60,
        commands=[EVIL],
    )
    page = Page(html)
    assert "script" not in page.tags
    assert page.texts.count(EVIL) >= 7
    assert any("dashed" in text for text in page.texts)


def test_the_same_input_gives_the_same_file(tmp_path: Path) -> None:
    assert write(tmp_path / "a.html") == write(tmp_path / "b.html")


def test_infinite_confidence_is_counted(tmp_path: Path) -> None:
    html = write(tmp_path / "report.html", partition=partition(infinite=3))
    assert len(re.findall(r"[3-9] of 60 examples lie below -", html)) == 2


def test_only_infinite_confidence(tmp_path: Path) -> None:
    html = write(tmp_path / "report.html", partition=partition(infinite=60))
    assert "60 of 60 examples lie below -10 and are not shown." in html
    assert "median -inf" in html


def test_equal_confidence_can_be_drawn(tmp_path: Path) -> None:
    certain = from_scores(range(4), ["h"] * 4, [1] * 4, np.zeros((4, 1)))
    html = write(tmp_path / "report.html", partition=certain, groups=None)
    assert "All 4 examples are shown." in html


def test_pictures_without_data_are_left_out(tmp_path: Path) -> None:
    plain = [run_log("one", mixup=False, paired=False)]
    assert Page(write(tmp_path / "a.html", runs=plain, groups=None)).tags.count("svg") == 3
    assert Page(write(tmp_path / "b.html", runs=[], groups=None)).tags.count("svg") == 2


def test_the_range_of_an_axis() -> None:
    values = np.array([1.0] * 990 + [2.0] * 9 + [1e9])
    limit, outside = shown_range(values)
    assert limit < 10
    assert outside == 1
    assert shown_range(np.array([1.0, 5.0])) == (5.0, 0)
    assert shown_range(np.array([1.0, np.inf]))[1] == 1
    assert shown_range(np.array([np.inf])) == (10.0, 1)
    assert outside_note(1, 1000, 4.0) == "1 of 1,000 examples lie below -4 and are not shown."


def test_the_table_in_plain_text() -> None:
    text = Table(["model", "loss"], [["one", "1.5"], ["another", "10.25"]]).text()
    assert text.splitlines() == ["model     loss", "one        1.5", "another  10.25"]


def test_groups_of_another_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one name for each of 60 examples, got 2"):
        write(tmp_path / "report.html", groups=["a", "b"])
    assert not (tmp_path / "report.html").exists()


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(ImportError, match=r"sftmix\[plots\]"):
        require_matplotlib()
    with pytest.raises(ImportError, match=r"sftmix\[plots\]"):
        write(tmp_path / "report.html")


def test_importing_it_does_not_need_matplotlib() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; import sftmix.report"
    subprocess.run([sys.executable, "-c", code], check=True)
