"""What ``--model`` may name, checked before anything is loaded: a folder or a name on the hub."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._validators import validate_repo_id
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer

from sftmix.conventions import (
    ADAPTER_WEIGHTS,
    CONFIGS,
    GENERATION_CONFIG,
    MODEL_CONFIG,
    WEIGHTS,
    WEIGHTS_INDEX,
)
from sftmix.model.known_types import check_type
from sftmix.runs.failures import Naming

JSON_FILES = (
    *(*CONFIGS, WEIGHTS_INDEX, GENERATION_CONFIG),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
WEIGHT_FILES = (WEIGHTS, WEIGHTS_INDEX, ADAPTER_WEIGHTS)
TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "*.bpe", "*.spm")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
# A hub that has not answered by then is not reached.
HUB_SECONDS = 10.0
ATTENTION = r"attn_implementation|(?i:flash.?attention|sdpa|flex_attention)"


class ReadingModel(Naming):
    """A context that turns what loading a model or tokenizer raises into one message.

    ``model`` is what was given; ``what`` says what is loaded, such as "the tokenizer".
    """

    def __init__(self, model: str, what: str) -> None:
        text = f"{what} in {model} cannot be loaded"
        super().__init__("model", text, among={"attn_implementation": ATTENTION})
        self.model = model

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Raise the error again with the model's name, and why the hub did not give it."""
        if error is not None and not Path(self.model).exists():
            why = hub_fault(error)
            if why is not None:
                hint = near_folder(Path(self.model))
                raise OSError(f"model: no folder ./{self.model}, and {why}{hint}") from error
        super().__exit__(kind, error, traceback)


def hub_fault(error: BaseException) -> str | None:
    """Return why the hub did not give a model, from the errors behind the one raised."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, GatedRepoError):
            return "its terms have to be accepted on the hub first, with `hf auth login`"
        if isinstance(found, RevisionNotFoundError):
            return "no such revision on the hub"
        if isinstance(found, RepositoryNotFoundError):
            return "no such name on the hub, or one that needs `hf auth login`"
        names = {base.__name__ for base in type(found).__mro__}
        if names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "TransportError"}:
            return (
                "no such name in the hub's cache; the hub itself is not reached (offline): "
                "give a folder, or download the model first"
            )
        found = found.__cause__ or found.__context__
    return None


def check_model(
    model: str,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> None:
    """Check that a folder holds a causal language model, or that a name could be on the hub.

    Raises:
        ValueError: it is a file, holds no model, a damaged one or one of another kind.
        OSError: there is no such folder, and no such name on the hub.
    """
    if not model:
        raise ValueError("model: expected a folder or a hub name, got an empty name")
    folder = Path(model)
    if folder.is_file():
        raise ValueError(f"model: expected a folder or a hub name, got the file {model}")
    if folder.is_dir():
        check_folder(folder, weights=weights)
        if not (folder / MODEL_CONFIG).exists():
            return  # an adapter, whose base is checked when it is loaded
    else:
        check_name(model)
        check_reached(model, revision or "main")
        with ReadingModel(model, "the config"):
            content, _ = PretrainedConfig.get_config_dict(model, revision=revision or "main")
        check_type(model, content)
    with ReadingModel(model, "the config"):
        config = AutoConfig.from_pretrained(
            model, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    check_kind(model, config, trust_remote_code=trust_remote_code)


def check_folder(folder: Path, *, weights: bool = True) -> None:
    """Check a folder's config and JSON files; with ``weights`` also its tokenizer, and that weights
    are there without code.
    """
    if not any((folder / name).exists() for name in CONFIGS):
        checkpoints = sorted(path.name for path in folder.glob("checkpoint-*"))
        hint = f"; did you mean {folder / checkpoints[-1]}?" if checkpoints else ""
        raise ValueError(f"model: {folder} is no model: it has no config.json{hint}")
    for name in JSON_FILES:
        path = folder / name
        if not path.exists():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"model: {path} is damaged: {error}; fetch it again") from error
        if not isinstance(content, dict):
            raise ValueError(
                f"model: {path} is damaged: expected a mapping, got a {type(content).__name__}"
            )
        if name == MODEL_CONFIG:
            check_config(path, content)
    if not weights:
        return
    has_tokenizer = any(any(folder.glob(pattern)) for pattern in TOKENIZERS)
    if (folder / MODEL_CONFIG).exists() and not has_tokenizer:
        raise ValueError(f"model: {folder} has no tokenizer: expected tokenizer.json")
    if any((folder / name).exists() for name in WEIGHT_FILES):
        return
    pickles = [name for name in PICKLES if (folder / name).exists()]
    why = f"; {pickles[0]} is a pickle, which could run code, and is not opened" if pickles else ""
    own = (folder / MODEL_CONFIG).exists()
    expected = "model.safetensors, nor its index" if own else "adapter_model.safetensors"
    raise OSError(f"model: {folder} has no {expected}{why}")


def check_config(path: Path, content: Mapping[str, Any]) -> None:
    """Check that a folder's config has a type of models, and that transformers knows it."""
    if content.get("model_type") is None and "auto_map" not in content:
        raise ValueError(f"model: {path} has no model_type; expected that of a saved model")
    check_type(path, content)


def check_name(model: str) -> None:
    """Check what is no folder: could it be the name of a model on the hub?

    Raises:
        OSError: it could not, saying which folder is nearest.
    """
    path = Path(model)
    try:
        validate_repo_id(model)
    except ValueError as error:
        on_hub = "; a name on the hub would be such as org/name"
        other = "; the shell expands ~ only without quotes" if model.startswith("~") else on_hub
        hint = near_folder(path) or other
        raise OSError(f"model: no folder {model}{hint}") from error


def near_folder(path: Path) -> str:
    """Return the hint that names the folder of about this name beside the path, if there is one."""
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    folders = {one.name: one for one in beside if one.is_dir()}
    found = difflib.get_close_matches(path.name, folders, n=1)
    return f"; did you mean {folders[found[0]]}?" if found else ""


def check_reached(model: str, revision: str) -> None:
    """Ask the hub once for a model that its cache lacks; its library would retry for 23 s.

    Raises:
        OSError: the hub is not reached.
    """
    if isinstance(try_to_load_from_cache(model, MODEL_CONFIG, revision=revision), str):
        return
    url = hf_hub_url(model, MODEL_CONFIG, revision=revision)
    # What the hub answers is told where the config is read.
    with ReadingModel(model, "the config"), contextlib.suppress(HfHubHTTPError):
        get_hf_file_metadata(url, timeout=HUB_SECONDS)


def check_kind(model: str, config: Any, *, trust_remote_code: bool) -> None:
    """Check that a config is one of a causal language model, of a quantisation that is known.

    Raises:
        ValueError: it is not.
    """
    own_code = trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if not own_code and type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"model: expected a causal language model, got {model} of type "
            f"{config.model_type!r}, which AutoModelForCausalLM does not know"
        )
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        values = quantised if isinstance(quantised, dict) else quantised.to_dict()
        if not AutoHfQuantizer.supports_quant_method(values):
            raise ValueError(
                f"model: {model} is quantised by {values.get('quant_method')!r}, which "
                "transformers does not know"
            )
