"""Scoring: the perplexity of every response under the model as it stands.

Legend: S examples, C checkpoints of one epoch, T tokens of one sequence.

The reference model is trained for one epoch on the data itself, with next-token prediction, and at
C evenly spaced steps, the last at the end, every example is scored in place
(``Conf(Y|X) = -(1/C) sum_c Perp_c(Y|X)``, arXiv 2410.05248).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sftmix.model.head import HeadAdapter
from sftmix.model.layout_check import ignores_padding
from sftmix.model.probe import evaluating
from sftmix.pairs.collator import PairedCollator
from sftmix.pairs.sampling import filler
from sftmix.runs import interrupts
from sftmix.runs.checkpoints import PREFIX, writing
from sftmix.runs.folders import atomic_write
from sftmix.runs.ranks import gathered, is_main, num_ranks, rank, summed
from sftmix.training.token_sums import TokenSums
from sftmix_kernels import StreamingPerplexity

# Between two savings of a scoring's progress: what a killed run has to score again. A saving waits
# for the device and for the disk.
SAVE_SECONDS = 30.0
# Batches collated at a time: a few megabytes.
AHEAD = 32
# The most that padding takes of a batch's tokens, where it is exact.
MOST_PADDING = 0.12
# Seconds between two lines of progress that no terminal overwrites.
LINE_SECONDS = 60.0
# Of `StreamingPerplexity.state_dict`: what ranks have parts of.
OPEN_SUMS = ("open_nll_sum", "open_num_tokens", "open_outside")


def score_examples(
    model: nn.Module,
    head: HeadAdapter,
    examples: Sequence[dict[str, Any]] | datasets.Dataset,
    *,
    collator: PairedCollator,
    perplexity: StreamingPerplexity | None = None,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    max_tokens: int | None = None,
    description: str = "score",
    disable_progress: bool | None = False,
    save: Callable[[], object] | None = None,
    shared: bool = False,
    watched: TokenSums | None = None,
) -> StreamingPerplexity:
    """Add one scoring of all examples, response tokens only, to ``perplexity`` (or a new one).

    The model is in eval mode meanwhile and no gradient is kept. Where `ignores_padding` finds that
    padding is exact, examples of about equal length share a batch, padded on the right and without
    a mask; elsewhere only those of equal length. An example reads neither padding nor another: it
    gets what it would get by itself, up to the rounding of products with another number of rows.

    Args:
        perplexity: sums to add to. Where they hold a scoring that was broken off, only the examples
            that they have no token of are scored.
        context: is entered around all batches (autocast, which then casts a weight once).
        max_tokens: the most tokens of a batch, padding too; `most_tokens` by default.
        description: what the progress bar says before tokens done, all tokens and the time left.
        save: is called between two batches, every `SAVE_SECONDS`. A signal ends the scoring after
            a batch, saved.
        shared: all ranks call this and share the batches; each gets the sums of all.
        watched: gets the sums of this rank's tokens; losses then come from the loss's row kernel.

    Raises:
        ValueError: there is nothing to score, an example has no response token, or ``perplexity``
            is of another number of examples.
        Interrupted: a signal waited for the end of a batch.
    """
    if len(examples) == 0:
        raise ValueError("examples: expected at least one, got none")
    if perplexity is None:
        perplexity = StreamingPerplexity(len(examples), head.weight.device)
    if perplexity.num_samples != len(examples):
        raise ValueError(
            f"perplexity: expected sums of {len(examples)} examples, got {perplexity.num_samples}"
        )
    lengths = sequence_lengths(examples)
    if isinstance(examples, datasets.Dataset):
        examples = examples.with_format("arrow")
    # A batch holds examples as a whole and each has a response token: the sums say who was scored.
    started = summed(perplexity.started.long()) if shared else perplexity.started
    waiting = (started == 0).nonzero().flatten().tolist()
    saved = time.monotonic()
    number, size = (rank(), num_ranks()) if shared else (0, 1)
    progress = progress_bar(lengths, waiting, description, True if number else disable_progress)
    with torch.no_grad(), evaluating(model), context(), progress:
        exact = padding_is_exact(model, head, lengths, perplexity.device, collator, shared=shared)
        padding, most = MOST_PADDING if exact else 0.0, max_tokens or most_tokens(perplexity.device)
        batches = batches_by_length(lengths, most, waiting, padding=padding)
        # A sharded model has to be called equally often by all ranks.
        batches += [[]] * (-len(batches) % size)
        own = collated(examples, batches[number::size], collator)
        for done, (batch_rows, batch) in enumerate(own, start=1):
            if exact or batch["attention_mask"].all():
                del batch["attention_mask"]
            score_batch(model, head, batch, torch.tensor(batch_rows).long(), perplexity, watched)
            dealt = batches[(done - 1) * size : done * size]
            progress.update(sum(lengths[row] for rows in dealt for row in rows))
            due, signum = agreed(saved, done, size)
            if save is not None and (due or signum):
                save()
                saved = time.monotonic()
            if signum:
                raise interrupts.Interrupted(signum, f"in {description}")
    perplexity.end_checkpoint(dist.group.WORLD if size > 1 else None)
    return perplexity


def progress_bar(
    lengths: Sequence[int], waiting: Sequence[int], description: str, disable: bool | None
) -> tqdm[Any]:
    """Return a bar of tokens, with the time that those of ``waiting`` examples will take.

    Where no terminal overwrites its line, it writes one every `LINE_SECONDS`.
    """
    return tqdm(
        total=sum(lengths),
        initial=sum(lengths) - sum(lengths[row] for row in waiting),
        desc=description,
        unit="tok",
        unit_scale=True,
        mininterval=0.1 if sys.stderr.isatty() else LINE_SECONDS,
        disable=disable,
    )


def agreed(saved: float, done: int, size: int) -> tuple[bool, int | None]:
    """Return whether `SAVE_SECONDS` have passed since ``saved``, and the signal to end, if any.

    Several ranks have to agree and would wait for each other, so that they ask every `AHEAD`
    batches only; of their clocks the first one's counts, of their signals any.
    """
    if size > 1 and done % AHEAD:
        return False, None
    due = time.monotonic() - saved >= SAVE_SECONDS
    own = (due, interrupts.requested())
    told = [own] if size == 1 else gathered(own)
    return told[0][0], next((signum for _, signum in told if signum), None)


def padding_is_exact(
    model: nn.Module,
    head: HeadAdapter,
    lengths: Sequence[int],
    device: torch.device,
    collator: PairedCollator,
    *,
    shared: bool,
) -> bool:
    """Return whether examples may be padded, which all ranks have to find; see `ignores_padding`.

    It is not asked where all are of one length.
    """
    longest = max(lengths)
    if longest == min(lengths):
        return False
    exact = ignores_padding(model, head, device, longest, collator.pad_token_id)
    return all(gathered(exact)) if shared else exact


def score_batch(
    model: nn.Module,
    head: HeadAdapter,
    batch: dict[str, Tensor],
    examples: Tensor,
    perplexity: StreamingPerplexity,
    watched: TokenSums | None = None,
) -> None:
    """Add the losses of a `PairedCollator`'s batch; ``examples`` says whose rows they are.

    Without an attention mask the model takes its causal path and need not ask the device whether
    the mask is full.
    """
    device = perplexity.device
    names = [name for name in ("input_ids", "attention_mask") if name in batch]
    sample_ids = examples[batch["owner"]].to(device)
    targets = batch["targets"].to(device)
    call = functools.partial(
        model,
        **{name: batch[name].to(device) for name in names},
        use_cache=False,
        rows=batch["rows"].to(device),
    )
    if head.fused:
        call(head_function=_adding(perplexity, targets, sample_ids, head, watched))
        return
    logits = call(head_input=lambda hidden: hidden).value.float()
    perplexity.add(F.cross_entropy(logits, targets, reduction="none"), sample_ids)
    if watched is not None:
        watched.add_logits(logits, targets)


def scoring_autocast(
    head: HeadAdapter, accelerator: Any
) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Return the precision that `sftmix score` scores in: bfloat16 autocast on CUDA.

    Scoring has no small updates to lose, and a float32 forward is slower. Training in fp16 scores
    in fp16; a CPU, weights that are not float32, and a GPU that only emulates bfloat16 score in
    what they train in.
    """
    weight = head.weight
    # FSDP has not moved the weights to the device yet.
    if (
        accelerator.device.type == "cuda"
        and weight.dtype == torch.float32
        and accelerator.mixed_precision != "fp16"
        and torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        return functools.partial(torch.autocast, "cuda", dtype=torch.bfloat16)
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = accelerator.autocast
    return autocast


def _adding(
    perplexity: StreamingPerplexity,
    targets: Tensor,
    sample_ids: Tensor,
    head: HeadAdapter,
    watched: TokenSums | None,
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    def head_function(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if watched is None:
            perplexity.update(hidden, weight, targets, sample_ids, bias=bias, **head.options)
        else:
            losses = watched.add(hidden, weight, targets, bias=bias, **head.options)
            perplexity.add(losses, sample_ids)
        return hidden.new_zeros(())

    return head_function


def collated(
    examples: Sequence[dict[str, Any]] | datasets.Dataset,
    batches: Sequence[list[int]],
    collator: PairedCollator,
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yield rows and tensors of each batch, read and made `AHEAD` at a time.

    One at a time, between two forward passes that have taken the caches, takes three times as long.
    """
    for first in range(0, len(batches), AHEAD):
        some = batches[first : first + AHEAD]
        read = iter(rows_of(examples, [row for rows in some for row in rows]))
        yield from [
            (rows, collator(list(itertools.islice(read, len(rows))) or [filler()])) for rows in some
        ]


def rows_of(
    examples: Sequence[dict[str, Any]] | datasets.Dataset, rows: Sequence[int]
) -> list[dict[str, Any]]:
    """Return examples; from Arrow without making Python numbers."""
    if not isinstance(examples, datasets.Dataset) or not rows:
        return [examples[row] for row in rows]
    table = examples[rows]
    arrays = []
    for name in ("input_ids", "labels"):
        column = table[name].combine_chunks()
        ends = pc.list_value_length(column).to_numpy().cumsum()
        arrays.append(np.split(column.flatten().to_numpy(), ends[:-1]))
    ids = table["id"].to_pylist() if "id" in table.column_names else rows
    names = ("id", "input_ids", "labels")
    return [dict(zip(names, values, strict=True)) for values in zip(ids, *arrays, strict=True)]


def sequence_lengths(examples: Sequence[dict[str, Any]] | datasets.Dataset) -> list[int]:
    """Return the length of each example; from Arrow without making Python numbers."""
    if isinstance(examples, datasets.Dataset):
        column = examples.with_format("arrow")[:]["input_ids"]
        lengths: list[int] = pc.list_value_length(column).to_pylist()
        return lengths
    return [len(example["input_ids"]) for example in examples]


def most_tokens(device: torch.device) -> int:
    """Return the tokens of a batch by default: 8,192, and 1,024 on a CPU, for its caches."""
    return 1024 if device.type == "cpu" else 8192


def batches_by_length(
    lengths: Sequence[int],
    max_tokens: int,
    rows: Iterable[int] | None = None,
    *,
    padding: float = 0.0,
) -> list[list[int]]:
    """Return examples grouped by length: the longest first, then in order.

    Each batch has at least one example and at most ``max_tokens`` tokens, of which padding takes
    the share ``padding`` at most. ``rows``: which examples; all by default. Examples one after
    another in one sequence would need block masks (T x T for SDPA), which state-space models cannot
    heed.
    """
    batches: list[list[int]] = []
    rows = range(len(lengths)) if rows is None else rows
    slots = tokens = 0
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        longest = lengths[batches[-1][0]] if batches else 0
        slots, tokens = slots + longest, tokens + lengths[row]
        if batches and slots <= max_tokens and slots - tokens <= padding * slots:
            batches[-1].append(row)
        else:
            batches.append([row])
            slots = tokens = lengths[row]
    return batches


def scoring_steps(max_steps: int, num_scorings: int) -> list[int]:
    """Return ``num_scorings`` evenly spaced steps of a run, the last at its end.

    Raises:
        ValueError: there are fewer steps than scorings.
    """
    if not 1 <= num_scorings <= max_steps:
        raise ValueError(
            f"num_scorings: expected 1 to {max_steps} (the steps of the epoch), "
            f"got {num_scorings}; ask for fewer, or take a smaller --per_device_train_batch_size"
        )
    return [round(max_steps * (c + 1) / num_scorings) for c in range(num_scorings)]


class ScoringCallback(TrainerCallback):
    """Scores the training data at C steps; its sums travel with checkpoints.

    ``checkpointed``: at each of these steps the trainer first writes a checkpoint, and the sums are
    saved into it every `SAVE_SECONDS` of the scoring and at its end. A run resumed from a
    checkpoint goes on with its scoring, if that is not finished, before it trains on.
    """

    FILE = "perplexity.safetensors"

    def __init__(
        self,
        perplexity: StreamingPerplexity,
        steps: Sequence[int],
        score: Callable[..., Any],
        *,
        checkpointed: bool = False,
    ) -> None:
        """Take ``score(perplexity=..., description=..., save=...)``: one scoring of all data."""
        self.perplexity = perplexity
        self.steps = list(steps)
        self.score = score
        self.checkpointed = checkpointed
        self.resumed_from: Path | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Finish the scoring that the resumed checkpoint was written for.

        Raises:
            ValueError: the number of finished scorings is not that of the step.
        """
        before, after = (
            bisect(self.steps, state.global_step) for bisect in (bisect_left, bisect_right)
        )
        if not before <= self.finished <= after:
            raise ValueError(
                f"perplexity: expected {after} finished scorings at step {state.global_step}, "
                f"got {self.finished}"
            )
        self.score_if_due(state.global_step, self.resumed_from)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Score if it is time to, or ask for the checkpoint that comes first."""
        if self.checkpointed and state.global_step in self.steps:
            control.should_save = True
        else:
            self.score_if_due(state.global_step, None)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Keep the last scoring's checkpoint: one of the epoch's end would replace it."""
        if self.checkpointed and state.global_step in self.steps:
            control.should_save = False

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Score if the checkpoint was written for it."""
        folder = Path(str(args.output_dir)) / f"{PREFIX}{state.global_step}"
        self.score_if_due(state.global_step, folder)

    @property
    def finished(self) -> int:
        """Return how many scorings are finished."""
        return self.perplexity.nll_sum.shape[1]

    def score_if_due(self, step: int, checkpoint: Path | None) -> None:
        """Score at one of the C steps, once, saving the progress into its checkpoint."""
        if step not in self.steps or self.steps.index(step) < self.finished:
            return
        save = functools.partial(self.save, checkpoint) if checkpoint is not None else None
        number = self.steps.index(step) + 1
        self.score(
            perplexity=self.perplexity, description=f"score {number}/{len(self.steps)}", save=save
        )
        if save is not None:
            save()

    def save(self, folder: Path) -> None:
        """Put the scorings into a checkpoint, the unfinished one too: every rank has to call this.

        The main process writes the sums over all ranks.
        """
        state = self.perplexity.state_dict()
        for name in OPEN_SUMS:
            state[name] = summed(state[name].long() if name == "open_outside" else state[name])
        state["open_outside"] = state["open_outside"] != 0
        if self.finished == 0:
            state["num_tokens"] = state["open_num_tokens"].clone()
        if is_main():
            state = {name: sums.cpu() for name, sums in state.items()}
            with writing(folder):
                atomic_write(folder / self.FILE, lambda path: save_file(state, path))

    def load(self, folder: Path) -> None:
        """Load a checkpoint's scorings; the main process takes the unfinished one."""
        state = load_file(folder / self.FILE)
        if not is_main():
            state |= {name: torch.zeros_like(state[name]) for name in OPEN_SUMS}
        self.perplexity.load_state_dict(state)
        self.resumed_from = folder
