"""QLoRA: the loss over weights of 4 bits, and `--load_in_4bit` from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from sftmix.cli import main
from sftmix.model.head import HeadAdapter
from sftmix.recipe.arguments import RunArguments
from sftmix.recipe.loading import load_tokenizer
from sftmix.recipe.lora import check_lora, four_bit, lora_options
from sftmix.training.config import SFTMixConfig
from sftmix.training.parallelism import check_parallelism
from tests.sftmix import tiny
from tests.sftmix.training.test_methods import OPTIONS, dense_loss

bitsandbytes = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
# PEFT asks for what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

QLORA = ["--lora_rank", "2", "--load_in_4bit", "true", "--learning_rate", "0.05"]
QUIET = ["--use_cpu", "true", "--disable_tqdm", "true"]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved llama."""
    path = tmp_path_factory.mktemp("qlora") / "llama"
    tiny.build("Llama", hidden_size=64, intermediate_size=96).save_pretrained(path)
    return path


def in_four_bits(folder: Path, **changes: Any) -> Any:
    quantised = BitsAndBytesConfig(**NF4, **changes)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantised, device_map={"": "cpu"}
    )


def adapted(model: Any) -> Any:
    """The model with random updates, the same each time."""
    config = peft.LoraConfig(
        r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(model, config)


def gradients(model: nn.Module) -> Tensor:
    """Of the updates, which alone are trained."""
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in found)
    return torch.cat([gradient.flatten() for gradient in found.values() if gradient is not None])


@pytest.mark.parametrize("head", ["fused", "logits"])
def test_a_step_is_that_of_the_dense_loss_of_the_quantised_model(
    head: str, folder: Path, tmp_path: Path
) -> None:
    model, plain = adapted(in_four_bits(folder)), adapted(in_four_bits(folder))
    exact = adapted(in_four_bits(folder).dequantize()).double()
    made = tiny.trainer(
        model,
        tmp_path,
        tiny.examples(6),
        confident=tiny.halves(6),
        per_device_train_batch_size=6,
        mu=OPTIONS["mu"],
        head=head,
    )
    batch = next(iter(made.get_train_dataloader()))
    loss = made.compute_loss(model, batch)
    assert isinstance(loss, Tensor)
    losses = [dense_loss(dense, batch, "sftmix", None) for dense in (plain, exact)]
    for one in (loss, *losses):
        one.backward()
    tiny.assert_in_budget("loss", loss.reshape(1), losses[0].reshape(1), losses[1].reshape(1))
    tiny.assert_in_budget("gradients", *map(gradients, (model, plain, exact)))
    assert gradients(model).abs().max() > 0


def test_the_loss_reads_a_head_that_is_not_quantised(folder: Path) -> None:
    model = in_four_bits(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder).lm_head.weight
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(HeadAdapter(adapted(model)).weight, whole)
    assert type(model.model.layers[0].mlp.up_proj.base_layer) is bitsandbytes.nn.Linear4bit


def test_a_quantised_head_is_refused_by_name(folder: Path) -> None:
    model = in_four_bits(folder, llm_int8_skip_modules=[])
    with pytest.raises(ValueError, match=r"got Linear4bit in uint8; leave the head out of the qu"):
        HeadAdapter(model)
    HeadAdapter(model, "logits")


def test_weights_that_bitsandbytes_quantised_are_not_sharded(folder: Path) -> None:
    full = SimpleNamespace(name="FULL_STATE_DICT")
    plugin = SimpleNamespace(fsdp_version=2, state_dict_type=full)
    accelerator = SimpleNamespace(
        distributed_type=None, parallelism_config=None, state=SimpleNamespace(fsdp_plugin=plugin)
    )
    args = SFTMixConfig(use_cpu=True)
    check_parallelism(args, accelerator, AutoModelForCausalLM.from_pretrained(folder))
    with pytest.raises(ValueError, match=r"^fsdp: not supported with weights that bitsandbytes"):
        check_parallelism(args, accelerator, adapted(in_four_bits(folder)))


def test_a_weight_stays_as_it_was_quantised(folder: Path) -> None:
    """On a CPU with AVX512-BF16 bitsandbytes packs it at the first pass without gradients."""
    model = in_four_bits(folder)
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight.clone()
    HeadAdapter(model)
    with torch.no_grad():
        model.eval()(torch.tensor([[1, 2, 3]]))
    assert torch.equal(layer.weight, before)
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"packed the weight of model.layers.0.mlp.up_proj"):
        HeadAdapter(model)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, toy_model: Path, toy_data: Path) -> Path:
    """A run scored by a reference model that QLoRA trained."""
    run = tmp_path_factory.mktemp("qlora") / "scored"
    words = ["--model", str(toy_model), "--data", str(toy_data), "--output", str(run)]
    assert main(["score", *words, "--num_scorings", "2", *QLORA, *QUIET]) == 0
    return run


