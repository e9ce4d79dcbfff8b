"""Examples that the backbone reads one after another, and activations that lie on the host."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sftmix.model.head import HeadAdapter
from sftmix.model.layout_check import check_layout
from sftmix.model.one_by_one import saved_on_host
from sftmix.pairs.collator import PairedCollator
from sftmix.training.config import CHECKPOINTING
from sftmix.training.loss import batch_counts, batch_loss
from sftmix.training.trainer import SFTMixTrainer, make_collator
from tests.sftmix import tiny
from tests.sftmix.pairs.test_layouts import fresh
from tests.sftmix.training.test_methods import METHODS, dense_loss, flat_gradients, options_of
from tools import families

LENGTHS = (9, 5, 12, 7)


def examples() -> list[dict[str, Any]]:
    """Two pairs of uneven lengths."""
    rows = []
    for number, length in enumerate(LENGTHS):
        tokens = [3 + (7 * number + 5 * place) % 60 for place in range(length)]
        labels = [-100, -100, *tokens[2:]]
        rows.append({**tiny.named(tokens, labels), "lam": (0.3, 0.8)[number // 2]})
    return rows


def collated(model: PreTrainedModel, layout: str) -> dict[str, Any]:
    """The examples as a batch on the model's device."""
    batch = PairedCollator(0, layout=layout)(examples())
    return {name: x.to(model.device) if name != "parts" else x for name, x in batch.items()}


def run(model: PreTrainedModel, options: Any, head: HeadAdapter | None = None) -> Tensor:
    """The loss of the examples, read one by one; backward is yet to come."""
    batch = collated(model, "sequential")
    head = HeadAdapter(model) if head is None else head
    counts = batch_counts([batch], model.device)
    return batch_loss(model, head, batch, options, counts).loss


def checkpoint_layers(model: PreTrainedModel) -> None:
    """As Trainer does; older versions of transformers have another name for it."""
    name = f"{CHECKPOINTING}_enable"
    getattr(model, name)({"use_reentrant": False})


