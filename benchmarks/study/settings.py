"""The systems that the studies compare, and the sizes of the one of small models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BASELINE = "ntp"
SEEDS = (0, 1, 2, 3, 4)
# The learning rate is chosen on this seed, which the study itself does not have.
SEARCH_SEED = 1000
# Which halves the partition's names stand for: as `sftmix split --by` takes them.
MEDIAN, RANDOM, REVERSED = "confidence", "random", "reversed"


@dataclass(frozen=True)
class Sizes:
    """The sizes of every run; the same for all systems."""

    vocab_size: int = 2000
    hidden_size: int = 96
    num_layers: int = 2
    max_length: int = 192
    batch_size: int = 16
    base_steps: int = 128
    base_learning_rate: float = 3e-3
    train_examples: int = 320
    epochs: int = 2
    num_scorings: int = 5
    held_out_examples: int = 256
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 9e-3)

    @property
    def base_examples(self) -> int:
        """Return as many as the base model's steps take in one epoch."""
        return self.base_steps * self.batch_size


QUICK = Sizes(
    vocab_size=300,
    hidden_size=16,
    num_layers=1,
    max_length=96,
    batch_size=8,
    base_steps=8,
    train_examples=32,
    epochs=1,
    num_scorings=2,
    held_out_examples=16,
    learning_rates=(1e-3, 4e-3),
)


@dataclass(frozen=True)
class System:
    """One way to train: what it changes of `SFTMixConfig`, and how the data is split."""

    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    by: str = MEDIAN


SYSTEMS = {
    BASELINE: System("NTP", {"method": "ntp"}),
    "sftmix": System("SFTMix"),
    "equal": System("NTP + Mixup, equal", {"method": "equal"}),
    "mixup": System("Mixup alone", {"method": "mixup"}),
    "ir_dro": System("IR-DRO", {"method": "ir_dro"}),
    "sftmix-random": System("SFTMix, random halves", by=RANDOM),
    "sftmix-reversed": System("SFTMix, reversed halves", by=REVERSED),
    "ntp-random": System("NTP, batches of random halves", {"method": "ntp"}, by=RANDOM),
    "levels-outer": System("SFTMix, 4 levels, outer", by="quantiles:4"),
    "levels-neighbours": System(
        "SFTMix, 4 levels, neighbours", {"pairing": "neighbours"}, by="quantiles:4"
    ),
    "rank": System("SFTMix, pairs by rank", {"pairing": "rank"}),
    "lam-batch": System("SFTMix, one lam a batch", {"lambda_scope": "batch"}),
    "sftmix-other": System("SFTMix, SmolLM2's halves"),
    "sftmix-mu": System("SFTMix, another mu"),
    "label_smoothing": System("Label smoothing", {"method": "label_smoothing"}),
    "dft": System("DFT", {"method": "dft"}),
    "noise": System("NTP, noise on activations", {"method": "ntp"}),
}
# Of small models: those of the first study, of which the first eight are the paper's, with controls
# of its partition and of the batches' order.
SMALL = tuple(SYSTEMS)[:12]
FIRST = SMALL[:8]
