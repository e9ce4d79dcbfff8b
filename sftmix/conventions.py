"""Constants that several rooms share: the label without loss, and the names of a run's files."""

from __future__ import annotations

# The label of a token that carries no loss, as in PyTorch and transformers.
IGNORE_INDEX = -100

MANIFEST = "manifest.json"
PARTITION = "confidence.parquet"
MODEL_CARD = "README.md"
EVALUATION = "evaluation.json"
TRAINER_STATE = "trainer_state.json"

# The files of a model's folder. A config is written last, and makes the folder a model or adapter.
MODEL_CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
CONFIGS = (MODEL_CONFIG, ADAPTER_CONFIG)
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
GENERATION_CONFIG = "generation_config.json"
