"""What the trainer refuses, found out by asking it: `docs/gaps.md`.

    python -m tools.gaps [NAME ...]

Every cell comes from a call of the checks that a training makes before its first step, on tiny
models: empty where they let it pass, else the number of the refusal, whose words stand below. New
options and methods of `SFTMixOptions` are asked about without a change here.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import transformers
from accelerate.utils import DistributedType
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from sftmix.model.head import HeadAdapter
from sftmix.model.layout_check import check_layout
from sftmix.model.tiled_mlp import refuse_router, tile_mlps
from sftmix.pairs.layouts import LAYOUTS
from sftmix.recipe.arguments import RunArguments
from sftmix.recipe.lora import add_lora
from sftmix.training.config import CHECKPOINTING, SFTMixConfig, SFTMixOptions
from sftmix.training.parallelism import check_device, check_parallelism
from tools import families

PAGE = Path(__file__).parents[1] / "docs" / "gaps.md"
HEADING = """# What is refused

`python -m tools.gaps` made these tables. Each cell comes from a call of the checks that a training
makes before its first step, on tiny models on the CPU: it is empty where they let it pass, and a
number stands for the refusal below the table, in the trainer's own words; `-` was not asked, since
the model itself is refused. That what they let pass is right is another matter, and
[compared](models.md#compared) family by family. Options of transformers that are refused whatever
else is given are [listed by name](command_line.md#options-of-transformers).
"""
HEADS = ("fused", "logits")
REFUSALS = (ValueError, TypeError, ImportError, NotImplementedError)
TILE = 8

# Options of transformers that change how a step is computed.
STEPS: dict[str, Any] = {
    "torch_compile": True,
    CHECKPOINTING: True,
    "bf16": True,
    "fp16": True,
    "neftune_noise_alpha": 5.0,
    "label_smoothing_factor": 0.1,
}

Refusals = dict[str, str]  # what was asked, and the words of the refusal; empty: none


def refusal(ask: Callable[[], Any], model: nn.Module | None = None) -> str:
    """Return the words with which a call is refused; empty: it is not.

    The way out is left out, and names that only the classes of `model` have.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ask()
    except REFUSALS as error:
        # The first clause: what follows is the way out, and a set's order in it may change.
        text = re.split(r"; |\. (?=[A-Z])| \(model_type", " ".join(str(error).split()))[0]
        for part in () if model is None else model.modules():
            if type(part).__module__.startswith("transformers.models."):
                name = "the model" if isinstance(part, PreTrainedModel) else "a module"
                text = re.sub(rf"\b{type(part).__name__}\b", name, text)
        # A number that was measured differs from machine to machine.
        return re.sub(r"\d+\.\d+(e-?\d+)?", "...", text)
    return ""


def of_family(name: str) -> Refusals:
    """Ask about a family's heads, layouts, tiles and LoRA."""
    model = families.build(name)
    lora = {"`--lora_rank`": refusal(lambda: with_lora(name), model)}
    found, adapter = of_heads(model)
    return found if adapter is None else found | of_backbone(model, adapter) | lora


def of_heads(model: Any) -> tuple[Refusals, HeadAdapter | None]:
    """Ask about both heads, and leave the first one attached that is taken."""
    found: Refusals = {}
    for kind in HEADS:
        found[kind] = refusal(functools.partial(attached_once, model, kind), model)
    taken = next((kind for kind, text in found.items() if not text), None)
    adapter = None if taken is None else HeadAdapter(model, taken)
    return {f"`--head {kind}`": text for kind, text in found.items()}, adapter


def attached_once(model: Any, head: str) -> None:
    """Attach a head, which checks it, and detach it."""
    HeadAdapter(model, head).detach()


def of_backbone(model: Any, adapter: HeadAdapter) -> Refusals:
    """Ask about layouts and tiles."""

    def tile() -> None:
        refuse_router(adapter.router_coefficient)
        tile_mlps(model, TILE)

    found: Refusals = {}
    for name in LAYOUTS:
        text = refusal(functools.partial(check_layout, model, name), adapter.model)
        found[f"`{name}`"] = text.replace(repr(name), "such")  # the column says which
    return {**found, "`--mlp_tile_tokens`": refusal(tile, adapter.model)}


def with_lora(name: str) -> Any:
    """Return a family's model with the updates of `--lora_rank`."""
    arguments = RunArguments("unused", ["unused"], "unused", lora_rank=2)
    return add_lora(families.build(name), arguments, seed=0)


def adapters() -> dict[str, Callable[[], Any]]:
    """Return ways to train a llama: what builds the model, by name."""
    import peft

    def over(base: Callable[[], Any], config: Any) -> Callable[[], Any]:
        return lambda: peft.get_peft_model(base(), config)

    def lora(**options: Any) -> Any:
        return peft.LoraConfig(task_type="CAUSAL_LM", r=2, **options)

    llama = functools.partial(families.build, "llama")
    virtual: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
    prompts = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1)
    return {
        "all weights": llama,
        "LoRA": over(llama, lora(target_modules="all-linear")),
        "LoRA on the head": over(llama, lora(target_modules=["q_proj", "lm_head"])),
        "LoRA and a copy of the head": over(llama, lora(modules_to_save=["lm_head"])),
        "DoRA": over(llama, lora(target_modules="all-linear", use_dora=True)),
        "IA3": over(llama, peft.IA3Config(task_type="CAUSAL_LM")),
        "prompt tuning": over(llama, peft.PromptTuningConfig(**virtual)),
        "prefix tuning": over(llama, peft.PrefixTuningConfig(**virtual)),
        "adaption prompt": over(llama, prompts),
        "QLoRA": over(four_bits, lora(target_modules="all-linear")),
        "QLoRA, the head in 4 bits too": over(lambda: four_bits(head=True), lora()),
    }


def four_bits(*, head: bool = False) -> Any:
    """Return a llama in NF4; the head is, too, if asked for."""
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=[] if head else None,
    )
    model = families.build("llama")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        options: dict[str, Any] = {"quantization_config": quantised, "device_map": {"": "cpu"}}
        return type(model).from_pretrained(folder, **options).eval()


