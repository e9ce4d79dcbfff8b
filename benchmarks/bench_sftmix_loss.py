"""NTP + Mixup, forward + backward, float32: ours, dense PyTorch, and NTP alone by others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .measure import interleaved_seconds, peak_extra_bytes
from .providers import (
    DENSE,
    Inputs,
    Loss,
    alone,
    dense,
    errors,
    fused,
    fused_ntp,
    make_inputs,
    ntp_rows,
    sftmix_rows,
    step,
    torch_chunked,
)
from .tables import print_providers, verdicts

OURS = "fused_sftmix_loss"
PEER = "linear_cross_entropy (NTP alone)"
# Factors of the provider named that ours must stay under.
TARGETS = (("seconds", DENSE, 0.80), ("seconds", PEER, 0.65), ("peak_bytes", DENSE, 0.30))


def bare_products(x: Inputs) -> tuple[Tensor, Tensor]:
    """The three matrix products of NTP with nothing between them, in chunks as ours."""
    hidden, weight = x.hidden.detach(), x.weight.detach()
    of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    workspace = weight.new_empty(min(512, hidden.shape[0]), weight.shape[0])
    for start in range(0, hidden.shape[0], 512):
        rows = hidden[start : start + 512]
        logits = torch.mm(rows, weight.t(), out=workspace[: rows.shape[0]])
        torch.mm(logits, weight, out=of_hidden[start : start + 512])
        of_weight.addmm_(logits.t(), rows)
    return of_hidden, of_weight


def loss_error(loss: Loss, oracle_rows: Loss, x: Inputs) -> tuple[float, bool]:
    """Error of the loss against float64, and whether loss and gradients hold the error budget."""
    found = errors(loss, oracle_rows, x)
    return found.largest[0], found.in_budget


def providers() -> tuple[dict[str, tuple[Loss, Loss]], dict[str, str]]:
    """Loss and oracle of each provider, and why one is left out."""
    found = {OURS: (fused(), sftmix_rows), DENSE: (dense, sftmix_rows)}
    left_out = {}
    try:
        found[PEER] = (alone(torch_chunked()), ntp_rows)
    except ImportError as reason:
        left_out[PEER] = str(reason)
    found["fused_cross_entropy (NTP alone)"] = (fused_ntp(), ntp_rows)
    return found, left_out


def run(pairs: int, hidden_size: int, vocab_size: int, repeats: int) -> dict[str, object]:
    """Check every provider on a slice, measure those that pass, print and return the table."""
    losses, left_out = providers()
    small = make_inputs(min(pairs, 64), hidden_size, min(vocab_size, 4096))
    found = {}
    for name, (loss, oracle) in list(losses.items()):
        found[name], passed = loss_error(loss, oracle, small)
        if not passed:
            left_out[name] = f"over the error budget on a slice: loss off by {found[name]:.3g}"
            del losses[name]
    x = make_inputs(pairs, hidden_size, vocab_size)
    steps: dict[str, Callable[[], object]] = {
        name: (lambda loss=loss: step(loss, x)) for name, (loss, _) in losses.items()
    }
    steps["three bare matrix products"] = lambda: bare_products(x)
    seconds = interleaved_seconds(steps, repeats)
    peaks = {name: peak_extra_bytes(one) for name, one in steps.items()}
    print_providers(seconds, peaks, found, left_out, DENSE)
    print("loss error: against float64, on at most 64 pairs and 4096 vocabulary entries")
    medians = {name: time.median for name, time in seconds.items()}
    reached = verdicts({"seconds": medians, "peak_bytes": peaks}, OURS, TARGETS)
    rows = {
        name: {**seconds[name]._asdict(), "peak_bytes": peaks[name], "loss_error": found.get(name)}
        for name in steps
    }
    return {"providers": rows, "left_out": left_out, "targets": reached}
