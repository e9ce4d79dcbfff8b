"""Draw the data of a run: three parts, of which no two share an example.

base: the base model is trained on it. train: it is scored, split and tuned on. held out: it is only
measured on. GSM8K has a test file of its own; of Alpaca the examples whose content hash is in the
lowest eighth are held out, so that no seed trains on an example that another one measures on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np

from sftmix import demo_data
from sftmix.data.examples import Example, load_examples
from sftmix.templates.tokenizing import tokenize_examples

from .settings import Sizes

Examples: TypeAlias = Sequence[Example]
HELD_OUT_SHARE = 8
# The share of examples to draw besides those needed: some prompts fill all of `max_length`.
SPARE = 0.1


@dataclass(frozen=True)
class Source:
    """A data set, parted into what may be trained on and what may not."""

    name: str
    pool: Examples
    held_out: Examples


@dataclass(frozen=True)
class Parts:
    """One seed's draw of a source."""

    base: Examples
    train: Examples
    held_out: Examples


def gsm8k(train: Path, test: Path) -> Source:
    """Return GSM8K from its two files."""
    pool, held_out = (
        load_examples([file], on_bad_row="skip", disable_progress=True) for file in (train, test)
    )
    return Source("gsm8k", pool, held_out)


def alpaca(file: Path) -> Source:
    """Return Alpaca or a sample of it, held-out examples by their content hash."""
    parts: dict[bool, list[Example]] = {False: [], True: []}
    for example in load_examples([file], on_bad_row="skip", disable_progress=True):
        # Equal contents are treated alike.
        parts[int(example.content_hash, 16) * HELD_OUT_SHARE < 2**256].append(example)
    return Source("alpaca", parts[False], parts[True])


def demo() -> Source:
    """Return the bundled data, for quick runs."""
    return Source(
        "demo",
        load_examples([demo_data.TRAIN], disable_progress=True),
        load_examples([demo_data.HELD_OUT], disable_progress=True),
    )


def draw(source: Source, seed: int, sizes: Sizes, *, search: bool = False) -> Parts:
    """Return a seed's parts, with some examples to spare.

    ``search``: held-out examples come from the pool too, so that the choice of a learning rate has
    seen nothing that the study measures on.

    Raises:
        ValueError: the source has too few examples.
    """
    random = np.random.Generator(np.random.Philox(key=seed))
    base, train, held_out = (
        number + int(number * SPARE)
        for number in (sizes.base_examples, sizes.train_examples, sizes.held_out_examples)
    )
    order, out = (random.permutation(len(part)) for part in (source.pool, source.held_out))
    needed = base + train + (held_out if search else 0)
    for name, wanted, found in (
        ("training", needed, len(order)),
        ("held-out", held_out, len(out)),
    ):
        if found < wanted:
            raise ValueError(f"{source.name}: expected {wanted} {name} examples, got {found}")
    pool = [source.pool[place] for place in order[:needed]]
    measured = [source.held_out[place] for place in out[:held_out]]
    return Parts(
        pool[:base],
        pool[base : base + train],
        pool[base + train :] if search else measured,
    )


def as_tokens(examples: Examples, tokenizer: Any, number: int, sizes: Sizes) -> datasets.Dataset:
    """Return the first ``number`` examples that have a response token within ``max_length``.

    Raises:
        ValueError: there are fewer.
    """
    dataset = tokenize_examples(
        examples,
        tokenizer,
        max_length=sizes.max_length,
        on_bad_row="skip",
        disable_progress=True,
    )
    if len(dataset) < number:
        raise ValueError(
            f"max_length: expected {number} of {len(examples)} examples to have a response token "
            f"within {sizes.max_length}, got {len(dataset)}"
        )
    return dataset.select(range(number))


def write_messages(path: Path, examples: Examples) -> None:
    """Write conversations as JSON lines, for what reads files."""
    rows = [json.dumps({"messages": example.messages}) + "\n" for example in examples]
    path.write_text("".join(rows), encoding="utf-8")
