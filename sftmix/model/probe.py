"""What a model makes of its head's logits and of its loss, found by giving it raw logits.

Configs name these things differently, or not at all, so that nothing is read off them: a few
tokens go through the model, and what comes out is compared. Every function here runs the model in
the mode it is in; see `evaluating`.

Legend: N tokens of a check, V vocabulary. ``inputs`` are a model's keywords, with `some_tokens` as
``input_ids``; ``own`` (1, N, V) are the model's own logits of them; ``path`` is the head's name.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from sftmix.model.stand_in import router_loss, standing_in

# Tokens of a check, and its raw logits: two for the scale and the cap, the rest to see that nothing
# else is done to them.
CHECKED = 8
TINY, HUGE = 2.0**-27, 2.0**100
RAW_LOGITS = (TINY, HUGE, -300.0, -60.0, -3.0, -0.5, 0.0, 0.25, 2.0, 17.0)
CERTAIN = 1e4
OTHER_WAY = "; --head logits goes through the model's own logits"


def some_tokens(model: PreTrainedModel, device: torch.device) -> Tensor:
    """Return a few tokens for the checks, (1, CHECKED)."""
    vocab_size: int = model.config.get_text_config().vocab_size
    return (torch.arange(CHECKED, device=device) * 7919 % vocab_size).unsqueeze(0)


def transformed(raw: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Return logits from those of a linear head: scaled, then softcapped."""
    scaled = raw * scale
    return scaled if softcap is None else softcap * torch.tanh(scaled / softcap)


def check_numbers(own: Tensor) -> None:
    """See that the model's own logits are numbers, or nothing could be learnt from them.

    Raises:
        ValueError: one is NaN or plus infinity; minus infinity forbids a token.
    """
    wrong = own.isnan() | own.isposinf()
    if wrong.any():
        raise ValueError(
            f"model: {int(wrong.sum())} of {wrong.numel()} of its logits are not numbers (NaN "
            "or infinite) for a few tokens: its weights are damaged, or too large for "
            f"{own.dtype}; take a model whose answers are numbers"
        )


def check_causal(model: PreTrainedModel, inputs: dict[str, Any], own: Tensor) -> None:
    """See that another last token does not change the logits before it.

    Rounding is allowed half the digits.

    Raises:
        ValueError: they change.
    """
    tokens = inputs["input_ids"].clone()
    tokens[:, -1] = (tokens[:, -1] + 1) % model.config.get_text_config().vocab_size
    changed = model(**{**inputs, "input_ids": tokens}).logits
    difference = (changed.float() - own.float())[:, :-1].abs().max()
    if difference > torch.finfo(own.dtype).eps ** 0.5 * own.float().abs().max():
        raise ValueError(
            f"model: expected a causal language model; a token's logits in "
            f"{type(model).__name__} change by {difference:.3g} with a later token"
        )


def check_logits(
    model: PreTrainedModel,
    own: Tensor,  # (1, N, V)
    found: Tensor,  # (N, V)
    dtype: torch.dtype,  # of the head's weight
    formula: str,
    way_out: str,
) -> None:
    """Compare the logits that ``formula`` gives with the model's own.

    The hidden states and the matrix product are the same, so only the head's last operations
    (bias, scale, softcap, a cast) may round differently: four roundings of the head's dtype.

    Raises:
        ValueError: they differ, with the two values that differ most.
    """
    kind = type(model).__name__
    if own.shape != (1, *found.shape):
        raise ValueError(
            f"model: expected logits (1, {CHECKED}, V) of {kind}, got {tuple(own.shape)} and "
            f"from its head {tuple(found.shape)}{way_out}"
        )
    # Of a quantised head the logits' dtype is all there is.
    eps = torch.finfo(dtype if dtype.is_floating_point else own.dtype).eps
    expected, found = own[0].float(), found.float()
    allowed = 4 * eps * expected.abs().max()
    difference = (found - expected).abs()
    if not (difference <= allowed).all():
        worst = int(difference.argmax())
        raise ValueError(
            f"model: the logits of {kind} are not {formula}: "
            f"expected {expected.flatten()[worst]:.6g}, found {found.flatten()[worst]:.6g}{way_out}"
        )


