"""The head adapter finds what a model's logits are made of, and refuses what it cannot express."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
)

from sftmix.model.head import HeadAdapter
from sftmix.model.probe import CHECKED, added
from sftmix.pairs.collator import PairedCollator
from tests.sftmix import tiny

EXPECTED = {
    "Llama": (1.0, None, False),
    "Qwen3": (1.0, None, False),
    "Gemma2": (1.0, 0.5, False),
    "Cohere": (0.25, None, False),
    "Granite": (1 / 3.0, None, False),
    "Phi": (1.0, None, True),
    "GPT2": (1.0, None, False),
}


def batch_of(number: int = 4) -> dict[str, Tensor]:
    return PairedCollator(0)(list(tiny.examples(number)))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_close_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert tiny.relative_difference(found[name], gradient) <= 1e-5, name


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_scale_softcap_and_bias_are_found(family: str) -> None:
    model = tiny.build(family)
    adapter = HeadAdapter(model)
    scale, softcap, has_bias = EXPECTED[family]
    assert adapter.options == {"logit_scale": pytest.approx(scale, rel=1e-15), "softcap": softcap}
    assert (adapter.head.bias is not None) == has_bias
    assert adapter.head is model.get_output_embeddings()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_ntp_is_the_models_own_loss(family: str, tmp_path: Path) -> None:
    own = tiny.build(family)
    batch = batch_of()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    own_loss = own(**inputs).loss
    own_loss.backward()
    model = tiny.build(family)
    made = tiny.trainer(model, tmp_path, tiny.examples(4), method="ntp")
    loss = made.compute_loss(model, batch)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert tiny.relative_difference(loss, own_loss) <= 1e-5
    assert_close_gradients(gradients(model), gradients(own))


def test_the_tied_weight_gets_both_gradients() -> None:
    model = tiny.build("GPT2")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "transformer.wte.weight" in dict(model.named_parameters())


# The newer name is not in every version of transformers that the project allows.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPT2"])
def test_gradient_checkpointing_gives_the_same_gradients(family: str, tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny.build(family)
        made = tiny.trainer(model, tmp_path, tiny.examples(4))
        batch = next(iter(made.get_train_dataloader()))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        loss = made.compute_loss(model, batch)
        assert isinstance(loss, Tensor)
        loss.backward()
        found.append(gradients(model))
    assert tiny.same(*found)


def test_calls_without_a_function_are_unchanged() -> None:
    batch = batch_of()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    model = tiny.build("Gemma2")
    before = model(**inputs)
    HeadAdapter(model)
    after = model(**inputs)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)
    assert type(before) is type(after)


def test_generation_is_unchanged_with_padding_on_the_left() -> None:
    model = tiny.build("Llama").eval()
    prompts = torch.tensor([[0, 0, 0, 5, 6], [9, 8, 7, 6, 5]])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    # Without a mask, generate makes one from the padding where forward's signature has one.
    before = model.generate(prompts, **options)
    adapter = HeadAdapter(model)
    assert torch.equal(model.generate(prompts, **options), before)
    parameters = inspect.signature(model.forward).parameters
    adapter.detach()
    assert inspect.signature(model.forward).parameters.keys() <= parameters.keys()


def test_only_the_instance_changes_and_detach_undoes_it() -> None:
    class_forward, linear_forward = LlamaForCausalLM.forward, nn.Linear.forward
    model, other = tiny.build("Llama"), tiny.build("Llama")
    adapter = HeadAdapter(model)
    assert "forward" in model.__dict__
    assert "forward" in model.lm_head.__dict__
    assert LlamaForCausalLM.forward is class_forward
    assert nn.Linear.forward is linear_forward
    assert "forward" not in other.__dict__
    assert "forward" not in other.lm_head.__dict__
    adapter.detach()
    assert model.__dict__.keys() == other.__dict__.keys()
    assert model.lm_head.__dict__.keys() == other.lm_head.__dict__.keys()
    # Llama's forward swallows unknown keywords, so that logits come back instead of a result.
    tokens = torch.tensor([[3, 4]])
    assert hasattr(model(tokens, head_function=lambda *_: 1), "logits")


def test_the_function_sees_the_chosen_rows_of_what_the_head_reads() -> None:
    model = tiny.build("Phi").eval()
    tokens = torch.arange(3, 15).reshape(2, 6)
    expected = model(tokens).logits.reshape(-1, tiny.VOCABULARY)
    HeadAdapter(model)

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert weight is model.lm_head.weight
        return torch.nn.functional.linear(hidden, weight, bias)

    rows = torch.tensor([11, 0, 5])
    found = model(tokens, rows=rows, head_function=logits)
    assert tiny.relative_difference(found.value, expected[rows]) <= 1e-6
    assert found.router_loss is None
    every_row = model(tokens, head_function=logits).value
    assert tiny.relative_difference(every_row, expected) <= 1e-6


def test_checking_keeps_the_mode_and_the_random_state() -> None:
    for training in (True, False):
        model = tiny.build("GPT2", resid_pdrop=0.5, embd_pdrop=0.5).train(training)
        state = torch.random.get_rng_state()
        HeadAdapter(model)
        assert all(module.training == training for module in model.modules())
        assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_low_precision_is_accepted(family: str, dtype: torch.dtype) -> None:
    HeadAdapter(tiny.build(family).to(dtype))


class Changed(LlamaForCausalLM):
    """A Llama whose logits are ``change`` of those its config describes."""

    def change(self, logits: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = self.change(output.logits)
        return output


class ShiftsOne(Changed):
    def change(self, logits: Tensor) -> Tensor:
        return logits + torch.nn.functional.one_hot(torch.tensor(5), logits.shape[-1])


class BreaksOne(Changed):
    def change(self, logits: Tensor) -> Tensor:
        return logits.clone().index_fill_(-1, torch.tensor([7]), float("nan"))


class Clamps(Changed):
    def change(self, logits: Tensor) -> Tensor:
        return logits.clamp(max=2)


class CutsOff(Changed):
    def change(self, logits: Tensor) -> Tensor:
        return logits[..., :-1]


class Learns(Changed):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.temperature = nn.Parameter(torch.ones(()))

    def change(self, logits: Tensor) -> Tensor:
        return logits * self.temperature


class Multiplies(Changed):
    def change(self, logits: Tensor) -> Tensor:
        return logits * 1.001


class Caps(Changed):
    def change(self, logits: Tensor) -> Tensor:
        return 3 * torch.tanh(logits / 3)


class ScalesBefore(LlamaForCausalLM):
    """A Llama that scales what its head reads, as MiniCPM does."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.register_forward_hook(self.scale)

    def scale(self, module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state / 3
        return output


@pytest.mark.parametrize("cls", [ShiftsOne, Clamps, CutsOff, Learns])
def test_other_logits_are_refused(cls: type[Changed]) -> None:
    model = cls(tiny.build("Llama").config)
    with pytest.raises(ValueError, match=f"^model: .*{cls.__name__} .*--head logits"):
        HeadAdapter(model)
    assert "forward" not in model.__dict__
    assert "forward" not in model.lm_head.__dict__


@pytest.mark.parametrize("vocabulary", [49_152, 262_144])
def test_a_loss_over_a_large_vocabulary_adds_nothing(vocabulary: int) -> None:
    """A confident model's float32 loss is off by 1e-5 to 1e-4 of itself: SmolLM2's was refused."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(1, CHECKED, vocabulary, generator=generator)
    labels = torch.zeros(1, CHECKED, dtype=torch.int64)
    logits[..., 0] = logits.max() - 1
    for more in (0.0, 1e-3):
        loss = nn.functional.cross_entropy(logits[0, :-1], labels[0, :-1]) + more
        extra, allowed = added(SimpleNamespace(logits=logits, loss=loss), labels, 0.0)
        assert (abs(extra) <= allowed) == (more == 0)


def test_logits_that_are_no_numbers_are_refused_for_that() -> None:
    model = BreaksOne(tiny.build("Llama").config)
    with pytest.raises(ValueError, match=r"^model: 8 of 512 of its logits are not numbers"):
        HeadAdapter(model)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("cls", [ShiftsOne, Clamps, CutsOff, Learns, Multiplies, Caps])
def test_any_logits_train_through_the_models_own(cls: type[Changed], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = cls(tiny.build("Llama").config), batch_of()
    batch["labels"][batch["labels"] == tiny.VOCABULARY - 1] = 3
    batch["targets"][batch["targets"] == tiny.VOCABULARY - 1] = 3
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1)[batch["rows"]], batch["targets"]
    )
    expected.backward()
    own = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    made = tiny.trainer(model, tmp_path, tiny.examples(4), method="ntp", head="logits")
    loss = made.compute_loss(model, batch)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert tiny.relative_difference(loss, expected) <= 1e-6
    assert_close_gradients(gradients(model), own)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Multiplies, {"logit_scale": 1.001, "softcap": None}),
        (Caps, {"logit_scale": 1.0, "softcap": 3.0}),
        (ScalesBefore, {"logit_scale": 1.0, "softcap": None}),
    ],
)
def test_logits_of_no_known_config_are_understood(
    cls: type[LlamaForCausalLM], options: dict[str, Any]
) -> None:
    adapter = HeadAdapter(cls(tiny.build("Llama").config))
    assert adapter.logit_scale == pytest.approx(options["logit_scale"], rel=1e-15)
    assert adapter.softcap == options["softcap"]


class CallsTwice(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        super().forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


class AddsToItsLoss(LlamaForCausalLM):
    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        output = super().forward(*args, labels=labels, **kwargs)
        if labels is not None:
            output.loss = output.loss + 1e-4 * output.logits.logsumexp(-1).square().mean()
        return output


@pytest.mark.parametrize("head", ["fused", "logits"])
@pytest.mark.parametrize(
    ("cls", "message"),
    [(CallsTwice, "to call its head lm_head once, got 2"), (AddsToItsLoss, "the loss of .* adds")],
)
def test_what_no_head_allows_is_refused(
    cls: type[LlamaForCausalLM], message: str, head: str
) -> None:
    model = cls(tiny.build("Llama").config)
    with pytest.raises(ValueError, match=message):
        HeadAdapter(model, head)
    assert type(model.lm_head) is nn.Linear


def test_a_quantised_head_is_refused() -> None:
    model = tiny.build("Llama")
    packed = torch.zeros(tiny.VOCABULARY, 16, dtype=torch.uint8)
    model.lm_head.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match="got Linear in uint8; leave the head out of the quant"):
        HeadAdapter(model)


class Packed(nn.Linear):
    """Has its weight in bytes and unpacks them when it is called."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ (self.weight.to(hidden.dtype) / 100).T


def test_a_quantised_head_goes_by_its_logits() -> None:
    model = tiny.build("Llama")
    head = Packed(16, tiny.VOCABULARY, bias=False)
    bytes_ = torch.randint(-99, 99, (tiny.VOCABULARY, 16), dtype=torch.int8)
    head.weight = nn.Parameter(bytes_, requires_grad=False)
    model.set_output_embeddings(head)
    assert HeadAdapter(model, "logits").weight.dtype == torch.int8


def not_causal() -> list[PreTrainedModel]:
    bert = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    llama = tiny.build("Llama").config
    masked = BertForMaskedLM(bert)
    with torch.no_grad():  # tokens of a random one hardly look at each other
        for weight in masked.parameters():
            weight.mul_(4)
    return [BertModel(bert), masked, LlamaModel(llama), LlamaForSequenceClassification(llama)]


@pytest.mark.parametrize("model", not_causal(), ids=lambda model: type(model).__name__)
def test_models_that_are_not_causal_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"^model: "):
        HeadAdapter(model)


def test_a_deep_copy_runs_its_own_weights() -> None:
    model, batch = tiny.build("Llama"), batch_of()
    HeadAdapter(model)
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data.zero_()
    assert not copied(input_ids=batch["input_ids"]).logits.any()
    hidden = copied(
        input_ids=batch["input_ids"], rows=batch["rows"], head_function=lambda h, w, b: (h, w)
    )
    assert not hidden.value[0].any()
    assert not hidden.value[1].any()
    assert model(input_ids=batch["input_ids"]).logits.any()
