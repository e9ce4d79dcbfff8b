"""The results that the paper reports (arXiv 2410.05248), and the recipe that repeats each.

Scores of MT-Bench are from 1 to 10, all others are in percent. A row's recipe is
`recipes/NAME.yaml` of the repository. The paper names no version of Mistral-7B; 0.1 is our choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

INSTRUCTION_FOLLOWING = "instruction following"
MEDICINE = "medicine"
ROLES = "roles"

LLAMA = "meta-llama/Llama-3.1-8B"
MISTRAL = "mistralai/Mistral-7B-v0.1"
QWEN = "Qwen/Qwen2.5-14B"

MT_BENCH = "MT-Bench"
WIN_RATE = "AlpacaEval-2 WR"
CONTROLLED_WIN_RATE = "AlpacaEval-2 LC WR"  # length-controlled


@dataclass(frozen=True)
class PaperRow:
    """A row of one of the paper's tables."""

    table: str  # "instruction following", "medicine" or "roles"
    model: str  # name on the hub
    data: str  # as the paper calls it
    method: str  # as --method
    recipe: str  # file in recipes/, without .yaml
    figures: Mapping[str, float]  # {"MT-Bench": 4.3625, ...}


def _alpaca(model: str, method: str, recipe: str, *figures: float) -> PaperRow:
    names = (MT_BENCH, WIN_RATE, CONTROLLED_WIN_RATE)
    values = dict(zip(names, figures, strict=True))
    return PaperRow(INSTRUCTION_FOLLOWING, model, "Alpaca-52K", method, recipe, values)


def _medicine(model: str, method: str, recipe: str, *figures: float) -> PaperRow:
    names = ("MedQA", "MedQA-5", "PubMedQA", "MedMCQA", "mean")
    values = dict(zip(names, figures, strict=True))
    return PaperRow(MEDICINE, model, "MedAlpaca-263K", method, recipe, values)


def _role(method: str, recipe: str, *figures: float) -> PaperRow:
    values = dict(zip((MT_BENCH, CONTROLLED_WIN_RATE), figures, strict=True))
    return PaperRow(ROLES, LLAMA, "Alpaca-52K", method, recipe, values)


ROWS: tuple[PaperRow, ...] = (
    _alpaca(LLAMA, "ntp", "llama-3.1-8b-alpaca-ntp", 4.3625, 4.0714, 8.6528),
    _alpaca(LLAMA, "sftmix", "llama-3.1-8b-alpaca", 4.5825, 4.9031, 10.3195),
    _alpaca(MISTRAL, "ntp", "mistral-7b-alpaca-ntp", 4.6163, 4.3560, 9.1759),
    _alpaca(MISTRAL, "sftmix", "mistral-7b-alpaca", 4.9100, 4.5386, 9.4994),
    _alpaca(QWEN, "ntp", "qwen2.5-14b-alpaca-ntp", 6.1930, 7.0764, 13.9508),
    _alpaca(QWEN, "sftmix", "qwen2.5-14b-alpaca", 6.5247, 7.8810, 15.0235),
    _medicine(LLAMA, "ntp", "llama-3.1-8b-medalpaca-ntp", 59.31, 54.52, 75.40, 53.65, 60.72),
    _medicine(LLAMA, "sftmix", "llama-3.1-8b-medalpaca", 60.88, 55.38, 77.80, 54.15, 62.05),
    _medicine(MISTRAL, "ntp", "mistral-7b-medalpaca-ntp", 49.10, 44.62, 75.40, 48.15, 54.32),
    _medicine(MISTRAL, "sftmix", "mistral-7b-medalpaca", 51.77, 45.72, 77.40, 49.03, 55.98),
    _role("ntp", "llama-3.1-8b-alpaca-ntp", 4.3625, 8.6528),
    _role("sftmix", "llama-3.1-8b-alpaca", 4.5825, 10.3195),
    _role("equal", "llama-3.1-8b-alpaca-equal", 4.4062, 8.2856),
    _role("mixup", "llama-3.1-8b-alpaca-mixup", 4.5062, 7.2964),
)