def of_adapter(build: Callable[[], Any]) -> Refusals:
    """Ask about an adapter's heads, layouts, tiles and processes."""
    model = build()
    found, adapter = of_heads(model)
    if adapter is not None:
        found |= of_backbone(model, adapter)
    reentrant = {f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}
    twice: dict[str, Any] = {"checkpoints_activations": True, **reentrant}
    for name, (args, accelerator) in {
        "DDP": processes(),
        "DDP, `use_reentrant`": processes(**twice),
        "FSDP2": processes(plugin={}),
    }.items():
        found[name] = refusal(functools.partial(check_parallelism, args, accelerator, model))
    return found


def processes(
    ranks: int = 2, plugin: Mapping[str, Any] | None = None, **changes: Any
) -> tuple[Any, Any]:
    """Return options and an accelerator as they are in a training of several processes.

    `plugin` changes what accelerate knows of FSDP; with None there is no FSDP.
    """
    full = SimpleNamespace(name="FULL_STATE_DICT")
    fsdp = {"fsdp_version": 2, "state_dict_type": full, **(plugin or {})}
    args = {
        "accelerator_config": SimpleNamespace(split_batches=False, dispatch_batches=None),
        "n_gpu": 1,
        "save_on_each_node": False,
        "fsdp": "",
        "checkpoints_activations": False,
        "world_size": ranks,
    }
    accelerator = {
        "distributed_type": DistributedType.MULTI_GPU,
        "parallelism_config": None,
        "state": SimpleNamespace(fsdp_plugin=None if plugin is None else SimpleNamespace(**fsdp)),
    }
    accelerator |= {name: changes.pop(name) for name in changes.keys() & accelerator.keys()}
    return SimpleNamespace(**{**args, **changes}), SimpleNamespace(**accelerator)


def split_over(name: str) -> tuple[Any, Any]:
    """Return what accelerate is told of tensor, context or sequence parallelism."""
    sizes = {"cp_size": 1, "sp_size": 1, "tp_size": 1, name: 2}
    return processes(parallelism_config=SimpleNamespace(**sizes))


def of_devices() -> Refusals:
    """Ask about ways to use several devices."""
    shards = SimpleNamespace(name="SHARDED_STATE_DICT")
    ways: dict[str, tuple[tuple[Any, Any], dict[str, Any]]] = {
        "DDP": (processes(), {}),
        "FSDP2": (processes(plugin={}), {}),
        "FSDP2, SHARDED_STATE_DICT": (processes(plugin={"state_dict_type": shards}), {}),
        "FSDP1": (processes(plugin={"fsdp_version": 1}), {}),
        "tensor parallelism": (split_over("tp_size"), {}),
        "context parallelism": (split_over("cp_size"), {}),
        "sequence parallelism": (split_over("sp_size"), {}),
        "DeepSpeed": (processes(distributed_type=DistributedType.DEEPSPEED), {}),
        "Megatron-LM": (processes(distributed_type=DistributedType.MEGATRON_LM), {}),
        "nn.DataParallel": (processes(1, n_gpu=2), {}),
        "a model with a `tp_plan`": (processes(), {"_tp_size": 2}),
        "a model over several devices": (processes(1), {"hf_device_map": {"": 0, "head": 1}}),
    }
    found: Refusals = {}
    for name, (way, marks) in ways.items():
        model = families.build("llama")
        vars(model).update(marks)
        found[name] = refusal(functools.partial(check_parallelism, *way, model))
    return found


