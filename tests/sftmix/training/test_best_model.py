"""The best model is the one of the lowest loss, perplexity or entropy, or highest accuracy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback

from sftmix.cli import main
from sftmix.runs.checkpoints import list_checkpoints
from sftmix.training.trainer import SFTMixTrainer
from tests.sftmix import tiny

SETS = {"near": 0, "far": 1}
ONE = ("loss", "perplexity", "eval_loss", "eval_perplexity", "entropy")
TWO = ("eval_near_perplexity", "far_perplexity", "eval_far_loss", "near_loss", "far_entropy")


def make(folder: Path, *, sets: bool = False, **changes: Any) -> SFTMixTrainer:
    """Five steps with an evaluation after each, of which the later ones do harm."""
    parts: Any = {name: tiny.examples(4, seed=seed) for name, seed in SETS.items()}
    options = {
        "learning_rate": 0.02,
        "warmup_steps": 0,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": None,
    }
    return tiny.trainer(
        tiny.build("Llama"),
        folder,
        tiny.examples(20),
        eval_dataset=parts if sets else parts["near"],
        **{**options, **changes},
    )


@pytest.mark.parametrize("metric", [*ONE, *TWO])
def test_less_is_better(metric: str, tmp_path: Path) -> None:
    made = make(tmp_path, sets=metric in TWO, metric_for_best_model=metric)
    assert made.args.greater_is_better is False


@pytest.mark.parametrize("metric", ["mean_token_accuracy", "eval_far_mean_token_accuracy"])
def test_more_accuracy_is_better(metric: str, tmp_path: Path) -> None:
    made = make(
        tmp_path, sets="far" in metric, metric_for_best_model=metric, load_best_model_at_end=True
    )
    made.train()
    name = f"eval_{metric.removeprefix('eval_')}"
    found = [line[name] for line in made.state.log_history if name in line]
    assert made.args.greater_is_better is True
    assert made.state.best_metric == max(found)


@pytest.mark.parametrize("metric", [*ONE[1:3], *TWO[1:3]])
def test_the_lowest_is_the_best(metric: str, tmp_path: Path) -> None:
    made = make(
        tmp_path, sets=metric in TWO, metric_for_best_model=metric, load_best_model_at_end=True
    )
    made.train()
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    found = [line[name] for line in made.state.log_history if name in line]
    assert len(found) == 5
    assert made.state.best_metric == min(found)
    assert Path(str(made.state.best_model_checkpoint)).name == (
        f"checkpoint-{found.index(min(found)) + 1}"
    )


def test_the_user_decides(tmp_path: Path) -> None:
    made = make(tmp_path, metric_for_best_model="perplexity", greater_is_better=True)
    assert made.args.greater_is_better is True


def test_the_best_alone_is_kept_and_training_stops_early(tmp_path: Path) -> None:
    """A rate that does harm at once: the first is the best."""
    made = make(
        tmp_path,
        metric_for_best_model="eval_perplexity",
        save_strategy="best",
        load_best_model_at_end=True,
        learning_rate=0.5,
    )
    made.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    made.train()
    found = [line["eval_perplexity"] for line in made.state.log_history if "eval_loss" in line]
    assert made.state.best_metric == min(found)
    best = found.index(min(found)) + 1
    assert list_checkpoints(tmp_path)[0].name == f"checkpoint-{best}"
    assert made.state.global_step == min(best + 2, 5)


@pytest.mark.parametrize(
    ("metric", "sets", "known"),
    [
        ("accuracy", False, "eval_loss, eval_perplexity, eval_entropy, eval_mean_token_accuracy"),
        ("loss", True, "eval_near_loss, eval_near_perplexity, .*, eval_far_loss, eval_far_perp"),
        ("eval_middle_loss", True, "eval_near_loss"),
        ("ntp_loss", False, "eval_loss"),
    ],
)
def test_a_metric_that_no_evaluation_has_is_refused(
    metric: str, sets: bool, known: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^metric_for_best_model: expected one of {known}.*got"):
        make(tmp_path, sets=sets, metric_for_best_model=metric)


def test_the_command_refuses_it_too(
    toy_model: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--method", "ntp", "--model", str(toy_model), "--data", str(toy_data)]
    words += ["--use_cpu", "true", "--eval_data", str(toy_data), "--output", str(tmp_path / "run")]
    words += ["--eval_strategy", "epoch", "--metric_for_best_model", "accuracy"]
    assert main(words) == 2
    says = "expected one of eval_loss, eval_perplexity, eval_entropy, eval_mean_token_accuracy, got"
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("how", ["moved", "copied", "gone"])
def test_the_best_checkpoint_is_the_one_in_this_folder(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever the run lay before; here the highest loss, after the second step, is the best."""
    old, run = tmp_path / "old", tmp_path / "run"
    options = {"load_best_model_at_end": True, "greater_is_better": True}
    whole = make(old, metric_for_best_model="loss", **options)
    whole.train()
    best = Path(str(whole.state.best_model_checkpoint)).name
    assert best != "checkpoint-5"
    shutil.copytree(old, run)
    shutil.rmtree(run / "checkpoint-5")
    if how != "copied":
        shutil.rmtree(old)
    if how == "gone":
        shutil.rmtree(run / best)
        with pytest.raises(ValueError, match=f"^load_best_model_at_end: .*/run/{best}, which is g"):
            make(run, metric_for_best_model="loss", **options).train(resume_from_checkpoint=True)
        options["load_best_model_at_end"] = False
    resumed = make(run, metric_for_best_model="loss", **options)
    resumed.train(resume_from_checkpoint=True)
    assert "does not exist anymore" not in caplog.text
    if how != "gone":
        assert resumed.state.best_model_checkpoint == str(run / best)
        assert tiny.same(tiny.weights(resumed.model), tiny.weights(whole.model))
