"""What is saved: the model before all else, no secret, checkpoints that work by themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

import sftmix.commands.score
import sftmix.commands.train
from sftmix.cli import main
from sftmix.runs.checkpoints import list_checkpoints
from sftmix.training.trainer import SFTMixTrainer
from tests.sftmix import tiny

TOKEN = "hf_a_secret_that_no_file_may_hold"
MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


@pytest.fixture
def train(toy_model: Path, toy_data: Path, held_out: Path, tmp_path: Path) -> list[str]:
    """Two steps of eight, evaluated at the end."""
    words = ["train", "--method", "ntp", "--model", str(toy_model), "--data", str(toy_data)]
    words += ["--use_cpu", "true", "--disable_tqdm", "true", "--max_steps", "2"]
    return [*words, "--eval_data", str(held_out), "--output", str(tmp_path / "run")]


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("owner", "name", "error", "lost"),
    [
        (SFTMixTrainer, "save_state", KeyError("new"), "its log could not be written"),
        (SFTMixTrainer, "evaluate", RuntimeError("lost"), "the evaluation failed"),
        (sftmix.commands.train, "model_card", OSError("no room"), "its card could not be written"),
    ],
)
def test_whatever_fails_afterwards_leaves_the_model(
    owner: Any,
    name: str,
    error: Exception,
    lost: str,
    train: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, failing(error))
        assert main(train) == 1
    assert f"error: the model is in {run}; {lost}: " in capsys.readouterr().err
    assert {path.name for path in run.iterdir()} >= MODEL_FILES
    AutoModelForCausalLM.from_pretrained(run)
    AutoTokenizer.from_pretrained(run)
    if name == "model_card":
        assert main([*train, "--resume"]) == 0
        assert (run / "README.md").exists()


def test_a_weight_that_is_not_finite_makes_no_model(
    train: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = Trainer._finalize_training

    def spoiling(self: Any, *args: Any) -> Any:
        with torch.no_grad():
            self.model.lm_head.weight.fill_(float("nan"))
        return own(self, *args)

    monkeypatch.setattr(Trainer, "_finalize_training", spoiling)
    assert main([*train, "--save_strategy", "no"]) == 1
    assert "is not finite after step 2" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_finished_run_says_so(
    train: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a checkpoint in the midst of an epoch, which Trainer would train a step past."""
    run = tmp_path / "run"
    train += ["--save_strategy", "steps", "--save_steps", "2"]
    assert main(train) == 0
    before = (run / "model.safetensors").read_bytes()
    state = (run / "trainer_state.json").read_bytes()
    assert main([*train, "--resume"]) == 0
    assert "run is finished already" in capsys.readouterr().out
    assert (run / "model.safetensors").read_bytes() == before
    assert (run / "trainer_state.json").read_bytes() == state

    train += ["--save_strategy", "no", "--output", str(tmp_path / "other")]
    assert main(train) == 0
    monkeypatch.setattr(Trainer, "training_step", failing(AssertionError()))
    assert main([*train, "--resume"]) == 0
    assert "other is finished already" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--num_train_epochs", "0"], ["--num_train_epochs", "-1"],
                                   ["--max_steps", "0"]])  # fmt: skip
