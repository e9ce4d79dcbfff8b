"""Run a training step on tensors without values to find its memory and its operations.

`plan_step` runs the model's own code, the project's loss and the real optimizer under a
`MemoryTrace`. The layers of a decoder are alike, so two short models are traced and the rest
follows: in each moment of a step the peak is a linear function of the number of layers.

All sequences are of one length, with loss at every token except the first. The plan does not count
the device's context, libraries' workspaces, the allocator's fragments, and wrappers' buffers.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from sftmix.methods import method_of
from sftmix.model.head import HeadAdapter
from sftmix.plan.attention import planned_implementation
from sftmix.plan.moments import BACKWARD, FORWARD, UPDATE, decoder_layers, name_moments
from sftmix.plan.optimizer import planned_optimizer, trained
from sftmix.plan.tiles import plan_tiles
from sftmix.plan.trace import (
    ACTIVATIONS,
    GRADIENTS,
    OPTIMIZER,
    WEIGHTS,
    MemoryTrace,
    planned_on_host,
)
from sftmix.recipe.arguments import RunArguments
from sftmix.recipe.lora import add_lora
from sftmix.training.config import CHECKPOINTING, SFTMixConfig
from sftmix.training.loss import batch_counts, batch_loss
from sftmix.training.trainer import make_collator
from sftmix_kernels import RowChunks, VocabTiles
from sftmix_kernels.peaks import op_products, op_workspace

# Layers of the short models; a model that has no more is traced as it is. From the second layer on
# each one more adds the same.
SHORT = (2, 3)
# Of a batch: its arrays take 50 bytes a token of the host's memory.
MOST_TOKENS = 2**26


@dataclass(frozen=True)
class Plan:
    """The memory (bytes) and the operations of one optimizer step."""

    length: int  # tokens of a sequence
    parts: dict[str, int]  # held at the peak, by `sftmix.plan.trace.PARTS`
    moment: str  # of the peak: forward, loss, backward, optimizer
    host: int  # kept in host memory
    matrix_products: int  # operations, two of a multiplication and an addition
    parameters: int
    trained: int  # of the parameters

    @property
    def peak(self) -> int:
        """Bytes of the device at the peak."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Traced:
    """A step of a model with some number of layers."""

    peaks: dict[str, dict[str, int]]  # parts at the peak of each moment
    host: int
    matrix_products: int
    parameters: int
    trained: int


def plan_step(
    config: PretrainedConfig,
    arguments: RunArguments,
    options: SFTMixConfig,
    length: int,
    *,
    on_cpu: bool = False,
) -> Plan:
    """Plan the step of `options.per_device_train_batch_size` sequences of `length` tokens.

    Args:
        config: of the model; no weights are read or made.
        arguments: dtype, LoRA and attention as `sftmix train` takes them; the rest is not used.
        options: of the training, as in `sftmix train`.
        length: tokens of every sequence, at least 2.
        on_cpu: plan for PyTorch's own operations on the CPU instead of a GPU's kernels.

    Raises:
        ValueError: no causal language model, or a quantised one; a layout that does not hold the
            length; an optimizer that is not known; several processes; experts in another dtype
            than bfloat16; a model whose shapes hang on values.
    """
    check_options(config, options, length)
    if arguments.load_in_4bit:
        raise ValueError("load_in_4bit: the plan knows no quantised weights; leave it out")
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    short: Sequence[int | None] = SHORT
    # If only some layers checkpoint, two short models do not tell the peak of a longer one.
    some = "every_n_layers" in (getattr(options, f"{CHECKPOINTING}_kwargs") or {})
    if layers is None or layers <= max(SHORT) or some or not all_alike(config, arguments):
        short, layers = (None,), 0
    steps = [
        traced_step(with_layers(config, count), arguments, options, length, on_cpu)
        for count in short
    ]
    step = steps[0] if len(steps) == 1 else extended(steps[0], steps[1], layers)
    moment, parts = max(step.peaks.items(), key=lambda peak: sum(peak[1].values()))
    return Plan(
        length=length,
        parts=parts,
        moment=moment.split(":")[0],
        host=step.host,
        matrix_products=step.matrix_products,
        parameters=step.parameters,
        trained=step.trained,
    )


def check_options(config: PretrainedConfig, options: SFTMixConfig, length: int) -> None:
    """Refuse what the plan would be wrong about."""
    if length < 2:
        raise ValueError(f"max_length: expected at least 2 tokens, got {length}")
    if options.fsdp or options.deepspeed or options.world_size > 1:
        raise ValueError(
            "plan: expected one process without --fsdp and --deepspeed, whose shards and buffers "
            "it does not know"
        )
    for name in ("torch_compile", "use_liger_kernel"):
        if getattr(options, name):
            raise ValueError(f"{name}: the plan knows only the model's own code; leave it off")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("model: expected weights that are not quantised; the plan knows no others")


