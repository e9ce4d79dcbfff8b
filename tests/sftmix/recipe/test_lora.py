"""LoRA from the command line: what is trained, saved and resumed, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

from sftmix.cli import main
from sftmix.pairs.partition import read_partition
from sftmix.recipe.arguments import RunArguments
from sftmix.recipe.lora import add_lora, lora_options
from sftmix.runs.provenance import combined, model_parts

peft = pytest.importorskip("peft")
# PEFT asks for what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

LORA = ["--lora_rank", "2", "--learning_rate", "0.05"]
QUIET = ["--use_cpu", "true", "--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, toy_model: Path, toy_data: Path) -> Path:
    """A run scored by a reference model that LoRA trained."""
    run = tmp_path_factory.mktemp("lora") / "scored"
    words = ["--model", str(toy_model), "--data", str(toy_data), "--output", str(run)]
    assert main(["score", *words, "--num_scorings", "2", *LORA, *QUIET]) == 0
    return run


@pytest.fixture
def train(scored: Path, toy_model: Path, toy_data: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs four steps of SFTMix into RUN; flags come last."""
    words = ["train", "--model", str(toy_model), "--data", str(toy_data)]
    words += ["--partition", str(scored / "confidence.parquet"), "--max_steps", "4"]
    words += ["--output", str(tmp_path / "run"), *LORA, *QUIET]
    return lambda *flags: main([*words, *flags])


def manifest(run: Path) -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text())


def test_the_reference_model_scores_with_its_updates(scored: Path) -> None:
    perplexity = read_partition(scored / "confidence.parquet").perplexity
    assert perplexity[:, 1].mean() < perplexity[:, 0].mean()
    assert manifest(scored)["lora_rank"] == 2
    assert not list(scored.glob("checkpoint-*"))


def test_a_run_is_an_adapter(
    train: Callable[..., int], toy_model: Path, toy_data: Path, tmp_path: Path
) -> None:
    assert train("--lora_alpha", "8", "--lora_dropout", "0.1") == 0
    run = tmp_path / "run"
    adapter = json.loads((run / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (2, 8, 0.1)
    layers = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[-1] for name in adapter["target_modules"]} == layers
    assert not (run / "model.safetensors").exists()
    named = {name: value for name, value in manifest(run).items() if name.startswith("lora_")}
    assert named == {
        "lora_rank": 2,
        "lora_alpha": 8.0,
        "lora_dropout": 0.1,
        "lora_targets": ["all-linear"],
    }
    card = (run / "README.md").read_text()
    assert "library_name: peft" in card
    assert "An adapter of" in card
    assert "| lora_rank | 2 |" in card
    base = AutoModelForCausalLM.from_pretrained(toy_model)
    tokens = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        before = base(input_ids=tokens).logits
        after = peft.PeftModel.from_pretrained(base, run).eval()(input_ids=tokens).logits
    assert not torch.equal(before, after)


def test_a_broken_run_resumed_ends_like_an_unbroken_one(
    train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--lora_dropout", "0.1", "--save_strategy", "steps", "--save_steps", "2"]
    flags += ["--lora_targets", "q_proj", "up_proj"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(*flags, "--output", str(whole)) == 0
    own = Trainer.training_step

    def failing(self: Any, *arguments: Any) -> Any:
        if self.state.global_step == 3:
            raise OSError("the machine is gone")
        return own(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "training_step", failing)
        assert train(*flags, "--output", str(broken)) == 2
    assert [path.name for path in broken.glob("checkpoint-*")] == ["checkpoint-2"]
    # What trained on from fresh updates would be another adapter.
    assert train(*flags, "--output", str(broken), "--resume") == 0
    name = "adapter_model.safetensors"
    assert (broken / name).read_bytes() == (whole / name).read_bytes()
    assert {key.split(".")[-3] for key in load_file(whole / name)} == {"q_proj", "up_proj"}


@pytest.mark.parametrize("reentrant", [True, False])
def test_updates_are_trained_under_gradient_checkpointing(
    reentrant: bool, train: Callable[..., int], tmp_path: Path
) -> None:
    kwargs = json.dumps({"use_reentrant": reentrant})
    plain, saving = tmp_path / "plain", tmp_path / "saving"
    assert train("--output", str(plain)) == 0
    flags = ["--gradient_checkpointing", "true", "--gradient_checkpointing_kwargs", kwargs]
    assert train("--output", str(saving), *flags) == 0
    expected, found = (load_file(run / "adapter_model.safetensors") for run in (plain, saving))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(value.any() for value in found.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 0}, "lora_rank: expected at least 1, got 0"),
        ({"lora_rank": 2, "lora_alpha": 0.0}, "lora_alpha: expected a finite number above 0"),
        ({"lora_rank": 2, "lora_dropout": 1.0}, "lora_dropout: expected a number of at least 0"),
        ({"lora_alpha": 8.0}, "lora_alpha: expected --lora_rank with it, got only 8.0"),
        ({"lora_alpha": 0.0}, "lora_alpha: expected --lora_rank with it, got only 0.0"),
        ({"lora_dropout": 0.1}, "lora_dropout: expected --lora_rank with it"),
        ({"lora_targets": ["q_proj"]}, "lora_targets: expected --lora_rank with it"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_options(RunArguments("model", ["data"], "run", **options))


def test_layers_that_are_not_there(
    train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--lora_targets", "nowhere") == 2
    assert "nowhere" in capsys.readouterr().err
    assert train("--lora_targets", "q_proj", "lm_head") == 2
    assert "leave lm_head out of PEFT's target_modules" in capsys.readouterr().err


def test_without_peft(
    train: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert train() == 2
    assert "lora_rank: needs PEFT: pip install peft" in capsys.readouterr().err


def test_drawing_the_updates_leaves_the_devices_alone(
    toy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several GPUs torch would warn, and keep the state of each."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    arguments = RunArguments(str(toy_model), ["data"], "run", lora_rank=2)
    state, found = torch.get_rng_state(), []
    for seed in (0, 0, 1):
        model = add_lora(AutoModelForCausalLM.from_pretrained(toy_model), arguments, seed)
        weights = {name: weight for name, weight in model.named_parameters() if "lora_A" in name}
        found.append(torch.cat([weight.flatten() for weight in weights.values()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_answers_of_an_adapter_belong_to_its_base_too(toy_model: Path, tmp_path: Path) -> None:
    """A resumed run of `sftmix generate` is refused where either has changed."""
    base, adapter = shutil.copytree(toy_model, tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    found = {combined(model_parts(str(adapter)))}
    for file in (adapter / "adapter_model.safetensors", base / "model.safetensors"):
        file.write_bytes(b"other weights")
        found.add(combined(model_parts(str(adapter))))
    assert len(found) == 3
