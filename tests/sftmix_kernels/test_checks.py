"""Refused arguments: the message names the argument and says what came."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from sftmix_kernels import (
    checks,
    fused_cross_entropy,
    fused_mixup_loss,
    fused_sftmix_loss,
    reference,
    streaming_perplexity,
)

from .budget import FAR, assert_refused

IDS = torch.tensor([1, 2, 3, 4])
HEAD = {"weight": torch.randn(9, 8)}
PLAIN = {"hidden": torch.randn(4, 8), "labels": IDS, **HEAD}
MIXUP = {"hidden_c": torch.randn(4, 8), "hidden_u": torch.randn(4, 8), **HEAD}
MIXUP |= {"labels_c": IDS, "labels_u": IDS, "lam": 0.3}
PAIRS = {"pair_c": torch.tensor([0, 1]), "pair_u": torch.tensor([2, 3]), "lam": 0.3}
NAN = float("nan")
Case = tuple[dict[str, Any], type[Exception], str]

HEAD_CASES: list[Case] = [
    ({"weight": torch.randn(9, 8).double()}, TypeError, "weight: .*float32, got torch.float64"),
    ({"weight": torch.randn(9, 8).bfloat16()}, TypeError, "weight: .*got torch.bfloat16"),
    ({"weight": torch.randn(9, 8, device="meta")}, ValueError, "weight: .*cpu, got meta"),
    ({"weight": torch.randn(8)}, ValueError, r"weight: .*\(V, D\).*got \(8,\)"),
    ({"weight": torch.randn(0, 8)}, ValueError, r"weight: .*got \(0, 8\)"),
    ({"weight": torch.randn(9, 0)}, ValueError, r"weight: .*D >= 1, got \(9, 0\)"),
    ({"weight": None}, TypeError, "weight: expected a Tensor, got NoneType"),
    ({"bias": torch.randn(8)}, ValueError, r"bias: .*\(9,\), got \(8,\)"),
    ({"bias": torch.randn(9).half()}, TypeError, "bias: .*got torch.float16"),
    ({"bias": [1.0] * 9}, TypeError, "bias: expected a Tensor, got list"),
    ({"logit_scale": NAN}, ValueError, "logit_scale: .*got nan"),
    ({"softcap": 0.0}, ValueError, "softcap: .*got 0.0"),
    ({"softcap": 1e-42}, ValueError, "softcap: .* at least 1.18e-38, got 1e-42"),
    ({"softcap": 1e39}, ValueError, r"softcap: .*float32.*got 1e\+39"),
    ({"softcap": "x"}, TypeError, "softcap: expected a number, got str"),
    ({"logit_scale": -1e39}, ValueError, r"logit_scale: .*float32.*got -1e\+39"),
    ({"logit_scale": Fraction(1, 2)}, TypeError, "logit_scale: .*got Fraction"),
    ({"ignore_index": None}, TypeError, "ignore_index: expected an integer, got NoneType"),
    ({"ignore_index": 2**63}, ValueError, "ignore_index: expected an int64 number, got 9223"),
    ({"logit_scale": None}, TypeError, "logit_scale: expected a number, got NoneType"),
    ({"schedule": "vocab_tiles"}, ValueError, "schedule: 'vocab_tiles'"),
    ({"schedule": "foo"}, ValueError, "schedule: .*got 'foo'"),
]
PLAIN_CASES: list[Case] = [
    ({"hidden": torch.randn(4, 7)}, ValueError, r"hidden: .*got \(4, 7\)"),
    (
        {"hidden": torch.randn(4, 8).double()},
        TypeError,
        "hidden: .*got torch.float64; sftmix_kernels.reference takes it",
    ),
    ({"hidden": torch.ones(4, 8).long()}, TypeError, "hidden: .*got torch.int64"),
    ({"hidden": "x"}, TypeError, "hidden: expected a Tensor, got str"),
    ({"labels": IDS.int()}, TypeError, "labels: expected int64, got torch.int32"),
    ({"stats": "yes"}, TypeError, "stats: expected True or False, got 'yes'"),
    ({"labels": IDS[:3]}, ValueError, r"labels: .*\(4,\).*got \(3,\)"),
    ({"labels": [1, 2, 3, 4]}, TypeError, "labels: expected a Tensor, got list"),
    ({"labels": IDS.to("meta")}, ValueError, "labels: expected device cpu, got meta"),
]
REDUCTION_CASES: list[Case] = [
    ({"reduction": "x"}, ValueError, "reduction: .*got 'x'"),
    ({"divisor": "x"}, TypeError, "divisor: expected a number, got str"),
    ({"divisor": 0.0}, ValueError, "divisor: .*got 0.0"),
    ({"divisor": torch.ones(2)}, ValueError, r"divisor: .*got shape \(2,\)"),
]
LAM_CASES: list[Case] = [
    ({"lam": 1.5}, ValueError, r"lam: .*\[0.0, 1.0\], got 1.5"),
    ({"lam": None}, TypeError, "lam: expected a number, got NoneType"),
    ({"lam": [0.5]}, TypeError, "lam: expected a number, got list"),
    ({"lam": NAN}, ValueError, "lam: .*got nan"),
    ({"lam": torch.tensor(-0.5)}, ValueError, "lam: .*got -0.5"),
    ({"lam": torch.tensor(1)}, TypeError, "lam: .*got torch.int64"),
    ({"lam": torch.rand(3)}, ValueError, r"lam: .*prefix of .*got \(3,\)"),
    ({"lam": torch.rand((), device="meta")}, ValueError, "lam: expected device cpu, got meta"),
]
MIXUP_CASES: list[Case] = [
    ({"hidden_u": torch.randn(3, 8)}, ValueError, r"hidden_u: .*\(4, 8\), got \(3, 8\)"),
    ({"hidden_u": torch.randn(4, 8).half()}, TypeError, "hidden_u: .*got torch.float16"),
    ({"hidden_u": None}, TypeError, "hidden_u: expected a Tensor, got NoneType"),
    ({"hidden_c": torch.randn(4, 7)}, ValueError, r"hidden_c: .*got \(4, 7\)"),
    ({"labels_u": IDS.int()}, TypeError, "labels_u: expected int64"),
]
SFTMIX_CASES: list[Case] = [
    ({"mu": -0.1}, ValueError, "mu: .*got -0.1"),
    ({"mu": None}, TypeError, "mu: expected a number, got NoneType"),
    ({"mu": NAN}, ValueError, "mu: .*got nan"),
    ({"ntp_divisor": -1.0}, ValueError, "ntp_divisor: .*got -1.0"),
    ({"ntp_divisor": 1e39}, ValueError, r"ntp_divisor: .*float32.*got 1e\+39"),
    ({"mu": 1e39}, ValueError, r"mu: .*float32.*got 1e\+39"),
    ({"mixup_divisor": torch.ones(2)}, ValueError, "mixup_divisor"),
    ({"pair_c": torch.tensor([0, 4])}, ValueError, r"pair_c.*\[0, 4\), got 4"),
    ({"pair_c": torch.tensor([0, 2])}, ValueError, "pair_c.*got row 2 twice"),
    ({"pair_c": torch.tensor([0])}, ValueError, r"pair_u: .*\(1,\) and \(2,\)"),
    ({"pair_c": torch.tensor([0, 1]).int()}, TypeError, "pair_c: .*got torch.int32"),
    ({"pair_u": [2, 3]}, TypeError, "pair_u: expected a Tensor, got list"),
    ({"pair_u": torch.tensor([2, 3], device="meta")}, ValueError, "pair_u: .*cpu, got meta"),
    ({"row_ntp_out": torch.empty(3)}, ValueError, r"row_ntp_out: .*got \(3,\)"),
    ({"row_ntp_out": torch.empty(4).half()}, TypeError, "row_ntp_out: .*got torch.float16"),
]


@pytest.mark.parametrize(
    ("changed", "error", "message"), HEAD_CASES + PLAIN_CASES + REDUCTION_CASES
)
def test_cross_entropy_refuses(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    assert_refused(fused_cross_entropy, {**PLAIN, **changed}, error, message)


@pytest.mark.parametrize(
    ("changed", "error", "message"), HEAD_CASES + REDUCTION_CASES + LAM_CASES + MIXUP_CASES
)
def test_mixup_refuses(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    assert_refused(fused_mixup_loss, {**MIXUP, **changed}, error, message)


@pytest.mark.parametrize(
    ("changed", "error", "message"), HEAD_CASES + PLAIN_CASES + LAM_CASES + SFTMIX_CASES
)
def test_sftmix_refuses(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    assert_refused(fused_sftmix_loss, {**PLAIN, **PAIRS, **changed}, error, message)


@pytest.mark.parametrize("label", [9, *FAR])
def test_validate_says_position_and_value(label: int) -> None:
    bad = IDS.clone()
    bad[2] = label
    message = rf"expected values in \[0, 9\) or -100, got {label} at position \[2\]"
    assert_refused(
        fused_cross_entropy, {**PLAIN, "labels": bad, "validate": True}, ValueError, message
    )
    assert_refused(
        fused_mixup_loss,
        {**MIXUP, "labels_u": bad, "validate": True},
        ValueError,
        "labels_u: " + message,
    )
    assert_refused(
        fused_sftmix_loss,
        {**PLAIN, **PAIRS, "labels": bad, "validate": True},
        ValueError,
        message,
    )


CALLS: list[tuple[Any, dict[str, Any], str]] = [
    (fused_cross_entropy, PLAIN, "labels"),
    (fused_mixup_loss, MIXUP, "labels_u"),
    (fused_sftmix_loss, {**PLAIN, **PAIRS}, "labels"),
    (streaming_perplexity, {**PLAIN, "sample_ids": IDS - 1, "num_samples": 4}, "labels"),
]


@pytest.mark.parametrize(("function", "arguments", "name"), CALLS)
def test_a_label_outside_the_vocabulary_is_told_of_once(
    function: Any, arguments: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nanoGPT's -1 with its way out; the row is NaN as ever."""
    monkeypatch.setattr(checks, "TOLD", set())
    bad = IDS.clone()
    bad[2] = -1
    message = (
        rf"^{name}: expected values in \[0, 9\) or -100, got -1 at position \[2\]: its loss and "
        "gradients are NaN, .*; ignore_index=-1 leaves such tokens out, validate=True makes this"
    )
    with pytest.warns(RuntimeWarning, match=message):
        found = function(**{**arguments, name: bad})
    assert torch.as_tensor(found[0] if isinstance(found, tuple) else found).isnan().any()
    function(**{**arguments, name: bad})
    assert function(**{**arguments, name: bad}, ignore_index=-1) is not None


