"""A whole training step: SFTMix against NTP, the same trainer, model and batch.

Legend: B examples, L tokens of each, D hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import interleaved_seconds
from sftmix import SFTMixConfig, SFTMixTrainer
from sftmix.pairing import PairedCollator

TARGETS = {"sftmix / ntp": 1.10}
