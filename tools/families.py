"""Which causal language models of transformers the trainer is right for: each built and compared.

    python -m tools.families [--markdown FILE] [NAME ...]

A tiny random model of each family runs a padded batch, in float32 and as a copy in float64. Two
things are compared, in loss and in every parameter's gradient:

- NTP through the fused loss, and the model's own loss of ``labels=``;
- NTP + mu * Mixup through the fused loss, and the same from the model's own logits
  (``--head logits``), whose float64 is the truth of both.

**Criterion.** An error may be twice PyTorch's own in float32, plus one rounding of float32. Errors
of a gradient are relative to the parameter's largest one plus ``sqrt(eps)`` of the model's largest,
and the largest relative error over all parameters, both comparisons and two batches is held beside
PyTorch's largest: a few numbers beside a few others are a lottery, and some gradients (a key's
bias) are 0 but for rounding. The loss's error is taken over its tokens without cancelling, for the
same reason.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sftmix.model.head import HeadAdapter
from sftmix.model.known_types import NEEDED, ROUTERS, needed
from sftmix.pairs.collator import PairedCollator
from sftmix.training.config import SFTMixConfig
from sftmix.training.loss import MODEL_INPUTS, BatchLoss, batch_counts, batch_loss

HEADING = """# Models

The trainer takes any causal language model of transformers that calls an LM head once. It does not
go by names: at the start it runs a few tokens through the model, sees what the model makes of raw
logits, and compares. What it finds:

