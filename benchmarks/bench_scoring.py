"""Scoring a data set with a small model: ours, the model's forward alone, and the obvious loop.

Legend: S examples.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from .group import Group
from .measure import SuiteError, interleaved_samples
from .perplexity_providers import require_compiled
from .settings import Settings

OURS = "score_examples"
FORWARD = "forward with logits, same batches"
BACKBONE = "forward without head, same batches"
LOOP = "obvious loop, losses of examples"
MEANS = "obvious loop, mean of a batch"
WAYS = (OURS, FORWARD, BACKBONE, LOOP, MEANS)
MAX_LENGTH = 1024
BATCH = 16
AGREE = 1e-4
QUICK_EXAMPLES = 24
# One takes tens of seconds.
REPEATS = 3


class Task(NamedTuple):
    """A model in eval mode and what it is to score."""

    model: Any
    head: Any  # sftmix.model.head.HeadAdapter
    examples: Any  # datasets.Dataset
    collator: Callable[[list[Any]], dict[str, Tensor]]
    batches: list[Tensor]  # tokens of the batches that ours scores, collated beforehand
    sizes: dict[str, int]  # tokens count without padding


def make_task(data: Path, rows: int, folder: Path, device: str = "cpu") -> Task:
    """The toy model in its default size, its tokenizer trained on the same text.

    A row that cannot be read is left out; the first rows come again where there are too few.
    """
    # Not at the top, here and in `ours`: the package needs what the other suites do without.
    from sftmix.conventions import IGNORE_INDEX
    from sftmix.model.head import HeadAdapter
    from sftmix.recipe.arguments import RunArguments
    from sftmix.recipe.loading import load_data, load_model, load_tokenizer
    from sftmix.toy import build_toy_model
    from sftmix.training.scoring import batches_by_length, score_examples, sequence_lengths
    from sftmix.training.trainer import make_collator

    files = [str(data)]
    build_toy_model(folder, files, max_length=MAX_LENGTH, on_bad_row="skip")
    arguments = RunArguments(str(folder), files, "", max_length=MAX_LENGTH, on_bad_row="skip")
    tokenizer, model = load_tokenizer(arguments), load_model(arguments).eval().to(device)
    examples = load_data(arguments, tokenizer)
    examples = examples.select([row % len(examples) for row in range(rows)])
    collator, lengths = make_collator(tokenizer), sequence_lengths(examples)
    most = inspect.signature(score_examples).parameters["max_tokens"].default
    batches = [
        collator([examples[row] for row in some])["input_ids"].to(device)
        for some in batches_by_length(lengths, most)
    ]
    labels = (label for row in examples["labels"] for label in row[1:])
    sizes = {
        "examples": len(examples),
        "distinct_examples": len(set(examples["id"])),
        "tokens": sum(lengths),
        "response_tokens": sum(label != IGNORE_INDEX for label in labels),
    }
    return Task(model, HeadAdapter(model), examples, collator, batches, sizes)


def ours(task: Task) -> Tensor:  # (S,) float64: sum of losses
    from sftmix.training.scoring import score_examples

    scores = score_examples(
        task.model, task.head, task.examples, collator=task.collator, disable_progress=True
    )
    return scores.nll_sum[:, 0]


def obvious_loop(task: Task) -> Tensor:  # (S,) float64: sum of losses
    """Rows in their order, padded, and the losses of examples from the model's logits.

    The model gets no labels: the mean that it would find with them is not asked for.
    """
    sums = []
    for batch in padded_batches(task, "input_ids", "attention_mask", "labels"):
        labels = batch.pop("labels")[:, 1:]
        logits = task.model(**batch).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        sums.append(losses.view(labels.shape).double().sum(-1))
    return torch.cat(sums)


def mean_loop(task: Task) -> list[float]:
    """The same batches without losses of examples: the loss that the model returns, a mean."""
    batches = padded_batches(task, "input_ids", "attention_mask", "labels")
    return [task.model(**batch).loss.item() for batch in batches]


def padded_batches(task: Task, *names: str) -> Any:
    """Some tensors of each batch, on the model's device."""
    for batch in DataLoader(task.examples, batch_size=BATCH, collate_fn=task.collator):
        yield {name: batch[name].to(task.model.device) for name in names}


def forward(module: Callable[..., object], batches: list[Tensor]) -> None:
    """Each result is dropped before the next: a list of them would hold the logits of all."""
    for tokens in batches:
        module(input_ids=tokens, use_cache=False)


def check(task: Task, device: str = "cpu") -> float:
    """Largest relative difference between an example's losses in ours and in the obvious loop.

    Raises:
        SuiteError: it is more than `AGREE`, or the extension is not built for the device.
    """
    require_compiled(device)
    expected = obvious_loop(task)
    difference = float(((ours(task) - expected) / expected).abs().max())
    if not difference <= AGREE:
        raise SuiteError(
            f"{OURS} and the obvious loop differ: losses of an example by {difference:.3g} of "
            f"themselves, over {AGREE:g}"
        )
    return difference


@torch.no_grad()
def measure_ways(task: Task, data: str, settings: Settings) -> Group:
    """Check that ours and the obvious loop agree, then measure all in turns."""
    group = Group()
    difference = group.attempt(OURS, partial(check, task, settings.device), ours=True)
    steps: dict[str, Callable[[], object]] = {
        FORWARD: lambda: forward(task.model, task.batches),
        BACKBONE: lambda: forward(task.model.base_model, task.batches),
        LOOP: lambda: obvious_loop(task),
        MEANS: lambda: mean_loop(task),
    }
    if difference is not None:
        steps = {OURS: lambda: ours(task), **steps}
    samples = interleaved_samples(steps, REPEATS, settings.device, says="scoring")
    for who, seconds in samples.items():
        is_ours = who == OURS
        own = {"difference": difference} if is_ours else {}
        group.add(
            who, seconds, measure="scoring", who=who, ours=is_ours, data=data, **task.sizes, **own
        )
    return group


def measure_scoring(settings: Settings) -> Group:
    """All ways to score what the settings name."""
    # Not at the top: a module that is skipped as a whole gets no line in the result file.
    pytest.importorskip("datasets", exc_type=ImportError)
    from sftmix.demo_data import TRAIN

    data = Path(settings.data or TRAIN)
    rows = min(settings.examples, QUICK_EXAMPLES) if settings.quick else settings.examples
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(data, rows, Path(folder) / "toy", settings.device)
    return measure_ways(task, data.name, settings)


@pytest.fixture(scope="module")
def ways(settings: Settings) -> Group:
    """All of them, measured at once."""
    if settings.out_of_time:
        pytest.skip(f"out of time: {settings.seconds} s are over")
    return measure_scoring(settings)


@pytest.mark.parametrize("who", WAYS)
def test_scoring(who: str, ways: Group, request: pytest.FixtureRequest) -> None:
    ways.write(who, f"{who}, scoring", request)
