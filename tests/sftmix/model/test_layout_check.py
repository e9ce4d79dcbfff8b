"""Whether a model reads what stands behind an example, and whether its row's length counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from sftmix.model.head import HeadAdapter
from sftmix.model.layout_check import ignores_padding
from tests.sftmix import tiny

CPU = torch.device("cpu")


def ignores(model: PreTrainedModel, longest: int, **options: Any) -> bool:
    return ignores_padding(model, HeadAdapter(model, **options), CPU, longest, 0)


def small(name: str, **options: Any) -> PreTrainedModel:
    """A model of a family that makes positions, masks or states of its own."""
    cls = getattr(transformers, name)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = cls(cls.config_class(**{**sizes, **options}))
    return model


@pytest.mark.parametrize("longest", [2, 3, 15, 40])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_causal_models_ignore_padding(family: str, longest: int) -> None:
    model = tiny.build(family).train()
    state = torch.get_rng_state()
    for dtype in (torch.float32, torch.bfloat16):
        assert ignores(model.to(dtype), longest)
    assert ignores(model, longest, head="logits")
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("BloomForCausalLM", {}),
        (
            "OPTForCausalLM",
            {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
        ),
        ("MambaForCausalLM", {"state_size": 4}),
    ],
)
def test_so_do_models_that_cannot_be_packed(name: str, options: dict[str, Any]) -> None:
    assert ignores(small(name, **options), 40)


def stretched(rope: dict[str, Any]) -> PreTrainedModel:
    """A Llama whose rotary embeddings change in rows of more than 32 tokens."""
    return tiny.build(
        "Llama",
        max_position_embeddings=64 if rope["rope_type"] == "longrope" else 32,
        rope_parameters={"rope_theta": 10000.0, "factor": 4.0, **rope},
    )


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic"}, LONGROPE], ids=["dynamic", "longrope"])
def test_rotary_embeddings_that_stretch_with_the_row_are_found(rope: dict[str, Any]) -> None:
    assert ignores(stretched(rope), 32)
    assert not ignores(stretched(rope), 33 if rope is LONGROPE else 64)


def looking_ahead(model: PreTrainedModel) -> None:
    """Let each token read a little of the one behind it: less than the check of causality sees."""
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _, args, output: output + 1e-5 * output.roll(-1, 1))


def counting_padding(model: PreTrainedModel) -> None:
    """Let each token know how many of its row are padding."""
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(
        lambda _, args, output: output * (1 + 1e-3 * (args[0] == 0).float().mean())
    )


@pytest.mark.parametrize("change", [looking_ahead, counting_padding])
def test_a_model_that_reads_what_comes_after_is_found(
    change: Callable[[PreTrainedModel], None],
) -> None:
    model = tiny.build("Llama")
    change(model)
    assert not ignores(model, 40)
