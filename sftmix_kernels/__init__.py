"""Fused loss kernels for SFTMix: NTP + Mixup for the matrix products of NTP.

`reference.py` has every formula in dense PyTorch. An op's file has its public function, and calls
the kernels. Proofs are below `tests/sftmix_kernels/`, benchmarks below `benchmarks/`:

| op | its file | kernels | proof | time |
|---|---|---|---|---|
| `fused_sftmix_loss` | `sftmix_loss.py` | of a schedule | `test_sftmix_loss.py` | `bench_loss.py` |
| `fused_mixup_loss` | `mixup_loss.py` | of a schedule | `test_mixup_loss.py` | `bench_loss.py` |
| `fused_cross_entropy` | `cross_entropy.py` | of a schedule | `test_cross_entropy.py` | `bench_loss.py` |
| `streaming_perplexity` | `perplexity/streaming.py` | `csrc/online_softmax_kernels.cuh` | `perplexity/test_streaming.py` | `bench_perplexity.py` |

`gates.py` has the objectives of `fused_cross_entropy` beside NTP, proven in `test_objectives.py`
and `row_chunks/test_row_objectives.py`, and timed in `bench_objectives.py`.

A schedule is a way to hold no full logits; `schedules.py` chooses one:

| schedule | kernels | proof | time |
|---|---|---|---|
| `row_chunks` | `row_chunks/kernels.py` | `row_chunks/test_row_chunks.py` | `bench_row_chunks.py` |
| ... on the CPU | `row_chunks/cpu.py`, `csrc/row_chunks.h` | `row_chunks/test_rows.py` | `bench_loss.py` |
| ... of a head shared out over ranks | `vocab_parallel/losses.py` | `vocab_parallel/test_vocab_parallel.py` | |
| `vocab_tiles` | `vocab_tiles/forward.py`, `vocab_tiles/backward.py` | `vocab_tiles/test_vocab_tiles.py` | `bench_loss.py` |
"""  # noqa: E501

from .cross_entropy import fused_cross_entropy
from .gates import Clipped, Entropy, Power, Threshold
from .mixup_loss import fused_mixup_loss
from .perplexity.streaming import StreamingPerplexity, streaming_perplexity
from .reference import SFTMixLoss, TokenStats
from .schedules import RowChunks, VocabTiles
from .sftmix_loss import fused_sftmix_loss
from .vocab_parallel.shard import VocabShard

__all__ = [
    "Clipped",
    "Entropy",
    "Power",
    "RowChunks",
    "SFTMixLoss",
    "StreamingPerplexity",
    "Threshold",
    "TokenStats",
    "VocabShard",
    "VocabTiles",
    "fused_cross_entropy",
    "fused_mixup_loss",
    "fused_sftmix_loss",
    "streaming_perplexity",
]
