"""SFTMix for language models: confidence partition, paired training, evaluation.

The command line is `sftmix --help`; the fused losses are the package `sftmix_kernels`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sftmix.pairs.partition import Partition as Partition
    from sftmix.pairs.partition import read_partition as read_partition
    from sftmix.pairs.partition import write_partition as write_partition
    from sftmix.training.config import ScoreConfig as ScoreConfig
    from sftmix.training.config import SFTMixConfig as SFTMixConfig
    from sftmix.training.config import SFTMixOptions as SFTMixOptions
    from sftmix.training.partitions import partition_of as partition_of
    from sftmix.training.reference import score as score
    from sftmix.training.trainer import SFTMixMixin as SFTMixMixin
    from sftmix.training.trainer import SFTMixTrainer as SFTMixTrainer
    from sftmix.training.trainer import make_collator as make_collator

__version__ = "0.1.0"

# transformers takes seconds to import, and `sftmix --help` does not need it.
_MODULES = {
    "Partition": "pairs.partition",
    "SFTMixConfig": "training.config",
    "SFTMixMixin": "training.trainer",
    "SFTMixOptions": "training.config",
    "SFTMixTrainer": "training.trainer",
    "ScoreConfig": "training.config",
    "make_collator": "training.trainer",
    "partition_of": "training.partitions",
    "read_partition": "pairs.partition",
    "score": "training.reference",
    "write_partition": "pairs.partition",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"sftmix.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