def watched(model: PreTrainedModel) -> tuple[list[int], list[Any]]:
    """The lengths that the first layer reads, and weak references to its outputs."""
    lengths: list[int] = []
    outputs: list[Any] = []

    def look(_: Any, inputs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        lengths.append(inputs[0].shape[1])
        outputs.append(weakref.ref(output))

    model.model.layers[0].register_forward_hook(look)
    return lengths, outputs


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("how", ["read again", "layers checkpointed", "offloaded"])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_those_of_all_together(
    method: str, how: str, device: str, tmp_path: Path
) -> None:
    models = [tiny.build("Llama").to(device) for _ in range(3)]
    options = tiny.config(tmp_path, layout="sequential", **options_of(method))
    if how != "read again":
        checkpoint_layers(models[0])
    models[0].train()
    saving = saved_on_host if how == "offloaded" else None
    loss = run(models[0], options, HeadAdapter(models[0], saving=saving))
    loss.backward()
    padded = collated(models[0], "padded")
    dense = [dense_loss(m, padded, method, None) for m in (models[1], models[2].double())]
    for one in dense:
        one.backward()
    tiny.assert_in_budget("loss", loss.reshape(1), dense[0].reshape(1), dense[1].reshape(1))
    tiny.assert_in_budget("gradients", *map(flat_gradients, models))


def test_only_the_last_example_keeps_its_activations(tmp_path: Path) -> None:
    """Backward goes from the last to the first, and makes each but the last anew by itself."""
    model = tiny.build("Llama")
    lengths, outputs = watched(model)
    head = HeadAdapter(model)
    lengths.clear(), outputs.clear()
    loss = run(model, tiny.config(tmp_path, mu=0.7), head)
    assert lengths == list(LENGTHS)
    assert [output() is not None for output in outputs] == [False, False, False, True]
    alive: list[int] = []
    model.model.layers[0].register_forward_hook(
        lambda *_: alive.append(sum(output() is not None for output in outputs))
    )
    loss.backward()
    assert lengths == [*LENGTHS, 12, 5, 9]
    # When one is read again, what was made of the others is gone.
    assert max(alive) == 1


def test_without_gradients_nothing_is_read_twice(tmp_path: Path) -> None:
    model = tiny.build("Llama")
    head = HeadAdapter(model)
    lengths, outputs = watched(model)
    with torch.no_grad():
        run(model, tiny.config(tmp_path), head)
    assert lengths == list(LENGTHS)
    assert not any(output() is not None for output in outputs)


def test_dropout_is_the_same_when_an_example_is_read_again(tmp_path: Path) -> None:
    """Held beside activations that were kept, on the host: bitwise."""
    found = []
    for saving in (None, saved_on_host):
        model = tiny.build("Llama", attention_dropout=0.4).train()
        head = HeadAdapter(model, saving=saving)
        torch.manual_seed(5)
        loss = run(model, tiny.config(tmp_path, mu=0.7), head)
        loss.backward()
        found.append((loss.detach(), flat_gradients(model)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


class Host:
    """A place for what is saved; counts what comes and goes."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.taken = 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
            yield

    def pack(self, tensor: Tensor) -> Tensor:
        self.shapes.append(tuple(tensor.shape))
        return tensor.clone()

    def unpack(self, tensor: Tensor) -> Tensor:
        self.taken += 1
        return tensor


def test_what_is_saved_on_the_host_is_the_layers_inputs(tmp_path: Path) -> None:
    """Not the head's, whose gradients are made in forward; and the loss is what it was."""
    found = []
    hosts: list[Any] = [None, Host()]
    for host in hosts:
        model = tiny.build("Llama").train()
        checkpoint_layers(model)
        loss = run(model, tiny.config(tmp_path, mu=0.7), HeadAdapter(model, saving=host))
        loss.backward()
        found.append((loss.detach(), flat_gradients(model)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    layers = model.config.num_hidden_layers
    hidden = [shape for shape in hosts[1].shapes if shape in [(1, n, 16) for n in LENGTHS]]
    # Each layer's input, and what the norm after the last one keeps.
    assert len(hidden) >= layers * len(LENGTHS)
    assert hosts[1].taken == len(hosts[1].shapes)
    largest = max(torch.Size(shape).numel() for shape in hosts[1].shapes)
    assert largest <= max(LENGTHS) * 16, "no weight, no logits"


def test_a_routers_loss_is_that_of_all_tokens(tmp_path: Path) -> None:
    """Not a mean over examples: their shares of the experts are counted together."""
    losses, gradients = [], []
    for layout, double in (("sequential", False), ("padded", False), ("padded", True)):
        model = families.build("mixtral")
        model = model.double() if double else model
        batch = collated(model, layout)
        counts, options = batch_counts([batch], model.device), tiny.config(tmp_path, mu=0.7)
        head = HeadAdapter(model, "logits" if double else "fused")
        loss = batch_loss(model, head, batch, options, counts)
        assert loss.router is not None
        loss.router.backward()
        losses.append(loss.router.reshape(1))
        gradients.append(model.model.layers[0].mlp.gate.weight.grad)
    tiny.assert_in_budget("router's loss", *losses)
    tiny.assert_in_budget("its gradient", *gradients)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_models_are_accepted(family: str) -> None:
    model = tiny.build(family)
    HeadAdapter(model)
    check_layout(model, "sequential")


def test_one_that_packing_refuses_is_read_one_by_one(tmp_path: Path) -> None:
    """Bloom tells positions by its mask."""
    model = fresh("BloomForCausalLM")
    model.transformer.h[0].mlp.hidden_dropout = 0.0
    HeadAdapter(model)
    check_layout(model, "sequential")
    loss = run(model.eval(), tiny.config(tmp_path, mu=0.7), HeadAdapter(model))
    truth = dense_loss(model, PairedCollator(0)(examples()), "sftmix", None)
    assert tiny.relative_difference(loss, truth) <= 4 * torch.finfo(torch.float32).eps


def counting() -> PreTrainedModel:
    """Its forward counts the tokens that it is given, and leaves the hidden states to it."""
    model = tiny.build("Llama")

    class Counting(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            places = torch.arange(input_ids.shape[1], device=input_ids.device)
            return super().forward((input_ids + places) % tiny.VOCABULARY, **kwargs)

    model.__class__ = Counting
    return model


def placing() -> PreTrainedModel:
    """Its forward tells the backbone the positions."""
    model = tiny.build("Llama")

    class Placing(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            places = torch.arange(input_ids.shape[1], device=input_ids.device)
            return super().forward(input_ids, **{**kwargs, "position_ids": places.unsqueeze(0)})

    model.__class__ = Placing
    return model


def opt() -> PreTrainedModel:
    return fresh("OPTForCausalLM", ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=64)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (opt, "expected OPTForCausalLM to call its backbone model once, got 0 calls"),
        (counting, "cannot take 'sequential' batches.*its logits are not those of each example"),
        (placing, "a model whose backbone is given only tokens, got position_ids too"),
    ],
    ids=["reads past its backbone", "counts on", "places"],
)
def test_models_that_cannot_are_refused_at_the_start(
    build: Callable[[], PreTrainedModel], message: str, tmp_path: Path
) -> None:
    options = tiny.config(tmp_path, layout="sequential")
    with pytest.raises(ValueError, match=message):
        SFTMixTrainer(
            model=build(),
            args=options,
            train_dataset=tiny.examples(8),
            data_collator=make_collator(None, options),
            confident=tiny.halves(8),
        )
