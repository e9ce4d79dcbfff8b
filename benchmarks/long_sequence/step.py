"""Train one step on a pair of long sequences by a trainer's own `train`, and say what it took.

The first of two steps is short: it makes the optimizer's states and whatever a first step loads.
The second is measured. Every method gets the same tokens and the same lam.

Legend: L tokens of each sequence.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.bench_step import DenseSFTMixTrainer, make_model
from benchmarks.inputs import MU
from benchmarks.records import THEIR_NTP, THEIR_SFTMIX
from sftmix import SFTMixConfig, SFTMixTrainer
from sftmix.conventions import IGNORE_INDEX
from sftmix.pairs.collator import PairedCollator
from sftmix.recipe.arguments import RunArguments
from sftmix.recipe.lora import add_lora

from .settings import MODES, Subject

WARM_TOKENS = 1024
LAM = 0.3
# What a plain Trainer's model is given.
PLAIN = ("input_ids", "attention_mask", "labels")


class StepCollator(PairedCollator):
    """Collate the pair, cut short the first time; ``keep`` names what of a batch is handed out."""

    def __init__(self, layout: str = "padded", keep: Sequence[str] | None = None) -> None:
        super().__init__(0, layout=layout)
        self.keep, self.warm = keep, False

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch whose pair and lam do not depend on the trainer's sampler."""
        most = None if self.warm else WARM_TOKENS
        self.warm = True
        examples = sorted(examples, key=lambda example: int(example["id"]))
        columns = ("input_ids", "labels")
        batch = super().__call__(
            [{name: one[name][:most] for name in columns} | {"lam": LAM} for one in examples]
        )
        return batch if self.keep is None else {name: batch[name] for name in self.keep}


class SecondStep(TrainerCallback):
    """Measure seconds, loss and the device's peak of the second step."""

    def __init__(self, device: str) -> None:
        self.device, self.begin = device, 0.0
        self.found: dict[str, float | int] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock before the batch is used."""
        if state.global_step == 1:
            if self.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock after the optimizer's step and the gradients' end."""
        if state.global_step == 2:
            if self.device == "cuda":
                torch.cuda.synchronize()
                self.found["peak_bytes"] = torch.cuda.max_memory_allocated()
                self.found["reserved_bytes"] = torch.cuda.max_memory_reserved()
            self.found["seconds"] = time.perf_counter() - self.begin

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        """Keep the loss of the step before."""
        if logs and state.global_step == 2 and "loss" in logs:
            self.found["loss"] = logs["loss"]


def make_pair(vocab_size: int, length: int) -> list[dict[str, Any]]:
    """Return two sequences of random tokens, of which all but the first carry loss."""
    random = np.random.default_rng(0)
    rows = random.integers(0, vocab_size, (2, length))
    labels = rows.copy()
    labels[:, 0] = IGNORE_INDEX
    return [{"id": i, "input_ids": rows[i], "labels": labels[i]} for i in range(2)]


def build_model(subject: Subject, device: str) -> Any:
    """Return the model, made where it stays, with LoRA's updates where the subject has them."""
    model = make_model(subject.size, device, getattr(torch, subject.dtype))
    arguments = RunArguments(model="", data=[], output="", lora_rank=subject.lora_rank)
    return add_lora(model, arguments, seed=0)


def make_trainer(subject: Subject, mode: str, length: int, device: str, folder: str) -> Trainer:
    """Return the mode's trainer over a new model and a pair of ``length`` tokens each."""
    way = MODES[mode]
    common: dict[str, Any] = {
        "model": build_model(subject, device),
        "train_dataset": make_pair(subject.size.vocab_size, length),
    }
    options: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 2e-6,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "report_to": "none",
        **way.options,
    }
    if way.ours:
        config = SFTMixConfig(**options, mu=MU)
        collator = StepCollator(config.layout)
        ours: Trainer = SFTMixTrainer(
            **common, args=config, data_collator=collator, confident=np.array([True, False])
        )
        return ours
    kinds = {THEIR_SFTMIX: DenseSFTMixTrainer, THEIR_NTP: Trainer}
    collator = StepCollator(keep=PLAIN if way.trainer == THEIR_NTP else None)
    trainer: Trainer = kinds[way.trainer](
        **common, args=TrainingArguments(**options), data_collator=collator
    )
    return trainer


def train_pair(
    subject: Subject, mode: str, length: int, device: str, folder: str
) -> dict[str, float | int]:
    """Return tokens, seconds, loss and on CUDA the peak of the second of two steps."""
    trainer = make_trainer(subject, mode, length, device, folder)
    probe = SecondStep(device)
    trainer.remove_callback(PrinterCallback)  # standard output is for what was measured
    trainer.add_callback(probe)
    trainer.train()
    return {"tokens": 2 * length, **probe.found}
