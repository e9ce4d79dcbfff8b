"""Evaluation: the plain NLL of a data set, with the entropy and the accuracy of its tokens.

Batches are those of a scoring (`scoring.py`), and so are the sums of losses. Entropy and the most
likely token come from the row kernel of the loss, which keeps a chunk of logits.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from transformers.trainer_utils import speed_metrics

from sftmix.model.head import HeadAdapter
from sftmix.pairs.collator import PairedCollator
from sftmix.runs.ranks import summed
from sftmix.training.scoring import score_examples
from sftmix.training.token_sums import TokenSums
from sftmix_kernels import StreamingPerplexity


def evaluated(
    model: torch.nn.Module,
    head: HeadAdapter,
    examples: Sequence[dict[str, Any]] | datasets.Dataset,
    *,
    collator: PairedCollator,
    device: torch.device,
    context: Callable[[], contextlib.AbstractContextManager[Any]],
    disable_progress: bool | None,
    prefix: str = "eval",
) -> dict[str, float]:
    """Return the figures of a data set, which all ranks evaluate together, by ``prefix_`` and name.

    ``loss`` (nats), ``entropy`` (nats) and ``mean_token_accuracy`` are means over its
    ``num_tokens`` response tokens; ``perplexity`` is ``exp(loss)``. Runtime (seconds), examples and
    steps a second are those of transformers: a step is a batch of each rank.

    Raises:
        ValueError: as `score_examples`.
    """
    start = time.time()
    watched = TokenSums(device)
    scores = score_examples(
        model,
        head,
        examples,
        collator=collator,
        perplexity=StreamingPerplexity(len(examples), device),
        context=context,
        description="evaluate",
        disable_progress=disable_progress,
        shared=True,
        watched=watched,
    )
    num_tokens = int(scores.num_tokens.sum())
    loss = float(scores.nll_sum.sum() / num_tokens)
    entropy, num_top = summed(watched.sums).tolist()
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(loss))  # infinite from a loss of 710 on
    found = {
        "loss": loss,
        "perplexity": perplexity,
        "entropy": entropy / num_tokens,
        "mean_token_accuracy": num_top / num_tokens,
        "num_tokens": num_tokens,
    }
    speed: dict[str, float] = speed_metrics(prefix, start, len(examples), watched.batches)
    return {f"{prefix}_{name}": value for name, value in found.items()} | speed
