"""Measure a finished model. Legend: N response tokens, V vocabulary, M bins."""

from __future__ import annotations

import math
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sftmix.model.head import HeadAdapter
from sftmix.pairs.collator import PairedCollator
from sftmix.pairs.partition import from_scores
from sftmix.training.scoring import batches_by_length, collated, score_examples, sequence_lengths

BINS = 15
MAX_TOKENS = 4096  # of a batch: 4096 x V logits are held


def calibration_error(
    confidence: NDArray[np.float64],  # (N,), in [0, 1]
    correct: NDArray[np.bool_],  # (N,)
) -> float:
    """Return the expected calibration error of N predictions, in [0, 1].

        ECE = sum_m |B_m| / N * |accuracy(B_m) - mean confidence(B_m)|

    B_m holds the predictions with a confidence in ((m - 1) / M, m / M], M = 15; the first bin also
    holds 0. The confidence is the probability of the most likely token. Source: Guo et al. 2017,
    arXiv 1706.04599.

    Raises:
        ValueError: no prediction, or a confidence outside of [0, 1].
    """
    if len(confidence) == 0:
        raise ValueError("confidence: expected at least one prediction, got none")
    if not (confidence.min() >= 0 and confidence.max() <= 1):
        raise ValueError(
            f"confidence: expected 0 .. 1, got {confidence.min()} .. {confidence.max()}"
        )
    places = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, None)
    surplus = np.bincount(places, weights=correct - confidence, minlength=BINS)
    return float(np.abs(surplus).sum() / len(confidence))


@torch.no_grad()
def on_held_out(
    model: Any,
    head: HeadAdapter,
    dataset: datasets.Dataset,
    collator: PairedCollator,
    max_tokens: int = MAX_TOKENS,
    padding: float = 0.0,
) -> dict[str, float]:
    """Return loss in nats, accuracy and calibration error of response tokens.

    Batches have at most ``max_tokens``, of which padding takes the share ``padding`` at most.
    """
    model.eval()
    losses, confidences, hits = [], [], []
    batches = batches_by_length(sequence_lengths(dataset), max_tokens, padding=padding)
    for _, batch in collated(dataset.with_format("arrow"), batches, collator):
        output = model(
            input_ids=batch["input_ids"],
            use_cache=False,
            rows=batch["rows"],
            head_input=lambda hidden: hidden,
        )
        logits: Tensor = output.value.float()  # (N, V)
        best, token = logits.softmax(-1).max(-1)
        losses.append(F.cross_entropy(logits, batch["targets"], reduction="none"))
        confidences.append(best)
        hits.append(token == batch["targets"])
    confidence = torch.cat(confidences).double().clamp(max=1).numpy()
    correct = torch.cat(hits).numpy()
    return {
        "held_out_loss": float(torch.cat(losses).double().mean()),
        "held_out_accuracy": float(correct.mean()),
        "held_out_ece": calibration_error(confidence, correct),
    }


def on_training_data(
    model: Any, head: HeadAdapter, dataset: datasets.Dataset, collator: PairedCollator
) -> dict[str, float]:
    """Return loss in nats per response token and the spread of the confidence, of one scoring.

    Confidence is minus the perplexity of an example. Its mean and standard deviation depend
    on the few examples of the highest perplexity; the interquartile range does not.

    Raises:
        ValueError: a perplexity is infinite.
    """
    scores = score_examples(model, head, dataset, collator=collator, disable_progress=True)
    partition = from_scores(
        dataset["id"][:],
        dataset["content_hash"][:],
        scores.num_tokens.numpy(),
        scores.nll_sum.numpy(),
    )
    confidence = partition.confidence
    if not np.isfinite(confidence).all():
        raise ValueError("confidence: expected finite numbers, a perplexity is infinite")
    lower, upper = np.quantile(confidence, [0.25, 0.75])
    return {
        "train_loss": math.fsum(partition.nll_sum[:, 0]) / int(partition.num_tokens.sum()),
        "confidence_mean": float(confidence.mean()),
        "confidence_std": float(confidence.std()),
        "confidence_iqr": float(upper - lower),
    }