- **`--head fused`** (the default) needs a linear head and logits that are
  `cap * tanh(scale * (W h + b) / cap)`, or without a cap. The head may have a bias, be tied to the
  embeddings, sit behind further layers (BERT's decoders) or a scale of the hidden states (MiniCPM).
- **`--head logits`** takes every head: the mixed hidden states go through the model's own head and
  what follows it. It holds all logits and is slow; it is for models that `fused` refuses.
- Refused by both: models that are not causal, that call their head several times, or whose own
  loss adds something besides next-token prediction and a router's auxiliary loss.

**Mixtures of experts.** Where the model's config has `output_router_logits` on, the router's
auxiliary loss times the model's own coefficient is added, as a mean over the micro-batches of all
ranks, and logged as `router_loss`, before the coefficient. The router counts the padding of packed
rows as tokens, that of padded batches not. TRL switches the loss on by itself, and its
`router_aux_loss_coef` is heeded. Models and checkpoints are saved with it off: generation fails
with it on padded prompts. Turn it on again to train such a model further.

**PEFT.** LoRA and its like on the backbone: a frozen head's gradient is not computed.
`modules_to_save=["lm_head"]` trains the copy of the head. An adapter on the head itself needs
`--head logits`. Virtual tokens (prompt learning) are refused.

**Quantised heads** (bitsandbytes) are refused by `fused`: leave the head out of the quantisation.

[What is refused](gaps.md) lists it by family, layout, adapter and way to use several devices.

## Compared

`python -m tools.families --markdown docs/models.md` made this table. A tiny random model of each
family runs padded batches; loss and every parameter's gradient of the fused NTP are compared with
the model's own `labels=`, and those of NTP + mu * Mixup with the same from the model's own logits,
both against float64. Errors are relative to what is allowed, twice PyTorch's own in float32: up to
1.00 is right.
"""
VOCABULARY = 64
EPS = torch.finfo(torch.float32).eps
LARGEST = 4_000_000  # parameters: what is larger was not made small

# What is compared by default: types of models as transformers names them.
_NAMES = """
    afmoe apertus arcee aria_text bailing_hybrid bamba bart beam bert bert-generation big_bird
    bigbird_pegasus biogpt bitnet blenderbot-small bloom camembert codegen cohere cohere2
    cohere2_moe cpmant ctrl cwm data2vec-text deepseek_v2 deepseek_v3 diffllama doge
    dots1 electra ernie
    ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo gemma
    gemma2 gemma3_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neo gpt_neox
    gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa
    granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3
    hyperclovax inkling_text jais2 jamba jetmoe kolibri1 laguna lfm2 lfm2_moe lfm3 llama
    llama4_text mamba mamba2 marian mbart megatron-bert mellum mimo_v2_flash minicpm3 minimax
    minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral modernbert-decoder
    moshi mpt mvp nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt
    opt pegasus persimmon phi phi3 phimoe plbart qwen2 qwen2_moe qwen3 qwen3_5_moe_text
    qwen3_5_text qwen3_moe qwen3_next qwen4_exp_text recurrent_gemma rembert roberta
    roberta-prelayernorm roformer rwkv seed_oss smollm3 solar_open stablelm starcoder2 trocr
    vaultgemma whisper xlm xlm-roberta xlm-roberta-xl youtu zaya
"""
FAMILIES = tuple(_NAMES.split())

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
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8}
_LATENT = {"head_dim": None, "num_key_value_heads": 4}
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA2,
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": {**_LATENT, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**_LATENT, "n_group": 1, "topk_group": 1},
    "glm4_moe_lite": {**_LATENT, "n_group": 1, "topk_group": 1},
    "youtu": _LATENT,
    "falcon": {"head_dim": None},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granite": {"logits_scaling": 3.0},
    "granitemoe": {"logits_scaling": 3.0},
    "granitemoehybrid": _MAMBA2,
    "hyperclovax": {"logits_scaling": 0.5},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 1, "chunk_size": 8},
    "minicpm3": {**_LATENT, "dim_model_base": 16},
    "inkling_text": {"logits_mup_width_multiplier": 3.0},
    "whisper": {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "plbart": {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}
# Their own loss takes labels that are already shifted.
UNSHIFTED = {
    *("bart", "bigbird_pegasus", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"),
    *("trocr", "whisper", "xlm"),
}
# Refused, as they should be: its tokens see those after them.
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
        if any(hasattr(module, "num_experts") for module in model.modules()):
            # The grouped product of experts has no float64.
            model.set_experts_implementation("eager")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def padded_batch(seed: int) -> dict[str, Tensor]:
    """Two pairs of examples of uneven lengths."""
    random = torch.Generator().manual_seed(seed)
    examples = []
    for row, length in enumerate((24, 17, 9, 21)):
        tokens = torch.randint(3, VOCABULARY, (length,), generator=random).tolist()
        labels = [-100] * (1 + row) + tokens[1 + row :]
        examples.append({"input_ids": tokens, "labels": labels, "lam": (0.3, 0.8)[row // 2]})
    return PairedCollator(0)(examples)


@functools.cache
def options(method: str) -> SFTMixConfig:
    """The trainer's options, with enough Mixup to be seen."""
    return SFTMixConfig(output_dir="unused", use_cpu=True, method=method, mu=0.5)


def ours(model: PreTrainedModel, head: HeadAdapter, batch: dict[str, Tensor], method: str) -> Run:
    """The trainer's loss of a batch, with the router's."""
    counts = batch_counts([batch], batch["rows"].device)
    loss = batch_loss(model, head, batch, options(method), counts)
    assert loss.row_ntp is not None  # Mixup alone has none
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
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Run(loss.detach(), rows.detach(), gradients)


def gradient_error(found: Run, truth: Run) -> float:
    """The largest error of a parameter's gradient, as the module describes; inf for a lost one."""
    if found.gradients.keys() != truth.gradients.keys():
        return torch.inf
    largest = {name: float(gradient.abs().max()) for name, gradient in truth.gradients.items()}
    floor = float(EPS**0.5 * max(largest.values()))
    return max(
        float((found.gradients[name].double() - gradient).abs().max()) / (largest[name] + floor)
        for name, gradient in truth.gradients.items()
    )


def loss_error(found: Run, truth: Run, of_rows: float) -> float:
    """The loss's error relative to what is allowed: twice a token's with PyTorch, two roundings.

    Two, as models make their own loss, and with it the truth, in float32 even from float64.
    """
    rounding = EPS * float(truth.loss.abs())
    return float((found.loss.double() - truth.loss).abs()) / (2 * of_rows + 2 * rounding)


def errors(model: PreTrainedModel, head: HeadAdapter, *, shifted: bool) -> tuple[float, float]:
    """The larger of both comparisons' errors of loss and gradients, relative to the allowed."""
    dense = copy.copy(head)
    dense.fused = False
    doubles = copy.deepcopy(model).double()
    losses, found, allowed = [0.0], [0.0], [EPS]
    methods: tuple[str, str] = ("ntp", "sftmix")
    for batch in (padded_batch(0), padded_batch(1)):
        exact, near = (ours(one, dense, batch, "sftmix") for one in (doubles, model))
        own_exact, own_near = (own(one, batch, shifted=shifted) for one in (doubles, model))
        of_rows = float((near.rows.double() - exact.rows).abs().mean())
        for method, truth, plain in zip(methods, (own_exact, exact), (own_near, near), strict=True):
            run = ours(model, head, batch, method)
            losses.append(loss_error(run, truth, of_rows))
            found.append(gradient_error(run, truth))
            allowed.append(2 * gradient_error(plain, truth) + EPS)
    return max(losses), max(found) / max(allowed)


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


def known() -> tuple[str, ...]:
    """The families that the installed transformers has right; the others need a newer one."""
    installed = Version(transformers.__version__)
    return tuple(name for name in FAMILIES if Version(needed(name, router=True)) <= installed)


def since() -> str:
    """Which families need a newer transformers than the lowest, as a paragraph of the page."""
    late = [f"{name} {NEEDED[name]}" for name in FAMILIES if name in NEEDED]
    routers = [f"{name} {version}" for name, version in ROUTERS.items()]
    return (
        "A model whose type came after the lowest transformers that is allowed, or is wrong in it, "
        f"is refused with the version that it needs: {', '.join(late)}; with the loss of its "
        f"routers {', '.join(routers)}."
    )


def is_as_expected(family: Family) -> bool:
    """Whether a family is right, or refused as it should be."""
    if family.name in REFUSED:
        return family.verdict.startswith("refused")
    return family.verdict == "right"


def table(families: Sequence[Family]) -> str:
    """The families as a table in Markdown."""
    lines = [
        "| family | class | head | loss error | gradient error | verdict |",
        "|---|---|---|---:|---:|---|",
    ]
    for name, kind, head, loss, gradient, verdict in families:
        found = "| | |" if verdict.startswith("refused") else f"| {loss:.2f} | {gradient:.2f} |"
        lines.append(f"| {name} | {kind} | {head} {found} {verdict} |")
    return "\n".join(lines)


def page(families: Sequence[Family]) -> str:
    """`docs/models.md`."""
    right = sum(family.verdict == "right" for family in families)
    pytorch = torch.__version__.partition("+")[0]
    return (
        f"{HEADING}\n\n{right} of {len(families)} families with transformers "
        f"{transformers.__version__}, PyTorch {pytorch}, on the CPU:\n\n"
        f"{table(families)}\n\n{since()}\n"
    )


def main(words: Sequence[str] | None = None) -> int:
    """Compare families; 1 if one is wrong, or refused where it should not be."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.families", description=__doc__.split("\n")[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="types of models; all by default")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    arguments = parser.parse_args(words)
    transformers.logging.set_verbosity_error()
    families = []
    for name in arguments.names or known():
        families.append(compare(name))
        print(table(families[-1:]).splitlines()[-1], flush=True)
    if arguments.markdown is not None:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text(page(families), encoding="utf-8")
    wrong = [family.name for family in families if not is_as_expected(family)]
    print(f"{len(families)} families, not as they should be: {', '.join(wrong) or 'none'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
