"""Constants that several rooms share: the label without loss, and the names of a run's files."""

from __future__ import annotations

# The label of a token that carries no loss, as in PyTorch and transformers.
IGNORE_INDEX = -100

MANIFEST = "manifest.json"
PARTITION = "confidence.parquet"
MODEL_CARD = "README.md"
EVALUATION = "evaluation.json"
TRAINER_STATE = "trainer_state.json"
