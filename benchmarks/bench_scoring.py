"""Scoring a data set with a small model: ours, the model's forward alone, and the obvious loop."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from sftmix.arguments import RunArguments
from sftmix.data import IGNORED_LABEL
from sftmix.demo_data import TRAIN
from sftmix.head import HeadAdapter
from sftmix.loading import load_data, load_model, load_tokenizer
from sftmix.pairing import PairedCollator
from sftmix.scoring import batches_by_length, score_examples, sequence_lengths
from sftmix.toy import build_toy_model
from sftmix.trainer import make_collator

from .measure import SuiteError, interleaved_seconds
from .perplexity_providers import require_compiled
from .tables import verdicts

OURS = "score_examples"
FORWARD = "forward with logits, same batches"
BACKBONE = "forward without head, same batches"
LOOP = "obvious loop, losses of examples"
MEANS = "obvious loop, mean of a batch"
# Factors of the provider named that ours must stay under.
TARGETS = (("seconds", FORWARD, 1.10), ("seconds", LOOP, 1.0))
MAX_TOKENS: int = inspect.signature(score_examples).parameters["max_tokens"].default
MAX_LENGTH = 1024
BATCH = 16
AGREE = 1e-4


class Task(NamedTuple):
    """A model in eval mode and what it is to score."""

    model: Any
    head: HeadAdapter
    examples: datasets.Dataset
    collator: PairedCollator


def make_task(data: str | None, rows: int, folder: Path) -> Task:
    """The toy model in its default size, its tokenizer trained on the same text.

    A row that cannot be read is left out; the first rows come again where there are too few.
    """
    files = [data or str(TRAIN)]
    build_toy_model(folder, files, max_length=MAX_LENGTH, on_bad_row="skip")
    arguments = RunArguments(str(folder), files, "", max_length=MAX_LENGTH, on_bad_row="skip")
    tokenizer, model = load_tokenizer(arguments), load_model(arguments).eval()
    examples = load_data(arguments, tokenizer)
    examples = examples.select([row % len(examples) for row in range(rows)])
    return Task(model, HeadAdapter(model), examples, make_collator(tokenizer))


def ours(task: Task) -> Tensor:  # (S,) float64: sum of losses
    scores = score_examples(
        task.model, task.head, task.examples, collator=task.collator, disable_progress=True
    )
    return scores.nll_sum[:, 0]


def obvious_loop(task: Task) -> Tensor:  # (S,) float64: sum of losses
    """Rows in their order, padded, and the losses of examples from the model's logits.

    The model gets no labels: the mean that it would find with them is not asked for.
    """
    sums = []
    for batch in padded_batches(task):
        names = ("input_ids", "attention_mask")
        logits = task.model(**{name: batch[name] for name in names}).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        sums.append(losses.view(labels.shape).double().sum(-1))
    return torch.cat(sums)


def mean_loop(task: Task) -> list[float]:
    """The same batches without losses of examples: the loss that the model returns, a mean."""
    names = ("input_ids", "attention_mask", "labels")
    return [
        task.model(**{name: batch[name] for name in names}).loss.item()
        for batch in padded_batches(task)
    ]


def padded_batches(task: Task) -> DataLoader:
    return DataLoader(task.examples, batch_size=BATCH, collate_fn=task.collator)


def batches_of_ours(task: Task) -> list[Tensor]:
    """Tokens of the batches that ours scores, collated beforehand."""
    batches = batches_by_length(sequence_lengths(task.examples), MAX_TOKENS)
    return [task.collator([task.examples[row] for row in rows])["input_ids"] for rows in batches]


def forward(module: Callable[..., object], batches: list[Tensor]) -> None:
    """Each result is dropped before the next: a list of them would hold the logits of all."""
    for tokens in batches:
        module(input_ids=tokens, use_cache=False)


def check(task: Task) -> float:
    """Largest relative difference between an example's losses in ours and in the obvious loop.

    Raises:
        SuiteError: it is more than `AGREE`.
    """
    expected = obvious_loop(task)
    difference = float(((ours(task) - expected) / expected).abs().max())
    if not difference <= AGREE:
        raise SuiteError(
            f"{OURS} and the obvious loop differ: losses of an example by {difference:.3g} of "
            f"themselves, over {AGREE:g}"
        )
    return difference


@torch.no_grad()
def run(data: str | None, rows: int, repeats: int) -> dict[str, object]:
    """Check that ours and the obvious loop agree, measure in turns, print and return the table.

    Raises:
        SuiteError: the extension is not built, or they do not agree.
    """
    require_compiled("cpu")
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(data, rows, Path(folder) / "toy")
    difference, batches = check(task), batches_of_ours(task)
    steps: dict[str, Callable[[], object]] = {
        OURS: lambda: ours(task),
        FORWARD: lambda: forward(task.model, batches),
        BACKBONE: lambda: forward(task.head.backbone, batches),
        LOOP: lambda: obvious_loop(task),
        MEANS: lambda: mean_loop(task),
    }
    seconds = interleaved_seconds(steps, repeats)
    sizes = describe(task, batches)
    print(f"{sizes}, largest relative difference from the obvious loop {difference:.2g}")
    print(f"{'way':36} {'median s':>9} {'quartiles':>15} {'tokens/s':>10}")
    found = {}
    for name, time in seconds.items():
        rate = sizes["tokens"] / time.median
        found[name] = {**time._asdict(), "tokens_per_second": rate}
        quartiles = f"{time.low:.3f}-{time.high:.3f}"
        print(f"{name:36} {time.median:9.3f} {quartiles:>15} {rate:10,.0f}")
    medians = {name: time.median for name, time in seconds.items()}
    reached = verdicts({"seconds": medians}, OURS, TARGETS)
    return {**sizes, "difference": difference, "ways": found, "targets": reached}


def describe(task: Task, batches: list[Tensor]) -> dict[str, int]:
    """Sizes of the data; tokens count without padding."""
    labels = (label for row in task.examples["labels"] for label in row[1:])
    lengths = sequence_lengths(task.examples)
    padded = (lengths[first : first + BATCH] for first in range(0, len(lengths), BATCH))
    return {
        "examples": len(task.examples),
        "distinct_examples": len(set(task.examples["id"])),
        "tokens": sum(lengths),
        "response_tokens": sum(label != IGNORED_LABEL for label in labels),
        "vocab_size": task.head.head.weight.shape[0],
        "batches_of_ours": len(batches),
        "slots_of_the_loop": sum(len(rows) * max(rows) for rows in padded),
    }
