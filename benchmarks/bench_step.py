"""A whole training step of a small model, float32: SFTMix beside NTP on the same batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sftmix import SFTMixConfig, SFTMixTrainer
from sftmix.pairing import PairedCollator

from .measure import interleaved_seconds

METHODS = ("ntp", "sftmix")
LIMIT = 1.10


def make_examples(batch: int, length: int, vocab_size: int) -> list[dict[str, Any]]:
    """Random tokens of uneven lengths, the second half of each a response."""
    random = np.random.default_rng(0)
    examples = []
    for size in random.integers(length // 2, length + 1, batch).tolist():
        tokens = random.integers(0, vocab_size, size).tolist()
        examples.append({"input_ids": tokens, "labels": [-100] * (size // 2) + tokens[size // 2 :]})
    return examples


def make_step(method: str, examples: list[dict[str, Any]], folder: str) -> Callable[[], object]:
    """Forward, backward and AdamW of the demo's model on one batch, through the trainer."""
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    torch.manual_seed(0)
    args = SFTMixConfig(
        output_dir=folder,
        method=method,
        per_device_train_batch_size=len(examples),
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = SFTMixTrainer(
        model=LlamaForCausalLM(config),
        args=args,
        train_dataset=examples,
        data_collator=PairedCollator(0),
        confident=np.arange(len(examples)) % 2 == 0,
    )
    optimizer = trainer.create_optimizer()
    batch = trainer.data_collator([{**example, "lam": 0.3} for example in examples])
    counts = trainer._get_num_items_in_batch([batch], trainer.args.device)

    def step() -> None:
        trainer.training_step(trainer.model, batch, counts)
        optimizer.step()
        optimizer.zero_grad()

    return step


def run(batch: int, length: int, repeats: int) -> dict[str, object]:
    """Measure both methods in turns, print and return them and their ratio."""
    examples = make_examples(batch, length, vocab_size=2000)
    with tempfile.TemporaryDirectory() as folder:
        steps = {method: make_step(method, examples, folder) for method in METHODS}
        seconds = interleaved_seconds(steps, repeats)
    print(f"{'method':34} {'median s':>9} {'quartiles':>15}")
    for method, time in seconds.items():
        print(f"{method:34} {time.median:9.4f} {f'{time.low:.4f}-{time.high:.4f}':>15}")
    ratio = seconds["sftmix"].median / seconds["ntp"].median
    met = "met" if ratio <= LIMIT else "MISSED"
    print(f"target seconds of sftmix <= {LIMIT} x ntp: {ratio:.2f}, {met}")
    return {
        "methods": {method: time._asdict() for method, time in seconds.items()},
        "targets": [{"quantity": "seconds", "of": "ntp", "limit": LIMIT, "ratio": ratio}],
    }
