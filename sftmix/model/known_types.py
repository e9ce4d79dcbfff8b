"""Which types of causal language models need a newer transformers than the lowest one allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING
from transformers import __version__ as installed

# The version that brought each, of those that came after the lowest of pyproject.toml; read off the
# distributions of every minor version up to 5.24.
_BROUGHT = {
    "5.7": "laguna",
    "5.8": "deepseek_v4 gemma4_assistant",
    "5.9": "cohere2_moe hrm_text hyperclovax",
    "5.10.1": "gemma4_unified gemma4_unified_assistant gemma4_unified_text mellum",
    "5.11": "deepseek_v32",
    "5.12": "minimax_m3_vl_text",
    "5.13": "mimo_v2_flash minicpm3 zaya",
    "5.14": "inkling_text",
    "5.15": "axk1 axk2 granite_swa granitemoe_swa",
    "5.16": "cohere_compass_text qwen4_exp qwen4_exp_text",
    "5.17": "hy_v4 kimi_linear",
    "5.20": "bailing_hybrid kolibri1 moss_transcribe_diarize",
    "5.21": "beam flint",
    "5.23": "dots3_note dots3_note_text inkling2_text internlm3 iquestcoder lfm3",
    "5.24": "apertus1p5_text dory exaone inkling2_loop_text lara_mini sarvam_mla sarvam_moe",
}
BROUGHT_BY = {name: version for version, names in _BROUGHT.items() for name in names.split()}


def check_type(place: object, config: Mapping[str, Any]) -> None:
    """Check that transformers knows the type of a model whose config was read from ``place``.

    A model that brings code of its own is let through, and so is a config without a type.

    Raises:
        ValueError: it does not know it; the message names the version that does.
    """
    kind = config.get("model_type")
    if kind is None or "auto_map" in config:
        return
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return
    needed = BROUGHT_BY.get(str(kind))
    raise ValueError(
        f"model: {place} is of type {kind!r}, which transformers {installed} does not know; "
        + (f"it needs transformers {needed} or newer" if needed else "a newer one may")
    )
