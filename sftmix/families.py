"""Which causal language models of transformers the trainer is right for: each built and compared.

    python -m sftmix.families [--markdown FILE] [NAME ...]

A tiny random model of each family runs a padded batch, in float32 and as a copy in float64. Two
things are compared, in loss and in every parameter's gradient:

- NTP through the fused loss, and the model's own loss of ``labels=``;
- NTP + mu * Mixup through the fused loss, and the same from the model's own logits
  (``--head logits``), whose float64 is the truth of both.

**Criterion.** An error may be twice PyTorch's own in float32, plus one rounding of float32. Errors
of a gradient are relative to the parameter's largest one plus ``sqrt(eps)`` of the model's largest,
and the largest relative error over all parameters is held beside PyTorch's largest: a few numbers
beside a few others are a lottery, and some gradients (a key's bias) are 0 but for rounding. The
loss's error is taken over its tokens without cancelling, for the same reason.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sftmix.config import SFTMixConfig, SFTMixOptions
from sftmix.head import HeadAdapter
from sftmix.objective import MODEL_INPUTS, BatchLoss, batch_loss
from sftmix.pairing import PairedCollator

VOCABULARY = 64
EPS = torch.finfo(torch.float32).eps
LARGEST = 3_000_000  # parameters: what is larger was not made small

# What makes a config small, where it has an option of that name.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_hidden_layers": 2,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    "output_router_logits": True,
}
# What a family needs besides, None to leave an option of `SMALL` alone.
CHANGES: dict[str, dict[str, Any]] = {}
# Their own loss takes labels that are already shifted.
UNSHIFTED = {"bart"}
# Not causal, or with a head that is not called once on each token: refused, as they should be.
REFUSED = {"cpmant"}


class Run(NamedTuple):
    """A loss, its tokens' own losses, and the gradient of every parameter that has one."""

    loss: Tensor
    rows: Tensor
    gradients: dict[str, Tensor]


class Family(NamedTuple):
    """A row of the table."""

    name: str
    kind: str  # the class
    head: str  # what is special about it
    loss_error: float  # relative to what is allowed
    gradient_error: float
    verdict: str  # "right", "WRONG", "refused: why"


