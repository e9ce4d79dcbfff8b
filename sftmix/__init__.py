"""SFTMix for language models: confidence partition, paired training, evaluation.

The command line is `sftmix --help`; the fused losses are the package `sftmix_kernels`.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["SFTMixConfig", "SFTMixMixin", "SFTMixTrainer", "__version__", "make_collator"]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import, and `sftmix --help` does not need it.
    if name in ("SFTMixConfig", "SFTMixMixin", "SFTMixTrainer", "make_collator"):
        from sftmix.training import config, trainer

        return getattr(config if name == "SFTMixConfig" else trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
