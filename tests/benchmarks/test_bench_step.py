"""Every training step does what the dense one does, and a step that does not is found out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama

import sftmix.training.loss
from benchmarks.bench_step import (
    LIMITS,
    MODELS,
    QUICK,
    check,
    difference,
    facts,
    liger_method,
    limit,
    loss_and_gradients,
    make_batch,
    make_methods,
    make_model,
    one_step,
)
from benchmarks.inputs import MU
from benchmarks.records import (
    LIGER_NTP,
    OUR_NTP,
    OUR_SFTMIX,
    OUR_TILES,
    THEIR_NTP,
    THEIR_SFTMIX,
)
from benchmarks.result_file import Results
from benchmarks.settings import Settings
from sftmix_kernels import fused_sftmix_loss, reference

ON_CPU = {OUR_SFTMIX, OUR_NTP, THEIR_SFTMIX, THEIR_NTP}
TINY = QUICK._replace(vocab_size=64, hidden_size=16, intermediate_size=24, length=16)
TIED = TINY._replace(tie_word_embeddings=True)


@pytest.mark.parametrize("size", [TINY, TIED], ids=["untied", "tied"])
def test_every_method_agrees_with_the_dense_one(size: Any, results: Results) -> None:
    found = check(size, "cpu", results)
    assert found.keys() == ON_CPU
    assert all(far <= limit(name, "cpu") for name, far in found.items()), found


def test_the_dense_one_is_the_reference(tmp_path: Path) -> None:
    model, batch = make_model(TINY, "cpu"), make_batch(TINY, "cpu")
    methods, _ = make_methods(model, TINY, "cpu", str(tmp_path))
    tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        hidden = model.model(**tokens).last_hidden_state.flatten(0, 1)
    weight, labels, hidden = model.lm_head.weight, batch["targets"], hidden[batch["rows"]]
    ntp = reference.cross_entropy(hidden, weight, labels)
    c, u = batch["pair_c"], batch["pair_u"]
    mixup = reference.mixup_loss(hidden[c], hidden[u], weight, labels[c], labels[u], batch["lam"])
    torch.testing.assert_close(methods[THEIR_SFTMIX].backward(), (ntp + MU * mixup).detach())
    torch.testing.assert_close(methods[THEIR_NTP].backward(), ntp.detach())


def wrong_mu(*args: Any, **options: Any) -> Any:
    return fused_sftmix_loss(*args, **{**options, "mu": 1.1 * options["mu"]})


def wrong_gradient(hidden: Tensor, *args: Any, **options: Any) -> Any:
    """The right loss, and too little of its gradient for the backbone."""
    return fused_sftmix_loss(0.99 * hidden + 0.01 * hidden.detach(), *args, **options)


@pytest.mark.parametrize("wrong", [wrong_mu, wrong_gradient])
def test_a_wrong_method_is_caught(
    monkeypatch: pytest.MonkeyPatch, wrong: Any, results: Results
) -> None:
    monkeypatch.setattr(sftmix.training.loss, "fused_sftmix_loss", wrong)
    found = check(TINY, "cpu", results)
    assert found[OUR_SFTMIX] > limit(OUR_SFTMIX, "cpu")
    assert found[THEIR_SFTMIX] == 0


def test_what_is_not_a_number_is_no_agreement() -> None:
    right = [[torch.ones(2)], [torch.ones(3)]]
    assert math.isnan(difference([[torch.ones(2)], [torch.tensor([1, 1, math.nan])]], right))
    assert difference([[torch.ones(2)], [torch.tensor([1.0, 1.0, 4.0])]], right) == pytest.approx(
        math.sqrt(3)
    )


def test_steps_train_the_one_model(tmp_path: Path) -> None:
    model = make_model(TINY, "cpu")
    methods, left_out = make_methods(model, TINY, "cpu", str(tmp_path))
    optimizer = torch.optim.AdamW(model.parameters())
    assert methods.keys() == ON_CPU
    for method in methods.values():
        before = [parameter.detach().clone() for parameter in model.parameters()]
        one_step(method, optimizer)
        after = list(model.parameters())
        assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert all(parameter.grad is None for parameter in after)
    assert left_out == {OUR_TILES: "needs CUDA", LIGER_NTP: "needs CUDA"}
    batch = make_batch(TINY, "cpu")
    assert facts(model, TINY, methods) == {
        "batch": TINY.batch,
        "length": TINY.length,
        "parameters": model.num_parameters(),
        "tokens": int(batch["attention_mask"].sum()),
        "response_tokens": int((batch["labels"] != -100).sum()),
        "mixed_positions": batch["lam"].numel(),
    }


def test_liger_changes_no_other_method(tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel")
    before = dict(vars(modeling_llama))
    model = make_model(TINY, "cpu")
    methods, _ = make_methods(model, TINY, "cpu", str(tmp_path))
    expected = loss_and_gradients(model, methods[THEIR_NTP])
    args = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    liger = liger_method(model, args, methods[THEIR_NTP].batch)
    assert vars(modeling_llama) == before
    assert liger.rope is not modeling_llama.apply_rotary_pos_emb
    assert "Liger" in repr(liger.trainer.model)
    assert "Liger" not in repr(methods[THEIR_NTP].trainer.model)
    assert difference(loss_and_gradients(model, methods[THEIR_NTP]), expected) == 0


@pytest.mark.gpu
def test_every_method_agrees_on_a_gpu() -> None:
    found = check(QUICK, "cuda", Results("step", Settings("cuda")))
    assert OUR_TILES in found
    assert all(far <= limit(name, "cuda") for name, far in found.items()), found


def test_shapes_are_the_published_ones() -> None:
    counts = {n: make_model(size, "meta").num_parameters() for n, size in MODELS["cuda"].items()}
    assert counts["1B"] == 1_235_814_400
    assert counts["8B"] == 8_030_261_248


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sizes_can_be_paired_and_checked(device: str) -> None:
    assert device in LIMITS
    assert all(size.batch % 2 == 0 for size in MODELS[device].values())
