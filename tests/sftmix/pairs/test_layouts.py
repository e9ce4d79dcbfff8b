"""Every layout holds the same examples and the same plan, and gives the same loss and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from sftmix.model.head import HeadAdapter
from sftmix.model.layout_check import check_layout
from sftmix.pairs.collator import PairedCollator
from sftmix.pairs.layouts import LAYOUTS, Layout
from sftmix_kernels import fused_sftmix_loss
from sftmix_kernels.reference import sftmix_loss
from tests.sftmix import tiny

PADDING = 7
INPUTS = {
    "padded": "attention_mask",
    "padding_free": "position_ids",
    "packed": "position_ids",
    "sequential": "parts",
}

Result = tuple[Tensor, dict[str, Tensor]]

# Where the examples lie, and the plan


@st.composite
def some_pairs(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Pairs whose labels have gaps, perhaps one on the first token; no token comes twice."""
    batch: list[dict[str, Any]] = []
    for number in range(2 * draw(st.integers(1, 4))):
        kept = draw(st.lists(st.booleans(), min_size=2, max_size=9))
        kept[draw(st.integers(1, len(kept) - 1))] = True
        tokens = [100 * (number + 1) + place for place in range(len(kept))]
        labels = [token if keep else -100 for token, keep in zip(tokens, kept, strict=True)]
        batch.append({"lam": draw(st.floats(0, 1)), **tiny.named(tokens, labels)})
    return batch


def places(batch: list[dict[str, Any]], found: dict[str, Tensor]) -> list[list[int]]:
    """The slot of each token of each example, looked for; checks all that is not the plan."""
    flat = {name: found[name].flatten().tolist() for name in ("input_ids", "labels")}
    slots = [[flat["input_ids"].index(token) for token in one["input_ids"]] for one in batch]
    length = found["input_ids"].shape[1]
    read, known = [0] * len(flat["labels"]), [-100] * len(flat["labels"])
    for one, taken in zip(batch, slots, strict=True):
        assert taken == list(range(taken[0], taken[0] + len(taken)))
        assert taken[0] // length == taken[-1] // length
        for position, slot in enumerate(taken):
            read[slot] = position if "position_ids" in found else 1
            if position > 0 or slot % length == 0:
                known[slot] = one["labels"][position]
    assert flat["labels"] == known
    if "parts" in found:
        assert found["parts"] == tuple(len(taken) for taken in slots)
    else:
        given = found.get("position_ids", found.get("attention_mask"))
        assert given is not None
        assert given.flatten().tolist() == read
    real = sum(len(taken) for taken in slots)
    assert flat["input_ids"].count(PADDING) == len(read) - real
    assert found["lengths"].tolist() == [len(taken) for taken in slots]
    return slots


def expected_plan(batch: list[dict[str, Any]], slots: list[list[int]]) -> dict[str, list[Any]]:
    """Written as the method says it, a token at a time."""
    names = ("rows", "targets", "owner", "pair_c", "pair_u", "lam")
    plan: dict[str, list[Any]] = {name: [] for name in names}
    responses: list[list[int]] = []
    for number, one in enumerate(batch):
        responses.append([])
        for position in range(1, len(one["labels"])):
            if one["labels"][position] != -100:
                responses[number].append(len(plan["rows"]))
                plan["rows"].append(slots[number][position - 1])
                plan["targets"].append(one["labels"][position])
                plan["owner"].append(number)
    for c in range(0, len(batch), 2):
        for token_c, token_u in zip(responses[c], responses[c + 1], strict=False):
            plan["pair_c"].append(token_c)
            plan["pair_u"].append(token_u)
            plan["lam"].append(np.float32(batch[c]["lam"]))
    return plan


