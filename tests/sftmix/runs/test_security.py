"""Nothing that lies in a model's or a run's folder is executed; what is written heeds the umask."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sftmix.cli import main
from sftmix.runs.checkpoints import LIST, fault, seal
from sftmix.runs.pickles import refuse_code
from tests.sftmix.medical_data import write

QUIET = ["--use_cpu", "true", "--disable_tqdm", "true"]


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Canary]:
    """A canary that has to live until the test ends; that it can sing is tried first."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Canary(path)))
    path.unlink()
    yield Canary(path)
    assert not path.exists()


@pytest.fixture(scope="module")
def broken_off(
    tmp_path_factory: pytest.TempPathFactory, toy_model: Path, toy_data: Path
) -> tuple[Path, list[str]]:
    """A run with a checkpoint before its end, and the command that goes on with it."""
    run = tmp_path_factory.mktemp("security") / "run"
    words = ["train", "--method", "ntp", "--model", str(toy_model), "--data", str(toy_data), *QUIET]
    words += ["--num_train_epochs", "1", "--save_strategy", "steps", "--save_steps", "6"]
    assert main([*words, "--save_total_limit", "9", "--output", str(run)]) == 0
    shutil.rmtree(run / "checkpoint-8")
    (run / "config.json").unlink()  # without it no model was saved
    return run, [*words, "--resume"]


