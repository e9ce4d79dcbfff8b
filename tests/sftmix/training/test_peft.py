"""PEFT under the trainer: frozen, copied and adapted heads, and adapters that load again."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

import sftmix.training.loss
from sftmix.model.head import HeadAdapter
from sftmix.pairs.collator import PairedCollator
from sftmix.training.saving import save_final_model
from tests.sftmix import tiny

peft = pytest.importorskip("peft")

# What PEFT and the versions of transformers that the project allows say by themselves.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "`is_gradient_checkpointing` is deprecated:FutureWarning",
        ".*gradient_checkpointing.* is deprecated:FutureWarning",
        "Model has `tie_word_embeddings=True`:UserWarning",
        "Setting `save_embedding_layers` to `True`:UserWarning",
        "Could not find a config file in  - will assume:UserWarning",
    )
]
COPIED = {"modules_to_save": ["lm_head"]}
TIED = pytest.param(
    *("Gemma2", {**COPIED, "ensure_weight_tying": True}, "fused"),
    marks=pytest.mark.skipif(
        Version(peft.__version__) < Version("0.19"), reason="PEFT 0.18 makes no such model"
    ),
)
ON_HEAD = {"target_modules": ["q_proj", "lm_head"]}


def adapted(family: str = "Llama", **changes: Any) -> Any:
    """A model with a random LoRA, so that every gradient of it is there from the start."""
    # PEFT takes a tied head out of the list that it is given.
    options = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    options |= copy.deepcopy(changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(init_lora_weights=False, **options)
        return peft.get_peft_model(tiny.build(family), config).eval()


def batch_of() -> dict[str, Tensor]:
    return PairedCollator(0)(list(tiny.examples(4)))


def own_gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the model's own loss of ``labels=``."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    model(**inputs).loss.backward()
    return taken(model)


def taken(model: nn.Module) -> dict[str, Tensor]:
    """The gradients there are, taken away."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "not reentrant"])
@pytest.mark.parametrize(
    ("family", "changes", "head"),
    [
        ("Llama", {}, "fused"),
        ("Llama", COPIED, "fused"),
        ("Gemma2", COPIED, "fused"),
        TIED,
        ("Llama", ON_HEAD, "logits"),
    ],
    ids=["frozen", "copied", "copied-tied", "copied-kept-tied", "adapted"],
)
def test_gradients_are_those_of_the_models_own_loss(
    family: str, changes: dict[str, Any], head: str, checkpointing: str, tmp_path: Path
) -> None:
    model, batch = adapted(family, **changes), batch_of()
    truth = own_gradients(copy.deepcopy(model).double(), batch)
    plain = own_gradients(model, batch)
    made = tiny.trainer(model, tmp_path, tiny.examples(4), method="ntp", head=head)
    if checkpointing != "none":
        reentrant = checkpointing == "reentrant"
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()  # without dropout: LoRA's is 0
    loss = made.compute_loss(model, batch)
    assert isinstance(loss, Tensor)
    loss.backward()
    tiny.assert_gradients_in_budget("gradients", taken(model), plain, truth)


@pytest.mark.parametrize(("changes", "needed"), [({}, False), (COPIED, True)])
def test_a_frozen_heads_gradient_is_not_asked_for(
    changes: dict[str, Any], needed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, own = [], sftmix.training.loss.fused_sftmix_loss

    def spy(hidden: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        asked.append((hidden.requires_grad, weight.requires_grad))
        return own(hidden, weight, *args, **kwargs)

    monkeypatch.setattr(sftmix.training.loss, "fused_sftmix_loss", spy)
    model = adapted(**changes)
    made = tiny.trainer(model, tmp_path, tiny.examples(4), max_steps=1)
    made.train()
    assert asked == [(True, needed)]
    base = model.get_base_model().lm_head
    original = base.original_module if needed else base
    assert original.weight.grad is None
    assert not original.weight.requires_grad


def test_heads_that_peft_may_not_change_are_refused() -> None:
    with pytest.raises(ValueError, match="leave lm_head out of PEFT's target_modules; --head log"):
        HeadAdapter(adapted(**ON_HEAD))
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    for head in ("fused", "logits"):
        with pytest.raises(ValueError, match="virtual tokens"):
            HeadAdapter(peft.get_peft_model(tiny.build("Llama"), prompt), head)


@pytest.mark.parametrize("changes", [{}, COPIED], ids=["frozen", "copied"])
def test_disabled_and_merged_adapters_leave_their_logits(changes: dict[str, Any]) -> None:
    model, batch = adapted(**changes), batch_of()
    if changes:
        with torch.no_grad():
            model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
    HeadAdapter(model)

    def both() -> tuple[Tensor, Tensor]:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        found = model(**inputs, rows=batch["rows"], head_function=nn.functional.linear).value
        return found, model(**inputs).logits.flatten(0, 1)[batch["rows"]]

    with torch.no_grad():
        adapted_logits = both()
        with model.disable_adapter():
            plain_logits = both()
        model.merge_adapter()
        merged_logits = both()
    for found, expected in (adapted_logits, plain_logits, merged_logits):
        assert tiny.relative_difference(found, expected) <= 1e-6
    assert tiny.relative_difference(plain_logits[0], adapted_logits[0]) > 1e-3


@pytest.mark.parametrize(
    ("family", "changes", "head"),
    [
        ("Llama", {}, "fused"),
        ("Llama", COPIED, "fused"),
        ("Gemma2", COPIED, "fused"),
        TIED,
        ("Llama", ON_HEAD, "logits"),
    ],
    ids=["frozen", "copied", "copied-tied", "copied-kept-tied", "adapted"],
)
def test_a_trained_adapter_is_saved_and_loads_again(
    family: str, changes: dict[str, Any], head: str, tmp_path: Path
) -> None:
    model = adapted(family, **changes)
    made = tiny.trainer(
        model, tmp_path / "run", tiny.examples(4), max_steps=2, learning_rate=0.1, head=head
    )
    made.train()
    tokenizer: Any = SimpleNamespace(save_pretrained=lambda folder: None)
    save_final_model(made.accelerator.unwrap_model(made.model), tokenizer, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(tiny.build(family), tmp_path).eval()
    tokens = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        expected, found = (one(input_ids=tokens).logits for one in (model.eval(), loaded))
        before = tiny.build(family).eval()(input_ids=tokens).logits
    assert torch.equal(found, expected)
    assert not torch.equal(before, expected)
