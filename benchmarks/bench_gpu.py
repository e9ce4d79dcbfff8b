"""The ops on a GPU: ours beside bare matrix products and peers, against the targets."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from triton import TritonError

from . import gpu_perplexity
from .bench_row_kernels import (
    PRODUCTS,
    Products,
    measure_products,
    measure_row_kernels,
    tune,
)
from .gpu_report import BARE, PEAKED, RANDOM, perplexity_targets, target_table, targets
from .measure import interleaved_seconds, nvidia_smi, peak_extra_bytes
from .providers import (
    BOTH,
    DENSE,
    MIXUP,
    ORACLES,
    Errors,
    Inputs,
    Provider,
    errors,
    make_inputs,
    our_providers,
    peakedness,
    peer_providers,
    step,
)

# Hidden size and vocabulary of heads people train.
MODELS = {
    "Llama-3.2-1B": (2048, 128256),
    "Gemma-2-2B": (2304, 256000),
    "Mistral-7B": (4096, 32768),
    "Llama-3.1-8B": (4096, 128256),
    "Qwen2.5-14B": (5120, 152064),
}
PARTS = (LOSS, PERPLEXITY) = ("loss", "perplexity")
GRID_ROWS = (2048, 8192, 32768)
COMPILED = "torch.compile of dense"

# One provider that does not run must not take the others' figures along; what is not an error of
# a kernel, a compiler or a peer's interface still ends the run.
FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
    ImportError,
    TritonError,
)
Found = TypeVar("Found")


@dataclass(frozen=True)
class Settings:
    """Sizes and repeats."""

    device: str = "cuda"
    dtype: str = "bfloat16"
    rows: int = 8192
    hidden_size: int = 4096
    vocab_size: int = 128256
    check_rows: int = 512
    long_rows: int = 32768
    kernel_rows: int = 4096
    repeats: int = 15
    same_bits: int = 100
    peers: bool = True
    compile_dense: bool = True
    judged: bool = True  # against the targets, which are for these sizes
    grid: bool = False
    tune: bool = False
    only: str | None = None  # one of `PARTS`
    seconds: int = 480  # no section is begun after these

    def quick(self) -> Settings:
        """Sizes for trying the suite out; the vocabulary is no multiple of any block."""
        small = {"rows": 256, "hidden_size": 64, "vocab_size": 1003, "check_rows": 256}
        few = {"long_rows": 512, "kernel_rows": 64, "repeats": 2, "same_bits": 3}
        return replace(self, **small, **few, compile_dense=False, judged=False)

    def inputs(self, rows: int, peaked: bool = False) -> Inputs:
        sizes = (rows // 2, self.hidden_size, self.vocab_size)
        return make_inputs(*sizes, getattr(torch, self.dtype), self.device, peaked)


class Notes:
    """What was not measured and why; failures of ours are the run's."""

    def __init__(self) -> None:
        self.left_out: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.wrong: set[Provider] = set()
        self.ours_failed = False

    def fail(self, name: str, reason: str, one: Provider | None = None) -> None:
        """A failure, of a provider or of a section."""
        print(f"FAILED {name}: {reason}", flush=True)
        self.failed[name] = reason
        self.ours_failed |= one is None or one.ours
        if one is not None:
            self.wrong.add(one)

    def attempt(
        self, name: str, call: Callable[[], Found], one: Provider | None = None
    ) -> Found | None:
        """What the call returns; None, and a note, where it fails or does not fit."""
        try:
            return call()
        except torch.OutOfMemoryError as error:
            self.left_out[name] = f"does not fit: {str(error).splitlines()[0]}"
        except FAILURES as error:
            traceback.print_exc(file=sys.stdout)
            self.fail(name, f"{type(error).__name__}: {error}", one)
        return None


def all_providers(settings: Settings, notes: Notes) -> list[Provider]:
    ours, missing = our_providers(settings.device)
    if not settings.peers:
        notes.left_out |= missing
        return ours
    peers, absent = peer_providers(settings.device, settings.compile_dense)
    notes.left_out |= {**missing, **absent}
    return ours + peers


def checked(
    providers: list[Provider], settings: Settings, peaked: bool, notes: Notes
) -> dict[Provider, Errors]:
    """Providers that are right on a smaller problem, and by how much; the others fail."""
    x = settings.inputs(settings.check_rows, peaked)
    kind = PEAKED if peaked else RANDOM
    found = {}
    for one in providers:
        name = f"{one.name} ({kind})"
        oracle = ORACLES[one.task]
        error = notes.attempt(name, lambda: errors(one.loss, oracle, one.inputs(x)), one)  # noqa: B023
        if error is None:
            continue
        if error.passed(one.limit):
            found[one] = error
        else:
            worst = f"relative errors of loss, dH, dW: {error.relative}"
            limit = "the error budget" if one.limit is None else str(one.limit)
            notes.fail(name, f"over {limit}; {worst}; largest: {error.largest}", one)
    return found


