"""The options of training: SFTMix's own, and `transformers.TrainingArguments` with them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from sftmix.methods import LABEL_SMOOTHING, METHODS, method_of
from sftmix.pairs.layouts import Layout, LayoutName
from sftmix.pairs.pools import Pairing
from sftmix.runs.failures import Naming
from sftmix.training.option_checks import check_number, check_options, check_settled
from sftmix_kernels import RowChunks, VocabTiles
from sftmix_kernels.schedules import Schedule

# What an evaluation gives of each of its data sets, and whether more of it is better.
EVALUATED = {"loss": False, "perplexity": False, "entropy": False, "mean_token_accuracy": True}
# Minutes between two checkpoints: one of an 8B model with AdamW, 100 GB, takes one or two.
SAVE_MINUTES = 30.0

# transformers' name for it; older versions know only the other.
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(TrainingArguments, "activation_checkpointing")
    else "gradient_checkpointing"
)
# What --memory lean chooses; tiles as long as an 8B model's hidden states are wide.
LEAN_TILE_TOKENS = 4096
LEAN_LOSS_BYTES = 2**28


def option(default: Any, help_text: str, source: str, **more: Any) -> Any:
    """Return a config field whose help names where the default comes from.

    ``more`` are further keywords of `argparse.ArgumentParser.add_argument`.
    """
    return field(default=default, metadata={"help": f"{help_text} [{source}]", **more})


# The options go over any config derived from TrainingArguments; type checkers read them as one.
if TYPE_CHECKING:
    ConfigBase = TrainingArguments
else:
    ConfigBase = object


@dataclass
class SFTMixOptions(ConfigBase):
    """SFTMix's own options, for any config derived from `transformers.TrainingArguments`.

    Every help text ends in "paper" (arXiv 2410.05248), in the number of another paper on arXiv, or
    in "ours" (no paper says).
    """

    method: str = option(
        "sftmix",
        "; ".join(
            f"{name}: {method.says} ({method.source.partition(':')[0]})"
            for name, method in METHODS.items()
        ),
        "paper",
        choices=METHODS.keys(),
    )
    mu: float = option(0.2, "Weight of the Mixup term in sftmix", "paper")
    alpha: float = option(0.5, "lam ~ Beta(alpha, alpha)", "paper")
    lambda_scope: Literal["pair", "batch"] = option(
        "pair", "One lam for each pair of examples, or for all pairs of an optimizer step", "ours"
    )
    pairing: Pairing = option(
        "outer",
        "outer: the confident half with the other, of K levels the first with the last and so on "
        "inwards; neighbours: level 1 with 2, 3 with 4; rank: halves, each example with one of "
        "about the same rank in the other",
        "ours",
    )
    kl_reg: float = option(1.0, "ir_dro: weights are the softmax of loss / kl_reg", "paper")
    power_k: float = option(
        10.0,
        "power: tokens weigh p^k; 0 is ntp, 1 is dft, and the larger k, the fewer tokens teach",
        "arXiv 2510.00526",
    )
    eaft_alpha: float = option(
        1.0, "eaft: tokens weigh (entropy / log V)^alpha; 0 is ntp", "arXiv 2601.02151"
    )
    gem_beta: float = option(
        0.7,
        "gem: temperature of the sharpened prediction; 1 has the gradient of ntp",
        "arXiv 2408.16673",
    )
    # None until it is known which method's default is wanted.
    label_smoothing_factor: float | None = option(  # type: ignore[assignment]
        None,
        "ntp and label_smoothing: share of each label that is spread over the whole vocabulary; "
        f"by default 0, with label_smoothing {LABEL_SMOOTHING}",
        "arXiv 1512.00567",
    )
    loss_schedule: Literal["auto", "row_chunks", "vocab_tiles"] = option(
        "auto", "How the loss avoids full logits; vocab_tiles: least memory, CUDA only", "ours"
    )
    head: Literal["fused", "logits"] = option(
        "fused",
        "fused: the loss reads a linear head and makes no logits; logits: the loss reads the "
        "model's own logits, of any head, slowly",
        "ours",
    )
    layout: LayoutName = option(
        "padded",
        "How examples lie in a batch: a row each; all in one row; several in each row; one after "
        "the other through the model, which keeps the activations of one, for another forward "
        "pass of all but the last",
        "ours",
    )
    row_length: int | None = option(
        None, "Most tokens of a packed row; by default the longest example's", "ours"
    )
    memory: Literal["plain", "lean"] = option(
        "plain",
        "lean: activation (gradient) checkpointing and, in place of their defaults, --layout "
        f"sequential, --mlp_tile_tokens {LEAN_TILE_TOKENS}, --loss_max_bytes {LEAN_LOSS_BYTES}; "
        "results differ only by rounding",
        "ours",
    )
    mlp_tile_tokens: int | None = option(
        None,
        "Run MLPs on so many tokens at a time, keeping nothing inside them, for another forward "
        "pass of them in backward",
        "ours",
    )
    activation_offload: bool = option(
        False,
        "Keep what activation checkpointing keeps, a hidden state of each token and layer, in the "
        "host's memory; costs its way there and back",
        "ours",
    )
    loss_max_bytes: int | None = option(
        None,
        "Most bytes of logits at a time in the loss, by default 1 GiB (256 MiB of workspace with "
        "vocab_tiles); chunks below 4096 tokens cost time",
        "ours",
    )
    save_minutes: float | None = option(
        None,
        "Write a checkpoint also when so many minutes have passed since the last; by default 30, "
        "with --save_strategy no none; 0: none",
        "ours",
    )
    spike_threshold: float | None = option(
        None,
        "Name the examples of a step whose loss or gradient norm is more than so many standard "
        "deviations above the mean of the 100 steps before it (at least 20); by default none",
        "ours",
    )
    # Examples carry columns that no model's forward knows, and the trainer sorts them itself.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Always off"})

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_objective()
        self._check_steps()
        if self.memory == "lean":
            self._turn_lean()
        if METHODS[self.method].mixed:
            require_pairs(self.per_device_train_batch_size)
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: the trainer needs every column; leave it off")
        # transformers knows the flag without a value, while a YAML file says true.
        words: dict[str, Any] = {"true": True, "yes": True, "false": None, "no": None}
        self.fsdp = words.get(str(self.fsdp).lower(), self.fsdp)
        check_options(self)
        Layout(self.layout, row_length=self.row_length)
        if self.push_to_hub and HubStrategy(self.hub_strategy) != HubStrategy.END:
            raise ValueError(
                f"hub_strategy: expected 'end', got {self.hub_strategy!r}: checkpoints are renamed "
                "while they would be uploaded"
            )
        # transformers takes what does not end in "loss" for the better the higher it is.
        metric = self.metric_for_best_model or ""
        found = next((more for name, more in EVALUATED.items() if metric.endswith(name)), None)
        if self.greater_is_better is None and found is not None:
            self.greater_is_better = found
        # transformers' messages mention the option that is wrong, most of them.
        among = {name: rf"\b{name}\b" for name in self.__dataclass_fields__}
        among["accelerator_config"] = "(?i)accelerator_?config"
        with Naming("training options", among=among):
            super().__post_init__()  # type: ignore[no-untyped-call]
        self._check_memory()
        self._check_settled()

    def _check_settled(self) -> None:
        """Check what can be told only once transformers has read the options."""
        check_settled(self, {name: one.default for name, one in self.__dataclass_fields__.items()})

    def _turn_lean(self) -> None:
        """Turn on what `--memory lean` stands for, where the user has not chosen otherwise."""
        self.layout = layout_for(self.layout, self.memory)
        if self.mlp_tile_tokens is None:
            self.mlp_tile_tokens = LEAN_TILE_TOKENS
        # vocab_tiles' own workspace is smaller, and with --head logits all logits are there.
        capped = self.head == "fused" and self.loss_schedule != "vocab_tiles"
        if self.loss_max_bytes is None and capped:
            self.loss_max_bytes = LEAN_LOSS_BYTES

    def _check_memory(self) -> None:
        """Check what can be told only now: FSDP's options, which may be in a file, are read."""
        if self.memory == "lean" and not self.checkpoints_activations:
            for name in {CHECKPOINTING, "gradient_checkpointing"}:
                setattr(self, name, True)
        if self.activation_offload and not self.checkpoints_activations:
            raise ValueError(
                "activation_offload: expected activation_checkpointing (gradient_checkpointing) "
                "with it, or every activation would go to the host"
            )
        if self.torch_compile and (self.layout == "sequential" or self.activation_offload):
            raise ValueError(
                "torch_compile: not supported with layout='sequential' or activation_offload, "
                "whose backbone is not compiled"
            )

    @property
    def checkpoints_activations(self) -> bool:
        """Return whether layers keep only their inputs, by transformers' option or by FSDP's."""
        names = (CHECKPOINTING, "gradient_checkpointing")
        sharded = self.fsdp_config if self.fsdp and isinstance(self.fsdp_config, dict) else {}
        by_fsdp = sharded.get("activation_checkpointing", False)
        return any(getattr(self, name, None) for name in names) or bool(by_fsdp)

    @property
    def save_seconds(self) -> float:
        """Return the seconds after which a checkpoint is due; infinite if the clock makes none."""
        minutes = self.save_minutes
        if minutes is None:
            minutes = SAVE_MINUTES if self.writes_checkpoints else 0.0
        return minutes * 60 or math.inf

    @property
    def writes_checkpoints(self) -> bool:
        """Return whether a run that nobody interrupts writes checkpoints."""
        return self.save_strategy != "no"

    def num_batches(self, num_examples: int) -> int:
        """Return the batches, of all devices together, of an epoch that has each example once.

        Raises:
            ValueError: the examples make no batch.
        """
        batch: int = self.train_batch_size * self.world_size
        if num_examples < batch:
            raise ValueError(
                f"train_dataset: expected at least one batch of {batch} examples, got "
                f"{num_examples}; take a smaller --per_device_train_batch_size"
            )
        return num_examples // batch if self.dataloader_drop_last else -(-num_examples // batch)

    def num_steps(self, num_examples: int) -> int:
        """Return the optimizer steps of an epoch that has each example once.

        Raises:
            ValueError: as `num_batches`.
        """
        return -(-self.num_batches(num_examples) // self.gradient_accumulation_steps)

    @property
    def loss_plan(self) -> Schedule:
        """Return how the loss avoids full logits: the fused ops' ``schedule``."""
        if self.loss_max_bytes is None:
            return self.loss_schedule
        if self.loss_schedule == "vocab_tiles":
            return VocabTiles(max_bytes=self.loss_max_bytes)
        return RowChunks(max_bytes=self.loss_max_bytes)

    def _check_numbers(self) -> None:
        method_of(self.method)
        for name, allowed in choices().items():
            if getattr(self, name) not in allowed:
                known = ", ".join(allowed)
                raise ValueError(f"{name}: expected {known}; got {getattr(self, name)!r}")
        if not (np.isfinite(self.mu) and self.mu >= 0):
            raise ValueError(f"mu: expected a finite number of at least 0, got {self.mu}")
        for name in ("alpha", "kl_reg"):
            number = getattr(self, name)
            if not (np.isfinite(number) and number > 0):
                raise ValueError(f"{name}: expected a finite number above 0, got {number}")
        spike = self.spike_threshold
        if spike is not None and not (np.isfinite(spike) and spike > 0):
            raise ValueError(
                f"spike_threshold: expected a finite number above 0, got {spike}; leave it out to "
                "look for no spikes"
            )
        for name in ("mlp_tile_tokens", "loss_max_bytes"):
            number = getattr(self, name)
            if number is not None and not 1 <= number < 2**63:
                raise ValueError(f"{name}: expected at least 1 and below 2^63, got {number}")
        if self.loss_max_bytes is not None and self.head == "logits":
            raise ValueError(
                "loss_max_bytes: expected head='fused'; head='logits' holds all logits"
            )

    def _check_objective(self) -> None:
        """Check what asks for an objective together, and settle the method's own smoothing."""
        method, smooths = METHODS[self.method], self.method == "label_smoothing"
        if self.label_smoothing_factor is None:
            self.label_smoothing_factor = LABEL_SMOOTHING if smooths else 0.0
        check_number("label_smoothing_factor", self.label_smoothing_factor)
        if smooths and not self.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor: expected a number above 0 with method='label_smoothing', "
                "got 0; method='ntp' is without smoothing"
            )
        if self.label_smoothing_factor and "label_smoothing_factor" not in method.options:
            raise ValueError(
                f"label_smoothing_factor: expected 0 with method={self.method!r}, whose loss has "
                f"no such term, got {self.label_smoothing_factor}; leave it out, or take "
                "method='label_smoothing'"
            )
        by_rows = method.whole_rows or self.label_smoothing_factor
        if by_rows and self.head == "fused" and self.loss_schedule == "vocab_tiles":
            what = self.method if method.whole_rows else f"{self.method} with label smoothing"
            raise ValueError(
                f"loss_schedule: expected auto or row_chunks with method {what}, whose loss needs "
                "whole rows of logits, got 'vocab_tiles'"
            )

    def _check_steps(self) -> None:
        if self.save_minutes is not None and not 0 <= self.save_minutes < math.inf:
            raise ValueError(
                f"save_minutes: expected a number of at least 0, got {self.save_minutes}"
            )
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(
                f"max_steps: expected at least 1, or -1 for all of num_train_epochs; got "
                f"{self.max_steps}, which trains nothing"
            )
        if self.max_steps == -1 and not 0 < self.num_train_epochs < math.inf:
            trained = "without end" if self.num_train_epochs > 0 else "nothing"
            raise ValueError(
                "num_train_epochs: expected a finite number above 0, got "
                f"{self.num_train_epochs}, which trains {trained}"
            )


