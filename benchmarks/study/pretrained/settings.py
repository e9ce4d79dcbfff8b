"""What the study of pretrained models compares: systems, data sets, sizes and grids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.study.settings import BASELINE, SEARCH_SEED, SEEDS

BASE = "base"  # the model before it is tuned
ANOTHER_MU, NOISE = "sftmix-mu", "noise"
BY_OTHER = "sftmix-other"  # on the halves of another model
# Systems of `benchmarks.study.settings.SYSTEMS`, in the order in which they are run.
TRAINED = (
    BASELINE,
    "sftmix",
    ANOTHER_MU,
    "sftmix-random",
    "equal",
    "mixup",
    "label_smoothing",
    "dft",
    NOISE,
)
# NEFTune's alpha, for noise as large beside activations as it is beside embeddings there.
NOISE_ALPHA = 5.0
DATA = ("gsm8k", "alpaca", "pubmedqa")
RESULTS = Path(__file__).resolve().parent.parent / "results"  # a folder for each study
NEGLIGIBLE = 0.01  # nats/token: 1 % of the perplexity
__all__ = ["SEARCH_SEED", "SEEDS"]


@dataclass(frozen=True)
class Sizes:
    """The sizes of every run; the same for all systems."""

    trained_layers: int = 3
    train_examples: int = 128
    held_out_examples: int = 64
    kept_examples: int = 48  # of Alpaca, that a grader kept
    questions: int = 64  # of PubMedQA, for each seed
    # Of prompt and response together: longer examples are not drawn.
    max_length: Mapping[str, int] = field(
        default_factory=lambda: {"gsm8k": 144, "alpaca": 112, "pubmedqa": 112, "demo": 96}
    )
    batch_size: int = 8
    epochs: int = 3
    evaluations: int = 2  # an epoch
    num_scorings: int = 3
    learning_rates: tuple[float, ...] = (2e-4, 4e-4, 8e-4)
    # Beside SFTMix's 0.2, and the 1 of `equal`.
    mus: tuple[float, ...] = (0.05, 0.5, 2.0)


@dataclass(frozen=True)
class Regime:
    """What is run with a model."""

    model: str
    sizes: Sizes
    data: tuple[str, ...] = DATA
    seeds: tuple[int, ...] = SEEDS
    systems: tuple[str, ...] = TRAINED
    decides: bool = True  # whether it answers the study's questions
    lora_rank: int | None = None  # None: all weights of the trained layers learn
    max_new_tokens: int | None = None  # of an answer to a held-out example; None: none is written


SMOLLM2, OVERFITTING, ANSWERS = "smollm2", "overfitting", "answers"
LORA, GEMMA3 = "lora", "gemma3"
REGIMES = {
    SMOLLM2: Regime("SmolLM2-135M-Instruct from a file of 4 bits a weight", Sizes()),
    # With the highest rate that the study tried NTP overfits on these.
    OVERFITTING: Regime(
        "SmolLM2-135M-Instruct from a file of 4 bits a weight",
        Sizes(learning_rates=(8e-4,), mus=()),
        data=("alpaca", "pubmedqa"),
        systems=(BASELINE, "sftmix", "sftmix-random", "equal"),
    ),
    # What the models write, at that rate: GSM8K's best, while Alpaca is overfitted.
    ANSWERS: Regime(
        "SmolLM2-135M-Instruct from a file of 4 bits a weight",
        Sizes(learning_rates=(8e-4,), mus=()),
        data=("gsm8k", "alpaca"),
        systems=(BASELINE, "sftmix", "sftmix-random"),
        decides=False,
        max_new_tokens=128,
    ),
    # As many seeds and examples as the study has, so that both can be laid side by side.
    LORA: Regime(
        "SmolLM2-135M-Instruct from a file of 4 bits a weight",
        Sizes(learning_rates=(5e-4, 1e-3, 2e-3, 4e-3), mus=()),
        data=("gsm8k", "alpaca"),
        systems=(BASELINE, "sftmix", "sftmix-random"),
        decides=False,
        lora_rank=16,
    ),
    # Its head has six times the weights, so there are fewer examples, seeds and systems.
    GEMMA3: Regime(
        "Gemma 3 270M from a file of 4 bits a weight",
        Sizes(
            train_examples=64,
            held_out_examples=32,
            kept_examples=24,
            questions=32,
            evaluations=1,
            mus=(),
        ),
        seeds=(0, 1, 2),
        systems=(BASELINE, "sftmix", "sftmix-random", BY_OTHER),
        decides=False,
    ),
}
QUICK = Sizes(
    trained_layers=1,
    train_examples=16,
    held_out_examples=8,
    batch_size=8,
    epochs=1,
    num_scorings=1,
    learning_rates=(1e-3, 4e-3),
    mus=(0.5, 2.0),
)
QUICK_TOKENS = 8  # of an answer