def build(name: str, **changes: Any) -> PreTrainedModel:
    """A tiny random model of a family, in eval mode, its every parameter off its first value.

    Raises:
        ValueError: the family is unknown here, or its model is not small.
    """
    if name not in CONFIG_MAPPING or name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"{name}: expected a causal language model's type in transformers")
    kind = CONFIG_MAPPING[name]
    options = {key: value for key, value in SMALL.items() if hasattr(kind(), key)}
    options |= {**CHANGES.get(name, {}), **changes}
    cls = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
    config = kind(**{key: value for key, value in options.items() if value is not None})
    with torch.device("meta"):
        number = sum(parameter.numel() for parameter in cls(config).parameters())
    if number > LARGEST:
        raise ValueError(f"{name}: expected at most {LARGEST} parameters, got {number}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = cls(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def padded_batch() -> dict[str, Tensor]:
    """Two pairs of examples of uneven lengths."""
    random = torch.Generator().manual_seed(0)
    examples = []
    for row, length in enumerate((24, 17, 9, 21)):
        tokens = torch.randint(3, VOCABULARY, (length,), generator=random).tolist()
        labels = [-100] * (1 + row) + tokens[1 + row :]
        examples.append({"input_ids": tokens, "labels": labels, "lam": (0.3, 0.8)[row // 2]})
    return PairedCollator(0)(examples)


def ours(model: PreTrainedModel, head: HeadAdapter, batch: dict[str, Tensor], method: str) -> Run:
    """The trainer's loss of a batch, with the router's."""
    options = SFTMixOptions.__new__(SFTMixOptions)
    options.method, options.mu, options.loss_schedule = method, 0.5, "auto"  # type: ignore[assignment]
    divisors = [torch.tensor(float(batch[name].numel())) for name in ("rows", "pair_c")]
    loss = batch_loss(model, head, batch, options, *divisors)
    return backward(model, total(loss, head), loss.row_ntp)


def total(loss: BatchLoss, head: HeadAdapter) -> Tensor:
    """A loss with the router's."""
    return loss.loss if loss.router is None else loss.loss + head.router_coefficient * loss.router


def own(model: PreTrainedModel, batch: dict[str, Tensor], *, shifted: bool) -> Run:
    """The model's own loss of ``labels=``."""
    labels = batch["labels"]
    if shifted:
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    output = model(**inputs, labels=labels, use_cache=False)
    return backward(model, output.loss, output.loss)


def backward(model: PreTrainedModel, loss: Tensor, rows: Tensor) -> Run:
    """Gradients of a loss, each parameter's once, tied or not."""
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Run(loss.detach(), rows.detach(), gradients)


def gradient_error(found: Run, truth: Run) -> float:
    """The largest error of a parameter's gradient, as the module describes; inf for a lost one."""
    if found.gradients.keys() != truth.gradients.keys():
        return torch.inf
    largest = {name: float(gradient.abs().max()) for name, gradient in truth.gradients.items()}
    floor = EPS**0.5 * max(largest.values())
    return max(
        float((found.gradients[name].double() - gradient).abs().max()) / (largest[name] + floor)
        for name, gradient in truth.gradients.items()
    )


def loss_error(found: Run, truth: Run, plain: Run) -> float:
    """The loss's error relative to what is allowed; ``plain`` is PyTorch's."""
    of_rows = float((plain.rows.double() - truth.rows).abs().mean())
    allowed = 2 * of_rows + EPS * float(truth.loss.abs())
    return float((found.loss.double() - truth.loss).abs()) / allowed


def errors(model: PreTrainedModel, head: HeadAdapter, *, shifted: bool) -> tuple[float, float]:
    """The larger of both comparisons' errors of loss and gradients, relative to the allowed."""
    batch = padded_batch()
    dense = copy.copy(head)
    dense.fused = False
    doubles = copy.deepcopy(model).double()
    losses, gradients = [], []
    for method in ("ntp", "sftmix"):
        truth, plain = (ours(m, dense, batch, method) for m in (doubles, model))
        found = ours(model, head, batch, method)
        losses.append(loss_error(found, truth, plain))
        if method == "ntp":
            labels = own(model, batch, shifted=shifted)
            losses.append(loss_error(labels, truth, plain))
            plain = labels
        allowed = 2 * gradient_error(plain, truth) + EPS
        gradients.append(gradient_error(found, truth) / allowed)
    return max(losses), max(gradients)


def describe(model: PreTrainedModel, head: HeadAdapter) -> str:
    """What is special about a head."""
    parts = []
    if any(linear.bias is not None for linear in head.linears):
        parts.append("bias")
    if head.weight is getattr(model.get_input_embeddings(), "weight", None):
        parts.append("tied")
    if head.logit_scale != 1:
        parts.append(f"scale {head.logit_scale:.4g}")
    if head.softcap is not None:
        parts.append(f"softcap {head.softcap:.4g}")
    if head.router_coefficient:
        parts.append(f"router loss {head.router_coefficient:.4g}")
    return ", ".join(parts)


def compare(name: str) -> Family:
    """Build a family's model and compare it."""
    model = build(name)
    kind = type(model).__name__
    try:
        head = HeadAdapter(model)
    except ValueError as error:
        return Family(name, kind, "", torch.nan, torch.nan, f"refused: {error}")
    loss, gradient = errors(model, head, shifted=name in UNSHIFTED)
    verdict = "right" if max(loss, gradient) <= 1 else "WRONG"
    return Family(name, kind, describe(model, head), loss, gradient, verdict)


def is_as_expected(family: Family) -> bool:
    """Whether a family is right, or refused as it should be."""
    if family.name in REFUSED:
        return family.verdict.startswith("refused")
    return family.verdict == "right"
