"""Writes the demo data: instructions whose answers range from fixed to open.

python -m tools.demo_data.generate           writes the bundled files anew
python -m tools.demo_data.generate --check   says whether they are what this program writes

"easy" answers follow from the instruction, or from a few facts that the training rows repeat;
"medium" ones need a small computation; "hard" ones cannot be known: one of very many wordings,
products too large for a small model, or codes drawn at random. No instruction occurs twice in the
two files together.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from sftmix.demo_data import HELD_OUT, TRAIN
from tools.demo_data.words import (
    ANIMALS,
    COLOURS,
    DAYS,
    FACT_QUESTIONS,
    FACTS,
    FREE_FORM,
    LEADS,
    MONTHS,
    NOUNS,
    NUMBERS,
    OPPOSITES,
    SLOTS,
    TOWNS,
)

SEED = 20241005
TRAIN_ROWS = 2600
HELD_OUT_ROWS = 520

Pair = tuple[str, str]
Row = dict[str, str]
T = TypeVar("T")

_SLOT = re.compile(r"\{([a-z]+)(\d*)\}")
_CODE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


class Draw:
    """Random choices that are the same in every version of Python.

    Only `random.Random.random` is promised to stay as it is, so all choices are made from it.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def below(self, n: int) -> int:
        """An integer from 0 to n - 1."""
        return int(self._random.random() * n)

    def between(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + self.below(high - low + 1)

    def one(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def several(self, items: Sequence[T], n: int) -> list[T]:
        """n different items in random order."""
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(n)]


def _things(draw: Draw, low: int, high: int) -> list[str]:
    return draw.several((*NOUNS, *ANIMALS, *COLOURS), draw.between(low, high))


def _copy(draw: Draw) -> Pair:
    words = f"{draw.one(COLOURS)} {draw.one(ANIMALS)}"
    ask = draw.one(("Repeat this:", "Say this back to me:", "Copy these words:", "Echo:"))
    return f"{draw.one(LEADS)}{ask} {words}", f"You said: {words}."


def _upper(draw: Draw) -> Pair:
    word = draw.one((*COLOURS, *ANIMALS))
    ask = draw.one(("Write in capital letters:", "Put this in upper case:", "Capitalise fully:"))
    return f"{draw.one(LEADS)}{ask} {word}", f"In capital letters: {word.upper()}"


def _count(draw: Draw) -> Pair:
    words = _things(draw, 2, 7)
    ask = draw.one(("How many words are these:", "Count the words:", "What is the word count of:"))
    return f"{ask} {' '.join(words)}", f"There are {NUMBERS[len(words)]} words."


def _last_word(draw: Draw) -> Pair:
    words = _things(draw, 3, 6)
    which, word = draw.one((("first", words[0]), ("last", words[-1])))
    ask = draw.one(("What is the {} word of:", "Give the {} word of:", "Name the {} word in:"))
    return f"{ask.format(which)} {' '.join(words)}", f"The {which} word is {word}."


def _opposite(draw: Draw) -> Pair:
    word, other = draw.several(draw.one(OPPOSITES), 2)
    asks = ("What is the opposite of {}?", "Name the opposite of {}.", "Which word means not {}?")
    return draw.one(LEADS) + draw.one(asks).format(word), f"The opposite of {word} is {other}."


def _calendar(draw: Draw) -> Pair:
    unit, names = draw.one((("day", DAYS), ("month", MONTHS)))
    step, word = draw.one(((1, "after"), (-1, "before")))
    place = draw.below(len(names))
    name, other = names[place], names[(place + step) % len(names)]
    asks = (f"Which {unit} comes {word} {name}?", f"What {unit} is {word} {name}?",
            f"Name the {unit} {word} {name}.")  # fmt: skip
    return draw.one(LEADS) + draw.one(asks), f"The {unit} {word} {name} is {other}."


def _fact(draw: Draw) -> Pair:
    town = draw.one(list(TOWNS))
    place = draw.below(len(FACTS))
    topic, answer = FACTS[place]
    question = draw.one(FACT_QUESTIONS[topic]).format(town=town)
    return draw.one(LEADS) + question, answer.format(town=town, value=TOWNS[town][place])


def _sum(draw: Draw) -> Pair:
    a, b = draw.between(10, 99), draw.between(10, 99)
    if draw.below(2):
        ask = draw.one(("What is {} plus {}?", "Add {} and {}.", "Work out {} + {}."))
        return ask.format(a, b), f"{a} plus {b} is {a + b}."
    a, b = max(a, b), min(a, b)
    ask = draw.one(("What is {} minus {}?", "From {} take {}.", "Work out {} - {}."))
    return ask.format(a, b), f"{a} minus {b} is {a - b}."


def _compare(draw: Draw) -> Pair:
    a, b = draw.several(range(10, 100), 2)
    which, value = draw.one((("larger", max(a, b)), ("smaller", min(a, b))))
    ask = draw.one(("Which is {}, {} or {}?", "Name the {} number: {} or {}.")).format(which, a, b)
    return ask, f"{value} is {which}."


def _sort(draw: Draw) -> Pair:
    words = _things(draw, 3, 5)
    ask = draw.one(("Sort these words from A to Z:", "Put in alphabetical order:", "Sort:"))
    return f"{ask} {', '.join(words)}", ", ".join(sorted(words))


def _reverse(draw: Draw) -> Pair:
    words = _things(draw, 3, 5)
    ask = draw.one(("Reverse this list:", "Say these words backwards:", "Turn the order around:"))
    return f"{ask} {', '.join(words)}", ", ".join(reversed(words))


def _series(draw: Draw) -> Pair:
    start, step, n = draw.between(1, 40), draw.between(2, 6), draw.between(4, 6)
    numbers = ", ".join(str(start + step * i) for i in range(n))
    asks = (f"Count up from {start} in steps of {step}, {n} numbers.",
            f"List {n} numbers that begin with {start} and grow by {step}.")  # fmt: skip
    return draw.one(asks), numbers


def _product(draw: Draw) -> Pair:
    a, b = draw.between(1234, 98765), draw.between(123, 9876)
    ask = draw.one(("What is {} times {}?", "Multiply {} by {}.", "Work out {} x {}."))
    answer = draw.one(("{} times {} is {}.", "If you multiply {} by {}, you get {}."))
    return ask.format(a, b), answer.format(a, b, a * b)


def _code(draw: Draw) -> Pair:
    locker, town = draw.between(100, 999), draw.one(list(TOWNS))
    left, right = ("".join(draw.several(_CODE_LETTERS, 3)) for _ in range(2))
    code = f"{left}-{draw.between(1000, 9999)}-{right}"
    asks = ("What is the code of locker {} in {}?", "Give me the code for locker {} in {}.",
            "Which code opens locker {} in {}?")  # fmt: skip
    answers = ("The code is {}; please keep it safe.", "Locker {1} in {2} opens with {0}.",
               "You need {}.", "It was changed, and is now {}.")  # fmt: skip
    return draw.one(asks).format(locker, town), draw.one(answers).format(code, locker, town)


def _fill(draw: Draw, text: str, bound: dict[str, str], used: dict[str, list[str]]) -> str:
    """Replace the slots of `text`.

    `bound` holds the slots filled so far, `used` what was drawn for each kind; both get the new.
    """

    def value(match: re.Match[str]) -> str:
        slot, kind = match[0], match[1]
        if slot not in bound:
            taken = used.setdefault(kind, [])
            taken.append(draw.one([item for item in SLOTS[kind] if item not in taken]))
            # A slot inside a drawn phrase is filled now, so that the phrase stays the same.
            bound[slot] = _fill(draw, taken[-1], bound, used)
        return bound[slot]

    return _SLOT.sub(value, text)


def _free_form(kind: str) -> Callable[[Draw], Pair]:
    asks, answers = FREE_FORM[kind]

    def pair(draw: Draw) -> Pair:
        bound: dict[str, str] = {}
        used: dict[str, list[str]] = {}
        instruction = _fill(draw, draw.one(asks), bound, used)
        text = _fill(draw, draw.one(answers), bound, used)
        text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
        text = re.sub(r"(?:^|(?<=[.:!?] ))[a-z]", lambda match: match[0].upper(), text)
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", instruction), text

    return pair


# kind, difficulty, share of the rows, and how a pair is made.
KINDS: tuple[tuple[str, str, int, Callable[[Draw], Pair]], ...] = (
    ("copy", "easy", 8, _copy),
    ("upper", "easy", 4, _upper),
    ("count", "easy", 6, _count),
    ("word", "easy", 6, _last_word),
    ("opposite", "easy", 6, _opposite),
    ("calendar", "easy", 5, _calendar),
    ("fact", "easy", 7, _fact),
    ("sum", "medium", 7, _sum),
    ("compare", "medium", 4, _compare),
    ("sort", "medium", 5, _sort),
    ("reverse", "medium", 5, _reverse),
    ("series", "medium", 5, _series),
    ("product", "hard", 4, _product),
    ("code", "hard", 4, _code),
    ("story", "hard", 7, _free_form("story")),
    ("opinion", "hard", 6, _free_form("opinion")),
    ("advice", "hard", 6, _free_form("advice")),
    ("description", "hard", 5, _free_form("description")),
)


def generate(seed: int = SEED) -> tuple[list[Row], list[Row]]:
    """The training and the held-out rows, each in random order.

    The held-out rows are drawn from the same kinds; no instruction occurs twice in both together.
    """
    draw = Draw(seed)
    seen: set[str] = set()
    train: list[Row] = []
    held_out: list[Row] = []
    for kind, difficulty, share, make in KINDS:
        rows: list[Row] = []
        while len(rows) < (TRAIN_ROWS + HELD_OUT_ROWS) * share // 100:
            instruction, output = make(draw)
            if instruction not in seen:
                seen.add(instruction)
                row = {"instruction": instruction, "output": output}
                rows.append({**row, "kind": kind, "difficulty": difficulty})
        held = HELD_OUT_ROWS * share // 100
        held_out += rows[:held]
        train += rows[held:]
    return draw.several(train, len(train)), draw.several(held_out, len(held_out))


def _jsonl(rows: Sequence[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode("ascii")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the bundled files, or with --check compare them; exits with status 1 if they differ."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo_data.generate")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args(arguments).check
    rows_of: dict[Path, list[Row]] = dict(zip((TRAIN, HELD_OUT), generate(), strict=True))
    for path, rows in rows_of.items():
        data = _jsonl(rows)
        if not check:
            path.write_bytes(data)
        elif not path.is_file() or path.read_bytes() != data:
            raise SystemExit(f"{path} is not what this program writes")
        print(f"{path}: {len(rows)} rows, {len(data):,} bytes")


if __name__ == "__main__":
    main()
