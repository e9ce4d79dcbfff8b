"""The page and its pictures: one file, nothing fetched, all text escaped, axes named."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftmix.pairs.partition import Partition, from_scores, split
from sftmix.report import Page as ReportPage
from sftmix.report import Section, Table, require_plots, write_page
from sftmix.report.confidence import (
    change_picture,
    groups_picture,
    histogram_picture,
    map_picture,
    outside_note,
    shown_range,
)
from sftmix.report.curves import TERMS, halves_picture, mean, term_picture
from sftmix.report.drawing import COLOURS, LeftOut, Picture, attempt, subset_colours
from sftmix.report.representations import by_chance, own_neighbours, places_of, places_picture
from sftmix.report.runs import Group, Run
from tests.sftmix.report_runs import Page

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

EVIL = "<script>alert('$x$ & \"y\"')</script>"


def partition(examples: int = 60, infinite: int = 0) -> Partition:
    draws = np.random.default_rng(0).gamma(2.0, 1.0, size=(examples, 5))
    draws[:infinite, 2] = 1e6  # nats per token: exp() overflows
    return from_scores(range(examples), ["h"] * examples, [1] * examples, draws)


def run(name: str, *, mixup: bool = True, paired: bool = True, shift: float = 0.0) -> Run:
    log: list[dict[str, Any]] = [{"step": 0, "train_runtime": 1.0}]
    for step in (10, 20, 30):
        log.append({"step": step, "loss": 3 / step, "ntp_loss": shift + 3 / step})
        log[-1] |= {"entropy": 2 / step, "mean_token_accuracy": 0.5 - 1 / step}
        if paired:
            log[-1] |= {"ntp_loss_confident": 1 / step, "ntp_loss_unconfident": 5 / step}
        if mixup:
            log[-1]["mixup_loss"] = float("nan") if step == 20 else 4 / step
        log.append({"step": step, "eval_loss": shift + 6 / step})
    return Run(Path(name), name, {"method": "ntp", "seed": 0}, {}, {}, log, {}, True)


def group(name: str, *runs: Run) -> Group:
    return Group(name, runs or [run(name)])


def representations(examples: int = 60) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(1).normal(size=(examples, 8)).astype(np.float32)


@functools.cache
def pictures(evil: str = "one") -> list[Picture | LeftOut]:
    rows = [group(evil, run(evil), run(evil, shift=1.0)), group("two", run("two", mixup=False))]
    points = representations()
    return [
        *(attempt(key, term_picture, rows, key) for key in TERMS),
        attempt("halves", halves_picture, rows),
        histogram_picture(partition()),
        map_picture(partition()),
        groups_picture(partition(), [evil, "sum"] * 30),
        change_picture(partition(), {evil: [partition()]}, {evil: COLOURS[0]}),
        places_picture(evil, points, points[:, :2], partition().subset),
    ]


def write(path: Path, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "paragraphs": ["A paragraph."],
        "warnings": ["A warning."],
        "tables": [Table(["model", "loss"], [["one", "1.5"], ["two", "0.25"]], "T", ["A note."])],
        "parts": pictures(),
        "commands": ["python -m sftmix train --data 'a file'"],
        "folded": [Table(["field", "value"], [["mu", "0.2"]], "Recipe")],
    }
    section = Section(changes.pop("title", "A section"), **(arguments | changes))
    write_page(path, ReportPage("A title", ["An introduction."], [section]))
    return path.read_text(encoding="utf-8")


def test_it_is_complete(tmp_path: Path) -> None:
    missing = LeftOut("A part", "there is no such thing")
    page = Page(write(tmp_path / "report.html", parts=[*pictures(), missing]))
    for text in ("A title", "An introduction.", "A section", "A paragraph.", "A warning."):
        assert text in page.texts
    for text in ("A note.", "one", "0.25", "mu", "A part is left out: there is no such thing"):
        assert text in page.texts
    assert "python -m sftmix train --data 'a file'" in page.texts
    assert page.tags.count("svg") == page.tags.count("figcaption") == len(pictures())
    assert len(page.values("aria-label")) == len(pictures()) + 2
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_each_picture_names_its_axes_and_says_what_it_shows() -> None:
    for picture in pictures():
        assert isinstance(picture, Picture)
        texts = [text for text in Page(picture.svg).texts if text]
        axes = [text for text in texts if re.search(r"\(.*\)|^examples$|steps|group of", text)]
        assert len(axes) >= 2, (picture.title, texts)
        assert len(picture.caption.split()) > 15, picture.title
        assert len(picture.alt.split()) > 5, picture.title
        assert picture.title


def test_nothing_is_fetched_and_ids_are_unique(tmp_path: Path) -> None:
    html = write(tmp_path / "report.html")
    page = Page(html)
    links = page.values("src", "href", "xlink:href", "srcset")
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "@import" not in html
    assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)", html))
    ids = page.values("id")
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
        warnings=[EVIL],
        tables=[Table([EVIL], [[EVIL]], EVIL, [EVIL])],
        parts=[*pictures(EVIL), LeftOut(EVIL, EVIL)],
        commands=[EVIL],
        folded=[Table([EVIL], [[EVIL]], EVIL)],
    )
    page = Page(html)
    assert "script" not in page.tags
    assert page.texts.count(EVIL) >= 12


def test_the_same_input_gives_the_same_file(tmp_path: Path) -> None:
    parts = [[map_picture(partition()), histogram_picture(partition())] for _ in range(2)]
    written = [write(tmp_path / f"{i}.html", parts=some) for i, some in enumerate(parts)]
    assert written[0] == written[1]


def test_infinite_confidence_is_counted() -> None:
    some, all_of_them = partition(infinite=3), partition(infinite=60)
    for make in (histogram_picture, map_picture):
        assert re.search(r"[3-9] of 60 examples lie below -", make(some).caption)
        assert "60 of 60 examples lie below -10 and are not shown." in make(all_of_them).caption
    change = change_picture(some, {"one": [all_of_them]}, {"one": COLOURS[0]})
    assert re.search(r"6[3-9] of 120 examples lie below -", change.caption)


def test_equal_confidence_can_be_drawn() -> None:
    certain = from_scores(range(4), ["h"] * 4, [1] * 4, np.zeros((4, 1)))
    assert "All 4 examples are shown." in histogram_picture(certain).caption
    assert "one 0." in change_picture(None, {"one": [certain]}, {"one": COLOURS[0]}).caption


def test_pictures_without_data_say_so() -> None:
    bare = [group("one", run("one", mixup=False, paired=False))]
    for make, arguments in ((term_picture, (bare, "mixup_loss")), (halves_picture, (bare,))):
        missing = attempt("A picture", make, *arguments)
        assert missing == LeftOut("A picture", "no run has logged it")
    with pytest.raises(ValueError, match="no model was scored"):
        change_picture(None, {"one": []}, {})


def test_the_mean_of_seeds() -> None:
    assert mean([([1, 2, 3], [1.0, 2.0, 3.0]), ([2, 3, 4], [4.0, 5.0, 6.0])]) == ([2, 3], [3, 4])
    assert mean([([1], [1.0]), ([2], [4.0])]) == ([1], [1.0])
    alt = term_picture([group("one", run("a"), run("b", shift=1.0))], "ntp_loss").alt
    assert "one ends at 0.6." in alt


def test_the_range_of_an_axis() -> None:
    values = np.array([1.0] * 990 + [2.0] * 9 + [1e9])
    limit, outside = shown_range(values)
    assert limit < 10
    assert outside == 1
    assert shown_range(np.array([1.0, 5.0])) == (5.0, 0)
    assert shown_range(np.array([1.0, np.inf]))[1] == 1
    assert shown_range(np.array([np.inf])) == (10.0, 1)
    assert outside_note(1, 1000, 4.0) == "1 of 1,000 examples lie below -4 and are not shown."


def test_levels_have_colours_in_order() -> None:
    names = split(partition(), "quantiles:12").subset.tolist()
    colours = subset_colours(names)
    assert list(colours) == [f"level {number}" for number in range(1, 13)]
    assert (colours["level 1"], colours["level 12"]) == COLOURS[:2]
    assert len(set(colours.values())) == 12
    texts = Page(histogram_picture(split(partition(), "quantiles:3")).svg).texts
    assert {"level 1", "level 2", "level 3"} <= set(texts)


def test_representations() -> None:
    subset = np.array(["confident", "unconfident"] * 30)
    points = representations()
    assert by_chance(subset) == pytest.approx(29 / 59)
    assert 0.3 < own_neighbours(points, subset) < 0.7
    apart = points + 100 * (subset == "confident")[:, None]
    assert own_neighbours(apart, subset) == 1.0
    places = places_of(apart)
    assert places.shape == (60, 2)
    assert (places == places_of(apart)).all()
    with pytest.raises(ValueError, match="at least 20 examples, there are 19"):
        places_of(points[:19])
    with pytest.raises(ValueError, match="not finite"):
        places_of(points * np.float32(np.inf))


def test_the_table_in_plain_text() -> None:
    text = Table(["model", "loss"], [["one", "1.5"], ["another", "10.25"]]).text()
    assert text.splitlines() == ["model     loss", "one        1.5", "another  10.25"]


def test_groups_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="one name for each of 60 examples, got 2"):
        groups_picture(partition(), ["a", "b"])


@pytest.mark.parametrize(
    ("module", "name"), [("matplotlib", "matplotlib"), ("sklearn", "scikit-learn")]
)
def test_without_a_package(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == module else find(name)
    )
    with pytest.raises(ImportError, match=rf"{name}: pip install {name}"):
        require_plots()
