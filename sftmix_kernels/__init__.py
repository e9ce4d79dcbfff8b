"""Fused loss kernels for SFTMix: NTP + Mixup for the matrix products of NTP alone.

Which file has what: `reference.py` the formulas, `<op>.py` the op and its public function,
`row_chunks.py` and `vocab_tiles.py` the two ways to avoid full logits (`schedules.py` chooses),
`vocab_parallel.py` and `sharded_chunks.py` a head shared out over ranks, `triton/` the kernels.
"""

from .cross_entropy import fused_cross_entropy
from .mixup_loss import fused_mixup_loss
from .perplexity import StreamingPerplexity, streaming_perplexity
from .reference import SFTMixLoss
from .schedules import RowChunks, VocabTiles
from .sftmix_loss import fused_sftmix_loss
from .vocab_parallel import VocabShard

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