def check_experts(model: Any) -> None:
    """Refuse experts whose products PyTorch cannot follow without values."""
    experts = getattr(model.config.get_text_config(), "_experts_implementation", None)
    if experts == "grouped_mm" and model.dtype != torch.bfloat16:
        raise ValueError(
            "dtype: expected bfloat16, the plan knows grouped products of experts in no other; got "
            f"{str(model.dtype).removeprefix('torch.')}"
        )


def with_layers(config: PretrainedConfig, count: int | None) -> PretrainedConfig:
    """Return a copy of the config with the first `count` layers, or with all for None."""
    config = copy.deepcopy(config)
    if count is not None:
        text = config.get_text_config()
        if getattr(text, "layer_types", None) is not None:
            text.layer_types = text.layer_types[:count]
        text.num_hidden_layers = count
    return config


_alike: dict[tuple[str, str], bool] = {}


def all_alike(config: PretrainedConfig, arguments: RunArguments) -> bool:
    """Return what `alike` says of a config, whose plans at other lengths ask again."""
    key = type(config).__name__, config.to_json_string()
    if key not in _alike:
        _alike[key] = alike(config, arguments)
    return _alike[key]


def alike(config: PretrainedConfig, arguments: RunArguments) -> bool:
    """Tell whether all layers have the same parameters and the same kind of attention."""
    text = config.get_text_config()
    layers = decoder_layers(empty_model(copy.deepcopy(config), arguments), text.num_hidden_layers)
    shapes = [{name: p.shape for name, p in layer.named_parameters()} for layer in layers]
    same = all(shape == shapes[0] for shape in shapes)
    return bool(shapes) and same and len(set(getattr(text, "layer_types", None) or [None])) == 1


def extended(two: Traced, three: Traced, layers: int) -> Traced:
    """Return the step of a model with `layers` layers, extended from the two `SHORT` ones."""
    first, second = SHORT

    def along(start: int, end: int) -> int:
        return start + (end - start) * (layers - first) // (second - first)

    peaks = {
        moment: {
            part: along(parts.get(part, 0), three.peaks[moment].get(part, 0))
            for part in {*parts, *three.peaks[moment]}
        }
        for moment, parts in two.peaks.items()
    }
    return Traced(
        peaks,
        along(two.host, three.host),
        along(two.matrix_products, three.matrix_products),
        along(two.parameters, three.parameters),
        along(two.trained, three.trained),
    )


def traced_step(
    config: PretrainedConfig,
    arguments: RunArguments,
    options: SFTMixConfig,
    length: int,
    on_cpu: bool,
) -> Traced:
    """Build the model, let it have trained once, and follow one optimizer step."""
    batch = planned_batch(options, length)
    packed = "position_ids" in batch and len(batch["lengths"]) > len(batch["input_ids"])
    model = empty_model(config, arguments)
    check_experts(model)
    model = add_lora(model, arguments, options.seed)
    real = str(arguments.attn_implementation or model.config._attn_implementation)
    planned = planned_implementation(real, packed=packed, on_cpu=on_cpu)
    for part in (config, config.get_text_config()):
        part._attn_implementation = planned
    schedule = loss_schedule(options)
    trace = MemoryTrace(
        lambda name, args: (
            op_workspace(name, args, schedule, kernels=not on_cpu),
            op_products(name, args),
        )
    )
    try:
        with trace:
            with trace.counting_as(WEIGHTS):
                fill(model)
            follow(trace, model, options, batch, on_cpu=on_cpu)
            parameters = [p.numel() for p in model.parameters()]
            of_trained = sum(p.numel() for p in trained(model))
    except NotImplementedError as error:
        raise ValueError(
            f"model: the shapes in {type(model).__name__} hang on values ({error}), which a plan "
            "does not have"
        ) from error
    micro_batches = min(options.gradient_accumulation_steps, 2)
    products = trace.products // micro_batches * options.gradient_accumulation_steps
    return Traced(trace.peaks, trace.host_peak, products, sum(parameters), of_trained)


def loss_schedule(options: SFTMixConfig) -> RowChunks | VocabTiles:
    """Return `options.loss_plan` as a schedule with its numbers."""
    plan = options.loss_plan
    if isinstance(plan, str):
        return VocabTiles() if plan == "vocab_tiles" else RowChunks()
    return plan


