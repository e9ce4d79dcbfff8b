"""Weights that are not those of the files, or no numbers, are refused by every command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import sftmix.evaluation.medical
from sftmix.cli import main
from sftmix.model.head import HeadAdapter
from sftmix.model.weights import refuse_not_finite
from sftmix.recipe.arguments import RunArguments
from sftmix.recipe.loading import load_model, load_trained_model
from tests.sftmix import tiny
from tests.sftmix.medical_data import write

QUIET = ["--use_cpu", "true", "--disable_tqdm", "true"]
NAN = float("nan")
NORM = "model.layers.0.input_layernorm.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def model(toy_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_model, tmp_path / "model"))


def change(model: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    path = next(model.glob("*model.safetensors"))
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, {"format": "pt"})


def without(*names: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: [weights.pop(name) for name in names]


def holding(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: weights[name].view(-1)[-1:].fill_(value)


FAULTS = {
    "missing": (without(NORM), f"1 tensors are missing in the weights of .*: {NORM}"),
    "a missing head": (without("lm_head.weight"), "1 tensors are missing .*: lm_head.weight"),
    "two missing": (without(DOWN, NORM), f"2 tensors are missing in .*: {NORM}, {DOWN}"),
    "unexpected": (
        lambda weights: weights.update({"model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)}),
        r"1 tensors are not the model's in .*: model\.layers\.7\.mlp\.up_proj\.weight",
    ),
    "of another shape": (
        lambda weights: weights.update({NORM: torch.ones(3)}),
        rf"1 tensors are of another shape in .*: {NORM} of shape \(3,\), the model has \(8,\)",
    ),
    "NaN": (holding(NORM, NAN), f"1 tensors of .* hold NaN or infinities: {NORM}"),
    "infinite": (holding(DOWN, float("-inf")), f"1 tensors of .* hold NaN or infinities: {DOWN}"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_are_refused(
    fault: str, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit, message = FAULTS[fault]
    change(model, edit)
    for load in (load_model, load_trained_model):
        with pytest.raises(OSError, match=f"model: {message}; "):
            load(RunArguments(str(model), [], ""))
    assert "LOAD REPORT" not in caplog.text


@pytest.mark.parametrize("fault", ["missing", "NaN"])
@pytest.mark.parametrize("command", ["score", "train", "generate", "evaluate"])
def test_every_command_refuses_them(
    command: str,
    fault: str,
    model: Path,
    toy_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    edit, message = FAULTS[fault]
    change(model, edit)
    monkeypatch.setattr("sftmix.commands.evaluate.require_harness", lambda: None)
    monkeypatch.setattr("sftmix.commands.evaluate.version", lambda name: "0")
    words = [command, "--model", str(model)]
    if command in ("train", "score"):
        words += ["--data", str(toy_data), "--output", str(tmp_path / "run"), *QUIET]
    if command == "train":
        words += ["--method", "ntp"]
    if command == "evaluate":
        words += ["--tasks", "medqa", "--medqa_data", write(tmp_path, "medqa", [0])["file"]]
    if command == "generate":
        (tmp_path / "questions.json").write_text('[{"instruction": "one"}]')
        words += ["--format", "alpaca_eval", "--questions", str(tmp_path / "questions.json")]
        words += ["--output", str(tmp_path / "out.json"), "--use_cpu"]
    assert main(words) == 2
    error = capsys.readouterr().err
    with pytest.raises(OSError, match=message):
        raise OSError(error)
    assert "Traceback" not in error
    assert not (model / "evaluation.json").exists()
    assert not (tmp_path / "out.json").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    for family in ("GPT2", "Gemma2"):
        tiny.build(family, tie_word_embeddings=True).save_pretrained(tmp_path / family)
        weights = load_file(tmp_path / family / "model.safetensors")
        assert "lm_head.weight" not in weights
        load_model(RunArguments(str(tmp_path / family), [], ""))


def test_what_a_model_declares_as_ignorable(tmp_path: Path) -> None:
    """Old files of GPT-2 and Llama hold buffers that are computed today."""
    tiny.build("GPT2").save_pretrained(tmp_path / "gpt2")
    old = {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    change(tmp_path / "gpt2", lambda weights: weights.update(old))
    load_model(RunArguments(str(tmp_path / "gpt2"), [], ""))
    tiny.build("Llama").save_pretrained(tmp_path / "llama")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    change(tmp_path / "llama", lambda weights: weights.update(old))
    load_model(RunArguments(str(tmp_path / "llama"), [], ""))


def test_a_shard_that_lacks_what_the_index_says(model: Path) -> None:
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(model, max_shard_size="8KB")
    (model / "model.safetensors").unlink()
    names = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    shard = model / names[NORM]
    weights = load_file(shard)
    del weights[NORM]
    save_file(weights, shard, {"format": "pt"})
    with pytest.raises(OSError, match=f"1 tensors are missing .*: {NORM}"):
        load_model(RunArguments(str(model), [], ""))


def test_weights_are_looked_at_in_every_dtype() -> None:
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2]
    for dtype in dtypes:
        layer = nn.Linear(3, 2, bias=False)
        layer.weight = nn.Parameter(torch.ones(2, 3).to(dtype), requires_grad=False)
        refuse_not_finite("m", layer)
        layer.weight[1, 2] = NAN
        with pytest.raises(OSError, match="1 tensors of m hold NaN or infinities: weight"):
            refuse_not_finite("m", layer)
    layer = nn.Linear(3, 2, bias=False)
    layer.register_buffer("kept", torch.tensor([NAN]))
    layer.register_buffer("computed", torch.tensor([NAN]), persistent=False)
    layer.register_buffer("whole", torch.ones(2, dtype=torch.int64))
    layer.register_buffer("empty", torch.ones(0))
    with pytest.raises(OSError, match="1 tensors of m hold NaN or infinities: kept;"):
        refuse_not_finite("m", layer)
    refuse_not_finite("m", nn.Linear(3, 2, device="meta"))
    many = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(7))
    for one in many:
        nn.init.constant_(one.weight, NAN)
    with pytest.raises(OSError, match=r"7 tensors of m .*: 0.weight, .*, 4.weight and 2 more;"):
        refuse_not_finite("m", many)


LORA = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight".format


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_adapters(model: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    whole = tmp_path / "whole"
    adapted.save_pretrained(whole)
    # With its embeddings, as PEFT saves it where the vocabulary has grown.
    adapted.save_pretrained(tmp_path / "embeddings", save_embedding_layers=True)
    saved = load_file(tmp_path / "embeddings" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.weight" in saved
    for name in ("whole", "embeddings"):
        load_trained_model(RunArguments(str(tmp_path / name), [], ""))
    foreign = {LORA("A").replace("layers.0", "layers.7"): torch.ones(2, 2)}
    for number, (edit, message) in enumerate(
        (
            (
                without(LORA("A")),
                f"1 tensors are missing in .*: {LORA('A')}".replace("lora_A", ".*"),
            ),
            (
                lambda weights: weights.update(foreign),
                "1 tensors are not the model's in .*layers.7",
            ),
            (holding(LORA("B"), NAN), r"1 tensors of .* hold NaN .*down_proj\.lora_B"),
            (
                lambda weights: weights.update({LORA("B"): torch.ones(3, 2)}),
                "is damaged or not one of .*size mismatch",
            ),
        )
    ):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        change(folder, edit)
        with pytest.raises(OSError, match=message) as caught:
            load_trained_model(RunArguments(str(folder), [], ""))
        assert str(folder) in str(caught.value)
    change(model, holding(NORM, NAN))
    with pytest.raises(OSError, match=f"tensors of {model} hold NaN or infinities: {NORM}"):
        load_trained_model(RunArguments(str(whole), [], ""))


@pytest.mark.parametrize("head", ["fused", "logits"])
@pytest.mark.parametrize("value", [NAN, 1e38])
def test_a_forward_that_gives_no_numbers_is_said(head: str, value: float) -> None:
    """Finite weights, too, may be too large."""
    model = tiny.build("Llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(value)
        model.lm_head.weight.fill_(value)
    with pytest.raises(ValueError, match="its logits are not numbers") as caught:
        HeadAdapter(model, head)
    assert "--head logits" not in str(caught.value)


def test_the_loader_of_evaluation_knows_revisions(toy_model: Path) -> None:
    with pytest.raises(ValueError, match="revision: expected the name of a model on the hub"):
        sftmix.evaluation.medical.load(str(toy_model), "auto", "main")
