"""Tiny random models of several families, uneven examples, and trainers over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from sftmix.training.config import SFTMixConfig
from sftmix.training.trainer import SFTMixTrainer, make_collator
from sftmix_kernels.budget import budget, rms

VOCABULARY = 64

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", _DECODER),
    "Qwen3": ("Qwen3ForCausalLM", {**_DECODER, "head_dim": 8}),
    "Gemma2": (
        "Gemma2ForCausalLM",
        {**_DECODER, "head_dim": 8, "final_logit_softcapping": 0.5, "sliding_window": 16},
    ),
    "Cohere": ("CohereForCausalLM", {**_DECODER, "logit_scale": 0.25}),
    "Granite": ("GraniteForCausalLM", {**_DECODER, "logits_scaling": 3.0}),
    "Phi": ("PhiForCausalLM", {**_DECODER, "num_key_value_heads": 2, "resid_pdrop": 0.0}),
    "GPT2": (
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}
FAMILIES = tuple(_FAMILIES)


def build(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model whose logits are large enough to be far from uniform."""
    name, options = _FAMILIES[family]
    cls = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = cls(cls.config_class(**{**options, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def examples(number: int, *, seed: int = 0, longest: int = 14) -> datasets.Dataset:
    """Examples whose prompts and responses are of uneven lengths; every third has two turns."""
    random = np.random.default_rng(seed)
    rows = []
    for row in range(number):
        length = int(random.integers(4, longest + 1))
        tokens = random.integers(3, VOCABULARY, length).tolist()
        prompt = int(random.integers(1, length - 1))
        labels = [-100] * prompt + tokens[prompt:]
        if row % 3 == 0 and length - prompt > 3:
            labels[prompt + 1] = -100
        rows.append({"id": 10 + row, "content_hash": f"{row:04}"} | named(tokens, labels))
    return datasets.Dataset.from_list(rows)


def named(tokens: list[int], labels: list[int]) -> dict[str, list[int]]:
    """The columns of an example."""
    return {"input_ids": tokens, "labels": labels}


def halves(number: int) -> list[bool]:
    """A partition that is no pattern of rows: equal halves, up to one."""
    order = np.random.default_rng(7).permutation(number)
    return [bool(rank < (number + 1) // 2) for rank in order]


def config(output: Path, **changes: Any) -> SFTMixConfig:
    """Settings of a short, quiet run on the CPU."""
    defaults: dict[str, Any] = {
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return SFTMixConfig(output_dir=str(output), **{**defaults, **changes})


def trainer(
    model: PreTrainedModel,
    output: Path,
    data: datasets.Dataset,
    *,
    callbacks: list[TrainerCallback] | None = None,
    confident: list[bool] | None = None,
    eval_dataset: Any = None,
    **changes: Any,
) -> SFTMixTrainer:
    """A trainer over the data, paired unless ``method="ntp"`` came without ``confident``."""
    if confident is None and changes.get("method") != "ntp":
        confident = halves(len(data))
    options = config(output, **changes)
    made = SFTMixTrainer(
        model=model,
        args=options,
        train_dataset=data,
        eval_dataset=eval_dataset,
        data_collator=make_collator(None, options),
        confident=confident,
        callbacks=callbacks,
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def losses(made: SFTMixTrainer, *names: str) -> list[tuple[float, ...]]:
    """The logged values of those names, a tuple for each log line that has them."""
    history = made.state.log_history
    return [tuple(line[name] for name in names) for line in history if names[0] in line]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are bitwise equal."""
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest magnitude of what is expected."""
    difference = (found - expected).detach().abs().max()
    return float(difference / expected.detach().abs().max().clamp(min=1e-30))


def assert_in_budget(name: str, found: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Hold a tensor to the error budget beside PyTorch's own."""
    used = budget(found, truth, plain.double() - truth)
    assert used.holds, f"{name} is over the error budget: {used.says}"


def assert_gradients_in_budget(
    name: str, found: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    """Hold the gradients of a model's parameters to the error budget, all together.

    Each is taken in units of its root mean square, so that no parameter hides behind a larger one.
    One by one, the errors of a norm's 16 numbers would be compared with those of 16 others.
    """
    assert found.keys() == plain.keys() == truth.keys()
    units = {key: rms(gradient) or 1.0 for key, gradient in truth.items()}
    together = (
        torch.cat([(gradients[key] / unit).flatten() for key, unit in units.items()])
        for gradients in (found, plain, truth)
    )
    assert_in_budget(name, *together)


def assert_same_training(
    mine: PreTrainedModel, theirs: PreTrainedModel, batch: dict[str, Tensor], router: float = 0.0
) -> None:
    """All gradients of ``mine`` in the budget beside those of ``theirs``, after both went backward.

    Together: the errors of a norm's few weights are a lottery. The truth is the dense loss in
    float64, with ``router`` times the router's.
    """
    # No deep copy: the forward that TRL has put on the instance would run the first one's weights.
    exact = type(theirs)(theirs.config).double()
    exact.load_state_dict(theirs.state_dict())
    inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask")}
    output = exact(**inputs, **({"output_router_logits": True} if router else {}))
    labels = batch["labels"][:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels)
    (loss + router * output.aux_loss if router else loss).backward()
    found, plain, truth = (
        torch.cat([weight.grad.flatten() for weight in model.parameters()])
        for model in (mine, theirs, exact)
    )
    assert_in_budget("all gradients", found, plain, truth)
