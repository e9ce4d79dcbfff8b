"""NEFTune: noise on embeddings while training, and only then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sftmix.training.reference import finished_scores, score_while_training
from sftmix.training.trainer import SFTMixTrainer
from tests.sftmix import tiny

NOISE = {"neftune_noise_alpha": 2.0}
NAMES = ("loss", "ntp_loss", "grad_norm")


def four_steps(output: Path, **options: Any) -> SFTMixTrainer:
    """A trainer of four steps."""
    return tiny.trainer(tiny.build("Llama"), output, tiny.examples(16), **options)


@pytest.mark.parametrize("layout", ["padded", "packed", "sequential"])
@pytest.mark.parametrize("head", ["fused", "logits"])
def test_training_has_noise(layout: str, head: str, tmp_path: Path) -> None:
    """A first step's loss differs from that of the same batch without it."""
    options = {"layout": layout, "head": head, "learning_rate": 0.0, "max_steps": 1}
    losses = []
    for noise in ({}, NOISE, NOISE):
        made = four_steps(tmp_path, **options, **noise)
        made.train()
        losses += tiny.losses(made, "loss")
    assert losses[0] != losses[1] == losses[2]


def test_evaluation_and_scoring_have_none(tmp_path: Path) -> None:
    """Also in the midst of training, which goes on with it."""
    found, evaluated, trained = [], [], []
    for noise in ({}, NOISE):
        made = four_steps(
            tmp_path, method="ntp", learning_rate=0.0, eval_strategy="steps", eval_steps=2,
            eval_dataset=tiny.examples(5, seed=3), **noise,
        )  # fmt: skip
        scores = score_while_training(made, 2)
        made.train()
        found.append(finished_scores(scores, 2)[1].tolist())
        evaluated.append(tiny.losses(made, "eval_loss"))
        trained.append(tiny.losses(made, "loss"))
    assert found[0] == found[1]
    assert evaluated[0] == evaluated[1]
    assert len(evaluated[0]) == 2
    assert all(one != other for one, other in zip(*trained, strict=True))


def test_a_resumed_run_has_the_noise_of_an_unbroken_one(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, **NOISE}
    unbroken = four_steps(tmp_path, **options)
    unbroken.train()
    again = four_steps(tmp_path, **options)
    again.train(str(tmp_path / "checkpoint-2"))
    assert tiny.losses(again, *NAMES) == tiny.losses(unbroken, *NAMES)
    assert tiny.same(tiny.weights(again.model), tiny.weights(unbroken.model))


def test_the_saved_model_carries_no_noise(tmp_path: Path) -> None:
    made = four_steps(tmp_path, **NOISE)
    made.train()
    embeddings = made.model.get_input_embeddings()
    assert not embeddings._forward_hooks
    tokens = torch.arange(3, 9)
    assert torch.equal(embeddings(tokens), embeddings.weight[tokens])