@given(some_pairs(), st.sampled_from(LAYOUTS), st.sampled_from([1, 4]), st.sampled_from([None, 24]))
def test_the_plan_is_that_of_a_slow_loop(
    batch: list[dict[str, Any]], layout: str, multiple: int, row_length: int | None
) -> None:
    limit = row_length if layout == "packed" else None
    found = PairedCollator(PADDING, multiple, layout=layout, row_length=limit)(batch)
    assert {"input_ids", "labels", INPUTS[layout]} <= found.keys()
    assert not set(INPUTS.values()) - {INPUTS[layout]} & found.keys()
    for name, values in expected_plan(batch, places(batch, found)).items():
        assert found[name].tolist() == values, name
        assert found[name].dtype == (torch.float32 if name == "lam" else torch.int64)
    rows, length = found["input_ids"].shape
    if layout == "sequential":
        multiple = 1
    assert length % multiple == 0
    longest, total = int(found["lengths"].max()), int(found["lengths"].sum())
    if layout in ("padding_free", "sequential"):
        assert (rows, length) == (1, -(-total // multiple) * multiple)
    if layout == "packed":
        assert length <= (limit or -(-longest // multiple) * multiple)
        assert rows * length <= len(batch) * -(-longest // multiple) * multiple


def packed(lengths: list[int], row_length: int | None) -> tuple[tuple[int, int], list[int]]:
    """Shape of the packed rows, and the first slot of each example."""
    slots = Layout("packed", row_length=row_length).place(np.array(lengths))
    return slots.shape, slots.flat[slots.positions == 0].tolist()


def test_packing_fills_rows_the_longest_first() -> None:
    # 6 and 4 share a row, and so do 5, 3 and 2: nothing is left over.
    assert packed([2, 6, 3, 5, 4], 10) == ((2, 10), [18, 0, 15, 10, 6])
    # 6 and 5 would share a row of 11; beside each other they leave rows of 9 full.
    assert packed([6, 5, 4, 3], 12) == ((2, 9), [0, 9, 14, 6])
    assert packed([2, 6, 3, 5, 4], 100) == ((1, 20), [18, 0, 15, 6, 11])
    # Rows as long as the longest waste none here, where longer ones would waste half a row.
    assert packed([10, 10, 10], 20) == ((3, 10), [0, 10, 20])


def test_packing_wastes_less_than_padding() -> None:
    lengths = np.random.default_rng(0).integers(20, 200, size=32)
    layouts = Layout(), Layout("packed"), Layout("packed", row_length=800)
    slots = [int(np.prod(layout.place(lengths).shape)) for layout in layouts]
    wasted = [1 - int(lengths.sum()) / number for number in slots]
    # Measured: 0.41, 0.14 and 0.01.
    assert wasted[0] > 2 * wasted[1] > 8 * wasted[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "flat"}, "layout: expected padded, .*, sequential; got 'flat'"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of: expected at least 1, got 0"),
        ({"row_length": 8}, "row_length: only layout='packed' has it, got 'padded'"),
        ({"layout": "packed", "row_length": 0}, r"row_length: .* multiple .*\(1\), got 0"),
        (
            {"layout": "packed", "row_length": 10, "pad_to_multiple_of": 4},
            r"row_length: .* multiple of pad_to_multiple_of \(4\), got 10",
        ),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairedCollator(0, **options)


def test_an_example_longer_than_a_row_is_refused() -> None:
    examples = [tiny.named([3, 4, 5], [-100, 4, 5]), tiny.named([3, 4], [-100, 4])]
    with pytest.raises(ValueError, match=r"row_length: expected .* longest example's 3 .*, got 2"):
        PairedCollator(0, layout="packed", row_length=2)(examples)


# Losses and gradients


def collected(model: PreTrainedModel, head: HeadAdapter, loss: Tensor) -> Result:
    loss.backward()
    head.detach()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def in_layout(model: PreTrainedModel, batch: dict[str, Tensor]) -> Result:
    """The fused loss of a batch, and the gradients of all parameters."""
    head = HeadAdapter(model.eval())
    plan = [batch[name] for name in ("targets", "pair_c", "pair_u", "lam")]

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        return fused_sftmix_loss(hidden, weight, *plan, bias=bias, **head.options)

    names = ("input_ids", "attention_mask", "position_ids", "parts")
    inputs = {name: batch[name] for name in names if name in batch}
    made = model(**inputs, use_cache=False, rows=batch["rows"], head_function=loss)
    return collected(model, head, made.value.loss)


def alone(model: PreTrainedModel, data: list[dict[str, Any]], dtype: torch.dtype) -> Result:
    """The same in plain PyTorch: the forward of each example by itself, then the dense loss."""
    head = HeadAdapter(model.eval())
    model.to(dtype)
    batches = [PairedCollator(0)([{k: one[k] for k in ("input_ids", "labels")}]) for one in data]
    hidden = torch.cat(
        [
            model(
                input_ids=batch["input_ids"],
                use_cache=False,
                rows=batch["rows"],
                head_function=lambda hidden, weight, bias: hidden,
            ).value
            for batch in batches
        ]
    )
    batch = PairedCollator(0)(data)
    plan = [batch[name] for name in ("targets", "pair_c", "pair_u", "lam")]
    made = sftmix_loss(hidden, head.head.weight, *plan, bias=head.head.bias, **head.options)
    return collected(model, head, made[0])


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPT2"])
def test_every_layout_gives_the_loss_and_gradients_of_examples_alone(family: str) -> None:
    # Some are longer than Gemma2's window of 16, and all together than GPT2's 64 positions.
    data = [
        {**row, "lam": 0.05 * (1 + number // 2)}
        for number, row in enumerate(tiny.examples(32, longest=24))
    ]
    plain, truth = (
        alone(tiny.build(family), data, dtype) for dtype in (torch.float32, torch.float64)
    )
    shapes = set()
    for layout in LAYOUTS:
        row_length = 60 if layout == "packed" else None
        batch = PairedCollator(0, layout=layout, row_length=row_length)(data)
        shapes.add(tuple(batch["input_ids"].shape))
        loss, gradients = in_layout(tiny.build(family), batch)
        tiny.assert_in_budget(f"{layout} loss", loss, plain[0], truth[0])
        tiny.assert_gradients_in_budget(layout, gradients, plain[1], truth[1])
    # In one row all examples lie padding-free or read one by one.
    assert len(shapes) == len(LAYOUTS) - 1


# Which models can take them


@pytest.mark.parametrize("layout", ["padding_free", "packed"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_models_that_heed_positions_are_accepted(family: str, layout: str) -> None:
    model = tiny.build(family)
    for dtype in (torch.float32, torch.bfloat16):
        check_layout(model.to(dtype), layout)


def test_the_check_leaves_everything_as_it_was() -> None:
    model = tiny.build("Llama").train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    before, state = tiny.weights(model), torch.get_rng_state()
    check_layout(model, "packed")
    assert [module.training for module in model.modules()] == modes
    assert tiny.same(tiny.weights(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def fresh(name: str, **options: Any) -> PreTrainedModel:
    """A small model as its class makes it."""
    cls = getattr(transformers, name)
    small = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = cls(cls.config_class(**{**small, **options}))
    return model


def falcon_h1() -> PreTrainedModel:
    """Attention and a state-space layer side by side, in bfloat16.

    The state carries over, but less than rounding: hidden states alone do not tell.
    """
    state = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 8}
    sizes = {"num_key_value_heads": 1, "intermediate_size": 32, "mamba_chunk_size": 8}
    return fresh("FalconH1ForCausalLM", **state, **sizes).to(torch.bfloat16)


def opt() -> PreTrainedModel:
    """It takes positions, but makes its attention mask without them."""
    return fresh("OPTForCausalLM", ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=64)


def counting_on() -> PreTrainedModel:
    """Attention heeds the positions; the learned ones are counted on through the row."""
    model = tiny.build("GPT2")
    model.transformer.wpe.register_forward_pre_hook(
        lambda module, args: (torch.arange(args[0].shape[-1]).expand_as(args[0]),)
    )
    return model


@pytest.mark.parametrize("layout", ["padding_free", "packed"])
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: fresh("BloomForCausalLM"), "Bloom.*: it takes no position_ids"),
        (opt, "OPT.*: an example reads the one before it"),
        (falcon_h1, "FalconH1.*: an example reads the one before it"),
        (counting_on, "GPT2.*: a token's hidden state is .* off what it is alone"),
    ],
    ids=["Bloom", "OPT", "FalconH1", "counting on"],
)
def test_models_that_mix_examples_are_refused(
    build: Callable[[], PreTrainedModel], reason: str, layout: str
) -> None:
    model = build()
    with pytest.raises(ValueError, match=f"layout: .*'{layout}' batches, use 'padded'") as refused:
        check_layout(model, layout)
    assert refused.match(reason)
    check_layout(model, "padded")