def test_no_steps_make_no_model(
    flags: list[str], train: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = train.index("--max_steps")
    words = [*train[:place], *train[place + 2 :], *flags]
    assert main(words) == 2
    assert "which trains nothing" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


def test_checkpoints_work_by_themselves(
    train: list[str], toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To train on, to resume, and to answer questions."""
    assert main(train) == 0
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "run").get_vocab()
    again = [*train, "--model", str(checkpoint), "--output", str(tmp_path / "again")]
    assert main(again) == 0
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps([{"instruction": "one two", "dataset": "d"}]))
    words = ["generate", "--model", str(checkpoint), "--questions", str(questions), "--format"]
    words += ["alpaca_eval", "--output", str(tmp_path / "answers.json"), "--max_new_tokens", "3"]
    assert main([*words, "--use_cpu", "true", "--disable_tqdm", "true"]) == 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapters_checkpoints_hold_the_tokenizer(train: list[str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    assert main([*train, "--lora_rank", "2"]) == 0
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "tokenizer.json"} <= names
    AutoTokenizer.from_pretrained(checkpoint)


class Hub:
    """Notes what the hub's client is asked for; replaces it."""

    def __init__(self, patched: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []
        self.fails: set[str] = set()
        patched.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        for name in ("create_repo", "create_branch", "upload_folder"):
            patched.setattr(huggingface_hub.HfApi, name, self.noting(name))

    def noting(self, name: str) -> Callable[..., Any]:
        def note(api: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, api.token, {"args": args, **kwargs}))
            if name in self.fails:
                raise OSError("403 Forbidden")
            return huggingface_hub.RepoUrl("https://huggingface.co/me/model")

        return note


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(monkeypatch)


PUSH = ["--push_to_hub", "true", "--hub_model_id", "model", "--hub_token", TOKEN]


def test_the_final_model_is_pushed(hub: Hub, train: list[str], tmp_path: Path) -> None:
    """And no file that is written knows the token."""
    run = tmp_path / "run"
    more = ["--hub_private_repo", "true", "--hub_revision", "first", "--hub_strategy", "end"]
    assert main([*train, *PUSH, *more, "--report_to", "tensorboard"]) == 0
    create, branch, upload = hub.calls
    assert create == ("create_repo", TOKEN, {"args": ("model",), "private": True, "exist_ok": True})
    assert branch[0] == "create_branch"
    assert branch[2] == {"args": ("me/model",), "branch": "first", "exist_ok": True}
    name, token, given = upload
    assert (name, token) == ("upload_folder", TOKEN)
    assert (given["repo_id"], given["revision"]) == ("me/model", "first")
    assert given["folder_path"] == str(run)
    assert {*MODEL_FILES, "README.md", "tokenizer_config.json"} <= set(given["allow_patterns"])
    kept = {"manifest.json", "trainer_state.json", "training_args.bin"}
    assert not kept & set(given["allow_patterns"])
    assert not any("checkpoint" in name for name in given["allow_patterns"])
    assert all((run / name).exists() for name in given["allow_patterns"])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files)
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


def test_a_push_that_fails_leaves_the_model(
    hub: Hub, train: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fails = {"upload_folder"}
    assert main([*train, *PUSH]) == 1
    error = capsys.readouterr().err
    assert f"the model is in {tmp_path}/run; it could not be pushed to the hub: 403" in error
    assert (tmp_path / "run" / "README.md").exists()
    hub.fails = set()
    assert main([*train, *PUSH, "--resume"]) == 0
    assert hub.calls[-1][0] == "upload_folder"


def test_a_finished_run_is_pushed_too(
    hub: Hub, train: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no checkpoint says that all is trained: after a push that failed, or had no option."""
    run = tmp_path / "run"
    hub.fails = {"upload_folder"}
    train += ["--save_strategy", "no"]
    assert main([*train, *PUSH]) == 1
    (run / "notes.txt").write_text("mine")
    wanted = hub.calls[-1][2]["allow_patterns"]
    assert main([*train, *PUSH, "--resume"]) == 1
    assert f"the model is in {run}; it could not be pushed to the hub" in capsys.readouterr().err
    hub.fails = set()
    assert main([*train, *PUSH, "--resume"]) == 0
    assert "pushed it to" in capsys.readouterr().out
    assert sorted(hub.calls[-1][2]["allow_patterns"]) == sorted(wanted)
    number = len(hub.calls)
    assert main([*train, "--resume"]) == 0
    assert len(hub.calls) == number


def test_a_tokenizer_of_several_templates_is_saved_again_and_pushed(
    hub: Hub, train: list[str], toy_model: Path, tmp_path: Path
) -> None:
    """All but the first lie in a folder of their own."""
    model, name = tmp_path / "model", "additional_chat_templates/tool_use.jinja"
    shutil.copytree(toy_model, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    own = tokenizer.chat_template
    tokenizer.chat_template = {"default": own, "tool_use": own}
    tokenizer.save_pretrained(model)
    train += ["--model", str(model)]
    assert main([*train, *PUSH]) == 0
    assert name in hub.calls[-1][2]["allow_patterns"]
    assert main([*train, *PUSH, "--resume"]) == 0
    assert name in hub.calls[-1][2]["allow_patterns"]
    assert (tmp_path / "run" / name).exists()
    assert not list((tmp_path / "run").glob(".tmp-*"))


@pytest.mark.parametrize("reason", ["forbidden", "no name", "no token", "offline", "strategy"])
def test_a_push_that_cannot_be_is_refused_before_training(
    reason: str,
    hub: Hub,
    train: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words, message = [*train, *PUSH], "the hub refuses --hub_model_id model: 403"
    if reason == "forbidden":
        hub.fails = {"create_repo"}
    elif reason == "no name":
        words, message = [*train, *PUSH[:2]], "--push_to_hub: expected --hub_model_id USER/NAME"
    elif reason == "no token":
        monkeypatch.setattr("sftmix.training.hub.get_token", lambda: None)
        words, message = [*train, *PUSH[:4]], "--push_to_hub: expected a token that may write"
    elif reason == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        message = "--push_to_hub: HF_HUB_OFFLINE is set"
    else:
        words, message = [*words, "--hub_strategy", "every_save"], "hub_strategy: expected 'end'"
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "manifest.json").exists()
    assert "upload_folder" not in [name for name, *_ in hub.calls]


def test_score_has_no_model_to_push(
    toy_model: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["score", "--model", str(toy_model), "--data", str(toy_data), "--use_cpu", "true"]
    assert main([*words, "--output", str(tmp_path / "run"), *PUSH]) == 2
    assert "push_to_hub: score makes a partition, and no model" in capsys.readouterr().err


def test_a_script_keeps_the_token_to_itself(tmp_path: Path) -> None:
    made = tiny.trainer(
        tiny.build("Llama"), tmp_path, tiny.examples(8), hub_token=TOKEN, save_strategy="epoch"
    )
    made.train()
    made.save_model(str(tmp_path / "final"))
    assert made.args.hub_token == TOKEN
    files = list(tmp_path.rglob("training_args.bin"))
    assert len(files) == 2
    assert not any(TOKEN.encode() in path.read_bytes() for path in files)


def test_a_scored_run_with_another_partition_is_refused(
    toy_model: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is damaged, and one that holds fewer scorings than were asked for."""
    run = tmp_path / "run"
    words = ["score", "--model", str(toy_model), "--data", str(toy_data), "--use_cpu", "true"]
    words += ["--disable_tqdm", "true", "--num_scorings", "2", "--output", str(run)]
    assert main(words) == 0
    path = run / "confidence.parquet"
    whole = sftmix.commands.score.read_partition(path)
    path.write_bytes(path.read_bytes()[:-9])
    assert main([*words, "--resume"]) == 2
    assert "delete the file to score again" in capsys.readouterr().err
    one = sftmix.commands.score.from_scores(
        whole.id, whole.content_hash, whole.num_tokens, np.asarray(whole.nll_sum)[:, :1]
    )
    sftmix.commands.score.write_partition(path, one)
    assert main([*words, "--resume"]) == 2
    assert "expected 31 examples and 2 scorings in" in capsys.readouterr().err
    path.unlink()
    assert main([*words, "--resume"]) == 0
    assert pq.read_table(path).num_rows == 31


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more lines"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "cublas", "python"],
)
@pytest.mark.parametrize("lean", [False, True])
def test_out_of_memory(
    error: Exception,
    lean: bool,
    train: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Trainer, "training_step", failing(error))
    assert main([*train, *(["--memory", "lean"] if lean else [])]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert "out of memory: " in line
    assert ("--memory lean" in line) == (not lean)
    assert "--max_length" in line
    assert "`sftmix plan` says what fits" in line


def test_out_of_memory_before_training(
    train: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the model goes to the device."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(sftmix.commands.train, "SFTMixTrainer", failing(error))
    assert main(train) == 1
    assert "out of memory: CUDA out of memory. Tried" in (line := capsys.readouterr().err)
    assert "--dtype bfloat16; --lora_rank 16 with a larger --learning_rate; more GPUs" in line


def test_other_errors_of_torch_are_not_taken_for_it(
    train: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "training_step", failing(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(train)
