"""Model FLOPs utilisation beside the same counted by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from benchmarks import predict
from sftmix.model.head import HeadAdapter
from sftmix.training import utilisation
from sftmix.training.utilisation import Utilisation, data_sheet_rate, operations, utilisation_of
from tests.sftmix import tiny

# Of `tiny.build("Llama")`: D = 16, 24 in the MLP, 2 heads of 8 that share one key and value.
LAYER = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24 + 2 * 16
BODY, HEAD, ATTENTION = 2 * LAYER + 16, 64 * 16, 12 * 2 * 2 * 8


def of(model: Any) -> tuple[float, float, float]:
    """The operations of a model for a token, a row of the head and a squared length."""
    return operations(model, HeadAdapter(model))


@pytest.mark.parametrize("tied", [False, True])
def test_operations_by_hand(tied: bool) -> None:
    model = tiny.build("Llama", tie_word_embeddings=tied)
    assert of(model) == (6 * BODY, 6 * HEAD, ATTENTION)


def test_frozen_weights_have_no_gradients_of_their_own() -> None:
    model = tiny.build("Llama")
    model.requires_grad_(False)
    assert of(model) == (4 * BODY, 4 * HEAD, ATTENTION)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    assert of(model)[0] == 4 * BODY + 2 * 16 * 24


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter() -> None:
    peft = pytest.importorskip("peft")
    options = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["up_proj"]}
    model = peft.get_peft_model(tiny.build("Llama"), peft.LoraConfig(**options))
    assert of(model) == (4 * BODY + 6 * 2 * 4 * (16 + 24), 4 * HEAD, ATTENTION)


def test_a_token_goes_through_the_experts_that_it_is_sent_to() -> None:
    sizes = {name: tiny._DECODER[name] for name in ("hidden_size", "vocab_size", "pad_token_id")}
    config = transformers.MixtralConfig(
        **sizes,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = transformers.MixtralForCausalLM(config)
    attention, router, norms = 16 * 16 + 2 * 16 * 8 + 16 * 16, 4 * 16, 2 * 16
    layer = attention + router + norms + 2 * 3 * 16 * 24
    assert of(model)[0] == 6 * (2 * layer + 16)


def test_four_bit_weights_count_as_numbers() -> None:
    packed = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = SimpleNamespace(shape=(4, 4))  # type: ignore[attr-defined]
    assert utilisation.of_weight(packed) == 4 * 16


def test_the_share_of_what_could_be_done() -> None:
    found = Utilisation(6.0, 60.0, 0.5, rate=1000.0)
    assert found.share(100, 10, 800, 2.0) == (600 + 600 + 400) / 2000


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 3060", None),
    ],
)
def test_gpus_by_their_names(name: str, rate: float | None) -> None:
    assert data_sheet_rate(name) == rate


def test_predictions_are_made_from_the_same_figures() -> None:
    for gpu in predict.GPUS.values():
        rate = data_sheet_rate(gpu.name)
        assert rate is not None
        assert gpu.product_rate == pytest.approx(rate * predict.PRODUCT_SHARE)


def test_a_cpu_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without random numbers, so that nothing that is drawn later changes."""
    monkeypatch.setattr(utilisation, "MEASURING_SECONDS", 0.001)
    utilisation.measured_rate.cache_clear()
    state = torch.get_rng_state()
    device = torch.device("cpu")
    rate = utilisation.peak_rate(device, torch.float32)
    assert rate is not None
    assert rate > 0
    assert utilisation.peak_rate(device, torch.float32) == rate
    assert torch.equal(torch.get_rng_state(), state)
    utilisation.measured_rate.cache_clear()


def test_a_training_logs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All operations of the run, from its lengths and its tokens with loss, by its time."""
    monkeypatch.setattr(utilisation, "peak_rate", lambda *_: 1e9)
    data = tiny.examples(8)
    made = tiny.trainer(tiny.build("Llama"), tmp_path, data, logging_steps=2)
    made.train()
    (line,) = (line for line in made.state.log_history if "loss" in line)
    lengths = [len(tokens) for tokens in data["input_ids"]]
    trained = sum(label != -100 for labels in data["labels"] for label in labels[1:])
    needed = 6 * (BODY * sum(lengths) + HEAD * trained) + ATTENTION * sum(n * n for n in lengths)
    seconds = sum(lengths) / line["tokens_per_second"]
    assert line["mfu"] == pytest.approx(needed / (seconds * 1e9), rel=1e-9)


def test_a_device_that_is_not_known_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(utilisation, "peak_rate", lambda *_: None)
    made = tiny.trainer(tiny.build("Llama"), tmp_path, tiny.examples(16))
    made.train()
    assert not [line for line in made.state.log_history if "mfu" in line]
    assert caplog.text.count("mfu is not logged") == 1
    assert utilisation_of(made.model, made.head, made.args) is None
