"""Show examples as the model reads them, and pairs as they would be mixed (`sftmix preview`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import datasets
from transformers import PreTrainedTokenizerBase

from sftmix.commands.train import read_subsets, weight_column, weighted
from sftmix.data.selection import columns_of, parse_selection
from sftmix.data.summary import Reading
from sftmix.data.unused import unused_of
from sftmix.data.weighting import WEIGHT
from sftmix.methods import method_of
from sftmix.pairs.partition import Partition
from sftmix.plan.planned import PlanConfig
from sftmix.recipe.arguments import TrainRunArguments, parse
from sftmix.recipe.first_batch import Pair, first_batch
from sftmix.recipe.loading import (
    load_held_out,
    load_tokenizer,
    read_data,
    refuse_misfits,
    warn_of_overlap,
)
from sftmix.recipe.manifest import kept_date
from sftmix.recipe.preview import Lengths, Screen, summary
from sftmix.report.page import write_page
from sftmix.report.preview import page
from sftmix.runs.failures import Naming, printable
from sftmix.runs.ranks import say
from sftmix.templates.chat import set_template_date
from sftmix.templates.view import View, texts_of, view, without_secrets
from sftmix.training.config import SFTMixConfig, option
from sftmix.training.trainer import make_collator


@dataclasses.dataclass
class PreviewArguments(TrainRunArguments):
    """The arguments of `sftmix train`, of which the output is not needed."""

    output: str = option("", "Not written", "ours")
    number: int = option(3, "Examples to show, the first that training reads; 0: none", "ours")
    html: str | None = option(
        None, "New HTML file to write the same to, with the whole examples", "ours"
    )

    def _check_partition(self) -> None:
        # A recipe may name the partition that scoring will write.
        if self.partition is not None and Path(self.partition).exists():
            super()._check_partition()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.number < 0:
            raise ValueError(f"number: expected at least 0, got {self.number}")
        if self.html is None:
            return
        if not self.html or Path(self.html).is_dir():
            raise ValueError(f"html: expected a file, got the folder {self.html!r}")
        if Path(self.html).exists():
            raise ValueError(f"html: {self.html} exists; delete it or choose another")


ARGUMENTS = (PreviewArguments, PlanConfig)


def main(words: Sequence[str]) -> None:
    """Run the command."""
    preview(*parse(words, PreviewArguments, PlanConfig, "sftmix preview"))


def preview(arguments: PreviewArguments, config: SFTMixConfig) -> None:
    """Print the first examples, what was read, and the pairs of the first batch; write the page.

    Raises:
        ValueError: bad data, a partition of other data, or fewer examples than a batch.
        OSError: the tokenizer or the model's config is not found, or the page cannot be written.
    """
    if arguments.html is not None:
        with Naming("html"):
            Path(arguments.html).parent.mkdir(parents=True, exist_ok=True)
    awaited = arguments.partition
    if awaited is not None and not Path(awaited).exists():
        arguments = dataclasses.replace(arguments, partition=None)
    scored = None if arguments.partition is None else Path(arguments.partition).parent
    tokenizer = load_tokenizer(arguments)
    set_template_date(tokenizer, kept_date(None, scored))
    refuse_misfits(arguments, tokenizer)
    silent = config.disable_tqdm
    held_out, _ = load_held_out(arguments, tokenizer, disable_progress=silent)
    column = weight_column(arguments)
    examples, tokens = read_data(arguments, tokenizer, weight=column, disable_progress=silent)
    warn_of_overlap(tokens, held_out)
    partition, _, _ = read_subsets(arguments, tokens, tokenizer)
    tokens, _ = weighted(arguments, config.method, tokens, partition)
    places = {id: place for place, id in enumerate(examples.ids.tolist())}
    # Copies of a mixture have other ids, and the content of an example.
    hashes = examples.content_hashes if arguments.weights is not None else []
    by_hash = {key: place for place, key in enumerate(hashes)}
    views = [
        view(examples[places[id]], tokenizer, arguments.max_length)
        for id in tokens["id"][: arguments.number]
        if id in places
    ]
    notes = _notes(arguments, examples.reading, views, tokens)
    screen = Screen()
    screen.line(screen.legend)
    for one, text in zip(views, notes, strict=True):
        screen.example(one)
        if text:
            screen.line(f"  {text}")
    lines = summary(examples.reading, len(tokens), Lengths.of(tokens), arguments.max_length)
    screen.summary("data", lines)
    pairs, note = _pairs(config, tokens, partition, awaited, tokenizer)

    def place(row: int) -> str:
        """Return the address and the half or level of an example of the data set."""
        assert partition is not None
        found = tokens[row]
        copied = found["id"] not in places
        address = examples.address(
            by_hash[found["content_hash"]] if copied else places[found["id"]]
        )
        copy = ", a copy" if copied else ""
        return printable(f"{address} ({partition.subset[row]}{copy})")

    screen.pairs(note, pairs, place, arguments.number)
    if arguments.html is not None:
        name = printable(", ".join(arguments.data))
        with Naming("html"):
            made = page(name, views, notes, lines, note, pairs, place)
            write_page(Path(arguments.html), made)
        say(f"wrote {arguments.html}")


def _notes(
    arguments: PreviewArguments,
    reading: Reading,
    views: Sequence[View],
    tokens: datasets.Dataset,
) -> list[str]:
    """Return for each example its weight, if it has one, and what of its row is not used."""
    selections = {text: parse_selection(text) for text in arguments.select or ()}
    chosen = [one.example for one in views]
    column = weight_column(arguments)
    asked = [*columns_of(selections), *([column.name] if column else [])]
    unused = unused_of(chosen, reading, asked, on_bad_row=arguments.on_bad_row)
    weights: dict[int, float] = {}
    if WEIGHT in tokens.column_names:
        first = tokens[: arguments.number]
        weights = dict(zip(first["id"], first[WEIGHT], strict=True))
    notes = []
    for one in chosen:
        parts = [f"weight {weights[one.id]:g}"] if one.id in weights else []
        if names := unused.get(one.id):
            parts.append(f"not used: {printable(', '.join(map(repr, names)))}")
        notes.append("; ".join(parts))
    return notes


def _pairs(
    config: SFTMixConfig,
    tokens: datasets.Dataset,
    partition: Partition | None,
    awaited: str | None,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[Pair], str]:
    """Return the pairs of the first batch, and a sentence about them.

    A partition that is named and not there yet is `awaited`.
    """
    if not method_of(config.method).mixed:
        return [], f"--method {config.method} mixes no pairs."
    if partition is None and awaited is not None:
        return (
            [],
            f"No pairs are shown: --partition {awaited} is not there; `sftmix score` makes it.",
        )
    if partition is None:
        return [], (
            "No pairs are shown: --partition RUN/confidence.parquet of `sftmix score` says which "
            "examples may be paired."
        )
    pairs, (rows, length) = first_batch(
        config,
        tokens,
        partition,
        make_collator(tokenizer, config),
        lambda ids: without_secrets(texts_of(ids, tokenizer)),
    )
    return pairs, (
        f"The first batch of --seed {config.seed} has {len(pairs)} pairs in {rows} rows of "
        f"{length} tokens (--layout {config.layout}). The n-th response tokens of a pair are mixed "
        "in the rows of hidden states that predict them."
    )
