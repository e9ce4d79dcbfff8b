"""Fused loss kernels for SFTMix: NTP + Mixup for the matrix products of NTP.

`reference.py` has the formulas and `<op>.py` each op with its public function. `row_chunks/` and
`vocab_tiles/` are the two ways to avoid full logits (`schedules.py` chooses), each with its Triton
kernels. `vocab_parallel/` shares a head out over ranks, `perplexity/` scores examples.
"""

from .cross_entropy import fused_cross_entropy
from .mixup_loss import fused_mixup_loss
from .perplexity.streaming import StreamingPerplexity, streaming_perplexity
from .reference import SFTMixLoss
from .schedules import RowChunks, VocabTiles
from .sftmix_loss import fused_sftmix_loss
from .vocab_parallel.shard import VocabShard

__all__ = [
    "RowChunks",
    "SFTMixLoss",
    "StreamingPerplexity",
    "VocabShard",
    "VocabTiles",
    "fused_cross_entropy",
    "fused_mixup_loss",
    "fused_sftmix_loss",
    "streaming_perplexity",
]