def full_step(one: Provider, x: Inputs) -> Callable[[], object]:
    values = one.inputs(x)
    return lambda: step(one.loss, values)


def workspace_bytes(one: Provider, x: Inputs, device: str) -> int:
    """Highest memory of a step over its inputs and gradients."""
    return peak_extra_bytes(full_step(one, x), device) - x.hidden.nbytes - x.weight.nbytes


def race(settings: Settings, providers: list[Provider], peaked: bool, notes: Notes) -> dict:
    """Everyone who is right, forward + backward, in turns."""
    right = checked(providers, settings, peaked, notes)
    x = settings.inputs(settings.rows, peaked)
    steps: dict[str, Callable[[], object]] = {BARE: Products(x).all_three}
    rows: dict[str, dict[str, Any]] = {BARE: {"who": BARE, "task": "", "ours": True}}
    for one, error in right.items():
        # The same step as is timed, so that what cannot run is found before the race.
        space = notes.attempt(
            one.name,
            lambda: workspace_bytes(one, x, settings.device),  # noqa: B023
            one,
        )
        if space is None:
            continue
        steps[one.name] = full_step(one, x)
        rows[one.name] = {
            "who": one.who,
            "task": one.task,
            "ours": one.ours,
            "workspace_bytes": space,
            "relative_error": max(error.relative[1:]),
            "error_of_dense": error.of_dense(),
            "errors": error._asdict(),
        }
    seconds = interleaved_seconds(steps, settings.repeats, settings.device)
    table = {name: {**rows[name], **time._asdict()} for name, time in seconds.items()}
    return {"inputs": peakedness(x), "providers": table, "after": nvidia_smi()}