def test_a_label_beyond_the_vocabulary_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "TOLD", set())
    with pytest.warns(RuntimeWarning, match=r"got 9 at position \[3\]: .*; mend the labels, vali"):
        fused_cross_entropy(**{**PLAIN, "labels": IDS + 5})


@pytest.mark.parametrize(("function", "arguments", "name"), CALLS)
def test_transforms_of_torch_func_are_refused_by_name(
    function: Any, arguments: dict[str, Any], name: str
) -> None:
    weight = arguments["weight"]

    def loss(weight: Tensor) -> Tensor:
        found = function(**{**arguments, "weight": weight})
        return found[0] if isinstance(found, tuple) else found

    for transformed, given, what in (
        (torch.vmap(loss), torch.stack([weight, weight]), "vmap"),
        (torch.func.grad(loss), weight, "grad"),
    ):
        with pytest.raises(TypeError, match=rf"^hidden(_c)?: .* inside of torch.func's {what}"):
            transformed(given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("function", "arguments", "name"), CALLS[:3])
def test_the_meta_device_gives_shapes_and_dtypes(
    function: Any, arguments: dict[str, Any], name: str, dtype: torch.dtype
) -> None:
    found = {
        key: value.to("meta", dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for key, value in arguments.items()
    }
    leaves = {key: value for key, value in found.items() if key.startswith(("hidden", "weight"))}
    for leaf in leaves.values():
        leaf.requires_grad_()
    result = function(**found)
    loss = result[0] if isinstance(result, tuple) else result
    assert (loss.device.type, loss.dtype, loss.shape) == ("meta", torch.float32, ())
    loss.backward()
    for leaf in leaves.values():
        assert leaf.grad is not None
        assert leaf.grad.device.type == "meta"
    with pytest.raises(ValueError, match=r"^validate: expected False for tensors on the meta dev"):
        function(**found, validate=True)


def test_a_perplexity_needs_values() -> None:
    arguments = {name: value.to("meta") for name, value in PLAIN.items()}
    with pytest.raises(ValueError, match=r"^hidden: expected values, .* got the meta device; the"):
        streaming_perplexity(**arguments, sample_ids=IDS.to("meta"), num_samples=5)


def test_the_reference_can_be_transformed() -> None:
    """What the refusal says; each of the batch as by itself."""
    weights = torch.randn(3, 9, 8)
    for function, arguments in (
        (reference.cross_entropy, PLAIN),
        (reference.mixup_loss, MIXUP),
        (lambda **given: reference.sftmix_loss(**given).loss, {**PLAIN, **PAIRS}),
    ):

        def loss(weight: Tensor, function: Any = function, arguments: Any = arguments) -> Tensor:
            found = function(**{**arguments, "weight": weight})
            assert isinstance(found, Tensor)
            return found

        together = torch.vmap(torch.func.grad(loss))(weights)
        for weight, gradient in zip(weights, together, strict=True):
            leaf = weight.clone().requires_grad_()
            loss(leaf).backward()
            torch.testing.assert_close(gradient, leaf.grad)


def test_autocast_does_not_hide_a_wrong_dtype() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for wrong in (torch.ones(4, 8).long(), torch.ones(4, 8).double()):
            assert_refused(fused_cross_entropy, {**PLAIN, "hidden": wrong}, TypeError, "hidden")
