"""Identify a run's model and tokenizer by their content, wherever they lie.

A model is its weights' files (shards in the order of their index), its configs and, if its code may
run, that code; an adapter is its own files and those of its base model. Files are read once (XXH3,
3 GB/s on one core: five seconds for 16 GB), after which loading finds them in the page cache. A
tokenizer is identified by its parts as `tokenizers` writes them, without the state of the last
call.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from sftmix.conventions import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    GENERATION_CONFIG,
    MODEL_CONFIG,
    WEIGHTS,
    WEIGHTS_INDEX,
)
from sftmix.runs.checkpoints import checksum

# Keys of a config that say where it lay and what wrote it.
OF_PLACE = {
    "_name_or_path",
    "base_model_name_or_path",
    "revision",
    "transformers_version",
    "peft_version",
}
# Keys of a tokenizer that hold the state of the last call and the form of the file.
OF_CALL = {"truncation", "padding", "version"}
PARTS = "parts"


def provenance(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Return the entries of a manifest that describe a model and its tokenizer.

    `model_hash` and `tokenizer_hash` are compared when a run goes on; `parts` tell which
    of their parts differ; `revision` and `commit` are for people.

    Raises:
        OSError: there is no such model, or a file of it cannot be read.
    """
    parts = {
        "model_hash": model_parts(model, revision, trust_remote_code=trust_remote_code),
        "tokenizer_hash": tokenizer_parts(tokenizer),
    }
    return {
        "revision": revision,
        "commit": commit_of(model, revision),
        **{name: combined(one) for name, one in parts.items()},
        PARTS: parts,
    }


def combined(parts: Mapping[str, str]) -> str:
    """Return the SHA-256 of the parts' hashes, in their order."""
    lines = "\n".join(f"{name} {digest}" for name, digest in parts.items())
    return hashlib.sha256(lines.encode("utf-8")).hexdigest()


def model_parts(
    model: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> dict[str, str]:
    """Return the checksum of each file that a model is loaded from, by name.

    `model` is a folder or a hub name; files that are not in the hub's cache yet are fetched. Python
    files are among them if they may be run.

    Raises:
        OSError: there is no such model, or a file of it is missing or damaged.
    """
    parts: dict[str, str] = {}
    config = find_file(model, ADAPTER_CONFIG, revision)
    if config is not None:
        weights = find_file(model, ADAPTER_WEIGHTS, revision)
        if weights is None:
            raise OSError(f"model: {model} has no {ADAPTER_WEIGHTS}")
        parts = {ADAPTER_WEIGHTS: checksum(weights), ADAPTER_CONFIG: _config_sum(config)}
        adapter = _json(config)
        base, base_revision = adapter.get("base_model_name_or_path"), adapter.get("revision")
        if not base:
            raise OSError(f"model: {config} has no base_model_name_or_path")
        own = model_parts(str(base), base_revision, trust_remote_code=trust_remote_code)
        return parts | {f"base model's {name}": digest for name, digest in own.items()}
    for name in weight_files(model, revision):
        path = find_file(model, name, revision)
        if path is None:
            raise OSError(f"model: {model} has no {name}, which {WEIGHTS_INDEX} names")
        parts[name] = checksum(path)
    for name in (MODEL_CONFIG, GENERATION_CONFIG):
        path = find_file(model, name, revision)
        if path is not None:
            parts[name] = _config_sum(path)
            if trust_remote_code:
                parts |= {code.name: checksum(code) for code in sorted(path.parent.glob("*.py"))}
    return parts


def weight_files(model: str, revision: str | None = None) -> list[str]:
    """Return the names of the safetensors that transformers loads; shards as indexed.

    Raises:
        OSError: it has none, or its index is damaged.
    """
    if find_file(model, WEIGHTS, revision) is not None:
        return [WEIGHTS]
    index = find_file(model, WEIGHTS_INDEX, revision)
    if index is None:
        raise OSError(
            f"model: expected safetensors ({WEIGHTS} or {WEIGHTS_INDEX}) in {model}, found none; "
            "save_pretrained writes them"
        )
    shards = _json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(one, str) for one in shards.values()):
        raise OSError(f"model: {index} is damaged: expected a weight_map, a file for each tensor")
    return list(dict.fromkeys(shards.values()))


def find_file(model: str, name: str, revision: str | None = None) -> Path | None:
    """Return a file of a folder or of a model on the hub; None if it does not exist.

    Raises:
        OSError: there is no such model.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    found = cached_file(model, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def commit_of(model: str, revision: str | None = None) -> str | None:
    """Return the commit of a hub model's revision; None for a folder."""
    if Path(model).is_dir():
        return None
    found = find_file(model, MODEL_CONFIG, revision) or find_file(model, ADAPTER_CONFIG, revision)
    # A file of the cache lies in snapshots/COMMIT.
    parts = [] if found is None else found.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def tokenizer_parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the hash of each part of a tokenizer, by its name in tokenizer.json."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python has its words, and a file of their merges
        named: dict[str, Any] = {"vocabulary": tokenizer.get_vocab()}
        file = getattr(tokenizer, "vocab_file", None)
        if file is not None and Path(file).is_file():
            named["vocab_file"] = checksum(Path(file))
    else:
        named = json.loads(backend.to_str())
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    kept = {name: part for name, part in named.items() if name not in OF_CALL}
    return {
        **{f"tokenizer.json: {name}": _digest(part) for name, part in kept.items()},
        "special tokens": _digest(tokens),
    }


def _config_sum(path: Path) -> str:
    return _digest({name: one for name, one in _json(path).items() if name not in OF_PLACE})


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8"))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"model: {path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise OSError(f"model: {path} is damaged: expected names and values")
    return content
