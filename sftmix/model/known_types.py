"""Which types of causal language models need a newer transformers than the lowest one allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from packaging.version import Version
from transformers import CONFIG_MAPPING
from transformers import __version__ as installed

# From which version on each is there and right, of those that the lowest allowed has not, or wrong.
# When they came is read off the distributions of every minor version up to 5.24.
_NEEDED = {
    "5.7": "laguna",
    "5.8": "deepseek_v4 gemma4_assistant",
    "5.9": "cohere2_moe hrm_text hyperclovax",
    "5.10.1": "gemma4_unified gemma4_unified_assistant gemma4_unified_text mellum",
    "5.11": "deepseek_v32",
    "5.12": "minimax_m3_vl_text",
    "5.13": "mimo_v2_flash minicpm3 zaya",
    "5.14": "inkling_text",
    "5.15": "axk1 axk2 granite_swa granitemoe_swa",
    "5.16": "cohere_compass_text diffllama qwen4_exp qwen4_exp_text",
    "5.17": "hy_v4 kimi_linear",
    "5.20": "bailing_hybrid kolibri1 moss_transcribe_diarize",
    "5.21": "beam flint moshi",
    "5.23": "dots3_note dots3_note_text inkling2_text internlm3 iquestcoder lfm3",
    "5.24": "apertus1p5_text dory exaone inkling2_loop_text lara_mini sarvam_mla sarvam_moe",
}
# Before it, their routers' loss fails inside of transformers; without that loss they are right.
ROUTERS = {
    **dict.fromkeys(("granitemoe", "granitemoehybrid", "granitemoeshared"), "5.18"),
    "doge": "5.23",
}
NEEDED = {name: version for version, names in _NEEDED.items() for name in names.split()}


def needed(kind: str, *, router: bool) -> str:
    """Return the first transformers that has a type of models right, "0" for the lowest allowed.

    ``router`` says whether the loss of the model's routers is on.
    """
    return max(NEEDED.get(kind, "0"), ROUTERS.get(kind, "0") if router else "0", key=Version)


def check_type(place: object, config: Mapping[str, Any]) -> None:
    """Check that transformers knows the type of a model whose config was read from ``place``.

    A model that brings code of its own is let through, and so is a config without a type.

    Raises:
        ValueError: it does not know it, or has it wrong; the message names the version that has it.
    """
    kind = config.get("model_type")
    if kind is None or "auto_map" in config:
        return
    version = needed(str(kind), router=bool(config.get("output_router_logits")))
    if Version(installed) < Version(version):
        why = f"needs transformers {version} or newer, got {installed}"
    elif str(kind) not in CONFIG_MAPPING:
        why = f"transformers {installed} does not know; a newer one may"
    else:
        return
    raise ValueError(f"model: {place} is of type {kind!r}, which {why}")
