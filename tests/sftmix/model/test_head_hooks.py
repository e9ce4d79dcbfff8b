"""Hooks, wrappers and parametrisations of the head: heeded exactly, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import PreTrainedModel

from sftmix.model.head import HeadAdapter
from tests.sftmix import tiny

Change = Callable[[PreTrainedModel], object]


def halve(module: nn.Module, args: Any, output: Any) -> Any:
    return output * 0.5


def halve_in_place(module: nn.Module, args: Any, output: Any) -> None:
    (output if isinstance(output, Tensor) else output[-1]).mul_(0.5)


def halve_in_training(module: nn.Module, args: Any, output: Any) -> Any:
    return output if not module.training else tuple(one * 0.5 for one in output)


def halve_logits(module: nn.Module, args: Any, output: Any) -> Any:
    output.logits = output.logits * 0.5
    return output


def copied(module: nn.Module, args: Any, output: Any) -> Any:
    return type(output)(*output) if isinstance(output, tuple) else output


def same_gradient(module: nn.Module, *gradients: Any) -> None:
    pass


REFUSED: dict[str, Change] = {
    "forward": lambda model: model.lm_head.register_forward_hook(halve),
    "in place": lambda model: model.lm_head.register_forward_hook(halve_in_place),
    "in training": lambda model: model.lm_head.register_forward_hook(halve_in_training),
    "another object": lambda model: model.lm_head.register_forward_hook(copied),
    "backward": lambda model: model.lm_head.register_full_backward_hook(same_gradient),
    "before backward": lambda model: model.lm_head.register_full_backward_pre_hook(same_gradient),
    "with keywords": lambda model: model.lm_head.register_forward_hook(
        lambda module, args, kwargs, output: output * 0.5, with_kwargs=True
    ),
    "model": lambda model: model.register_forward_hook(halve_logits),
    "model, backward": lambda model: model.register_full_backward_hook(same_gradient),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_hooks_that_would_change_the_loss_are_refused(kind: str) -> None:
    model = tiny.build("Llama")
    REFUSED[kind](model)
    where = "LlamaForCausalLM" if kind.startswith("model") else "lm_head"
    with pytest.raises(ValueError, match=f"^model: a .*hook on {where} would see the loss instead"):
        HeadAdapter(model)
    assert "forward" not in model.__dict__
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("kind", ["forward", "backward", "model"])
def test_hooks_that_come_after_the_trainer_are_refused(kind: str, tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.build("Llama"), tmp_path, tiny.examples(8), max_steps=1)
    REFUSED[kind](trainer.model)
    with pytest.raises(ValueError, match=r"^model: a .*hook on .* would see the loss instead"):
        trainer.train()


@pytest.mark.parametrize("kind", ["forward", "backward", "before backward", "with keywords"])
def test_the_models_own_logits_pass_by_the_heads_hooks(kind: str, tmp_path: Path) -> None:
    """With ``--head logits`` they see logits, as they do without this trainer."""
    model = tiny.build("Llama")
    REFUSED[kind](model)
    train_alike(model, tmp_path, head="logits")


def scale_by_weight_norm(model: PreTrainedModel) -> None:
    parametrizations.weight_norm(model.lm_head)


HEEDED: dict[str, Change] = {
    "before the head": lambda model: model.lm_head.register_forward_pre_hook(
        lambda module, args: (args[0] * 0.5,)
    ),
    "final norm": lambda model: model.model.norm.register_forward_hook(halve),
    "before the final norm": lambda model: model.model.norm.register_forward_pre_hook(
        lambda module, args: (args[0] + 0.25,)
    ),
    "looks only": lambda model: model.lm_head.register_forward_hook(lambda *_: None),
    "layer": lambda model: model.model.layers[0].mlp.register_forward_hook(halve),
    "weight norm": scale_by_weight_norm,
}


@pytest.mark.parametrize("kind", HEEDED)
def test_hooks_before_the_head_train_as_they_do_alone(kind: str, tmp_path: Path) -> None:
    model = tiny.build("Llama")
    HEEDED[kind](model)
    train_alike(model, tmp_path)


def train_alike(model: PreTrainedModel, folder: Path, **options: Any) -> None:
    """The loss and the gradients of a batch are those of the model's own logits."""
    made = tiny.trainer(model, folder, tiny.examples(4), method="ntp", **options)
    batch = next(iter(made.get_train_dataloader()))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1)[batch["rows"]], batch["targets"])
    expected.backward()
    own = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    loss = made.compute_loss(model, batch)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert tiny.relative_difference(loss, expected) <= 1e-6
    for name, weight in model.named_parameters():
        assert tiny.relative_difference(weight.grad, own[name]) <= 1e-5, name


def test_a_hook_that_hangs_on_where_a_row_stands_is_refused() -> None:
    model = tiny.build("Llama")

    def first_alone(module: nn.Module, args: Any) -> Any:
        scale = torch.ones(args[0].shape[-2], 1)
        scale[0] = 0.5
        return (args[0] * scale,)

    model.lm_head.register_forward_pre_hook(first_alone)
    with pytest.raises(ValueError, match=r"^model: the logits of LlamaForCausalLM are not"):
        HeadAdapter(model)


class Wrapper(nn.Module):
    """Holds a head and is called in its place."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.head(hidden) * 0.5
        return output


class Halved(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) * 0.5


def test_a_wrapped_head_is_refused(tmp_path: Path) -> None:
    model = tiny.build("Llama")
    model.lm_head = Wrapper(model.lm_head)
    with pytest.raises(ValueError, match=r"with a linear LM head, got .* with Wrapper; --head log"):
        HeadAdapter(model)
    model = tiny.build("Llama")
    head = Halved(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    with pytest.raises(ValueError, match=r"^model: the logits of .*; --head logits goes"):
        HeadAdapter(model)
    train_alike(model, tmp_path, head="logits")


IGNORED = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


@IGNORED
def test_hooks_on_an_adapters_wrapper_are_refused() -> None:
    wrapped = peft.get_peft_model(tiny.build("Llama"), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    wrapped.register_forward_hook(halve_logits)
    with pytest.raises(
        ValueError, match=r"hook on PeftModelForCausalLM would see the loss instead"
    ):
        HeadAdapter(wrapped)


@IGNORED
def test_adaption_prompts_are_refused_by_name() -> None:
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny.build("Llama"), config)
    with pytest.raises(ValueError, match=r"^model: PEFT's AdaptionPrompt "):
        HeadAdapter(model)


class PastIt(nn.Module):
    """Calls the forward that the model had when it was wrapped."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.forward = model, model.forward

    def get_base_model(self) -> PreTrainedModel:
        return self.model

    peft_config: dict[str, Any] = {}  # noqa: RUF012
    active_peft_config = peft.LoraConfig()


def test_a_wrapper_that_calls_another_forward_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^model: PastIt does not call the forward of Llama"):
        HeadAdapter(PastIt(tiny.build("Llama")))
