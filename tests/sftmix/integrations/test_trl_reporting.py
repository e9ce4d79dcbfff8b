"""What reporters and callbacks get: runs of their own, TRL's names and TRL's columns."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import EarlyStoppingCallback, GenerationConfig
from trl import LogCompletionsCallback

import sftmix
from sftmix import ScoreConfig, SFTMixTrainer
from sftmix.integrations.trl import SFTMixSFTConfig, score
from sftmix.training.reporters import reporters_apart
from tests.sftmix import over_trl, tiny
from tests.sftmix.integrations.test_trl import options, ours
from tools import families

# TRL's own defaults use a name that transformers gives up.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")

COLOURS = ["red", "blue", "green", "black", "white", "pink", "grey", "gold"]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL tells its makers of every trainer, except in CI."""
    monkeypatch.setenv("CI", "1")


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    pairs = [{"prompt": f"Say {one}.", "completion": f" {one}", "id": one} for one in COLOURS]
    return datasets.Dataset.from_list(pairs)


class FakeWandb(ModuleType):
    """As much of W&B as transformers' callback uses; its runs stay in memory."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.config = Config()
        self.runs: list[Any] = []
        self.run: Any = None

    def init(self, project: str | None = None, name: str | None = None) -> None:
        """Begin a run."""
        self.run = SimpleNamespace(
            id=len(self.runs), name=name, lines=[], summary={}, _label=lambda **_: None
        )
        self.runs.append(self.run)

    def log(self, line: dict[str, Any]) -> None:
        """Log into the run that is active."""
        self.run.lines.append(line)

    def finish(self) -> None:
        """End the run."""
        self.run = None


class Config(dict[str, Any]):
    """A run's config, whose update takes a keyword of W&B's."""

    def update(self, values: dict[str, Any], allow_val_change: bool = False) -> None:  # type: ignore[override]
        super().update(values)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake, errors = FakeWandb(), ModuleType("wandb.sdk.lib.config_util")
    errors.ConfigError = RuntimeError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("wandb.sdk", "wandb.sdk.lib"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "wandb.sdk.lib.config_util", errors)
    for name in ("WANDB_RUN_ID", "WANDB_DISABLED", "WANDB_LOG_MODEL", "WANDB_WATCH"):
        monkeypatch.delenv(name, raising=False)
    return fake


def trained(toy_model: Path, folder: Path, rows: datasets.Dataset, **changes: Any) -> Any:
    """Score and train as a script does, and return the trainer."""
    config = SFTMixSFTConfig(**options(folder, num_train_epochs=2, **changes))
    partition = score(str(toy_model), config, train_dataset=rows, num_scorings=1)
    given = {"confident": partition}
    trainer = ours(toy_model, folder, rows, given, num_train_epochs=2, **changes)
    trainer.train()
    return trainer


def written(folder: Path) -> dict[int, float]:
    """The losses of a TensorBoard folder by step; each step is there once."""
    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = events.Scalars("train/loss")
    found = {one.step: one.value for one in scalars}
    assert len(found) == len(scalars)
    return found


@pytest.mark.parametrize("elsewhere", [False, True])
def test_tensorboard_gets_two_folders(
    elsewhere: bool,
    toy_model: Path,
    rows: datasets.Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    folder = tmp_path / "run" / "tensorboard"
    if elsewhere:
        folder = tmp_path / "events"
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder))
    trainer = trained(toy_model, tmp_path / "run", rows, report_to="tensorboard")
    logged = {one["step"]: one["loss"] for one in trainer.state.log_history if "loss" in one}
    assert written(folder) == pytest.approx(logged, rel=1e-6)
    assert [*written(folder)] == [1, 2, 3, 4]
    assert [*written(folder / "reference")] == [1, 2]


@pytest.mark.parametrize("name", [None, "mine"])
def test_wandb_gets_two_runs(
    name: str | None, wandb: FakeWandb, toy_model: Path, rows: datasets.Dataset, tmp_path: Path
) -> None:
    trained(toy_model, tmp_path, rows, report_to="wandb", run_name=name)
    assert [run.name for run in wandb.runs] == [f"{name or tmp_path}-reference", name]
    steps = [
        [line["train/global_step"] for line in run.lines if "train/loss" in line]
        for run in wandb.runs
    ]
    assert steps == [[1, 2], [1, 2, 3, 4]]
    assert wandb.run is wandb.runs[1]  # transformers leaves the training's open


def test_wandb_gets_two_runs_of_the_plain_trainer_too(wandb: FakeWandb, tmp_path: Path) -> None:
    data, told = tiny.examples(8), {"report_to": "wandb", "logging_steps": 1, "use_cpu": True}
    args = ScoreConfig(
        str(tmp_path / "score"), num_scorings=1, run_name="scores", disable_tqdm=True, **told
    )
    partition = sftmix.score(tiny.build("Llama"), args, train_dataset=data)
    assert args.report_to == ["wandb"]
    made = SFTMixTrainer(
        tiny.build("Llama"),
        tiny.config(tmp_path / "run", run_name="mine", num_train_epochs=2, **told),
        train_dataset=data,
        confident=partition,
    )
    made.train()
    steps = [
        (run.name, [line["train/global_step"] for line in run.lines if "train/loss" in line])
        for run in wandb.runs
    ]
    assert steps == [("scores", [1, 2]), ("mine", [1, 2, 3, 4])]


@pytest.mark.parametrize("chosen", ["active", "id"])
def test_a_run_of_wandb_that_is_active_stays_the_trainings(
    chosen: str,
    wandb: FakeWandb,
    toy_model: Path,
    rows: datasets.Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if chosen == "active":
        wandb.init(name="the user's")
    else:
        monkeypatch.setenv("WANDB_RUN_ID", "the user's")
    trained(toy_model, tmp_path, rows, report_to="wandb")
    (run,) = wandb.runs
    steps = [line["train/global_step"] for line in run.lines if "train/loss" in line]
    assert steps == [1, 2, 3, 4]
    said = [line for line in caplog.messages if line.startswith("report_to: ")]
    assert said == [
        "report_to: the reference model's training is not reported to wandb, where it would be "
        "part of the run that is active, or of the training's own"
    ]


def test_a_reporter_without_a_run_for_each_training_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert reporters_apart(["tensorboard", "trackio"]) == ["tensorboard", "trackio"]
    assert not caplog.messages
    assert reporters_apart(["mlflow", "tensorboard", "swanlab"]) == ["tensorboard"]
    (line,) = caplog.messages
    assert "is not reported to mlflow, swanlab, " in line


def test_a_set_to_evaluate_has_a_name(
    toy_model: Path, rows: datasets.Dataset, tmp_path: Path
) -> None:
    trainer = ours(toy_model, tmp_path, rows, {"eval_dataset": {"near": rows, "far": rows}})
    assert trainer.evaluate("near")["eval_loss"] == trainer.evaluate()["eval_near_loss"]
    with pytest.raises(ValueError, match=r"^eval_dataset: .*own \(near, far\), got 'nar'"):
        trainer.evaluate("nar")


@pytest.mark.parametrize("held", ["one", "several"])
def test_data_to_evaluate_keep_the_columns_of_trl(
    held: str, toy_model: Path, rows: datasets.Dataset, tmp_path: Path
) -> None:
    more = {"lam": 0.5, "filler": "yes", "weight": 2.0, "colour": "x"}
    wide = rows
    for name, value in more.items():
        wide = wide.add_column(name, [value] * len(rows))
    given = {"eval_dataset": wide if held == "one" else {"train": wide}}
    trainer = ours(toy_model, tmp_path, rows, given)
    kept = trainer.eval_dataset if held == "one" else trainer.eval_dataset["train"]
    assert kept["prompt"][:] == rows["prompt"][:]
    assert kept["colour"][:] == ["x"] * len(rows)
    assert kept["id"][:] == list(range(len(rows)))
    assert sorted(trainer.examples.column_names) == ["id", "input_ids", "labels"]
    plain = ours(toy_model, tmp_path, rows, {"eval_dataset": rows}).evaluate()
    prefix = "eval" if held == "one" else "eval_train"
    assert trainer.evaluate()[f"{prefix}_loss"] == plain["eval_loss"]


def test_trls_callback_writes_completions(
    toy_model: Path, rows: datasets.Dataset, tmp_path: Path
) -> None:
    trainer = ours(toy_model, tmp_path, rows, {"eval_dataset": rows})
    short = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    callback = LogCompletionsCallback(trainer, generation_config=short, num_prompts=2, freq=1)
    trainer.add_callback(callback)
    trainer.train()
    steps, prompts, completions = zip(*callback.table, strict=True)
    assert steps == ("1", "1", "2", "2")
    assert prompts == ("Say red.", "Say blue.") * 2
    assert all(completions)


def test_scoring_leaves_early_stopping_out(
    toy_model: Path, rows: datasets.Dataset, tmp_path: Path
) -> None:
    """It evaluates nothing, which that callback asserts; a script gives both the same arguments."""
    config = SFTMixSFTConfig(
        **options(
            tmp_path, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True
        )
    )
    given = {"eval_dataset": rows, "train_dataset": rows}
    for callback in (EarlyStoppingCallback(2), EarlyStoppingCallback):
        found = score(str(toy_model), config, num_scorings=1, callbacks=[callback], **given)
        assert len(found) == len(rows)


def test_optimizers_of_another_model_are_refused(
    toy_model: Path, rows: datasets.Dataset, tmp_path: Path
) -> None:
    """`score` trains a copy, which these would not move."""
    model = tiny.build("Llama")
    given = {"optimizers": (torch.optim.SGD(model.parameters(), lr=1.0), None)}
    words = r"^optimizers: expected none, since score trains a model of its own"
    config = SFTMixSFTConfig(**options(tmp_path))
    with pytest.raises(ValueError, match=words):
        score(str(toy_model), config, train_dataset=rows, **given)
    with pytest.raises(ValueError, match=words):
        sftmix.score(model, ScoreConfig(str(tmp_path)), train_dataset=tiny.examples(8), **given)


def test_a_routers_loss_has_trls_name(tmp_path: Path) -> None:
    model = families.build("mixtral", router_aux_loss_coef=2.0)
    trainer = over_trl.trainer(model, tmp_path, over_trl.tiny.examples(8), 4)
    trainer.train()
    line = next(one for one in trainer.state.log_history if "loss" in one)
    assert line["aux_loss"] > 0
    assert "router_loss" not in line