def require_pairs(batch_size: int) -> None:
    """Check that a batch of a device holds pairs of examples.

    Raises:
        ValueError: its number of examples is odd.
    """
    if batch_size % 2:
        raise ValueError(
            "per_device_train_batch_size: expected an even number (pairs of examples), got "
            f"{batch_size}; layout='sequential' or memory='lean' runs the examples of a batch one "
            "by one, in the memory of one"
        )


def choices() -> dict[str, tuple[str, ...]]:
    """Return the values of SFTMix's own options that are one of several words."""
    hints = get_type_hints(SFTMixOptions)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def layout_for(layout: LayoutName, memory: str) -> LayoutName:
    """Return the layout of a run: in place of the default, `--memory lean` takes sequential."""
    return "sequential" if memory == "lean" and layout == "padded" else layout


@dataclass
class SFTMixConfig(SFTMixOptions, TrainingArguments):
    """`transformers.TrainingArguments` with SFTMix's options, and the paper's defaults."""

    learning_rate: float = option(2e-6, "Peak learning rate of AdamW", "paper")
    weight_decay: float = option(0.1, "Weight decay of AdamW", "paper")
    lr_scheduler_type: str = option("cosine", "Learning-rate schedule", "paper")
    warmup_steps: float = option(
        0.1, "Warm-up: a share of all steps where below 1, else a number of steps", "paper"
    )
    num_train_epochs: float = option(3.0, "Epochs (the paper's 3 are for Alpaca-52K)", "paper")
    per_device_train_batch_size: int = option(
        4, "Examples of a step on each device, an even number (the paper's 32 on 8 GPUs)", "paper"
    )
    logging_steps: float = option(10, "Steps between two log lines", "ours")
    save_strategy: str = option(
        "epoch", "When to write a checkpoint: no, steps, epoch, best", "ours"
    )
    save_total_limit: int | None = option(2, "Checkpoints kept, the newest", "ours")
    hub_strategy: str = option(
        "end", "When --push_to_hub pushes: end, the final model with tokenizer and card", "ours"
    )
    seed: int = option(0, "Seed of pairs, lam, shuffling and initialisation", "ours")
    report_to: str | list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "Reporters of the metrics: none, tensorboard, wandb, ... [ours]"},
    )


