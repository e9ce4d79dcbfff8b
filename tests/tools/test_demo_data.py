"""The bundled data: what the generator writes, right where an answer is determined, and varied."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from sftmix.data.examples import load_examples
from sftmix.demo_data import HELD_OUT, TRAIN
from tools.demo_data import generate
from tools.demo_data.words import NUMBERS

Row = dict[str, str]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    lines = [path.read_text(encoding="utf-8").splitlines() for path in (TRAIN, HELD_OUT)]
    return [json.loads(line) for part in lines for line in part]


def _kind(rows: list[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def test_the_files_are_what_the_generator_writes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    generate.main(["--check"])
    assert "train.jsonl" in capsys.readouterr().out
    changed = tmp_path / "held_out.jsonl"
    changed.write_bytes(HELD_OUT.read_bytes()[:-1])
    monkeypatch.setattr(generate, "HELD_OUT", changed)
    with pytest.raises(SystemExit, match=r"held_out\.jsonl is not what"):
        generate.main(["--check"])
    generate_again = generate.generate()
    assert generate_again == generate.generate()
    assert generate_again != generate.generate(seed=1)


def test_sizes_and_no_overlap(rows: list[Row]) -> None:
    train, held_out = (load_examples([path]) for path in (TRAIN, HELD_OUT))
    assert len(train) >= 2400
    assert len(held_out) >= 400
    assert len({row["instruction"] for row in rows}) == len(train) + len(held_out)
    assert not {e.content_hash for e in train} & {e.content_hash for e in held_out}
    assert TRAIN.stat().st_size + HELD_OUT.stat().st_size < 1_500_000
    for path in (TRAIN, HELD_OUT):
        part = [json.loads(line) for line in path.read_text().splitlines()]
        shares = Counter(row["difficulty"] for row in part)
        assert set(shares) == {"easy", "medium", "hard"}
        assert min(shares.values()) > len(part) / 5
        assert {row["kind"] for row in part} == {row["kind"] for row in rows}


def test_every_slot_is_filled_and_sentences_begin_well(rows: list[Row]) -> None:
    for row in rows:
        text = row["instruction"] + " " + row["output"]
        assert not re.search(r"[{}]|  |\ba [aeiou]|\ban [^aeiou]", text), text
        if row["kind"] in ("story", "opinion", "advice", "description"):
            assert not re.search(r"[.!?:] [a-z]|^[a-z]", row["output"]), row["output"]
            assert 10 <= len(row["output"].split()) <= 60, row["output"]


def test_no_phrase_is_drawn_twice(rows: list[Row]) -> None:
    for row in _kind(rows, "description"):
        sights = re.findall(r"rows of \w+ boats|a door painted|smoke above", row["output"])
        assert len({sight.split()[0] for sight in sights}) == len(sights), row["output"]


def test_answers_that_are_determined_are_right(rows: list[Row]) -> None:
    for row in _kind(rows, "sum"):
        a, sign, b, result = re.fullmatch(r"(\d+) (\w+) (\d+) is (\d+)\.", row["output"]).groups()  # type: ignore[union-attr]
        assert int(result) == (int(a) + int(b) if sign == "plus" else int(a) - int(b))
        assert {a, b} == set(re.findall(r"\d+", row["instruction"]))
    for row in _kind(rows, "product"):
        numbers = [int(n) for n in re.findall(r"\d+", row["output"])]
        assert numbers[0] * numbers[1] == numbers[2]
    for row in _kind(rows, "copy"):
        assert row["output"] == f"You said: {row['instruction'].split(': ')[-1]}."
    for row in _kind(rows, "upper"):
        word = row["instruction"].split(": ")[-1]
        assert row["output"] == f"In capital letters: {word.upper()}"
    for row in _kind(rows, "count"):
        words = row["instruction"].split(": ")[1].split()
        assert row["output"] == f"There are {NUMBERS[len(words)]} words."
    for kind in ("sort", "reverse"):
        for row in _kind(rows, kind):
            words = row["instruction"].split(": ")[1].split(", ")
            expected = sorted(words) if kind == "sort" else words[::-1]
            assert row["output"].split(", ") == expected


def test_facts_agree_and_codes_do_not(rows: list[Row]) -> None:
    facts = Counter(row["output"] for row in _kind(rows, "fact"))
    assert len(facts) == 32
    assert min(facts.values()) >= 2
    codes = re.findall(
        r"[A-Z]{3}-\d{4}-[A-Z]{3}", " ".join(r["output"] for r in _kind(rows, "code"))
    )
    assert len(set(codes)) == len(_kind(rows, "code"))
    stories = {row["output"] for row in _kind(rows, "story")}
    assert len(stories) == len(_kind(rows, "story"))
