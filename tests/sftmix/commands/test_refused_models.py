"""Models that are not there, or damaged: one message, the flag as typed, exit code 2."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from packaging.version import Version

from sftmix.model import known_types, source
from sftmix.model.source import ReadingModel
from tests.sftmix.refusals import refused

Edit = Callable[[Path], object]

pytestmark = pytest.mark.usefixtures("offline")


def test_a_hub_that_is_not_reached_is_asked_once(
    words: list[str],
    toy_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """huggingface_hub alone would ask six times, in 23 s."""
    asked = []

    class TransportError(Exception):
        """What httpx raises without a network is of this name."""

    def head(url: str, **keywords: Any) -> None:
        asked.append(url)
        raise TransportError("Name or service not known")

    monkeypatch.setattr("sftmix.model.source.get_hf_file_metadata", head)
    monkeypatch.chdir(toy_model.parent)
    near = f"{toy_model.name}y"
    found = refused(capsys, [*words, "--model", near])
    assert found.startswith(f"--model: no folder ./{near}, and no such name in the hub's cache; ")
    assert found.endswith(f"did you mean {toy_model.name}?")
    assert len(asked) == 1


def test_a_near_folder_is_named(
    words: list[str], toy_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    near = str(toy_model.parent / "modle")
    assert refused(capsys, [*words, "--model", near]) == (
        f"--model: no folder {near}; did you mean {toy_model}?"
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, "its terms have to be accepted on the hub first, with `hf auth login`"),
        (RepositoryNotFoundError, "no such name on the hub, or one that needs `hf auth login`"),
        (RevisionNotFoundError, "no such revision on the hub"),
    ],
)
def test_why_the_hub_gives_no_model(error: Any, message: str) -> None:
    """As transformers tells it: an OSError of its own words, from the hub's."""
    told = OSError("org/x is not a local folder")
    told.__cause__ = error.__new__(error)
    with pytest.raises(OSError, match=rf"^model: no folder \./org/x, and {re.escape(message)}$"):
        raise_within(ReadingModel("org/x", "the config"), told)


def raise_within(context: ReadingModel, error: Exception) -> None:
    with context:
        raise error


def config(**changes: Any) -> Edit:
    """Changes values of a model's config."""

    def edit(model: Path) -> None:
        content = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**content, **changes}))

    return edit


def file(name: str, text: str | None) -> Edit:
    """Writes a file of a model, or deletes it."""
    if text is None:
        return lambda model: (model / name).unlink()
    return lambda model: (model / name).write_text(text)


def both(*edits: Edit) -> Edit:
    return lambda model: [edit(model) for edit in edits]


DAMAGED: dict[str, tuple[Edit, str]] = {
    "no config": (file("config.json", None), "MODEL is no model: it has no config.json"),
    "no weights": (
        file("model.safetensors", None),
        "MODEL has no model.safetensors, nor its index",
    ),
    "a pickle": (
        both(file("model.safetensors", None), file("pytorch_model.bin", "x")),
        "MODEL has no model.safetensors, nor its index; pytorch_model.bin is a pickle, which",
    ),
    "a config that is cut off": (file("config.json", "{"), "MODEL/config.json is damaged: "),
    "an empty config": (file("config.json", ""), "MODEL/config.json is damaged: "),
    "a config that is a list": (
        file("config.json", "[]"),
        "MODEL/config.json is damaged: expected a mapping, got a list",
    ),
    "no type": (file("config.json", "{}"), "MODEL/config.json has no model_type"),
    "an unknown type": (
        config(model_type="nonsense"),
        f"MODEL/config.json is of type 'nonsense', which transformers {transformers.__version__} "
        "does not know; a newer one may",
    ),
    "a type that is no text": (config(model_type=3), "MODEL/config.json is of type 3"),
    "text for a number": (config(hidden_size="eight"), "the config in MODEL cannot be loaded: "),
    "heads that do not divide": (config(num_attention_heads=3), "the config in MODEL cannot be"),
    "an unknown function": (
        config(hidden_act="nonsense"),
        "the config in MODEL cannot be loaded: ",
    ),
    "an unknown dtype": (config(dtype="float99"), "the config in MODEL cannot be loaded: "),
    "an encoder and a decoder": (
        config(model_type="t5"),
        "expected a causal language model, got MODEL of type 't5'",
    ),
    "an unknown quantisation": (
        config(quantization_config={"quant_method": "nonsense"}),
        "MODEL is quantised by 'nonsense'",
    ),
    "a tokenizer that is cut off": (
        file("tokenizer.json", "{"),
        "MODEL/tokenizer.json is damaged: ",
    ),
    "a tokenizer of nothing": (
        file("tokenizer.json", "{}"),
        "the tokenizer in MODEL cannot be loaded: ",
    ),
    "options of a tokenizer": (
        file("tokenizer_config.json", "[]"),
        "MODEL/tokenizer_config.json is damaged: expected a mapping, got a list",
    ),
    "no tokenizer": (
        lambda model: [path.unlink() for path in model.glob("*token*")],
        "MODEL has no tokenizer: expected tokenizer.json",
    ),
    "an index without its shard": (
        both(
            file("model.safetensors", None),
            file(
                "model.safetensors.index.json",
                '{"metadata": {}, "weight_map": {"lm_head.weight": "m-1.safetensors"}}',
            ),
        ),
        "the model in MODEL cannot be loaded: ",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_models(
    kind: str,
    words: list[str],
    toy_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit, message = DAMAGED[kind]
    model = tmp_path / "model"
    shutil.copytree(toy_model, model)
    edit(model)
    message = message.replace("MODEL", str(model))
    assert refused(capsys, [*words, "--model", str(model)]).startswith(f"--model: {message}")


def test_a_run_is_no_model_but_its_checkpoint_is(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old" / "checkpoint-4").mkdir(parents=True)
    assert refused(capsys, [*words, "--model", str(tmp_path / "old")]).endswith(
        f"it has no config.json; did you mean {tmp_path / 'old' / 'checkpoint-4'}?"
    )


def test_a_type_that_a_newer_transformers_knows_is_refused_with_its_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a name on the hub, whose config is not read from a folder."""
    monkeypatch.setattr(source, "check_reached", lambda *_: None)
    monkeypatch.setattr(known_types, "installed", "5.6.1")
    content = {"model_type": "lfm3"}
    monkeypatch.setattr(source.PretrainedConfig, "get_config_dict", lambda *_, **__: (content, {}))
    message = "model: org/x is of type 'lfm3', which needs transformers 5.23 or newer, got 5.6.1"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        source.check_model("org/x")


def test_types_are_known_from_the_version_on_that_they_need() -> None:
    installed = Version(transformers.__version__)
    due = {name for name, one in known_types.NEEDED.items() if Version(one) <= installed}
    assert due <= set(transformers.CONFIG_MAPPING.keys())
