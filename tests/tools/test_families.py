"""The families of causal language models that the trainer is right for, and faults it would see."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import Tensor, nn

from sftmix.model.head import HeadAdapter
from sftmix.training.trainer import SFTMixTrainer
from tests.sftmix import tiny
from tools import families

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
MOST_USED = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2"),
    *("gemma3_text", "phi", "phi3", "granite", "granitemoe", "cohere", "olmo2", "olmoe"),
    *("falcon_h1", "gpt2", "gpt_neox", "gptj", "opt", "bloom", "smollm3", "stablelm"),
    *("starcoder2", "deepseek_v3", "gpt_oss", "mamba", "minicpm3", "bert", "bart"),
)
# Fallbacks of state-space models, and the loss of GPT-2's family: nothing that changes a result.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("name", MOST_USED)
def test_a_family_is_right(name: str) -> None:
    if name not in families.known():
        pytest.skip(f"needs transformers {families.needed(name, router=True)}")
    family = families.compare(name)
    assert families.is_as_expected(family), family


def test_what_is_not_causal_is_refused() -> None:
    family = families.compare("cpmant")
    assert family.verdict.startswith("refused: model: expected a causal language model")
    assert families.is_as_expected(family)
    assert not families.is_as_expected(family._replace(name="llama"))


def test_the_page_lists_what_the_code_knows() -> None:
    rows = re.findall(r"^\| (\S+) \| (\w+) \|.*\| (right|refused: .*) \|$", PAGE.read_text(), re.M)
    assert [name for name, _, _ in rows] == list(families.FAMILIES)
    classes = families.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    known = [row for row in rows if row[0] in families.known()]
    assert [(name, classes[name]) for name, _, _ in known] == [row[:2] for row in known]
    assert {name for name, _, verdict in rows if verdict != "right"} == families.REFUSED
    assert set(MOST_USED) < set(families.FAMILIES)
    assert PAGE.read_text().startswith(families.HEADING)
    assert PAGE.read_text().endswith(f"\n\n{families.since()}\n")


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "docs" / "models.md"
    assert families.main(["--markdown", str(page), "cohere", "cpmant"]) == 0
    assert "| cohere | CohereForCausalLM | tied, scale 0.0625 |" in page.read_text()
    assert "not as they should be: none" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"^t5: expected a causal"):
        families.main(["t5"])


def test_a_wrong_family_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = families.Family("llama", "LlamaForCausalLM", "", 0.5, 1.5, "WRONG")
    monkeypatch.setattr(families, "compare", lambda name: wrong)
    assert families.main(["llama"]) == 1


def test_a_wrong_scale_is_noticed() -> None:
    model = families.build("granite")
    head = HeadAdapter(model)
    head.logit_scale *= 1 + 1e-4
    loss, gradient = families.errors(model, head, shifted=False)
    assert loss > 1
    assert gradient > 1


def test_a_dropped_bias_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.build("phi")
    head = HeadAdapter(model)
    linear = model.lm_head
    forward = linear.__dict__["forward"].__func__

    def without_bias(module: nn.Linear, hidden: Tensor, head_function: Any = None) -> Any:
        function = head_function and (lambda h, weight, bias: head_function(h, weight, None))
        return forward(module, hidden, function)

    monkeypatch.setitem(linear.__dict__, "forward", without_bias.__get__(linear))
    loss, gradient = families.errors(model, head, shifted=False)
    assert loss > 1
    assert gradient > 1


@pytest.mark.parametrize("factor", [0.0, 1.01])
def test_a_lost_or_wrong_router_loss_is_noticed(factor: float) -> None:
    model = families.build("mixtral")
    head = HeadAdapter(model)
    head.router_coefficient *= factor
    loss, gradient = families.errors(model, head, shifted=False)
    assert max(loss, gradient) > 1


def test_the_routers_loss_is_the_models_choice() -> None:
    model = families.build("olmoe", router_aux_loss_coef=0.125)
    adapter = HeadAdapter(model)
    assert adapter.router_coefficient == 0.125
    model.config.output_router_logits = False
    assert HeadAdapter(model).router_coefficient == 0


class Gradients(transformers.TrainerCallback):
    """Those of the first step, before the optimizer's step."""

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.found = {
            name: parameter.grad.clone()
            for name, parameter in kwargs["model"].named_parameters()
            if parameter.grad is not None
        }


def trained(coefficient: float, head: str, output: Path) -> tuple[SFTMixTrainer, Gradients]:
    """One step of two micro-batches of a mixture of experts."""
    model = families.build("mixtral", router_aux_loss_coef=coefficient)
    made = tiny.trainer(
        model,
        output,
        tiny.examples(8),
        callbacks=[taken := Gradients()],
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        max_grad_norm=0.0,
        head=head,
    )
    made.train()
    return made, taken


@pytest.mark.parametrize("head", ["fused", "logits"])
def test_the_routers_loss_is_a_mean_over_micro_batches(head: str, tmp_path: Path) -> None:
    coefficient = 8.0
    made, taken = trained(coefficient, head, tmp_path / "with")
    without, without_taken = trained(0.0, head, tmp_path / "without")
    model = families.build("mixtral", router_aux_loss_coef=coefficient).train()
    batches = list(made.get_train_dataloader())[:2]
    losses = [
        model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).aux_loss
        for batch in batches
    ]
    (coefficient * sum(losses) / 2).backward()
    [(loss, ntp, mixup, router)] = tiny.losses(
        made, "loss", "ntp_loss", "mixup_loss", "router_loss"
    )
    assert router == pytest.approx(float(sum(losses).detach()) / 2, rel=1e-6)
    assert loss == pytest.approx(ntp + 0.2 * mixup + coefficient * router, rel=1e-6)
    assert tiny.losses(without, "ntp_loss", "mixup_loss") == [(ntp, mixup)]
    assert "router_loss" not in without.state.log_history[0]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            expected = without_taken.found[name] + parameter.grad
            assert tiny.relative_difference(taken.found[name], expected) <= 1e-5, name