@pytest.fixture
def train(scored: Path, toy_model: Path, toy_data: Path) -> Callable[..., int]:
    """Runs four steps of SFTMix; flags come last."""
    words = ["train", "--model", str(toy_model), "--data", str(toy_data), "--max_steps", "4"]
    words += ["--partition", str(scored / "confidence.parquet"), *QUIET]
    return lambda *flags: main([*words, *flags])


def test_a_run_is_an_adapter_that_merges_into_the_whole_model(
    train: Callable[..., int],
    toy_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    assert train("--output", str(run), "--dtype", "bfloat16", *QLORA) == 0
    assert not (run / "model.safetensors").exists()
    assert all("lora_" in name for name in load_file(run / "adapter_model.safetensors"))
    assert json.loads((run / "manifest.json").read_text())["load_in_4bit"] is True
    assert "| load_in_4bit | True |" in (run / "README.md").read_text().replace("\\", "")
    before = AutoModelForCausalLM.from_pretrained(toy_model, dtype="bfloat16")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(run, dtype="bfloat16")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(run).save_pretrained(tmp_path / "merged")
    load_tokenizer(RunArguments(str(tmp_path / "merged"), [], ""))
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    changed = [(type(one.lm_head), one.model.layers[0].mlp.up_proj) for one in (before, after)]
    assert changed[0][0] is changed[1][0] is nn.Linear
    assert not torch.equal(changed[0][1].weight, changed[1][1].weight)
    without = [word for word in QLORA if word not in ("--load_in_4bit", "true")]
    assert train("--output", str(run), "--dtype", "bfloat16", *without, "--resume") == 2
    assert "with load_in_4bit = True, now it is None" in capsys.readouterr().err


def test_a_model_that_was_saved_in_four_bits(
    train: Callable[..., int],
    toy_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved = tmp_path / "nf4"
    in_four_bits(toy_model).save_pretrained(saved)
    AutoTokenizer.from_pretrained(toy_model).save_pretrained(saved)
    words = ["--model", str(saved), "--output", str(tmp_path / "run")]
    assert train(*words, "--lora_rank", "2") == 0
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert train("--model", str(saved), "--output", str(tmp_path / "whole")) == 2
    assert "are quantised, and cannot be trained; train updates" in capsys.readouterr().err


def test_lean_training_of_four_bits_is_that_of_plain_training(
    train: Callable[..., int], tmp_path: Path
) -> None:
    """Layers, tiles and examples one by one: products of NF4 in every order."""
    found = []
    for name, flags in {"plain": [], "lean": ["--memory", "lean"]}.items():
        assert train("--output", str(tmp_path / name), *QLORA, *flags) == 0
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        found.append(state["log_history"][-1]["train_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load_in_4bit"], "--load_in_4bit: expected --lora_rank with it"),
        ([*QLORA, "--dtype", "auto"], "--load_in_4bit: expected --dtype bfloat16 or float32"),
        ([*QLORA, "--max_steps", "x"], "--max_steps: invalid int value"),
    ],
)
def test_what_is_refused(
    flags: list[str],
    message: str,
    train: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        code = train("--output", str(tmp_path / "run"), *flags)
    except SystemExit as caught:
        code = caught.code  # type: ignore[assignment]
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def arguments(**changes: Any) -> RunArguments:
    return RunArguments("m", ["d"], "o", **{"lora_rank": 2, "load_in_4bit": True, **changes})


def test_what_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config: Any = SimpleNamespace(fsdp="", learning_rate=1e-4)
    check_lora(arguments(), config)
    assert not caplog.text
    check_lora(arguments(), SimpleNamespace(fsdp="", learning_rate=2e-6))  # type: ignore[arg-type]
    assert "learning_rate is 2e-06, which is for training all weights" in caplog.text
    with pytest.raises(ValueError, match=r"^load_in_4bit: not supported with --fsdp"):
        check_lora(arguments(), SimpleNamespace(fsdp=[True], learning_rate=1e-4))  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"^load_in_4bit: needs bitsandbytes: pip install"):
        check_lora(arguments(), config)
    check_lora(arguments(load_in_4bit=False), config)


def test_the_options_are_recorded_where_they_are_on() -> None:
    assert lora_options(arguments())["load_in_4bit"] is True
    assert "load_in_4bit" not in lora_options(arguments(load_in_4bit=False))
    assert four_bit(arguments(load_in_4bit=False), torch.device("cpu")) == {}


def test_a_plan_knows_no_weights_of_four_bits(
    toy_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", str(toy_model), *QLORA, *QUIET]) == 2
    assert "--load_in_4bit: the plan knows no quantised weights" in capsys.readouterr().err
