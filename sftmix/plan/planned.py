"""Read the options of `sftmix plan`, try the switches that save memory, and give advice."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from sftmix.model.source import check_model
from sftmix.plan.optimizer import FEW_BITS
from sftmix.plan.search import GRID, largest_length
from sftmix.plan.step import Plan, plan_step
from sftmix.recipe.arguments import TrainRunArguments, parse
from sftmix.training.config import (
    CHECKPOINTING,
    LEAN_LOSS_BYTES,
    LEAN_TILE_TOKENS,
    SFTMixConfig,
    option,
)
from sftmix.training.optimizer_checks import check_schedule

# A small model's step of millions of tokens would fit, too, and take minutes to plan.
SEARCHED = 2**20
UNITS = {"": 0, "B": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclasses.dataclass(frozen=True)
class Alternative:
    """A switch that is off and what it would do; `error` says why it cannot be turned on."""

    says: str
    same: bool  # results stay the same up to rounding
    peak: int = 0
    host: int = 0
    per_token: float = 0.0
    saved: float = 0.0  # bytes less for one more token
    work: float = 0.0  # matrix products, as a share of those without it
    largest: int | None = None
    error: str = ""


@dataclasses.dataclass
class PlanArguments(TrainRunArguments):
    """The arguments of `sftmix train`, of which data, output and partition are not needed."""

    data: list[str] = dataclasses.field(default_factory=list, metadata={"help": "Not read [ours]"})
    output: str = option("", "Not written", "ours")
    gpu_memory: str | None = option(
        None, "Bytes to fit into, such as 80GiB, 80GB or 80e9; by default those of the GPU", "ours"
    )

    def _check_partition(self) -> None:
        # A recipe may name the partition that scoring will write.
        pass


@dataclasses.dataclass
class PlanConfig(SFTMixConfig):
    """The training options of `sftmix train`; `use_cpu` plans for the CPU instead of a GPU."""

    def __post_init__(self) -> None:
        self.on_cpu = bool(self.use_cpu)
        # Without a GPU transformers would refuse options that only a GPU has.
        self.use_cpu = self.on_cpu or not torch.cuda.is_available()
        super().__post_init__()

    def _check_settled(self) -> None:
        # This device is not the planned one, and the optimizer's packages do not matter.
        check_schedule(self)


@dataclasses.dataclass(frozen=True)
class Switch:
    """An option that saves memory, and the words that turn it on."""

    name: str
    words: tuple[str, ...]
    off: tuple[Any, ...]  # values of the option that it would change
    same: bool = True  # whether results stay the same up to rounding
    on_gpu: bool = False  # whether the CPU has none

    @property
    def says(self) -> str:
        """As a user types it."""
        return " ".join(self.words)


def switch(name: str, value: str, off: tuple[Any, ...], **facts: bool) -> Switch:
    """Return the switch `--name value`."""
    return Switch(name, (f"--{name}", value), off, **facts)


SWITCHES = (
    switch("memory", "lean", ("plain",)),
    switch(CHECKPOINTING, "true", (False, None)),
    switch("layout", "sequential", ("padded", "padding_free", "packed")),
    switch("mlp_tile_tokens", str(LEAN_TILE_TOKENS), (None,)),
    switch("loss_max_bytes", str(LEAN_LOSS_BYTES), (None,)),
    switch("loss_schedule", "vocab_tiles", ("auto", "row_chunks"), on_gpu=True),
    Switch(
        "activation_offload",
        ("--activation_offload", "true", f"--{CHECKPOINTING}", "true"),
        (False,),
        on_gpu=True,
    ),
    switch("lora_rank", "16", (None,), same=False),
    switch("dtype", "bfloat16", ("float32",), same=False),
    switch("optim", FEW_BITS[0], ("adamw_torch", "adamw_torch_fused"), same=False),
)


class Planned:
    """The plans of one set of words, by length."""

    def __init__(
        self, words: Sequence[str], plans: dict[tuple[str, int], Plan] | None = None
    ) -> None:
        self.words = list(words)
        self.arguments, self.options = parse(words, PlanArguments, PlanConfig, "sftmix plan")
        self.length: int = self.arguments.max_length
        self.plans = {} if plans is None else plans
        # Words that mean the same, such as a switch that `--memory lean` turns on, share plans.
        self.meaning = f"{self.arguments} {self.options}"

    def with_words(self, words: Sequence[str]) -> Planned:
        """Return the plans of these words and more."""
        return Planned([*self.words, *words], self.plans)

    def read_config(self) -> PretrainedConfig:
        """Return the model's config."""
        model, trust_remote_code = self.arguments.model, self.arguments.trust_remote_code
        revision = self.arguments.revision
        check_model(model, revision, trust_remote_code=trust_remote_code, weights=False)
        config: PretrainedConfig = AutoConfig.from_pretrained(
            model,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
        )
        return config

    def plan(self, config: PretrainedConfig, length: int) -> Plan:
        """Return the plan of a step at this length."""
        key = self.meaning, length
        if key not in self.plans:
            self.plans[key] = plan_step(
                config, self.arguments, self.options, length, on_cpu=self.options.on_cpu
            )
        return self.plans[key]

    @property
    def longer(self) -> int:
        """A second length, from which follows what a token takes; no longer than a packed row."""
        longer = self.length + max(GRID, self.length // 4)
        row: int | None = self.options.row_length
        if row is None or longer <= row:
            return longer
        return row if row > self.length else self.length // 2

    def bytes_of_token(self, config: PretrainedConfig) -> float:
        """Return the bytes that one more token of the batch adds to the peak."""
        more = self.plan(config, self.longer).peak - self.plan(config, self.length).peak
        batch: int = self.options.per_device_train_batch_size
        return more / ((self.longer - self.length) * batch)

    def largest(self, config: PretrainedConfig, memory: int, *, proven: bool) -> int:
        """Return the largest length that fits, up to where the search ends."""
        known = {n: self.plan(config, n).peak for n in (self.length, self.longer)}
        longest = self.search_end(config)
        return largest_length(
            lambda n: self.plan(config, n).peak, memory, known, proven=proven, longest=longest
        )

    def search_end(self, config: PretrainedConfig) -> int:
        """Return the length at which the search for the largest ends."""
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
        longest: int = max(SEARCHED, positions, self.longer)
        row: int | None = self.options.row_length
        return longest if row is None else min(longest, row + 1)

    def is_off(self, one: Switch) -> bool:
        """Tell whether a switch would change something."""
        if one.on_gpu and self.options.on_cpu:
            return False
        if one.name == "loss_max_bytes" and self.options.loss_schedule == "vocab_tiles":
            return False  # whose own cap is lower
        holder = self.arguments if hasattr(self.arguments, one.name) else self.options
        value = getattr(holder, one.name)
        return getattr(value, "value", value) in one.off


def memory_of(planned: Planned) -> int | None:
    """Return the bytes to fit into; None if neither an option nor a GPU says."""
    if planned.arguments.gpu_memory is not None:
        return parse_bytes(planned.arguments.gpu_memory)
    if torch.cuda.is_available() and not planned.options.on_cpu:
        return int(torch.cuda.get_device_properties(0).total_memory)
    return None


def parse_bytes(text: str) -> int:
    """Return the bytes of a text such as `80GiB`, `80GB` or `80e9`.

    Raises:
        ValueError: it is none of these, not above 0, or more than any address.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?(?:[eE]\d+)?) ?([KMGT]?)(i?)B?", text.strip())
    if not found or float(found[1]) <= 0 or (found[3] and not found[2]):
        raise ValueError(f"gpu_memory: expected bytes such as 80GiB, 80GB or 80e9, got {text!r}")
    size = float(found[1]) * (1024 if found[3] else 1000) ** UNITS[found[2]]
    if size >= 2**63:
        raise ValueError(f"gpu_memory: expected less than 2^63 bytes, got {text!r}")
    return int(size)


def row_of(
    planned: Planned, one: Switch, config: PretrainedConfig, memory: int | None
) -> Alternative:
    """Return what a switch would change, or why it cannot be turned on."""
    try:
        other = planned.with_words(one.words)
        plan = other.plan(config, planned.length)
    except (ValueError, ImportError) as error:
        return Alternative(one.says, same=one.same, error=str(error).splitlines()[0])
    return Alternative(
        one.says,
        same=one.same,
        peak=plan.peak,
        host=plan.host,
        per_token=other.bytes_of_token(config),
        saved=planned.bytes_of_token(config) - other.bytes_of_token(config),
        work=plan.matrix_products / planned.plan(config, planned.length).matrix_products,
        largest=None if memory is None else other.largest(config, memory, proven=False),
    )


def advised(
    planned: Planned, config: PretrainedConfig, memory: int, rows: list[Alternative]
) -> str:
    """Return the switch that would help most, or the few that would help together.

    Switches that leave results unchanged go first.
    """
    possible = [row for row in rows if not row.error]
    fitting = [row for row in possible if row.peak <= memory]
    for choice in ([row for row in fitting if row.same], fitting):
        if choice:
            least = min(choice, key=lambda row: row.peak)
            return f"it fits best with {least.says} ({least.peak / 2**30:.1f} GiB)"
    best, says, peak = planned, [], planned.plan(config, planned.length).peak
    for row in sorted(possible, key=lambda row: (not row.same, row.peak)):
        other = best.with_words(row.says.split())
        with_it = other.plan(config, planned.length).peak
        # A switch that hardly helps beside the others is left out.
        if with_it < 0.99 * peak:
            best, peak = other, with_it
            says.append(row.says)
        if peak <= memory:
            return f"it fits with {', '.join(says)} together ({peak / 2**30:.1f} GiB)"
    tried = f"even with {', '.join(says)}" if says else "with any switch"
    return f"it does not fit {tried} ({peak / 2**30:.1f} GiB)"
