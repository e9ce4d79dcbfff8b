"""A gradient, a loss or a weight that is not finite ends training before it is used or saved."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from sftmix.runs.checkpoints import fault, list_checkpoints
from sftmix.training.config import SFTMixConfig
from sftmix.training.trainer import SFTMixTrainer
from tests.sftmix import tiny

LAST = 5  # of twenty examples, four at a time
LOGGED = ("loss", "step", "grad_norm")


class Weights(TrainerCallback):
    """Keeps the trained weights after each step."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after.append(tiny.weights(kwargs["model"]))


def make(folder: Path, model: Any = None, **changes: Any) -> tuple[SFTMixTrainer, Weights]:
    """A checkpoint at every step, of which the newest stays."""
    kept = Weights()
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, **changes}
    made = tiny.trainer(
        model or tiny.build("Llama"), folder, tiny.examples(20), callbacks=[kept], **options
    )
    return made, kept


def spoil(made: SFTMixTrainer, step: int, value: float, name: str = "up_proj") -> None:
    """Have one gradient be ``value`` in a step, whatever the loss is."""
    weights = made.model.named_parameters()
    weight = next(own for path, own in weights if name in path and own.requires_grad)

    def hook(gradient: Tensor) -> Tensor:
        return gradient.fill_(value) if made.state.global_step + 1 == step else gradient

    weight.register_hook(hook)


def refused(made: SFTMixTrainer, step: int, examples: int, **resumed: Any) -> str:
    """The message; it names the step and so many examples that there are."""
    with pytest.raises(FloatingPointError) as caught:
        made.train(**resumed)
    found = re.search(
        rf"at step {step} .*examples \[([\d, ]+)\]; the model was not updated$", str(caught.value)
    )
    assert found, caught.value
    numbers = [int(number) for number in found[1].split(",")]
    assert len(set(numbers)) == examples
    assert set(numbers) <= set(made.examples["id"])
    return str(caught.value)


