"""Model FLOPs utilisation: the operations that a model needs, over those that the device could do.

Of T tokens of an example, R of them with loss, forward and backward need

    F = w_body T + w_head R + 12 L H Q T^2,    w = 4 N + 2 N_trained

(PaLM, arXiv 2204.02311, appendix B): ``6 N`` for weights that are trained, and ``4 N`` for frozen
ones, which need no gradients of their own. L layers of H heads of size Q attend to the whole
example. What is computed a second time to save memory does not count, nor do embeddings, which are
read and not multiplied; padding does not count, and the head counts only where there is a loss.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import time
from typing import Any, NamedTuple

import torch
from torch import nn

from sftmix.model.head import HeadAdapter
from sftmix.runs.ranks import is_main, num_ranks

logger = logging.getLogger(__name__)

# Dense bfloat16 operations a second with float32 sums, by NVIDIA's data sheets, which count zeros
# left out where they say "with sparsity": halved here.
PEAKS = {
    "A10": 125e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A100": 312e12,
    "L4": 121e12,
    "L40S": 362e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "B200": 2250e12,
}
# Rows and columns of the product that a CPU's rate is measured with (a megabyte each in float32, 3
# ms on a core of 80 GFLOP/s), and the seconds after which it is not repeated.
MEASURED_SIZE, MEASURING_SECONDS = 512, 0.1


class Utilisation(NamedTuple):
    """What a model needs for its tokens, and what all devices together could do."""

    token: float  # operations for each input token
    head_row: float  # for each row that the head multiplies
    squared_length: float  # times the square of an example's length
    rate: float  # operations a second

    def share(self, tokens: float, head_rows: float, squares: float, seconds: float) -> float:
        """Return the operations that were needed over those that could be done in this time."""
        needed = self.token * tokens + self.head_row * head_rows + self.squared_length * squares
        return needed / (self.rate * seconds)


def utilisation_of(model: nn.Module, head: HeadAdapter, args: Any) -> Utilisation | None:
    """Return what ``mfu`` follows from; None, said once, where the device's rate is not known."""
    rate = peak_rate(args.device, compute_dtype(head, args))
    if rate is None:
        name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "it"
        if is_main():
            logger.warning("mfu is not logged: the rate of %s (%s) is not known", args.device, name)
        return None
    return Utilisation(*operations(model, head), rate * num_ranks())


def operations(model: nn.Module, head: HeadAdapter) -> tuple[float, float, float]:
    """Return the operations of forward and backward for an input token, for a row that the head
    multiplies, and for the square of an example's length."""
    config: Any = head.model.config.get_text_config()
    embeddings = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
    left_out = {*embeddings, id(head.weight)}
    body = sum(
        of_weight(weight) * (active_share(config) if ".experts." in name else 1.0)
        for name, weight in model.named_parameters()
        if id(weight) not in left_out
    )
    heads = getattr(config, "num_attention_heads", None) or 0
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return body, of_weight(head.weight), 12.0 * config.num_hidden_layers * heads * size


def of_weight(weight: nn.Parameter) -> float:
    """Return the operations of forward and backward for one row: 6 a number, or 4 if frozen."""
    packed = getattr(weight, "quant_state", None)  # bitsandbytes: two numbers in a byte
    number = weight.numel() if packed is None else math.prod(packed.shape)
    return number * (6.0 if weight.requires_grad else 4.0)


def active_share(config: Any) -> float:
    """Return the share of a mixture's experts that a token goes through."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    every = next((n for name in names if (n := getattr(config, name, None))), 0)
    active = getattr(config, "num_experts_per_tok", None)
    return active / every if active and every else 1.0


def compute_dtype(head: HeadAdapter, args: Any) -> torch.dtype:
    """Return the dtype of a training's matrix products."""
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    return head.weight.dtype


def peak_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the operations a second that a device could do; None where they are not known.

    Of a GPU it is the data sheet's figure in bfloat16, whatever ``dtype`` is. Of a CPU it is what a
    large product of that dtype reaches.
    """
    if device.type == "cpu":
        return measured_rate(dtype, torch.get_num_threads())
    return data_sheet_rate(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def data_sheet_rate(name: str) -> float | None:
    """Return the rate of a GPU by the name that PyTorch reports, such as "NVIDIA H100 PCIe"."""
    known = sorted(PEAKS, key=len, reverse=True)
    return next((PEAKS[one] for one in known if re.search(rf"\b{one}\b", name)), None)


@functools.cache
def measured_rate(dtype: torch.dtype, num_threads: int) -> float:
    """Return the most operations a second of some products on the CPU, measured once."""
    matrix = torch.ones(MEASURED_SIZE, MEASURED_SIZE, dtype=dtype)
    matrix @ matrix
    began, fastest = time.perf_counter(), math.inf
    while (start := time.perf_counter()) - began < MEASURING_SECONDS:
        matrix @ matrix
        fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * MEASURED_SIZE**3 / fastest