def forward(settings: Settings, providers: list[Provider], notes: Notes) -> dict:
    """Losses without gradients, by rate; Mixup projects one row for each pair."""
    x = settings.inputs(settings.rows)
    products = Products(x)
    steps: dict[str, Callable[[], object]] = {PRODUCTS[0]: products.forward}
    rows = {PRODUCTS[0]: ("", products.operations)}
    for one in providers:
        if not one.ours:
            continue

        def call(one: Provider = one) -> object:
            with torch.no_grad():
                return one.loss(x)

        if notes.attempt(f"{one.name}, forward", call, one) is not None:
            steps[one.name] = call
            rows[one.name] = (one.who, products.operations // (2 if one.task == MIXUP else 1))
    seconds = interleaved_seconds(steps, settings.repeats, settings.device)
    return {
        name: {
            **time._asdict(),
            "who": rows[name][0],
            "tflops": rows[name][1] / time.median / 1e12,
        }
        for name, time in seconds.items()
    }


def memory(settings: Settings, providers: list[Provider], notes: Notes) -> dict:
    """Workspace of a long batch."""
    x = settings.inputs(settings.long_rows)
    found = {}
    for one in providers:
        if one.who in (DENSE, COMPILED):
            continue
        name = f"{one.name}, N = {settings.long_rows}"
        call = lambda one=one: workspace_bytes(one, x, settings.device)  # noqa: E731
        space = notes.attempt(name, call, one)
        if space is not None:
            found[one.name] = {"rows": settings.long_rows, "workspace_bytes": space}
    return found


def same_bits(settings: Settings, providers: list[Provider], notes: Notes) -> dict:
    """Whether loss and gradients of many runs are equal to the bit."""
    x = settings.inputs(settings.rows)
    found = {}
    for one in providers:
        if not one.ours or one.task != BOTH:
            continue

        def equal(one: Provider = one) -> bool:
            first = step(one.loss, x)
            return all(
                torch.equal(a, b)
                for _ in range(settings.same_bits)
                for a, b in zip(first, step(one.loss, x), strict=True)
            )

        result = notes.attempt(f"{one.name}, same bits", equal, one)
        if result is not None:
            found[one.name] = {"repeats": settings.same_bits, "equal": result}
            if not result:
                notes.fail(f"{one.name}, same bits", "repeats differ", one)
    return found


def grid(
    settings: Settings, providers: list[Provider], notes: Notes, out_of_time: Callable[[], bool]
) -> list[dict]:
    """Sizes of real models; providers whose logits are never whole."""
    found = []
    for model, (hidden_size, vocab_size) in MODELS.items():
        for rows in GRID_ROWS:
            size = f"{model}, N = {rows}"
            if out_of_time():
                notes.left_out[size] = "out of time"
                continue
            sizes = {"rows": rows, "hidden_size": hidden_size, "vocab_size": vocab_size}
            here = replace(settings, **sizes)
            times = notes.attempt(size, lambda: grid_times(here, providers, notes))  # noqa: B023
            if times is not None:
                found.append({"model": model, **sizes, "milliseconds": times})
            if settings.device != "cpu":
                torch.cuda.empty_cache()
    return found


def grid_times(settings: Settings, providers: list[Provider], notes: Notes) -> dict[str, float]:
    """Median milliseconds at one size."""
    x = settings.inputs(settings.rows)
    steps: dict[str, Callable[[], object]] = {BARE: Products(x).all_three}
    for one in providers:
        if one.who in (DENSE, COMPILED) or one.task == MIXUP or (not one.ours and one.task == BOTH):
            continue
        call = full_step(one, x)
        sizes = (settings.rows, settings.hidden_size, settings.vocab_size)
        if notes.attempt(f"{one.name} at {sizes}", lambda: call() and True, one):  # noqa: B023
            steps[one.name] = call
    seconds = interleaved_seconds(steps, min(settings.repeats, 5), settings.device)
    return {name: 1e3 * time.median for name, time in seconds.items()}


def run(settings: Settings, save: Callable[[dict[str, Any]], None]) -> bool:
    """Section by section, each saved as it ends; whether all of ours ran and was right."""
    print(settings)
    begin, notes = time.monotonic(), Notes()
    providers = all_providers(settings, notes)
    result: dict[str, Any] = {"settings": asdict(settings)}
    dtype = getattr(torch, settings.dtype)

    def out_of_time() -> bool:
        return time.monotonic() - begin > settings.seconds

    def still_right() -> list[Provider]:
        return [one for one in providers if one not in notes.wrong]

    sizes = (settings.kernel_rows, settings.vocab_size, dtype)
    kernels = (*sizes, settings.device, settings.repeats)
    at_size = settings.inputs
    sections: dict[str, Callable[[], object]] = {
        "products": lambda: measure_products(
            at_size(settings.rows), settings.repeats, settings.device
        ),
        RANDOM: lambda: race(settings, providers, False, notes),
        PEAKED: lambda: race(
            settings, [p for p in still_right() if p.who != COMPILED], True, notes
        ),
        "row kernels": lambda: measure_row_kernels(*kernels),
        "forward": lambda: forward(settings, still_right(), notes),
        "memory": lambda: memory(settings, still_right(), notes),
        "same bits": lambda: same_bits(settings, still_right(), notes),
        PERPLEXITY: lambda: gpu_perplexity.measure_whole(settings, notes.attempt),
        f"{PERPLEXITY} fold": lambda: gpu_perplexity.measure_folds(settings, notes.attempt),
        f"{PERPLEXITY} tuning": lambda: gpu_perplexity.tune(settings, notes.attempt),
        "tuning": lambda: tune(*kernels, attempt=notes.attempt),
        "grid": lambda: grid(settings, still_right(), notes, out_of_time),
    }
    asked = {"tuning": settings.tune, f"{PERPLEXITY} tuning": settings.tune, "grid": settings.grid}
    for name, section in sections.items():
        part = PERPLEXITY if name.startswith(PERPLEXITY) else LOSS
        if not asked.get(name, True) or settings.only not in (None, part):
            continue
        if settings.device == "cpu" and name in ("row kernels", "tuning"):
            notes.left_out[name] = "needs CUDA"
        elif out_of_time():
            notes.left_out[name] = f"out of time: {settings.seconds} s are over"
        elif (found := notes.attempt(name, section)) is not None:
            result[name] = found
            print(f"{time.monotonic() - begin:6.0f} s  {name}", flush=True)
        if settings.device != "cpu":
            notes.attempt("the device after " + name, torch.cuda.empty_cache)
        verdicts = targets(result) + perplexity_targets(result)
        if not settings.judged:
            verdicts = [
                target._replace(reached=None, note="sizes too small") for target in verdicts
            ]
        result |= {"targets": [target._asdict() for target in verdicts]}
        result |= {"left_out": dict(notes.left_out), "failed": dict(notes.failed)}
        save(result)
    print(target_table(verdicts))
    return not notes.ours_failed