@pytest.mark.parametrize(
    ("step", "value", "changes"),
    [
        (3, float("nan"), {}),
        (3, float("inf"), {"method": "ntp"}),
        (LAST, float("nan"), {"max_grad_norm": 0.0}),
        (1, float("-inf"), {"max_grad_norm": 0.0}),
        (2, float("nan"), {"gradient_accumulation_steps": 2}),
        (3, float("nan"), {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}),
        (2, float("nan"), {"head": "logits"}),
    ],
    ids=["nan", "inf", "last", "first", "accumulated", "last accumulated", "logits"],
)
def test_a_gradient_that_is_not_finite_stops_before_the_step(
    step: int, value: float, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Accumulated, the window's examples; the last window has one micro-batch."""
    made, kept = make(tmp_path, **changes)
    before = tiny.weights(made.model)
    spoil(made, step, value)
    windows = changes.get("gradient_accumulation_steps", 1)
    message = refused(made, step, 4 if step == 3 and windows == 2 else 4 * windows)
    assert message.startswith(f"the norm of the gradients is {'nan' if value != value else ''}")
    assert len(kept.after) == step - 1
    assert tiny.same(tiny.weights(made.model), kept.after[-1] if kept.after else before)
    found = list_checkpoints(tmp_path)
    assert [path.name for path in found] == [f"checkpoint-{step - 1}"] * (step > 1)
    assert all(fault(path) is None for path in found)


def test_the_run_goes_on_from_the_last_good_checkpoint(tmp_path: Path) -> None:
    whole, _ = make(tmp_path / "whole")
    whole.train()
    broken, _ = make(tmp_path / "broken")
    spoil(broken, 3, float("nan"))
    refused(broken, 3, 4)
    resumed, _ = make(tmp_path / "broken")
    resumed.train(resume_from_checkpoint=True)
    assert tiny.losses(resumed, *LOGGED) == tiny.losses(whole, *LOGGED)
    assert tiny.same(tiny.weights(resumed.model), tiny.weights(whole.model))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_looked_at_alike(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny.build("Llama"), peft.LoraConfig(task_type="CAUSAL_LM", r=4))
    made, kept = make(tmp_path, model)
    spoil(made, 2, float("nan"), "lora_A")
    refused(made, 2, 4)
    assert tiny.same(tiny.weights(made.model), kept.after[-1])


def test_a_step_that_the_scaler_leaves_out_is_no_fault(tmp_path: Path) -> None:
    """fp16 needs a GPU; its scaler, which halves what is too large, is asked all the same."""
    made, _ = make(tmp_path)
    ids = torch.tensor([10, 11])
    made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    made.unchecked = [(torch.tensor(1.0), ids)]
    made._check_step(torch.tensor(float("inf")))
    # Not even the smallest scale has helped.
    made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    made.unchecked = [(torch.tensor(1.0), ids)]
    with pytest.raises(FloatingPointError, match=r"norm of the gradients is inf at step 1"):
        made._check_step(torch.tensor(float("inf")))
    # A loss is not scaled.
    made.accelerator.scaler = torch.amp.GradScaler("cpu")
    made.unchecked = [(torch.tensor(float("nan")), ids)]
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 1, examples \[10, 11\]"):
        made._check_step(torch.tensor(float("nan")))


def test_an_optimizer_that_does_not_wait_is_said(tmp_path: Path) -> None:
    made, _ = make(tmp_path)
    assert made._unharmed() == "the model was not updated"
    made.args.optim = "adalomo"
    assert (
        made._unharmed() == "--optim adalomo updates weights in backward: the model may be spoilt"
    )


class SpoilWeight(TrainerCallback):
    """An update that overflows, in the optimizer's step itself."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                kwargs["model"].lm_head.weight[3, 2] = self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_never_saved(value: float, tmp_path: Path) -> None:
    made, _ = make(tmp_path)
    made.add_callback(SpoilWeight(3, value))
    with pytest.raises(FloatingPointError, match=r"lm_head\.weight is not finite after step 3: "):
        made.train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert not list(tmp_path.glob(".tmp-*"))


def test_the_step_after_says_that_the_weight_was_spoilt_before(tmp_path: Path) -> None:
    made, _ = make(tmp_path, save_strategy="no")
    made.add_callback(SpoilWeight(3, float("nan")))
    with pytest.raises(
        FloatingPointError, match=r"at step 4, .*, but lm_head\.weight was not finite before this"
    ):
        made.train()
    with pytest.raises(FloatingPointError, match=r"lm_head\.weight .*; nothing was written;"):
        made.refuse_weights("nothing was written")


def test_an_update_that_overflows_bfloat16(tmp_path: Path) -> None:
    """At the last step, where no loss tells."""
    data, model = tiny.examples(8), tiny.build("Llama").to(torch.bfloat16)
    made = tiny.trainer(
        model, tmp_path, data, max_steps=1, learning_rate=3e38, warmup_steps=0, optim="sgd",
        save_strategy="steps", save_steps=1, max_grad_norm=1e9, lr_scheduler_type="constant",
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    with pytest.raises(FloatingPointError, match="is not finite after step 1"):
        made.train()
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_train_epochs": 0}, "num_train_epochs: expected a finite number above 0, got 0"),
        ({"num_train_epochs": -1}, "num_train_epochs: .*got -1, which trains nothing"),
        ({"num_train_epochs": float("inf")}, "num_train_epochs: .*got inf, which trains without"),
        ({"num_train_epochs": float("nan")}, "num_train_epochs: .*got nan"),
        ({"max_steps": 0}, "max_steps: expected at least 1, or -1 .*got 0, which trains nothing"),
        ({"max_steps": -2}, "max_steps: .*got -2"),
        ({"save_minutes": -1.0}, "save_minutes: expected a number of at least 0, got -1"),
        ({"save_minutes": float("nan")}, "save_minutes: .*got nan"),
    ],
)
def test_what_trains_nothing_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        SFTMixConfig(output_dir=str(tmp_path), use_cpu=True, **changes)
    SFTMixConfig(output_dir=str(tmp_path), use_cpu=True, num_train_epochs=0, max_steps=1)
    SFTMixConfig(output_dir=str(tmp_path), use_cpu=True, num_train_epochs=0.01)


def test_a_model_without_weights_to_train_is_refused(tmp_path: Path) -> None:
    made = tiny.trainer(tiny.build("Llama"), tmp_path, tiny.examples(8), method="ntp")
    made.model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^model: .*all frozen"):
        made.train()


def test_a_method_without_a_loss_never_reaches_training(tmp_path: Path) -> None:
    """Whether a script changes the options before the trainer is made or after it."""
    unknown = r"^method: expected sftmix, ntp, .*; got 'newest'$"
    for head in ("fused", "logits"):
        options = tiny.config(tmp_path, method="ntp", head=head)
        made = tiny.trainer(
            tiny.build("Llama"), tmp_path, tiny.examples(8), method="ntp", head=head
        )
        made.args.method = options.method = "newest"
        with pytest.raises(ValueError, match=unknown):
            made.train()
        with pytest.raises(ValueError, match=unknown):
            tiny.SFTMixTrainer(made.model, options, train_dataset=tiny.examples(8))