@pytest.fixture
def run(broken_off: tuple[Path, list[str]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(broken_off[0], tmp_path / "run"))


def with_torch(value: Any, path: Path) -> None:
    torch.save({"state": value}, path)


def with_pickle(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps({"state": value}))


@pytest.mark.parametrize("write", [with_torch, with_pickle])
@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "rng_state_0.pth",
        "scaler.pt",
        "optimizer.bin",
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model_fsdp.bin",
        "adapter_model.bin",
        "other/adapter_model.bin",
        "global_step6/mp_rank_00_model_states.pt",
    ],
)
def test_a_pickle_in_a_checkpoint_stops_the_run(
    name: str,
    write: Callable[[Any, Path], None],
    canary: Canary,
    run: Path,
    broken_off: tuple[Path, list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whoever planted it made the list of checksums anew."""
    planted = run / "checkpoint-6" / name
    planted.parent.mkdir(exist_ok=True)
    write(canary, planted)
    if name.startswith("pytorch_model"):
        (run / "checkpoint-6" / "model.safetensors").unlink()
    seal(run / "checkpoint-6")
    assert fault(run / "checkpoint-6") is None
    assert main([*broken_off[1], "--output", str(run)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert f"resume: {planted} holds more than tensors and plain values" in error
    assert len(error.splitlines()[-1]) < 600


def test_the_pickle_that_nobody_reads(
    canary: Canary, run: Path, broken_off: tuple[Path, list[str]]
) -> None:
    """Trainer writes its arguments for people; a run goes on without a look at them."""
    with_torch(canary, run / "checkpoint-6" / "training_args.bin")
    seal(run / "checkpoint-6")
    assert main([*broken_off[1], "--output", str(run)]) == 0


def test_a_pickle_that_changed_the_checksums_is_not_opened(
    canary: Canary,
    run: Path,
    broken_off: tuple[Path, list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_torch(canary, run / "checkpoint-6" / "optimizer.pt")
    assert main([*broken_off[1], "--output", str(run)]) == 2
    assert "only damaged ones (checkpoint-6: optimizer.pt" in capsys.readouterr().err


def test_a_checkpoint_of_our_own_is_not_refused(run: Path) -> None:
    refuse_code(run / "checkpoint-6")
    assert LIST in {path.name for path in (run / "checkpoint-6").iterdir()}


# Model folders


@pytest.fixture
def model(toy_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_model, tmp_path / "model"))


def refusal(
    model: Path, toy_data: Path, output: Path, capsys: pytest.CaptureFixture[str], *flags: str
) -> str:
    words = ["train", "--method", "ntp", "--model", str(model), "--data", str(toy_data), *QUIET]
    assert main([*words, "--num_train_epochs", "1", "--output", str(output), *flags]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert ": error: " in error
    return error


def test_pickled_adapters_are_never_opened(
    model: Path,
    toy_data: Path,
    canary: Canary,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_torch(canary, model / "adapter_model.bin")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(model), "r": 4}
    (model / "adapter_config.json").write_text(json.dumps(config))
    assert "is an adapter" in refusal(model, toy_data, tmp_path / "run", capsys)


def asking(command: str, model: Path, tmp_path: Path, toy_data: Path) -> list[str]:
    """The words of a command that loads the model."""
    words = [command, "--model", str(model)]
    if command == "evaluate":
        return [*words, "--tasks", "medqa", "--medqa_data", write(tmp_path, "medqa", [0])["file"]]
    if command == "generate":
        (tmp_path / "questions.json").write_text('[{"instruction": "one"}]')
        words += ["--format", "alpaca_eval", "--questions", str(tmp_path / "questions.json")]
        return [*words, "--output", str(tmp_path / "out.json"), "--use_cpu"]
    method = ["--method", "ntp"] if command == "train" else []
    return [*words, *method, "--data", str(toy_data), "--output", str(tmp_path / "run"), *QUIET]


@pytest.mark.parametrize("kind", ["config", "tokenizer", "adapter", "base", "megatron"])
@pytest.mark.parametrize("command", ["score", "train", "generate", "evaluate"])
def test_no_command_runs_what_comes_with_a_model(
    command: str,
    kind: str,
    model: Path,
    toy_data: Path,
    canary: Canary,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sftmix.commands.evaluate.require_harness", lambda: None)
    monkeypatch.setattr("sftmix.commands.evaluate.version", lambda name: "0")
    code = f"from pathlib import Path\nPath({str(canary.path)!r}).touch()\n"
    (model / "own.py").write_text(code)
    given = model
    config = {"peft_type": "LORA", "base_model_name_or_path": str(model), "r": 2}
    if kind in ("config", "base"):
        edited = json.loads((model / "config.json").read_text())
        edited["auto_map"] = {"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.Own"}
        (model / "config.json").write_text(json.dumps({**edited, "model_type": "own"}))
    if kind == "tokenizer":
        edited = json.loads((model / "tokenizer_config.json").read_text())
        edited |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
        (model / "tokenizer_config.json").write_text(json.dumps(edited))
    if kind in ("adapter", "base", "megatron"):
        given = tmp_path / "adapter"
        given.mkdir()
        for path in model.glob("tokenizer*"):
            shutil.copy(path, given)
        with_torch(canary, given / "adapter_model.bin")
        if kind != "adapter":
            save_file({"x": torch.ones(1)}, given / "adapter_model.safetensors")
        if kind == "megatron":
            monkeypatch.syspath_prepend(str(model))
            config |= {
                "megatron_config": {"x": 1},
                "megatron_core": "own",
                "target_modules": ["down_proj"],
            }
        (given / "adapter_config.json").write_text(json.dumps(config))
    assert main(asking(command, given, tmp_path, toy_data)) == 2
    error = capsys.readouterr().err
    assert ": error: " in error
    assert "Traceback" not in error


def test_code_beside_a_tokenizer_is_not_run(
    model: Path,
    toy_data: Path,
    canary: Canary,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (model / "own.py").write_text(f"from pathlib import Path\nPath({str(canary.path)!r}).touch()\n")
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    path.write_text(json.dumps(config))
    error = refusal(model, toy_data, tmp_path / "run", capsys)
    assert "contains custom code" in error


# Permissions


def test_what_is_written_heeds_the_umask(model: Path, toy_data: Path, tmp_path: Path) -> None:
    """Also where safetensors by itself would shut others out."""
    words = ["--model", str(model), "--data", str(toy_data), *QUIET]
    before = os.umask(0o027)
    try:
        score = ["score", *words, "--num_scorings", "2", "--save_strategy", "epoch"]
        assert main([*score, "--output", str(tmp_path / "score")]) == 0
        train = ["train", *words, "--num_train_epochs", "1", "--save_strategy", "epoch"]
        train += ["--partition", str(tmp_path / "score" / "confidence.parquet")]
        assert main([*train, "--output", str(tmp_path / "train")]) == 0
    finally:
        os.umask(before)
    found = [path for run in ("score", "train") for path in (tmp_path / run).rglob("*")]
    assert {path.name for path in found} >= {"perplexity.safetensors", "model.safetensors"}
    for path in found:
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path