def empty_model(config: PretrainedConfig, arguments: RunArguments) -> Any:
    """Return the model on the meta device, with the attention that `transformers` would choose.

    Raises:
        ValueError: the config is of no causal language model.
    """
    dtype = getattr(config, "dtype", None) or torch.float32
    if arguments.dtype != "auto":
        dtype = getattr(torch, arguments.dtype)
    asked = arguments.attn_implementation
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=asked if asked in (None, "eager", "sdpa") else "sdpa",
            trust_remote_code=arguments.trust_remote_code,
        )


def fill(model: nn.Module) -> None:
    """Replace the meta device's tensors by tensors without values; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def planned_batch(options: SFTMixConfig, length: int) -> dict[str, Any]:
    """Return the collator's batch of equal sequences, in pairs if the method mixes them.

    Raises:
        ValueError: it has more tokens than are laid out in a few seconds.
    """
    size = options.per_device_train_batch_size
    if size * length > MOST_TOKENS:
        raise ValueError(
            f"per_device_train_batch_size: expected at most {MOST_TOKENS:,} tokens in a batch, got "
            f"{size:,} sequences of {length:,}; take a smaller one, or a smaller --max_length"
        )
    tokens = np.zeros(length, dtype=np.int64)
    example: dict[str, Any] = {"input_ids": tokens, "labels": tokens}
    if method_of(options.method).mixed:
        example["lam"] = 0.5
    return make_collator(None, options)([example] * size)


def follow(
    trace: MemoryTrace, model: Any, options: SFTMixConfig, batch: dict[str, Any], *, on_cpu: bool
) -> None:
    """Run the steps of `transformers.Trainer`, each under the name of its moment."""
    with trace.counting_as(OPTIMIZER):
        optimizer = planned_optimizer(model, options, on_cpu=on_cpu)
        make_states(model, optimizer)
    enable_checkpointing(model, options)
    model.train()
    saving = planned_on_host if options.activation_offload else None
    head = HeadAdapter(model, options.head, checked=False, saving=saving)
    if options.mlp_tile_tokens is not None:
        plan_tiles(model, options.mlp_tile_tokens)
    name_moments(trace, head)
    for parameter in trained(model):
        parameter.register_post_accumulate_grad_hook(lambda p: trace.recount(p.grad, GRADIENTS))
    trace.forget_peaks()
    inputs = {
        name: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
    # The second micro-batch finds the first one's gradients.
    for _ in range(min(options.gradient_accumulation_steps, 2)):
        micro_step(trace, model, head, options, inputs)
    trace.moment = UPDATE
    trace.note_peak()
    with trace.counting_as(OPTIMIZER):
        if options.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(list(trained(model)), options.max_grad_norm)
        optimizer.step()


def micro_step(
    trace: MemoryTrace,
    model: Any,
    head: HeadAdapter,
    options: SFTMixConfig,
    inputs: dict[str, Any],
) -> None:
    """Run forward, loss and backward of one batch."""
    counts = batch_counts([inputs], torch.device("cpu"))
    trace.moment = FORWARD
    with autocast(options):
        loss = batch_loss(model, head, inputs, options, counts)
    trace.part, trace.moment = ACTIVATIONS, BACKWARD
    total = loss.loss if loss.router is None else loss.loss + head.router_coefficient * loss.router
    total.backward()


def autocast(options: SFTMixConfig) -> contextlib.AbstractContextManager[Any]:
    """Return the trainer's mixed precision, of the CPU's kind, which casts weights once."""
    if not (options.bf16 or options.fp16):
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype=torch.bfloat16 if options.bf16 else torch.float16)


def make_states(model: nn.Module, optimizer: Any) -> None:
    """Make the optimizer's states, which exist from the second step on."""
    for parameter in trained(model):
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    for parameter in trained(model):
        parameter.grad = None


def enable_checkpointing(model: Any, options: SFTMixConfig) -> None:
    """Enable checkpointing as `transformers.Trainer` does, under this version's name for it."""
    if not getattr(options, CHECKPOINTING):
        return
    settings = dict(getattr(options, f"{CHECKPOINTING}_kwargs") or {})
    if settings.pop("offload", False):
        raise ValueError(
            f"{CHECKPOINTING}_kwargs: the plan does not know 'offload'; give --activation_offload"
        )
    every = {key: settings.pop(key) for key in ("every_n_layers",) if key in settings}
    enable = getattr(model, f"{CHECKPOINTING}_enable")
    enable(**{f"{CHECKPOINTING}_kwargs": settings or None}, **every)
