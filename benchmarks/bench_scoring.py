"""Time scoring a data set with a small model, as `sftmix score` does.

Timed is `ours` beside the bare forward passes of its batches, with logits and without, and the
obvious loop, for losses of examples and for means of batches. Ours and the loop have to agree.
Figures: "Scoring a data set" in RESULTS.md.

Legend: S examples.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from sftmix.conventions import IGNORE_INDEX
from sftmix.demo_data import TRAIN
from sftmix.model.head import HeadAdapter
from sftmix.recipe.arguments import RunArguments
from sftmix.recipe.loading import load_data, load_model, load_tokenizer
from sftmix.toy import build_toy_model
from sftmix.training.scoring import batches_by_length, score_examples, sequence_lengths
from sftmix.training.trainer import make_collator

from .bench_perplexity import require_compiled
from .measure import SuiteError, interleaved_samples
from .records import SCORE, SCORE_BACKBONE, SCORE_FORWARD, SCORE_LOOP, SCORE_MEANS
from .result_file import Results
from .settings import Settings

MAX_LENGTH = 1024
BATCH = 16
AGREE = 1e-4
QUICK_EXAMPLES = 24
# One takes tens of seconds.
REPEATS = 3


class Task(NamedTuple):
    """A model in eval mode and what it is to score."""

    model: Any
    head: HeadAdapter
    examples: Any  # datasets.Dataset
    collator: Callable[[list[Any]], dict[str, Tensor]]
    batches: list[Tensor]  # tokens of the batches that ours scores, collated beforehand
    sizes: dict[str, int]  # tokens count without padding


def make_task(data: Path, number: int, folder: Path, device: str = "cpu") -> Task:
    """Return the toy model in its default size, its tokenizer trained on the same text.

    An example that cannot be read is left out; the first come again where there are too few.
    """
    files = [str(data)]
    build_toy_model(folder, files, max_length=MAX_LENGTH, on_bad_row="skip")
    arguments = RunArguments(str(folder), files, "", max_length=MAX_LENGTH, on_bad_row="skip")
    tokenizer, model = load_tokenizer(arguments), load_model(arguments).eval().to(device)
    examples, _ = load_data(arguments, tokenizer)
    examples = examples.select([place % len(examples) for place in range(number)])
    collator, lengths = make_collator(tokenizer), sequence_lengths(examples)
    most = inspect.signature(score_examples).parameters["max_tokens"].default
    batches = [
        collator([examples[place] for place in some])["input_ids"].to(device)
        for some in batches_by_length(lengths, most)
    ]
    labels = (label for labels in examples["labels"] for label in labels[1:])
    sizes = {
        "examples": len(examples),
        "distinct_examples": len(set(examples["id"])),
        "tokens": sum(lengths),
        "response_tokens": sum(label != IGNORE_INDEX for label in labels),
    }
    return Task(model, HeadAdapter(model), examples, collator, batches, sizes)


def ours(task: Task) -> Tensor:  # (S,) float64: sum of losses
    """Score as `sftmix score` does."""
    scores = score_examples(
        task.model, task.head, task.examples, collator=task.collator, disable_progress=True
    )
    return scores.nll_sum[:, 0]


def obvious_loop(task: Task) -> Tensor:  # (S,) float64: sum of losses
    """Score examples in their order, padded, by the model's logits.

    The model gets no labels: the mean that it would find with them is not asked for.
    """
    sums = []
    for batch in padded_batches(task):
        labels = batch.pop("labels")[:, 1:]
        logits = task.model(**batch).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        sums.append(losses.view(labels.shape).double().sum(-1))
    return torch.cat(sums)


def mean_loop(task: Task) -> list[float]:
    """Run the same batches without losses of examples: the model returns a mean."""
    return [task.model(**batch).loss.item() for batch in padded_batches(task)]


def padded_batches(task: Task) -> Any:
    """Yield what the model takes of each batch, on its device."""
    for batch in DataLoader(task.examples, batch_size=BATCH, collate_fn=task.collator):
        names = ("input_ids", "attention_mask", "labels")
        yield {name: batch[name].to(task.model.device) for name in names}


def forward(module: Callable[..., object], batches: list[Tensor]) -> None:
    """Run the batches; each result is dropped before the next, so that one batch has logits."""
    for tokens in batches:
        module(input_ids=tokens, use_cache=False)


def check(task: Task, device: str = "cpu") -> float:
    """Return the largest relative difference of an example's losses in ours and the obvious loop.

    Raises:
        SuiteError: it is more than `AGREE`, or the extension is not built for the device.
    """
    require_compiled(device)
    expected = obvious_loop(task)
    difference = float(((ours(task) - expected) / expected).abs().max())
    if not difference <= AGREE:
        raise SuiteError(
            f"{SCORE} and the obvious loop differ: losses of an example by {difference:.3g} of "
            f"themselves, over {AGREE:g}"
        )
    return difference


@torch.no_grad()
def measure(settings: Settings, results: Results) -> None:
    """Check that ours and the obvious loop agree, then time all ways in turns."""
    data = settings.data or TRAIN
    examples = min(settings.examples, QUICK_EXAMPLES) if settings.quick else settings.examples
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(data, examples, Path(folder) / "toy", settings.device)
    work = partial(check, task, settings.device)
    difference = results.attempt(f"{SCORE}, scoring", work, ours=True)
    steps: dict[str, Callable[[], object]] = {
        SCORE: partial(ours, task),
        SCORE_FORWARD: partial(forward, task.model, task.batches),
        SCORE_BACKBONE: partial(forward, task.model.base_model, task.batches),
        SCORE_LOOP: partial(obvious_loop, task),
        SCORE_MEANS: partial(mean_loop, task),
    }
    if difference is None:
        del steps[SCORE]
    samples = interleaved_samples(steps, REPEATS, settings.device, says="scoring")
    for who, seconds in samples.items():
        own: dict[str, Any] = {"who": who, "ours": who == SCORE, "data": data.name, **task.sizes}
        if who == SCORE:
            own["difference"] = difference
        results.add_times(seconds, measure="scoring", **own)
