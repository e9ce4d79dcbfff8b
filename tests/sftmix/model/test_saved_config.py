"""The config of a saved model is the base model's, without what training turned on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sftmix.cli import main
from sftmix.training.config import CHECKPOINTING
from tests.sftmix import tiny
from tools import families


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def generate(folder: Path) -> torch.Tensor:
    """Two prompts of unequal length, padded on the left."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    made: torch.Tensor = model.generate(
        tokens, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    return made


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts_generates_after_training(kind: str, tmp_path: Path) -> None:
    model = families.build(kind)
    assert model.config.output_router_logits
    made = tiny.trainer(
        model,
        tmp_path,
        tiny.examples(8),
        method="ntp",
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
        **{CHECKPOINTING: True},
    )
    made.train()
    assert tiny.losses(made, "router_loss")
    made.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "checkpoint-1", tmp_path / "final"):
        config = config_of(folder)
        assert (config["output_router_logits"], config.get("use_cache", True)) == (False, True)
    assert generate(tmp_path / "final").shape == (2, 7)
    # Training goes on as it was.
    assert (model.config.output_router_logits, model.config.use_cache) == (True, False)


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_cache_is_what_the_base_model_says(use_cache: bool, tmp_path: Path) -> None:
    model = tiny.build("Llama", use_cache=use_cache)
    made = tiny.trainer(model, tmp_path, tiny.examples(8), method="ntp", max_steps=1)
    made.train()
    made.save_model(str(tmp_path / "final"))
    assert AutoConfig.from_pretrained(tmp_path / "final").use_cache == use_cache


def test_the_command_saves_a_mixture_that_generates(
    toy_model: Path, toy_data: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    base, run = tmp_path / "base", tmp_path / "run"
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: getattr(tokenizer, name) for name in names}
    families.build("mixtral", vocab_size=len(tokenizer), **ids).save_pretrained(base)
    assert config_of(base)["output_router_logits"]
    for path in toy_model.glob("*token*"):
        shutil.copy(path, base)
    words = ["train", "--model", str(base), "--data", str(toy_data), "--output", str(run)]
    words += ["--method", "ntp", "--num_train_epochs", "1", "--max_steps", "2"]
    words += ["--save_strategy", "epoch", "--use_cpu", "true", "--disable_tqdm", "true"]
    assert main(words) == 0
    assert not config_of(run)["output_router_logits"]
    assert not config_of(run / "checkpoint-2")["output_router_logits"]
    assert {**config_of(run), "output_router_logits": True} == config_of(base)
    assert generate(run).shape == (2, 7)