def switches() -> dict[str, dict[str, Any]]:
    """Return options off their defaults: words, flags and sizes of `SFTMixOptions`, and `STEPS`."""
    hints = get_type_hints(SFTMixOptions)
    found: dict[str, dict[str, Any]] = {}
    for field in dataclasses.fields(SFTMixOptions):
        hint = hints[field.name]
        values: Iterable[Any] = field.metadata.get("choices", ())
        if get_origin(hint) is Literal:
            values = get_args(hint)
        elif hint is bool and field.name != "remove_unused_columns":
            values = (True,)
        elif hint == int | None:
            values = (TILE,)
        kept = [value for value in values if value != field.default]
        found |= {spelt(field.name, value): {field.name: value} for value in kept}
    return found | {spelt(name, value): {name: value} for name, value in STEPS.items()}


def spelt(name: str, value: Any) -> str:
    """Return an option as a user types it."""
    return f"`--{name} {str(value).lower() if isinstance(value, bool) else value}`"


def of_options(options: Mapping[str, Any], *, on_cpu: bool = False) -> str:
    """Ask about options that are given together; `on_cpu` asks whether the CPU has them, too."""

    def ask() -> None:
        config = SFTMixConfig(output_dir="unused", use_cpu=True, **options)
        if on_cpu:
            check_device(config)

    return refusal(ask)


def pairs(options: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """Return the refusals of options alone, (name, ""), and of two of them.

    One that needs another is asked about together with the first other that lets it pass.
    """
    found = {(name, ""): of_options(values, on_cpu=True) for name, values in options.items()}
    given: dict[str, Mapping[str, Any]] = {}
    for name, values in options.items():
        others = ({**other, **values} for other in ({}, *options.values()))
        passing = next((tried for tried in others if not of_options(tried)), None)
        given |= {} if passing is None else {name: passing}
    for one, other in itertools.combinations(given, 2):
        if not given[one].keys() & given[other].keys():
            found[one, other] = of_options({**given[one], **given[other]})
    return {pair: text for pair, text in found.items() if text}


def table(first: str, rows: Mapping[str, Refusals]) -> str:
    """Return refusals by row and column as Markdown, with their words below."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    texts = list(dict.fromkeys(text for row in rows.values() for text in row.values() if text))
    numbers = {"": "", "-": "-"} | {text: str(number) for number, text in enumerate(texts, 1)}
    lines = [f"| {first} | {' | '.join(columns)} |", f"|---|{':-:|' * len(columns)}"]
    for name, row in rows.items():
        cells = [numbers[row.get(column, "-")] for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{numbers[text]}. {text}" for text in texts)])


def of_families(found: Mapping[str, Refusals]) -> str:
    """Return the section of families: those of which something is refused, then the others."""
    refused = {name: row for name, row in found.items() if any(row.values())}
    others = [name for name in found if name not in refused]
    return (
        f"## Families\n\n{table('family', refused)}\n\n"
        f"Of these, {len(others)} of {len(found)}, nothing is refused: {', '.join(others)}."
    )


def of_adapters(ways: Mapping[str, Callable[[], Any]]) -> str:
    """Return the section of adapters."""
    rows = {name: of_adapter(build) for name, build in ways.items()}
    return f"## Adapters\n\nOver a llama.\n\n{table('trained', rows)}"


def of_rest() -> str:
    """Return the sections of devices and of options."""
    devices = "\n".join(f"| {name} | {text} |" for name, text in of_devices().items())
    found = pairs(switches())
    options = "\n".join(f"| {one} | {other} | {text} |" for (one, other), text in found.items())
    return (
        f"## Several devices\n\n| way | refused |\n|---|---|\n{devices}\n\n"
        "## Options\n\nEvery option of SFTMix that is a word, a flag or a size, and some of "
        "transformers', by itself on the CPU, and two at a time.\n\n"
        f"| option | with | refused |\n|---|---|---|\n{options}"
    )


def page(found: Mapping[str, Refusals]) -> str:
    """Return `docs/gaps.md`."""
    pytorch = torch.__version__.partition("+")[0]
    versions = f"With transformers {transformers.__version__} and PyTorch {pytorch}."
    parts = [f"{HEADING}\n{versions}", of_families(found), of_adapters(adapters()), of_rest()]
    return "\n\n".join(parts) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python -m tools.gaps", description="Write docs/gaps.md.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="families; all by default")
    parser.add_argument("--markdown", type=Path, default=PAGE, metavar="FILE", help="the page")
    arguments = parser.parse_args(words)
    transformers.logging.set_verbosity_error()
    found = {name: of_family(name) for name in arguments.names or families.FAMILIES}
    arguments.markdown.write_text(page(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
