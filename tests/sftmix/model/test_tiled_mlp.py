"""Tiled MLPs give what plain ones give, in little memory."""

from __future__ import annotations

import copy
import types
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sftmix.model.tiled_mlp import mlps, tile_mlps
from tests.sftmix import tiny
from tests.sftmix.pairs.test_layouts import fresh

TOKENS = 5  # of a tile; 2 x 8 tokens are three tiles and a token
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def mlp_of(model: PreTrainedModel) -> Any:
    return mlps(model)[0]


def gradients(mlp: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Output, gradient of the hidden states, and gradients of trained weights, by an upstream."""
    generator = torch.Generator().manual_seed(1)
    hidden, upstream = (torch.randn(2, 8, 16, generator=generator) for _ in range(2))
    device = next(mlp.parameters()).device
    hidden, upstream = hidden.to(device, dtype).requires_grad_(), upstream.to(device)
    mlp.zero_grad()
    output = mlp(hidden)
    output.backward(upstream.to(output.dtype))
    trained = [weight for weight in mlp.parameters() if weight.requires_grad]
    assert all(weight.grad is not None and weight.grad.dtype == weight.dtype for weight in trained)
    assert hidden.grad is not None
    return [output.detach(), hidden.grad, *(weight.grad for weight in trained)]  # type: ignore[list-item]


def assert_right(tiled: nn.Module, plain: nn.Module) -> None:
    """All of `gradients` within the error budget."""
    exact = gradients(copy.deepcopy(plain).double(), torch.float64)
    for found, near, truth in zip(gradients(tiled), gradients(plain), exact, strict=True):
        tiny.assert_in_budget("output or gradient", found, near, truth)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_outputs_and_gradients_of_every_family(family: str, device: str) -> None:
    model, plain = (tiny.build(family).to(device) for _ in range(2))
    tile_mlps(model, TOKENS)
    for tiled, other in zip(mlps(model), mlps(plain), strict=True):
        assert_right(tiled, other)


def test_weights_gradients_in_bfloat16_lose_nothing_over_many_tiles() -> None:
    """A sum in bfloat16 over 512 tiles of one token would be several times as far off."""
    model = tiny.build("Llama").to(torch.bfloat16)
    plain, exact = copy.deepcopy(mlp_of(model)), copy.deepcopy(mlp_of(model)).double()
    tile_mlps(model, 1)
    generator = torch.Generator().manual_seed(1)
    hidden, upstream = (torch.randn(1, 512, 16, generator=generator).bfloat16() for _ in range(2))
    for mlp in (tiled := mlp_of(model), plain, exact):
        dtype = next(mlp.parameters()).dtype
        mlp(hidden.to(dtype)).backward(upstream.to(dtype))
    for found, near, truth in zip(
        *(mlp.parameters() for mlp in (tiled, plain, exact)), strict=True
    ):
        tiny.assert_in_budget("weights", found.grad, near.grad, truth.grad)


def test_dropout_is_the_same_in_forward_and_backward() -> None:
    """Were it drawn anew, the gradient would be that of another function."""
    model = tiny.build("GPT2", resid_pdrop=0.5).train()
    mlp = mlp_of(model)
    tile_mlps(model, TOKENS)
    torch.manual_seed(3)
    found = gradients(mlp)
    tile_of = type(mlp).forward
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(1)
    hidden, upstream = (torch.randn(2, 8, 16, generator=generator) for _ in range(2))
    hidden.requires_grad_()
    mlp.zero_grad()
    tiles = hidden.reshape(1, 16, 16).split(TOKENS, dim=1)
    output = torch.cat([tile_of(mlp, tile) for tile in tiles], dim=1).reshape(2, 8, 16)
    assert torch.equal(output, found[0])
    output.backward(upstream)
    assert hidden.grad is not None
    torch.testing.assert_close(found[1], hidden.grad, rtol=0, atol=0)
    output = mlp(hidden)
    torch.rand(3)
    before = torch.get_rng_state()
    output.backward(upstream)
    assert torch.equal(before, torch.get_rng_state()), "backward moves the generator"


def test_autocast_is_that_of_the_forward() -> None:
    mlp = mlp_of(model := tiny.build("Llama"))
    tile_mlps(model, TOKENS)
    dtypes: list[torch.dtype] = []
    mlp.act_fn.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    hidden = torch.randn(2, 8, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = mlp(hidden)
    output.sum().backward()
    assert dtypes == [torch.bfloat16] * 8  # four tiles in forward, and again in backward
    assert {weight.grad.dtype for weight in mlp.parameters()} == {torch.float32}


def test_frozen_weights_and_lora(recwarn: pytest.WarningsRecorder) -> None:
    config = peft.LoraConfig(r=2, target_modules=["gate_proj", "down_proj"])
    models = [peft.get_peft_model(tiny.build("Llama"), config) for _ in range(2)]
    with torch.no_grad():
        for one, other in zip(*(model.parameters() for model in models), strict=True):
            one.copy_(other.add_(0.1 if other.requires_grad else 0.0))
    tile_mlps(models[0], TOKENS)
    tiled, plain = (mlp_of(model.get_base_model()) for model in models)
    assert_right(tiled, plain)
    assert all(weight.grad is None for weight in tiled.parameters() if not weight.requires_grad)


def test_only_one_tile_of_inner_activations_is_there() -> None:
    """The widest tensor inside is as long as a tile, in forward and in backward."""
    model = tiny.build("Llama")
    longest: list[int] = []
    mlp = mlp_of(model)
    tile_mlps(model, TOKENS)
    mlp.act_fn.register_forward_hook(lambda _, __, output: longest.append(output.shape[1]))
    saved: list[int] = []
    hidden = torch.randn(2, 8, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        output = mlp(hidden)
    assert saved == [hidden.numel()]
    output.sum().backward()
    assert longest == [5, 5, 5, 1] * 2


def test_few_tokens_run_as_they_are() -> None:
    model, plain = tiny.build("Llama"), tiny.build("Llama")
    tile_mlps(model, 16)
    for found, expected in zip(gradients(mlp_of(model)), gradients(mlp_of(plain)), strict=True):
        assert torch.equal(found, expected)


def test_a_second_number_of_tokens_replaces_the_first() -> None:
    """And what somebody else has put on the instance is what is tiled."""
    model, other = tiny.build("Llama"), tiny.build("Llama")
    mlp, plain = mlp_of(model), mlp_of(other)
    own = type(mlp).forward
    for one in (mlp, plain):
        one.forward = types.MethodType(lambda module, hidden: 2 * own(module, hidden), one)
    for tokens in (3, TOKENS):
        tile_mlps(model, tokens)
    longest: list[int] = []
    mlp.act_fn.register_forward_hook(lambda _, __, output: longest.append(output.shape[1]))
    assert_right(mlp, plain)
    assert longest == [5, 5, 5, 1] * 2


def bloom() -> PreTrainedModel:
    return fresh("BloomForCausalLM")


def mixing() -> PreTrainedModel:
    """Its MLP adds the mean over tokens."""
    model = tiny.build("Llama")

    class Mixing(type(mlp_of(model))):  # type: ignore[misc]
        def forward(self, hidden: Tensor) -> Tensor:
            output: Tensor = super().forward(hidden)
            return output + hidden.mean(1, keepdim=True)

    mlp_of(model).__class__ = Mixing
    return model


def opt() -> PreTrainedModel:
    return fresh("OPTForCausalLM", ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=64)


@pytest.mark.parametrize(
    ("build", "tokens", "message"),
    [
        (lambda: tiny.build("Llama"), 0, "mlp_tile_tokens: expected at least 1, got 0"),
        (opt, 8, "mlp_tile_tokens: the layers of OPT.* have no mlp, feed_forward, ffn"),
        (mixing, 8, "mlp_tile_tokens: Mixing of Llama.* does not treat each token by itself"),
        (bloom, 8, "mlp_tile_tokens: BloomMLP of Bloom.* does not treat each token by itself"),
    ],
    ids=["no tokens", "no MLP", "reads other tokens", "more arguments"],
)
def test_what_cannot_be_tiled_is_refused(build: Any, tokens: int, message: str) -> None:
    model = build()
    before = [module.__dict__.get("forward") for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        tile_mlps(model, tokens)
    assert [module.__dict__.get("forward") for module in model.modules()] == before
