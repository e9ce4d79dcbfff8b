"""The options that save memory: what each turns on, and what goes together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from sftmix.model.tiled_mlp import mlps
from sftmix.training import loss as loss_module
from sftmix.training.config import CHECKPOINTING
from sftmix.training.trainer import SFTMixTrainer
from sftmix_kernels import RowChunks, VocabTiles
from tests.sftmix import tiny
from tests.sftmix.training.test_methods import flat_gradients
from tools import families

LEAN = {"memory": "lean", "mlp_tile_tokens": 5}


def test_lean_turns_on_what_is_off(tmp_path: Path) -> None:
    lean = tiny.config(tmp_path, memory="lean")
    assert lean.layout == "sequential"
    assert lean.mlp_tile_tokens == 4096
    assert lean.loss_plan == RowChunks(max_bytes=2**28)
    assert getattr(lean, CHECKPOINTING)
    assert lean.checkpoints_activations
    assert not lean.activation_offload


def test_lean_leaves_what_is_given(tmp_path: Path) -> None:
    options = {"layout": "packed", "mlp_tile_tokens": 7, "loss_max_bytes": 10**6}
    lean = tiny.config(tmp_path, memory="lean", loss_schedule="vocab_tiles", **options)
    assert {name: getattr(lean, name) for name in options} == options
    assert lean.loss_plan == VocabTiles(max_bytes=10**6)


def test_lean_leaves_the_smaller_workspace_of_vocab_tiles(tmp_path: Path) -> None:
    assert tiny.config(tmp_path, memory="lean", loss_schedule="vocab_tiles").loss_plan == (
        "vocab_tiles"
    )


@pytest.mark.filterwarnings("ignore:`--fsdp_config` is useful only")  # of older transformers
def test_lean_leaves_checkpointing_to_fsdp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # which FSDP's options set
    file = tmp_path / "fsdp.json"
    file.write_text('{"activation_checkpointing": true}')
    sharded = tiny.config(tmp_path, memory="lean", fsdp=True, fsdp_config=str(file))
    assert sharded.checkpoints_activations
    assert not getattr(sharded, CHECKPOINTING)
    assert getattr(tiny.config(tmp_path, memory="lean", fsdp_config=str(file)), CHECKPOINTING)


def test_plain_turns_on_nothing(tmp_path: Path) -> None:
    plain = tiny.config(tmp_path)
    assert (plain.layout, plain.mlp_tile_tokens, plain.loss_plan) == ("padded", None, "auto")
    assert not plain.checkpoints_activations


def test_the_loss_gets_its_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Any] = []
    own = loss_module.fused_sftmix_loss

    def seen(*args: Any, schedule: Any, **kwargs: Any) -> Any:
        plans.append(schedule)
        return own(*args, schedule=schedule, **kwargs)

    monkeypatch.setattr(loss_module, "fused_sftmix_loss", seen)
    made = tiny.trainer(tiny.build("Llama"), tmp_path, tiny.examples(8), loss_max_bytes=5000)
    made.compute_loss(made.model, next(iter(made.get_train_dataloader())))
    assert plans == [RowChunks(max_bytes=5000)]


@pytest.mark.parametrize("head", ["fused", "logits"])
@pytest.mark.parametrize("offload", [False, True])
def test_a_lean_training_is_the_plain_one(offload: bool, head: str, tmp_path: Path) -> None:
    """Losses of steps that follow each other, and an evaluation, which tiles its MLPs too."""
    found = []
    for options in ({}, {**LEAN, "activation_offload": offload}):
        made = tiny.trainer(
            tiny.build("Llama"), tmp_path, tiny.examples(8), max_steps=3, head=head, **options
        )
        made.train()
        evaluated = made.evaluate(tiny.examples(5, seed=1))["eval_loss"]
        found.append([*tiny.losses(made, "loss", "ntp_loss", "mixup_loss"), (evaluated,)])
    assert len(found[0]) == 4
    for plain, lean in zip(*found, strict=True):
        assert lean == pytest.approx(plain, rel=1e-6)


def test_layers_are_checkpointed_and_tiled(tmp_path: Path) -> None:
    """The model that is trained, and no other."""
    model = tiny.build("Llama")
    plain = copy.deepcopy(model)
    widths: list[int] = []
    made = tiny.trainer(model, tmp_path, tiny.examples(8), max_steps=1, **LEAN)
    mlps(model)[0].act_fn.register_forward_hook(lambda _, __, out: widths.append(out.shape[1]))
    reads: list[int] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: reads.append(1))
    made.train()
    assert max(widths) <= 5
    # Four examples: each read once, all but the last a second time, and each again by its layers.
    assert len(reads) == 4 + 3 + 4
    assert not any("forward" in mlp.__dict__ for mlp in mlps(plain))


def test_a_reentrant_checkpoint_gives_the_same_gradients(tmp_path: Path) -> None:
    found = []
    for reentrant in (False, True):
        model = tiny.build("Llama").train()
        made = tiny.trainer(model, tmp_path, tiny.examples(8), **LEAN)
        getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})
        made.compute_loss(model, next(iter(made.get_train_dataloader()))).backward()
        found.append(flat_gradients(model))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "leaner"}, "memory: expected plain, lean; got 'leaner'"),
        ({"mlp_tile_tokens": 0}, "mlp_tile_tokens: expected at least 1 .*, got 0"),
        ({"loss_max_bytes": -1}, "loss_max_bytes: expected at least 1 .*, got -1"),
        ({"loss_max_bytes": 9, "head": "logits"}, "loss_max_bytes: expected head='fused'"),
        ({"memory": "lean", "torch_compile": True}, "torch_compile: not supported with layout"),
        ({"activation_offload": True}, "activation_offload: expected activation_checkpointing"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.config(tmp_path, **options)


def test_a_routers_loss_needs_whole_mlps(tmp_path: Path) -> None:
    experts = families.build("mixtral")
    options = tiny.config(tmp_path, mlp_tile_tokens=4)
    with pytest.raises(ValueError, match="mlp_tile_tokens: the router's auxiliary loss"):
        SFTMixTrainer(
            model=experts,
            args=options,
            train_dataset=tiny.examples(8),
            confident=tiny.halves(8),
        )
