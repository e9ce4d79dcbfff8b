"""Time scoring a data set as `sftmix score` does, with a toy model and with `--model`.

Timed is `ours` beside bare forward passes, which take their batches from memory: of the same
batches and of batches of equal length, with logits. What is promised is ours by the faster one.
Beside them, for the toy, stand the same batches without logits and the obvious loop, for losses of
examples and for means of batches. Ours and the loop have to agree. Figures: "Scoring a data set" in
RESULTS.md.

python -m benchmarks run perplexity -k scoring --data alpaca.json --examples 2000 \\
    --model runs/smollm2 --out runs/bench

Legend: S examples.
"""

from __future__ import annotations

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
from sftmix.training.scoring import (
    MOST_PADDING,
    batches_by_length,
    most_tokens,
    score_examples,
    sequence_lengths,
)
from sftmix.training.trainer import make_collator

from .bench_perplexity import require_compiled
from .measure import SuiteError, interleaved_samples
from .records import (
    SCORE,
    SCORE_BACKBONE,
    SCORE_EQUAL,
    SCORE_FORWARD,
    SCORE_LOOP,
    SCORE_MEANS,
    by_best_forward,
)
from .result_file import Results
from .settings import Settings
from .tables import number

MAX_LENGTH = 1024
BATCH = 16
AGREE = 1e-4
QUICK_EXAMPLES = 24
# Those of `--model`, of which one takes a hundred times the toy's time.
MODEL_EXAMPLES = 240
# One takes tens of seconds.
REPEATS = 3


class Task(NamedTuple):
    """A model in eval mode and what it is to score."""

    model: Any
    head: HeadAdapter
    examples: Any  # datasets.Dataset
    collator: Callable[[list[Any]], dict[str, Tensor]]
    batches: list[Tensor]  # tokens of the batches that ours scores, collated beforehand
    equal: list[Tensor]  # tokens of batches of equal length
    sizes: dict[str, Any]  # tokens count without padding


def make_task(model_folder: Path, data: Path, count: int, device: str = "cpu") -> Task:
    """Return a model with examples of the data.

    An example that cannot be read is left out; the first come again where there are too few.
    """
    files = [str(data)]
    arguments = RunArguments(str(model_folder), files, "", max_length=MAX_LENGTH, on_bad_row="skip")
    tokenizer, model = load_tokenizer(arguments), load_model(arguments).eval().to(device)
    examples, _ = load_data(arguments, tokenizer)
    examples = examples.select([place % len(examples) for place in range(count)])
    collator, lengths = make_collator(tokenizer), sequence_lengths(examples)
    batches, equal = (
        [
            collator([examples[place] for place in some])["input_ids"].to(device)
            for some in batches_by_length(lengths, most_tokens(torch.device(device)), padding=share)
        ]
        for share in (MOST_PADDING, 0.0)
    )
    labels = (label for labels in examples["labels"] for label in labels[1:])
    sizes = {
        "case": f"{model_folder.name}, {len(examples)} examples",
        "examples": len(examples),
        "distinct_examples": len(set(examples["id"])),
        "tokens": sum(lengths),
        "response_tokens": sum(label != IGNORE_INDEX for label in labels),
        "batches": len(batches),
        "padding": 1 - sum(lengths) / sum(batch.numel() for batch in batches),
    }
    return Task(model, HeadAdapter(model), examples, collator, batches, equal, sizes)


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


def measure(settings: Settings, results: Results) -> None:
    """Score with the toy in its default size, its tokenizer trained on the data, and `--model`."""
    data = settings.data or TRAIN
    with tempfile.TemporaryDirectory() as folder:
        toy = Path(folder) / "toy"
        build_toy_model(toy, [str(data)], max_length=MAX_LENGTH, on_bad_row="skip")
        measure_model(toy, data, settings.examples, settings, results)
    if settings.model is not None:
        measure_model(settings.model, data, MODEL_EXAMPLES, settings, results)


@torch.no_grad()
def measure_model(
    model: Path, data: Path, examples: int, settings: Settings, results: Results
) -> None:
    """Check that ours and the obvious loop agree, then time all ways in turns."""
    most = QUICK_EXAMPLES if settings.quick else examples
    task = make_task(model, data, min(examples, most), settings.device)
    work = partial(check, task, settings.device)
    difference = results.attempt(f"{SCORE}, {model.name}", work, ours=True)
    steps: dict[str, Callable[[], object]] = {
        SCORE: partial(ours, task),
        SCORE_FORWARD: partial(forward, task.model, task.batches),
        SCORE_EQUAL: partial(forward, task.model, task.equal),
    }
    if model != settings.model:
        steps |= {
            SCORE_BACKBONE: partial(forward, task.model.base_model, task.batches),
            SCORE_LOOP: partial(obvious_loop, task),
            SCORE_MEANS: partial(mean_loop, task),
        }
    if difference is None:
        del steps[SCORE]
    # The check has run the model over all examples: a further round without times shows no more.
    samples = interleaved_samples(
        steps, REPEATS, settings.device, says=f"scoring, {model.name}", warm=difference is not None
    )
    for who, seconds in samples.items():
        own: dict[str, Any] = {"who": who, "ours": who == SCORE, "data": data.name, **task.sizes}
        if who == SCORE:
            own["difference"] = difference
        results.add_times(seconds, measure="scoring", **own)
    case, batches, padding = (task.sizes[name] for name in ("case", "batches", "padding"))
    says = number(by_best_forward(results.report, case))
    print(f"{case}: {SCORE} / best forward {says}, {batches} batches, padding {padding:.1%}")
