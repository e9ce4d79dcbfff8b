"""Model, tokenizer and data of a run are known by content: swapped ones are refused, moved not."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.cli import main
from sftmix.recipe.arguments import RunArguments
from sftmix.recipe.loading import load_model, load_tokenizer, load_trained_model
from sftmix.recipe.manifest import start_manifest
from sftmix.runs.folders import read_manifest
from sftmix.runs.provenance import (
    combined,
    commit_of,
    model_parts,
    provenance,
    tokenizer_parts,
    weight_files,
)
from sftmix.runs.redaction import redacted
from tests.sftmix import tiny
from tests.sftmix.conftest import write_rows

QUIET = ["--use_cpu", "true", "--disable_tqdm", "true"]
FILES = ["model.safetensors", "config.json", "generation_config.json"]


@pytest.fixture
def model(toy_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_model, tmp_path / "model"))


def swap_weights(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    name = sorted(weights)[0]
    save_file({**weights, name: -weights[name]}, model / "model.safetensors", {"format": "pt"})


def swap_tokenizer(model: Path) -> None:
    """Two words change their numbers, and nothing else."""
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Hashes


def test_a_folder_is_its_files_wherever_it_lies(toy_model: Path, model: Path) -> None:
    parts = model_parts(str(toy_model))
    assert list(parts) == FILES
    (model / "notes.txt").write_text("not read")
    edit(model / "config.json", _name_or_path="/elsewhere", transformers_version="9.9")
    assert model_parts(str(model)) == parts
    swap_weights(model)
    changed = model_parts(str(model))
    assert {name for name in FILES if changed[name] != parts[name]} == {"model.safetensors"}
    edit(model / "config.json", rms_norm_eps=0.5)
    edit(model / "generation_config.json", eos_token_id=[1, 2])
    changed = model_parts(str(model))
    assert all(changed[name] != parts[name] for name in FILES)
    assert combined(changed) != combined(parts)


def test_code_is_part_of_a_model_that_may_run_it(model: Path) -> None:
    (model / "own.py").write_text("x = 1")
    assert list(model_parts(str(model))) == FILES
    before = model_parts(str(model), trust_remote_code=True)
    (model / "own.py").write_text("x = 2")
    after = model_parts(str(model), trust_remote_code=True)
    assert {name for name in after if after[name] != before[name]} == {"own.py"}


def test_shards_in_the_order_of_their_index(model: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    loaded.save_pretrained(model, max_shard_size="8KB")
    names = weight_files(str(model))
    assert len(names) > 2
    assert list(model_parts(str(model)))[: len(names)] == names
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    turned = dict(reversed(content["weight_map"].items()))
    edit(index, weight_map=turned)
    assert weight_files(str(model)) == list(dict.fromkeys(turned.values()))
    (model / names[0]).unlink()
    with pytest.raises(OSError, match=f"has no {names[0]}, which model.safetensors.index.json"):
        model_parts(str(model))
    for text in ("{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(OSError, match=r"index\.json is damaged"):
            model_parts(str(model))
    index.unlink()
    with pytest.raises(OSError, match=r"expected safetensors .* found none"):
        model_parts(str(model))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_its_own_files_and_its_base(model: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2)
    adapter = tmp_path / "adapter"
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    adapted.save_pretrained(adapter)
    before = model_parts(str(adapter))
    base = [f"base model's {name}" for name in FILES]
    assert list(before) == ["adapter_model.safetensors", "adapter_config.json", *base]
    moved = tmp_path / "moved"
    model.rename(moved)
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(moved))
    assert model_parts(str(adapter)) == before
    swap_weights(moved)
    after = model_parts(str(adapter))
    assert {name for name in after if after[name] != before[name]} == {
        "base model's model.safetensors"
    }
    edit(adapter / "adapter_config.json", lora_alpha=99)
    assert model_parts(str(adapter))["adapter_config.json"] != before["adapter_config.json"]


def test_a_tokenizer_is_what_it_does(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    parts = tokenizer_parts(tokenizer)
    tokenizer("one two", truncation=True, max_length=1)
    tokenizer(["one", "one two"], padding=True)
    assert tokenizer_parts(tokenizer) == parts
    again = model.parent / "again"
    tokenizer.save_pretrained(again)
    assert tokenizer_parts(AutoTokenizer.from_pretrained(again)) == parts
    swap_tokenizer(model)
    changed = tokenizer_parts(AutoTokenizer.from_pretrained(model))
    assert {one for one in parts if parts[one] != changed[one]} == {"tokenizer.json: model"}
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    changed = tokenizer_parts(tokenizer)
    assert {one for one in parts if parts[one] != changed[one]} == {
        *("tokenizer.json: added_tokens", "special tokens")
    }


COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def hub(toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub, offline, with two commits of a model."""
    for module in ("huggingface_hub.constants", "transformers.utils.hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--toy"
    (repository / "refs").mkdir(parents=True)
    for revision, commit in COMMITS.items():
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(toy_model, repository / "snapshots" / commit)
    swap_weights(repository / "snapshots" / COMMITS["v1"])
    return repository


def test_a_model_of_the_hub_is_the_files_of_its_commit(hub: Path, toy_model: Path) -> None:
    assert model_parts("org/toy") == model_parts(str(toy_model))
    other = model_parts("org/toy", "v1")
    assert other == model_parts(str(hub / "snapshots" / COMMITS["v1"]))
    assert other != model_parts("org/toy")
    assert (commit_of("org/toy"), commit_of("org/toy", "v1")) == tuple(COMMITS.values())
    assert commit_of("org/toy", COMMITS["v1"]) == COMMITS["v1"]
    assert commit_of(str(toy_model)) is None
    found = provenance("org/toy", AutoTokenizer.from_pretrained("org/toy"), "v1")
    assert (found["revision"], found["commit"]) == ("v1", COMMITS["v1"])
    name = sorted(load_file(toy_model / "model.safetensors"))[0]
    weights = [
        load_model(RunArguments("org/toy", [], "", revision=one)).state_dict()[name]
        for one in (None, "v1")
    ]
    assert torch.equal(weights[0], -weights[1])
    with pytest.raises(OSError, match="no such name in the hub's cache"):
        load_tokenizer(RunArguments("org/toy", [], "", revision="v9"))


def test_a_run_at_a_revision(
    hub: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["train", "--method", "ntp", "--model", "org/toy", "--data", str(toy_data), *QUIET]
    words += ["--max_steps", "1", "--save_strategy", "no", "--output", str(run)]
    assert main([*words, "--revision", "v1"]) == 0
    manifest = read_manifest(run / "manifest.json")
    assert (manifest["revision"], manifest["commit"]) == ("v1", COMMITS["v1"])
    card = (run / "README.md").read_text()
    assert "| revision | v1 |" in card
    assert f"| commit | {COMMITS['v1']} |" in card
    assert main([*words, "--resume"]) == 2
    assert "(model.safetensors differs; revision was 'v1', now None" in capsys.readouterr().err
    # The branch has moved on, to the same content under another commit.
    moved = "c" * 40
    (hub / "snapshots" / COMMITS["v1"]).rename(hub / "snapshots" / moved)
    (hub / "refs" / "v1").write_text(moved)
    start_manifest(run, {**manifest, **{"commit": moved}})


@pytest.mark.parametrize("load", [load_model, load_trained_model, load_tokenizer])
def test_a_folder_has_no_revision(load: Any, toy_model: Path) -> None:
    with pytest.raises(ValueError, match="revision: expected the name of a model on the hub"):
        load(RunArguments(str(toy_model), [], "", revision="main"))


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--method", "ntp"],
        ["score"],
        ["generate", "--format", "alpaca_eval", "--questions"],
    ],
)
def test_commands_refuse_a_revision_of_a_folder(
    words: list[str],
    toy_model: Path,
    toy_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--model", str(toy_model), "--revision", "main"]
    given += ["--output", str(tmp_path / "out.json")]
    if words[0] == "generate":
        (tmp_path / "questions.json").write_text('[{"instruction": "one"}]')
        words = [*words, str(tmp_path / "questions.json"), "--use_cpu", "--disable_tqdm"]
    else:
        words = [*words, "--data", str(toy_data), *QUIET]
    assert main([*words, *given]) == 2
    assert "--revision: expected the name of a model on the hub" in capsys.readouterr().err


# Runs that go on


@pytest.fixture(scope="module")
def started(
    tmp_path_factory: pytest.TempPathFactory, toy_model: Path, toy_data: Path, held_out: Path
) -> tuple[Path, dict[str, str]]:
    """A folder with a run, its partition, model and data; and the words that made it."""
    folder = tmp_path_factory.mktemp("provenance")
    shutil.copytree(toy_model, folder / "model")
    for name, data in (("rows", toy_data), ("held-out", held_out)):
        shutil.copy(data, folder / f"{name}.jsonl")
    words = {
        "--model": str(folder / "model"),
        "--data": str(folder / "rows.jsonl"),
        "--output": str(folder / "score"),
    }
    flat = [word for pair in words.items() for word in pair]
    assert main(["score", *flat, "--num_scorings", "1", *QUIET]) == 0
    words["--output"] = str(folder / "run")
    words["--partition"] = str(folder / "score" / "confidence.parquet")
    words["--eval_data"] = str(folder / "held-out.jsonl")
    assert main(train_words(words)) == 0
    return folder, words


def train_words(words: dict[str, str], *flags: str) -> list[str]:
    flat = [word for pair in words.items() for word in pair]
    return ["train", *flat, "--max_steps", "2", "--save_steps", "1", *QUIET, *flags]


def moved_to(folder: Path, words: dict[str, str], place: Path) -> dict[str, str]:
    """The same words for a copy of everything in another place."""
    shutil.copytree(folder, place)
    return {flag: word.replace(str(folder), str(place)) for flag, word in words.items()}


def test_everything_moved_goes_on(started: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, words = started
    elsewhere = moved_to(folder, words, tmp_path / "elsewhere")
    run = Path(elsewhere["--output"])
    before = (run / "manifest.json").read_bytes()
    assert main(train_words(elsewhere, "--resume")) == 0
    assert (run / "manifest.json").read_bytes() == before
    given = ["--model", elsewhere["--model"], "--data", elsewhere["--data"]]
    given += ["--output", str(tmp_path / "elsewhere" / "score"), "--num_scorings", "1"]
    assert main(["score", *given, *QUIET, "--resume"]) == 0


@pytest.mark.parametrize(
    ("flag", "change", "message"),
    [
        ("--model", swap_weights, "model_hash = .* \\(model.safetensors differs"),
        ("--model", swap_tokenizer, "tokenizer_hash = .* \\(tokenizer.json: model differs"),
        ("--eval_data", lambda path: write_rows(path, 9, seed=5), "eval_data_hash = "),
    ],
)
def test_what_was_swapped_is_refused(
    flag: str,
    change: Any,
    message: str,
    started: tuple[Path, dict[str, str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, words = started
    elsewhere = moved_to(folder, words, tmp_path / "elsewhere")
    change(Path(elsewhere[flag]))
    assert main(train_words(elsewhere, "--resume")) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "take what it was started with, or start anew" in error
    if flag == "--model":
        given = ["--model", elsewhere["--model"], "--data", elsewhere["--data"]]
        given += ["--output", str(tmp_path / "elsewhere" / "score"), "--num_scorings", "1"]
        assert main(["score", *given, *QUIET, "--resume"]) == 2
        assert re.search(message, capsys.readouterr().err)


RECIPE = {
    "model": "/a/model",
    "data": ["/a/rows.jsonl"],
    "data_hash": "d",
    "seed": 0,
    "model_hash": "m",
    "tokenizer_hash": "t",
    "revision": None,
    "parts": {"model_hash": {"x": "1", "y": "2"}, "tokenizer_hash": {}},
}


def refusal(run: Path, **changes: Any) -> str | None:
    try:
        start_manifest(run, {**RECIPE, **changes})
    except ValueError as error:
        return str(error)
    return None


def test_names_are_for_people(tmp_path: Path) -> None:
    start_manifest(tmp_path, RECIPE)
    moved = {"model": "/b/model", "data": ["/b/rows.jsonl"], "revision": "main"}
    assert refusal(tmp_path, **moved) is None
    parts = {"model_hash": {"x": "1", "y": "3", "z": "4"}, "tokenizer_hash": {}}
    error = refusal(tmp_path, **moved, model_hash="n", parts=parts)
    assert error is not None
    assert (
        f"resume: {tmp_path} was started with model_hash = 'm', now it is 'n' (y, z differ; "
        in (error)
    )
    assert "model was '/a/model', now '/b/model'" in error
    assert "seed = 0, now it is 1;" in str(refusal(tmp_path, seed=1))


def test_a_run_of_a_version_without_hashes_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start_manifest(tmp_path, RECIPE)
    manifest = read_manifest(tmp_path / "manifest.json")
    old = {n: v for n, v in manifest.items() if n not in ("model_hash", "tokenizer_hash", "parts")}
    (tmp_path / "manifest.json").write_text(json.dumps(old))
    with caplog.at_level(logging.WARNING):
        assert refusal(tmp_path) is None
    assert "kept no model_hash, tokenizer_hash: whether they are the same cannot be told" in (
        caplog.text
    )
    # Names are all there is.
    assert "model = '/a/model', now it is '/b'" in str(refusal(tmp_path, model="/b"))
    assert refusal(tmp_path, data=["/b/rows.jsonl"]) is None


def test_a_run_of_a_version_with_schedules_of_mu_goes_on_if_mu_was_constant(
    tmp_path: Path,
) -> None:
    start_manifest(tmp_path, RECIPE)
    path = tmp_path / "manifest.json"
    manifest = read_manifest(path)
    for schedule, goes_on in (("constant", True), ("cosine", False)):
        path.write_text(json.dumps({**manifest, "mu_schedule": schedule, "mu_warmup_ratio": 0.1}))
        assert (refusal(tmp_path) is None) == goes_on


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": ' + "[" * 100_000, "\xff"])
def test_a_damaged_manifest_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(text.encode("latin-1"))
    assert f"{path} is damaged" in str(refusal(tmp_path))


def test_split_names_a_damaged_manifest(
    started: tuple[Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(started[0] / "score", tmp_path / "score"))
    (run / "manifest.json").write_text("{")
    assert main(["split", str(run), "--by", "random"]) == 2
    assert f"{run}/manifest.json is damaged" in capsys.readouterr().err


# Secrets

TOKEN = "hf_" + "abcDEF123456" * 3


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:word@host/a.jsonl", "https://***@host/a.jsonl"),
        (f"https://{TOKEN}@huggingface.co/x", "https://***@huggingface.co/x"),
        ("s3://key:secret@bucket", "s3://***@bucket"),
        ("https://host/a?X-Amz-Signature=ab12&b=1", "https://host/a?X-Amz-Signature=***&b=1"),
        ("https://host/a?access_token=ab12", "https://host/a?access_token=***"),
        (f"Bearer {TOKEN}.", "Bearer ***."),
        ("wandb of 0123456789abcdef0123", "wandb of ***"),
        ("me@host.org, https://host/a?b=c", "me@host.org, https://host/a?b=c"),
        ("org/name@v1", "org/name@v1"),
    ],
)
def test_secrets_are_hidden(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    monkeypatch.setenv("HF_TOKEN", "short")
    assert redacted(text) == shown
    assert redacted({"a": [text, 1, None], text: 2}) == {"a": [shown, 1, None], shown: 2}


def test_no_secret_reaches_a_file_or_the_screen(
    toy_model: Path,
    toy_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    key = "0123456789abcdef0123"
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run = tmp_path / "run"
    words = ["train", "--method", "ntp", "--model", str(toy_model), "--data", str(toy_data)]
    words += ["--max_steps", "1", *QUIET, "--hub_token", TOKEN, "--run_name", f"named {key}"]
    assert (
        main([*words, "--output", str(run), "--save_strategy", "steps", "--save_steps", "1"]) == 0
    )
    # What transformers keeps of its arguments is no file of ours to write.
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        if path.name != "training_args.bin":
            assert not {one for one in (TOKEN, key) if one.encode() in path.read_bytes()}, path
    # Said of rows on the way: how many were read, and which of their fields are not used.
    named = tmp_path / f"rows?key={key}.jsonl"
    named.write_text("".join(f'{{"prompt": "a", "completion": "{n}", "b": 1}}\n' for n in range(4)))
    assert main([*words, "--output", str(tmp_path / "named"), "--data", str(named)]) == 0
    assert key not in (tmp_path / "named" / "README.md").read_text()
    url = f"https://me:{key}@host/rows.jsonl"
    for flag, value in (("--data", url), ("--model", f"https://{TOKEN}@host/x")):
        other = [*words, "--output", str(tmp_path / "other"), flag, value]
        assert main(other) == 2
    shown = capfd.readouterr()
    assert "***@host" in shown.err
    for text in (shown.out, shown.err):
        assert TOKEN not in text
        assert key not in text


def test_a_tiny_model_of_another_kind(tmp_path: Path) -> None:
    """GPT-2's head is tied, and its old files have buffers that it ignores."""
    tiny.build("GPT2").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    assert "lm_head.weight" not in weights
    old = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 4, 4) for i in range(2)}
    save_file({**weights, **old}, path, {"format": "pt"})
    load_model(RunArguments(str(tmp_path), [], ""))