@dataclasses.dataclass
class ScoreConfig(SFTMixConfig):
    """Options of the reference model's training: one epoch of next-token prediction."""

    method: Literal["ntp"] = option("ntp", "The reference model is trained with NTP", "paper")
    num_train_epochs: float = option(1.0, "The confidence is that of one epoch", "paper")
    num_scorings: int = option(
        5,
        "C, evenly spaced scorings, the last at the end; on a GPU in bfloat16, also where the "
        "training is in float32",
        "ours",
    )
    checkpoint_scorings: bool = option(
        True,
        "Write a checkpoint before each scoring, so that a killed run resumes in the midst of it",
        "ours",
    )
    save_strategy: str = option(
        "no",
        "When to write other checkpoints: no, steps, epoch; with no, those of the scorings are "
        "deleted once confidence.parquet is there",
        "ours",
    )
    save_total_limit: int | None = option(
        1, "Checkpoints kept, the newest, while the run goes on", "ours"
    )

    def __post_init__(self) -> None:
        if self.num_scorings < 1:
            raise ValueError(f"num_scorings: expected at least 1, got {self.num_scorings}")
        for name, expected in (("method", "ntp"), ("num_train_epochs", 1), ("max_steps", -1)):
            if getattr(self, name) != expected:
                raise ValueError(
                    f"{name}: score trains one epoch of next-token prediction, expected "
                    f"{expected}, got {getattr(self, name)}; leave it out"
                )
        # Passed over, as what a config file that is shared with `train` says of the methods.
        self.label_smoothing_factor = 0.0
        if self.push_to_hub:
            raise ValueError("push_to_hub: score makes a partition, and no model to push")
        super().__post_init__()

    @property
    def writes_checkpoints(self) -> bool:
        """Return whether a run that nobody interrupts writes checkpoints."""
        return self.checkpoint_scorings or super().writes_checkpoints
