"""Write the text that `sftmix plan` prints."""

from __future__ import annotations

from transformers import PretrainedConfig

from sftmix.plan.planned import Alternative, Planned
from sftmix.plan.search import ends
from sftmix.plan.step import Plan
from sftmix.plan.trace import PARTS

GIB, KIB = 2**30, 2**10
NOT_COUNTED = (
    "not counted: the device's context, libraries' workspaces, the allocator's fragments, "
    "DDP's buffers; every sequence is taken as full"
)
ROUNDED = (
    "--dtype bfloat16 without LoRA loses small updates unless they are rounded at random,\n"
    "--optim adamw_torch_8bit --optim_args bf16_stochastic_round=True: docs/memory.md"
)


def first_text(
    planned: Planned, config: PretrainedConfig, plan: Plan, longer: Plan, memory: int | None
) -> str:
    """Return the first answer: what is planned, the parts of its peak, and whether it fits."""
    lines = [*heading(planned, config, plan), "", *part_lines(planned, plan, longer), ""]
    if memory is not None:
        says = "fits" if plan.peak <= memory else "does not fit"
        lines.append(f"{says}: {plan.peak / GIB:.1f} GiB of {memory / GIB:.1f}")
    return "\n".join(lines)


def switches_text(planned: Planned, rows: list[Alternative], advice: str) -> str:
    """Return the last answer: what the switches would change, and the advice."""
    lines = [*switch_lines(rows), "", *([advice, ""] if advice else [])]
    if planned.arguments.lora_rank is None and "bf16_stochastic_round" not in str(
        planned.options.optim_args
    ):
        lines.append(ROUNDED)
    lines.append(NOT_COUNTED)
    return "\n".join(lines)


def heading(planned: Planned, config: PretrainedConfig, plan: Plan) -> list[str]:
    """Return the lines that say what is planned."""
    options, arguments = planned.options, planned.arguments
    billions = f"{plan.parameters / 1e9:.2f} B parameters"
    if plan.trained < plan.parameters:
        billions += f", {plan.trained / 1e6:.1f} M trained (LoRA of rank {arguments.lora_rank})"
    autocast = "bfloat16" if options.bf16 else "float16" if options.fp16 else ""
    dtype = arguments.dtype + (f" under {autocast} autocast" if autocast else "")
    optimizer = getattr(options.optim, "value", options.optim)
    lines = [
        f"model     {arguments.model}: {billions}, {dtype}",
        f"step      {options.method}, {options.per_device_train_batch_size} sequences of "
        f"{plan.length} tokens, {options.layout}, {optimizer}, on "
        f"{'the CPU' if options.on_cpu else 'a GPU'}",
        f"switches  {', '.join(switched_on(planned)) or 'none'}",
    ]
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is not None and plan.length > most:
        lines.append(f"warning   the model was made for {most} positions at most")
    return lines


def switched_on(planned: Planned) -> list[str]:
    """Return the options that save memory and are on."""
    options = planned.options
    found = ["--memory lean"] if options.memory == "lean" else []
    if options.checkpoints_activations:
        found.append("activation checkpointing")
    for name in ("mlp_tile_tokens", "loss_max_bytes"):
        if getattr(options, name) is not None:
            found.append(f"--{name} {getattr(options, name)}")
    if options.activation_offload:
        found.append("--activation_offload true")
    if options.loss_schedule == "vocab_tiles":
        found.append("--loss_schedule vocab_tiles")
    return found


def part_lines(planned: Planned, plan: Plan, longer: Plan) -> list[str]:
    """Return the lines of the peak's parts and of what one more token of the batch adds."""
    tokens = (longer.length - plan.length) * planned.options.per_device_train_batch_size

    def line(name: str, now: int, later: int) -> str:
        return f"{name:<16} {now / GIB:>9.2f} {(later - now) / tokens / KIB:>16.1f}"

    lines = [f"{'at the peak':<16} {'GiB':>9} {'KiB per token':>16}"]
    lines += [line(name, plan.parts.get(name, 0), longer.parts.get(name, 0)) for name in PARTS]
    lines += [f"{line('peak', plan.peak, longer.peak)}   in {plan.moment}"]
    if plan.host:
        lines.append(line("host memory", plan.host, longer.host))
    return lines


def length_text(planned: Planned, config: PretrainedConfig, largest: int) -> str:
    """Return the line that names the largest length."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if ends(largest, longest := planned.search_end(config)):
        if planned.options.row_length is not None:
            return f"longest that fits: {largest} tokens; a row holds {planned.options.row_length}"
        return f"longest that fits: {largest} tokens or more; the search ends at {longest}"
    beyond = f", beyond the model's {most} positions" if most and largest > most else ""
    return f"longest that fits: {largest} tokens{beyond}" if largest else "no length fits"


def switch_lines(rows: list[Alternative]) -> list[str]:
    """Return the lines of the switches that are off."""
    if not rows:
        return ["every switch that saves memory is on"]
    width = max(len(row.says) + 2 * (not row.same) for row in rows)
    last = "longest" if any(row.largest is not None for row in rows) else ""
    head = (
        f"{'switch':<{width}}   {'peak GiB':>8}   {'KiB/token saved':>15}   {'products':>8}   "
        f"{last:>9}"
    )
    lines = [head.rstrip()]
    for row in rows:
        says = row.says if row.same else f"{row.says} *"
        if row.error:
            lines.append(f"{says:<{width}}   {row.error}")
            continue
        longest = "" if row.largest is None else str(row.largest)
        host = f"   {row.host / GIB:.1f} GiB on the host" if row.host else ""
        lines.append(
            f"{says:<{width}}   {row.peak / GIB:>8.2f}   {row.saved / KIB:>15.1f}   "
            f"{row.work:>7.2f}x   {longest:>9}{host}".rstrip()
        )
    if not all(row.same for row in rows):
        lines.append("* changes what is trained, or its precision")
    return lines
