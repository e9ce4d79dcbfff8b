"""Scoring: the perplexity of every response under the model as it stands.

Legend: S examples, C checkpoints of one epoch.

The reference model is trained for one epoch on the data itself, with next-token prediction, and at
C evenly spaced steps, the last at the end, every example is scored in place
(``Conf(Y|X) = -(1/C) sum_c Perp_c(Y|X)``, arXiv 2410.05248).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sftmix.head import HeadAdapter
from sftmix.pairing import PairedCollator
from sftmix_kernels import StreamingPerplexity


def score_examples(
    model: nn.Module,
    head: HeadAdapter,
    examples: Sequence[dict[str, Any]] | datasets.Dataset,
    *,
    collator: PairedCollator,
    perplexity: StreamingPerplexity | None = None,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    max_tokens: int = 8192,
    description: str = "score",
    disable_progress: bool | None = False,
) -> StreamingPerplexity:
    """Add one scoring of all examples, response tokens only, to ``perplexity`` (or a new one).

    The model is in eval mode meanwhile and no gradient is kept. ``max_tokens`` bounds the padded
    tokens of a batch; ``context`` is entered around each forward (autocast).

    Raises:
        ValueError: there is nothing to score, or an example has no response token.
    """
    if len(examples) == 0:
        raise ValueError("examples: expected at least one, got none")
    device = head.head.weight.device
    if perplexity is None:
        perplexity = StreamingPerplexity(len(examples), device)
    lengths = sequence_lengths(examples)
    training = model.training
    model.eval()
    progress = tqdm(
        total=sum(lengths), desc=description, unit="tok", unit_scale=True, disable=disable_progress
    )
    with torch.no_grad(), progress:
        for batch_rows in batches_by_length(lengths, max_tokens):
            batch = collator([examples[row] for row in batch_rows])
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            sample_ids = torch.tensor(batch_rows, device=device)[batch["owner"]]
            with context():
                model(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    use_cache=False,
                    rows=batch["rows"],
                    head_function=_adding(perplexity, batch["targets"], sample_ids, head),
                )
            progress.update(sum(lengths[row] for row in batch_rows))
    model.train(training)
    perplexity.end_checkpoint()
    return perplexity


def _adding(
    perplexity: StreamingPerplexity, targets: Tensor, sample_ids: Tensor, head: HeadAdapter
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    def head_function(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        perplexity.update(hidden, weight, targets, sample_ids, bias=bias, **head.options)
        return hidden.new_zeros(())

    return head_function


def sequence_lengths(examples: Sequence[dict[str, Any]] | datasets.Dataset) -> list[int]:
    """Tokens of each example; of a data set without turning its tokens into Python numbers."""
    if isinstance(examples, datasets.Dataset):
        column = examples.with_format("arrow")[:]["input_ids"]
        lengths: list[int] = pc.list_value_length(column).to_pylist()
        return lengths
    return [len(example["input_ids"]) for example in examples]


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Rows grouped with rows of about their length, so that little is padded; longest first.

    Each batch holds at most ``max_tokens`` tokens with padding, and at least one row.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def scoring_steps(max_steps: int, num_scorings: int) -> list[int]:
    """``num_scorings`` evenly spaced steps of a run, the last at its end.

    Raises:
        ValueError: there are fewer steps than scorings.
    """
    if not 1 <= num_scorings <= max_steps:
        raise ValueError(
            f"num_scorings: expected 1 to {max_steps} (the steps of the epoch), "
            f"got {num_scorings}; ask for fewer, or take a smaller per_device_train_batch_size"
        )
    return [round(max_steps * (c + 1) / num_scorings) for c in range(num_scorings)]


class ScoringCallback(TrainerCallback):
    """Scores the training data at C steps; its sums travel with checkpoints."""

    FILE = "perplexity.safetensors"

    def __init__(
        self, perplexity: StreamingPerplexity, steps: Sequence[int], score: Callable[..., Any]
    ) -> None:
        """``score(perplexity=..., description=...)`` adds one scoring of the whole data set."""
        self.perplexity = perplexity
        self.steps = list(steps)
        self.score = score

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Score where it is time to."""
        if state.global_step in self.steps:
            number = self.steps.index(state.global_step) + 1
            self.score(perplexity=self.perplexity, description=f"score {number}/{len(self.steps)}")

    def save(self, folder: Path) -> None:
        """Put the finished scorings into a checkpoint."""
        state = {name: t.contiguous().cpu() for name, t in self.perplexity.state_dict().items()}
        save_file(state, folder / self.FILE)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint's scorings."""
        self.perplexity.load_state_dict(load_file(folder / self.FILE))
