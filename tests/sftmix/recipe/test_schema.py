"""The JSON Schema of config files says what the commands make of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftmix.cli import main
from sftmix.commands.schema import schema_text
from sftmix.methods import METHODS
from sftmix.recipe.arguments import ELSEWHERE, TrainRunArguments, parse
from sftmix.recipe.config_file import WITH_CONFIG, read_config
from sftmix.recipe.yaml_core import load_yaml
from sftmix.training.config import SFTMixConfig
from sftmix.training.option_checks import AT_LEAST, BELOW, UNSUPPORTED

jsonschema = pytest.importorskip("jsonschema")

PAGE = Path(__file__).parents[3] / "docs" / "command_line.md"
RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))
# What a file needs to be read by `sftmix train`.
WHOLE = {"model": "m", "data": ["d.jsonl"], "output": "o", "use_cpu": True}


@pytest.fixture(scope="module")
def schemas() -> dict[str | None, Any]:
    """The schema of each command's file, and of one for all of them."""
    return {command: json.loads(schema_text(command)) for command in (None, *WITH_CONFIG)}


def fits(schema: Any, content: Any) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(content)


def test_they_are_schemas(schemas: dict[str | None, Any]) -> None:
    for command in (None, "generate"):
        jsonschema.Draft202012Validator.check_schema(schemas[command])
        assert schemas[command]["$schema"].endswith("draft/2020-12/schema")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits(recipe: Path, schemas: dict[str | None, Any]) -> None:
    """As it stands, and with what it includes."""
    own = load_yaml(recipe.read_text(), recipe.name)
    for content in (own, read_config(recipe)):
        for command in (None, *content.keys() & set(WITH_CONFIG)):
            jsonschema.Draft202012Validator(schemas[command]).validate(content)
    assert not fits(schemas[None], {**own, "learing_rate": 1e-5})


@pytest.mark.parametrize("command", WITH_CONFIG)
def test_every_option_of_the_help_is_in_it(
    command: str, schemas: dict[str | None, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help-all" if command in ("train", "score") else "--help"])
    flags = set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE))
    flags -= {"help", "config", "no_remove_unused_columns", *ELSEWHERE}
    flags = {flag for flag in flags if not flag.startswith(("help", "no_"))}
    options = schemas[command]["$defs"][command]["properties"]
    assert flags <= options.keys()
    assert len(flags) > 10
    assert options.keys() <= schemas[command]["properties"].keys()
    assert all(one["description"] for name, one in options.items() if name in flags)


@pytest.mark.parametrize("command", WITH_CONFIG)
def test_every_default_is_a_value(command: str, schemas: dict[str | None, Any]) -> None:
    for name, option in schemas[command]["$defs"][command]["properties"].items():
        if "default" in option:
            assert fits(option, option["default"]), name


def test_what_an_editor_shows(schemas: dict[str | None, Any]) -> None:
    options = schemas["train"]["$defs"]["train"]["properties"]
    assert options["method"]["enum"] == [*METHODS, None]
    assert options["mu"] == {
        "description": "Weight of the Mixup term in sftmix [paper]",
        "default": 0.2,
        "type": ["number", "string", "null"],
        "pattern": options["mu"]["pattern"],
    }
    assert options["seed"]["minimum"] == AT_LEAST["seed"]
    assert options["seed"]["exclusiveMaximum"] == BELOW["seed"]
    assert options["data"]["items"]["type"] == ["string", "number", "boolean"]
    assert "'train[10%:20%]'" in options["data_split"]["description"]
    assert options["deepspeed"]["enum"] == [*UNSUPPORTED["deepspeed"][0]]
    assert "output_dir" not in options
    assert "questions" not in schemas["train"]["properties"]
    assert "questions" in schemas[None]["properties"]


