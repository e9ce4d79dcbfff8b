"""What is watched, beside the same computed from all logits of the batches that were seen."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments

import sftmix.training.metrics
from sftmix.pairs.collator import PairedCollator
from sftmix.training.loss import BatchLoss, FusedHead
from sftmix.training.metrics import HALVES, MEASURED, LossWindow, micro_batch
from sftmix.training.scoring import MOST_PADDING, batches_by_length, most_tokens
from sftmix.training.trainer import SFTMixTrainer
from tests.sftmix import tiny
from tools import families

NAMES = ("ntp_loss", "entropy", "mean_token_accuracy")


class Weighted(PairedCollator):
    """Keeps the batches it makes; of every four examples one has no weight, and one weighs 2.5."""

    def __init__(self, *, weighted: bool) -> None:
        super().__init__(0)
        self.weighted, self.batches = weighted, list[dict[str, Any]]()

    def __call__(self, examples: Any) -> dict[str, Any]:
        batch = super().__call__(examples)
        if self.weighted:
            batch["weight"] = torch.tensor([1.0, 0.0, 2.5, 1.0])
        self.batches.append(batch)
        return batch


@torch.no_grad()
def dense(model: Any, batches: list[dict[str, Any]]) -> dict[str, float]:
    """Means over tokens with loss, in float64, of all of them and of each half."""
    tables = []
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs).logits.flatten(0, 1)[batch["rows"]].double()
        log_probs = logits.log_softmax(-1)
        nll = -log_probs.gather(-1, batch["targets"].unsqueeze(-1)).squeeze(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        right = (logits.argmax(-1) == batch["targets"]).double()
        weight = batch.get("weight", torch.ones(len(batch["ids"])))[batch["owner"]]
        table = torch.stack([nll, entropy, right, batch["owner"] % 2.0])
        tables.append(table[:, weight != 0])
    *numbers, unconfident = torch.cat(tables, 1)
    found = {}
    for half, of_half in zip(HALVES, (unconfident == 0, unconfident == 1), strict=True):
        for name, one in zip(NAMES, numbers, strict=True):
            found[name] = float(one.mean())
            found[f"{name}_{half}"] = float(one[of_half].mean())
    return {**found, "trained": float(unconfident.numel())}


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still, in a list of its one reading."""
    now = [1000.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(sftmix.training.metrics, "time", clock)
    return now


def watch(folder: Path, *, weighted: bool = False, **changes: Any) -> tuple[SFTMixTrainer, Any]:
    """Four steps of a model that does not learn, a log line after each second."""
    made = tiny.trainer(
        tiny.build("Llama"),
        folder,
        tiny.examples(16),
        learning_rate=0.0,
        logging_steps=2,
        **changes,
    )
    seen = Weighted(weighted=weighted)
    made.data_collator = seen
    made.train()
    lines = [line for line in made.state.log_history if "loss" in line]
    return made, list(zip(lines, (seen.batches[:2], seen.batches[2:]), strict=True))


@pytest.mark.parametrize("head", ["fused", "logits"])
@pytest.mark.parametrize("method", ["ntp", "sftmix", "ir_dro"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_log_line(head: str, method: str, weighted: bool, tmp_path: Path) -> None:
    if weighted and method == "ir_dro":
        pytest.skip("weights are of NTP")
    options = {"confident": tiny.halves(16), "head": head, "method": method}
    _, found = watch(tmp_path, weighted=weighted, **options)
    num_tokens = 0
    for line, batches in found:
        expected = dense(tiny.build("Llama"), batches)
        for name in (*NAMES[1:], *(f"{name}_{half}" for name in NAMES for half in HALVES)):
            assert line[name] == pytest.approx(expected[name], rel=1e-5), name
        num_tokens += sum(int(batch["attention_mask"].sum()) for batch in batches)
        assert line["num_tokens"] == num_tokens
        rates = line["trained_tokens_per_second"] / line["tokens_per_second"]
        of_window = sum(int(batch["attention_mask"].sum()) for batch in batches)
        assert rates == pytest.approx(expected["trained"] / of_window, rel=1e-9)


def test_without_a_partition_there_are_no_halves(tmp_path: Path) -> None:
    _, found = watch(tmp_path, method="ntp")
    for line, batches in found:
        expected = dense(tiny.build("Llama"), batches)
        for name in NAMES[1:]:
            assert line[name] == pytest.approx(expected[name], rel=1e-5), name
        assert not [name for name in line if name.endswith(HALVES)]


def test_mixup_alone_has_neither_and_trains_on_mixed_tokens(tmp_path: Path) -> None:
    _, found = watch(tmp_path, method="mixup")
    for line, batches in found:
        assert not [name for name in line if name.startswith(NAMES)]
        mixed = sum(2 * batch["pair_c"].numel() for batch in batches)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        rates = line["trained_tokens_per_second"] / line["tokens_per_second"]
        assert rates == pytest.approx(mixed / tokens, rel=1e-9)


def test_what_a_loss_does_not_find_is_not_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with vocabulary tiles; NTP and its halves are there all the same."""
    _, plain = watch(tmp_path, method="ntp", confident=tiny.halves(16))
    monkeypatch.setattr(FusedHead, "watches", False)
    _, found = watch(tmp_path, method="ntp", confident=tiny.halves(16))
    for (line, _), (expected, _) in zip(found, plain, strict=True):
        names = {name for name in expected if not name.startswith(NAMES[1:])}
        assert line.keys() == names
        for name in ("loss", "ntp_loss", "ntp_loss_confident", "ntp_loss_unconfident"):
            assert line[name] == pytest.approx(expected[name], rel=1e-6)


def batch_of(owner: list[int], **more: Any) -> dict[str, Tensor]:
    """What `micro_batch` reads of a batch."""
    return {"owner": torch.tensor(owner), "lengths": torch.tensor([3, 4]), **more}


def test_the_sums_of_a_micro_batch_by_hand() -> None:
    """Three tokens of c, of which the second is right, and two of u, whose weight is 0."""
    loss = BatchLoss(
        torch.tensor(9.0),
        torch.tensor(2.0),
        None,
        torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0]),
        entropy=torch.tensor([0.5, 0.25, 0.75, 0.0, 0.0]),
        is_top=torch.tensor([False, True, False, False, False]),
    )
    inputs = batch_of([0, 0, 0, 1, 1], weight=torch.tensor([0.5, 0.0]))
    window = LossWindow(torch.device("cpu"))
    window.add(micro_batch(inputs, loss, paired=True))
    line = window.report(window.sums, 1, paired=True, mixed=False)
    assert (line["ntp_loss"], line["ntp_loss_confident"]) == (2.0, 2.0)
    assert line["entropy"] == line["entropy_confident"] == 0.5
    assert line["mean_token_accuracy"] == line["mean_token_accuracy_confident"] == 1 / 3
    assert line["num_tokens"] == 7
    # Of nothing there is no mean.
    assert not [name for name in line if name.endswith("_unconfident")]


def test_a_checkpoint_of_an_earlier_version(tmp_path: Path, seconds: list[float]) -> None:
    """It ends with the input tokens: what it lacks is of the tokens that follow."""
    sums = [4.0, 4.0, 0.0, 0.0, 12.0, 8.0, 6.0, 2.0, 0.0, 0.0, 100.0]
    state = {"first_step": 2, "sums": sums, "window_seconds": 5.0, "seconds": 9.0}
    (tmp_path / LossWindow.FILE).write_text(json.dumps(state))
    window = LossWindow(torch.device("cpu"))
    window.load(tmp_path)
    loss = BatchLoss(
        torch.tensor(2.0),
        torch.tensor(2.0),
        None,
        torch.tensor([3.0, 1.0]),
        entropy=torch.tensor([0.5, 0.25]),
        is_top=torch.tensor([True, False]),
    )
    window.add(micro_batch(batch_of([0, 1]), loss, paired=True))
    seconds[0] += 5
    line = window.report(window.sums, 4, paired=True, mixed=False)
    assert line == {
        "loss": 3.0,
        "ntp_loss": 3.0,
        "ntp_loss_confident": 15 / 7,
        "ntp_loss_unconfident": 3.0,
        "entropy": 0.375,
        "entropy_confident": 0.5,
        "entropy_unconfident": 0.25,
        "mean_token_accuracy": 0.5,
        "mean_token_accuracy_confident": 1.0,
        "mean_token_accuracy_unconfident": 0.0,
        "num_tokens": 107,
        "tokens_per_second": 10.7,
        "trained_tokens_per_second": 1.0,
        "peak_memory_gib": line["peak_memory_gib"],
    }


def test_a_resumed_run_logs_the_same(tmp_path: Path) -> None:
    """From a checkpoint in the middle of a window, tokens of the whole run among them."""

    def lines(made: SFTMixTrainer) -> list[dict[str, Any]]:
        history = [line for line in made.state.log_history if "loss" in line]
        return [{k: v for k, v in line.items() if k not in MEASURED} for line in history]

    def make(steps: int) -> SFTMixTrainer:
        options = {"logging_steps": 2, "save_strategy": "steps", "save_steps": 3}
        data = tiny.examples(24)
        return tiny.trainer(tiny.build("Llama"), tmp_path, data, max_steps=steps, **options)

    whole = make(6)
    whole.train()
    resumed = make(6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert lines(resumed) == lines(whole)
    assert lines(whole)[-1]["num_tokens"] == sum(map(len, tiny.examples(24)["input_ids"]))


@pytest.mark.parametrize("head", ["fused", "logits"])
def test_an_evaluation(head: str, tmp_path: Path) -> None:
    """Every token counts, whatever the batches; the loss is that of a scoring to its rounding."""
    held_out, model = tiny.examples(9, seed=5), tiny.build("Llama")
    made = tiny.trainer(model, tmp_path, tiny.examples(8), eval_dataset=held_out, head=head)
    found = made.evaluate()
    expected = dense(model, [PairedCollator(0)(list(held_out))])
    assert found["eval_loss"] == pytest.approx(expected["ntp_loss"], rel=1e-5)
    assert found["eval_entropy"] == pytest.approx(expected["entropy"], rel=1e-5)
    accuracy = pytest.approx(expected["mean_token_accuracy"], rel=1e-12)
    assert found["eval_mean_token_accuracy"] == accuracy
    assert found["eval_num_tokens"] == expected["trained"]
    rate = found["eval_samples_per_second"] * found["eval_runtime"]
    assert rate == pytest.approx(9, rel=0.1)
    lengths = [len(ids) for ids in held_out["input_ids"]]
    batches = batches_by_length(lengths, most_tokens(made.args.device), padding=MOST_PADDING)
    steps = found["eval_steps_per_second"] / found["eval_samples_per_second"]
    assert steps == pytest.approx(len(batches) / 9, rel=0.01)


def test_the_page_has_exactly_what_is_logged(tmp_path: Path) -> None:
    """By a method with every term, of a model with every loss, that is evaluated."""
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
    table = page.split("## What is logged")[1].split("\n\n")[2]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    told = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    made = tiny.trainer(
        families.build("mixtral"),
        tmp_path,
        tiny.examples(8),
        eval_dataset=tiny.examples(4),
        eval_strategy="epoch",
    )
    made.train()
    logged = {name for line in made.state.log_history for name in line}
    assert sorted(told) == sorted(logged - {"step"})


class Plain(PairedCollator):
    """Gives what any other trainer reads."""

    def __call__(self, examples: Any) -> dict[str, Any]:
        batch = super().__call__(examples)
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


def test_the_ntp_loss_is_what_transformers_logs_as_loss(tmp_path: Path) -> None:
    """Of two steps that have all the data, each in two micro-batches."""
    options: dict[str, Any] = {
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "learning_rate": 0.0,
        "eval_strategy": "epoch",
    }
    data, held_out = tiny.examples(8), tiny.examples(6, seed=5)
    ours = tiny.trainer(tiny.build("Llama"), tmp_path, data, eval_dataset=held_out, **options)
    theirs = Trainer(
        tiny.build("Llama"),
        TrainingArguments(
            str(tmp_path / "theirs"),
            **options,
            per_device_train_batch_size=4,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            report_to="none",
        ),
        train_dataset=data,
        eval_dataset=held_out,
        data_collator=Plain(0),
    )
    theirs.remove_callback(PrinterCallback)
    ours.train()
    theirs.train()
    found = [ntp for ntp, loss in tiny.losses(ours, "ntp_loss", "loss") if loss > ntp]
    lines = [line for line in theirs.state.log_history if "loss" in line]
    assert found == pytest.approx([line["loss"] for line in lines], rel=1e-5)
    evaluated = [line for line in theirs.state.log_history if "eval_loss" in line][-1]
    assert evaluated.keys() <= set().union(*ours.state.log_history)


def test_an_evaluation_of_several_sets(tmp_path: Path) -> None:
    sets = {"near": tiny.examples(3, seed=1), "far": tiny.examples(4, seed=2)}
    made = tiny.trainer(tiny.build("Llama"), tmp_path, tiny.examples(8), eval_dataset=sets)
    found = made.evaluate()
    for name, part in sets.items():
        alone = made.evaluate(part)
        for figure in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
            assert found[f"eval_{name}_{figure}"] == alone[f"eval_{figure}"]
