"""Small bundled data: instructions of very different difficulty, from `tools/demo_data` (CC0)."""

from __future__ import annotations

from pathlib import Path

TRAIN = Path(__file__).parent / "train.jsonl"
HELD_OUT = Path(__file__).parent / "held_out.jsonl"