ACCEPTED: list[dict[str, Any]] = [
    {"mu": 0.5, "max_steps": 3},
    {"mu": "0.5", "max_steps": "3", "adam_epsilon": "1e-8"},
    {"mu": 1, "learning_rate": 2e-6},
    {"bf16": True, "resume": "yes", "disable_tqdm": "T"},
    {"bf16": 1, "disable_tqdm": 0},
    {"max-length": 100, "learning-rate": 1e-3},
    {"mu": None, "method": None, "data_split": None},
    {"data": "one.jsonl", "select": "longest:3"},
    {"data": ["a.jsonl", 7], "weights": [1, "2.5"]},
    {"model": 7, "revision": 12},
    {"columns": {"prompt": "q", "response": "a"}},
    {"lr_scheduler_kwargs": {"num_cycles": 0.5}, "fsdp_config": {"version": 2}},
    {"eval_strategy": "no", "optim": "adamw_torch"},
    {"report_to": ["none"]},
    {"report_to": "none"},
    {"trust_remote_code": False},
    {"trust_remote_code": "no"},
    {"label_smoothing_factor": 0.0, "max_grad_norm": 0},
    {"max_grad_norm": "inf"},
    {"train": {"method": "ntp"}, "score": {"output": "s"}, "evaluate": {}},
    {"train": {"mu": None}, "generate": {"questions": "q"}},
    {"num_scorings": 3},
    {"attn_implementation": "sdpa"},
]
REFUSED: list[dict[str, Any]] = [
    {"learing_rate": 1e-5},
    {"train": {"learing_rate": 1e-5}},
    {"split": {"by": "random"}},
    {"questions": "q.jsonl"},
    {"train": {"num_scorings": 3}},
    {"output_dir": "x"},
    {"mu": "much"},
    {"mu": True},
    {"mu": [0.5]},
    {"max_steps": 3.5},
    {"max_steps": "3.5"},
    {"bf16": "on"},
    {"bf16": 2},
    {"model": ["m"]},
    {"data": []},
    {"data": [None]},
    {"data": [["a"]]},
    {"weights": ["some"]},
    {"method": "sft"},
    {"layout": "padd"},
    {"layout": ["padded"]},
    {"optim": "adamm"},
    {"eval_strategy": "never"},
    {"seed": -1},
    {"seed": 2**32},
    {"gradient_accumulation_steps": 0},
    {"adam_beta1": 1},
    {"neftune_noise_alpha": 0},
    {"trust_remote_code": True},
    {"trust_remote_code": "yes"},
    {"attn_implementation": "owner/kernel"},
    {"use_liger_kernel": True},
    {"parallelism_config": "tp"},
    {"train": None},
    {"train": ["mu"]},
    {"include": ["paper.yaml"]},
    {"include": "paper.json"},
    {"mu": {"value": 1}},
]


def is_read(content: Any, folder: Path) -> bool:
    """Whether `sftmix train` takes a file."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    try:
        parse(["--config", str(path)], TrainRunArguments, SFTMixConfig, "sftmix train")
    except (SystemExit, ValueError, OSError):
        return False
    return True


@pytest.mark.parametrize("content", ACCEPTED, ids=str)
def test_what_is_read_fits(
    content: dict[str, Any], schemas: dict[str | None, Any], tmp_path: Path
) -> None:
    content = {**WHOLE, **content}
    assert is_read(content, tmp_path)
    jsonschema.Draft202012Validator(schemas["train"]).validate(content)
    jsonschema.Draft202012Validator(schemas[None]).validate(content)


@pytest.mark.parametrize("content", REFUSED, ids=str)
def test_what_is_refused_does_not(
    content: dict[str, Any], schemas: dict[str | None, Any], tmp_path: Path
) -> None:
    content = {**WHOLE, **content}
    assert not is_read(content, tmp_path)
    assert not fits(schemas["train"], content)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "train"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text) == json.loads(schema_text("train"))
    path = tmp_path / "sftmix.schema.json"
    assert main(["schema", "train", "--output", str(path)]) == 0
    assert capsys.readouterr().out == f"wrote {path}\n"
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tain"], "argument COMMAND: invalid choice: 'tain'"),
        (["train", "--output", "nowhere/schema.json"], "--output: no such file or directory"),
        (["train", "--ouput", "x"], "--ouput: sftmix schema has no such option; did you mean"),
    ],
)
def test_what_the_command_refuses(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["schema", *words])
    except SystemExit as caught:
        code = caught.code  # type: ignore[assignment]
    assert code == 2
    assert message in capsys.readouterr().err


def test_the_page_shows_an_option_as_it_is(schemas: dict[str | None, Any]) -> None:
    shown = re.search(
        r'^```json\n("layout": .*?\n)```$', PAGE.read_text(), re.MULTILINE | re.DOTALL
    )
    assert shown is not None
    options = schemas["train"]["$defs"]["train"]["properties"]
    assert json.loads(f"{{{shown[1]}}}") == {"layout": options["layout"]}