def find_scale_and_softcap(
    model: PreTrainedModel, path: str, inputs: dict[str, Any]
) -> tuple[float, float | None]:
    """Return scale and cap of ``cap * tanh(scale * x / cap)``, which a model makes of raw logits x.

    They are given in float64, so that a scale such as 1 / 3 is found to its last digits.

    Raises:
        ValueError: the model makes something else of them.
    """
    kind, device = type(model).__name__, inputs["input_ids"].device
    values = torch.tensor(RAW_LOGITS, dtype=torch.float64, device=device)
    shape = (CHECKED, model.config.get_text_config().vocab_size)
    places = torch.arange(shape[0], device=device).unsqueeze(1) * 3
    places = (places + torch.arange(shape[1], device=device)) % len(values)
    with torch.enable_grad():
        found = after_head(model, path, values[places], inputs).logits
    if found.requires_grad:
        raise ValueError(f"model: {kind} trains what it does to its logits{OTHER_WAY}")
    if found.shape != (1, *shape):
        raise ValueError(
            f"model: {kind} makes logits {tuple(found.shape)} of {(1, *shape)}{OTHER_WAY}"
        )
    found, eps = found[0].double(), 4 * torch.finfo(torch.float32).eps
    scale, highest = float(found[places == 0][0] / TINY), float(found[places == 1][0])
    logit_scale = 1.0 if abs(scale - 1) <= eps else scale
    softcap = highest if abs(highest) < HUGE * abs(scale) / 2 else None
    expected = transformed(values[places], logit_scale, softcap)
    wrong = ~((found - expected).abs() <= eps * expected.abs())
    if scale == 0 or wrong.any():
        worst = int(wrong.flatten().int().argmax())
        raise ValueError(
            f"model: the logits of {kind} are not a scale and a softcap of the head's: "
            f"{values[places].flatten()[worst]:.6g} becomes {found.flatten()[worst]:.6g}, "
            f"expected {expected.flatten()[worst]:.6g}{OTHER_WAY}"
        )
    return logit_scale, softcap


def find_router_coefficient(
    model: PreTrainedModel, path: str, inputs: dict[str, Any], own: Tensor
) -> float:
    """Return what a model's own loss multiplies its router's auxiliary loss by; 0 without one.

    Logits that are certain of every label leave nothing of next-token prediction, and the loss
    divided by the auxiliary loss is the coefficient. The model's own logits must then give the
    same.

    Raises:
        ValueError: the loss adds something else to next-token prediction.
    """
    coefficient = 0.0
    if "labels" not in inspect.signature(type(model).forward).parameters:
        return coefficient
    labels = torch.zeros_like(inputs["input_ids"])
    certain = torch.full_like(own[0], -CERTAIN).index_fill_(1, labels[0, :1], CERTAIN)
    outputs = [
        after_head(model, path, certain, {**inputs, "labels": labels}),
        model(**inputs, labels=labels),
    ]
    if outputs[0].loss is None:
        return coefficient
    aux = router_loss(outputs[1])
    if aux is not None:
        # The quotient has float32's error; a coefficient has few digits.
        quotient = float(added(outputs[0], labels, 0.0)[0] / aux)
        rounded = float(f"{quotient:.6g}") if math.isfinite(quotient) else 0.0
        close = abs(rounded - quotient) <= 4 * torch.finfo(torch.float32).eps * abs(quotient)
        coefficient = rounded if close else quotient
    for output in outputs:
        expected = 0.0 if aux is None else coefficient * float(aux)
        extra, allowed = added(output, labels, expected)
        if not abs(extra - expected) <= allowed:
            raise ValueError(
                f"model: the loss of {type(model).__name__} adds {extra:.6g} to "
                f"next-token prediction, expected {expected:.6g} (a router's auxiliary loss); "
                "turn the other term off in its config"
            )
    return coefficient


def after_head(model: PreTrainedModel, path: str, raw: Tensor, inputs: dict[str, Any]) -> Any:
    """Return the output that the model would have if its head's raw logits were these (N, V)."""
    # An adapter's forward is passed by: without a function it is the model's own.
    with standing_in(model, path, lambda head, hidden: raw.unsqueeze(0)):
        return model(**inputs)


def added(output: Any, labels: Tensor, expected: float) -> tuple[float, float]:
    """Return what a model's loss adds to the cross-entropy of its logits, and the error allowed.

    A few decoders of encoder-decoder families do not shift labels; and float32's sum over a large
    vocabulary is off by up to 1e-4, in the model's loss as in ours: what is nearest counts.
    """
    extras = [
        float(output.loss.double() - F.cross_entropy(logits[:end], labels[0, :end]).double())
        for logits in (output.logits[0].double(), output.logits[0].float())
        for end in (CHECKED - 1, CHECKED)
    ]
    eps = torch.finfo(output.loss.dtype).eps
    nearest = min(extras, key=lambda extra: abs(extra - expected))
    # A certain token's log(1 + x) is rounded at 1.
    return nearest, 4 * eps * (1 + float(output.loss.abs()) + abs(expected))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
