"""SFTMix over `trl.SFTTrainer`: data, masks, losses and scripts compared with TRL's own."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import SFTConfig, SFTTrainer

from sftmix.cli import main
from sftmix.data.examples import load_examples
from sftmix.integrations.trl import SFTMixSFTConfig, SFTMixSFTTrainer, score
from sftmix.pairs.partition import Partition, from_scores, split, write_partition
from tests.sftmix import tiny

# TRL's own defaults use a name that transformers gives up.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")

MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '### Response:\n' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ '### Instruction:\n' + message['content'] + '\n' }}{% endif %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL tells its makers of every trainer, except in CI."""
    monkeypatch.setenv("CI", "1")


@pytest.fixture(scope="module")
def questions(toy_data: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in toy_data.read_text().splitlines()][:16]


@pytest.fixture(scope="module")
def pairs(questions: list[dict[str, str]]) -> datasets.Dataset:
    """Prompts and completions, with a column that is nobody's business."""
    return datasets.Dataset.from_list(
        [{"id": "x", "prompt": r["question"], "completion": " " + r["answer"]} for r in questions]
    )


@pytest.fixture(scope="module")
def chats(questions: list[dict[str, str]]) -> datasets.Dataset:
    """Conversations of two turns."""
    rows = zip(questions, questions[1:] + questions[:1], strict=True)
    return datasets.Dataset.from_list([{"messages": turn(a) + turn(b)} for a, b in rows])


def turn(row: dict[str, str]) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": row["answer"]},
    ]


def options(output: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a short, quiet run in float32 on the CPU."""
    return {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        **changes,
    }


def ours(
    model: Any, output: Path, data: Any, given: dict[str, Any] | None = None, **changes: Any
) -> SFTMixSFTTrainer:
    """Our trainer, paired by `tiny.halves` unless it is said otherwise."""
    given = given or {}
    if "confident" not in given:
        given["confident"] = tiny.halves(len(data))
    model = str(model) if isinstance(model, Path) else model
    made = SFTMixSFTTrainer(
        model, SFTMixSFTConfig(**options(output, **changes)), train_dataset=data, **given
    )
    made.remove_callback(PrinterCallback)
    return made


def marked_tokenizer(toy_model: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    tokenizer.chat_template = MARKED
    return tokenizer


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("pairs", {}),
    "whole sequence": ("pairs", {"completion_only_loss": False}),
    "text": (
        "text",
        {"pad_to_multiple_of": 16, "shuffle_dataset": True, "completion_only_loss": False},
    ),
    "assistant": ("chats", {"assistant_only_loss": True}),
    "conversation": ("chats", {"max_length": 60, "assistant_only_loss": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_labels_loss_gradients_and_metrics_are_those_of_trl(
    case: str,
    toy_model: Path,
    pairs: datasets.Dataset,
    chats: datasets.Dataset,
    questions: list[dict[str, str]],
    tmp_path: Path,
) -> None:
    kind, changes = CASES[case]
    text = datasets.Dataset.from_list([{"text": row["question"]} for row in questions])
    data = {"pairs": pairs, "chats": chats, "text": text}[kind]
    tokenizer = marked_tokenizer(toy_model)
    mine = ours(toy_model, tmp_path, data, {"processing_class": tokenizer}, method="ntp", **changes)
    theirs = SFTTrainer(
        str(toy_model),
        SFTConfig(**options(tmp_path, **changes)),
        train_dataset=data,
        processing_class=tokenizer,
    )
    examples = mine.train_dataset.examples
    for begin in range(0, len(data), 4):
        rows = range(begin, begin + 4)
        found = mine.data_collator([examples[row] for row in rows])
        expected = theirs.data_collator([theirs.train_dataset[row] for row in rows])
        for name in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(found[name], expected[name]), (name, begin)
    batch = next(iter(mine.get_train_dataloader()))
    loss = mine.compute_loss(mine.model, batch)
    loss.backward()
    own = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    theirs.model.train()  # or it would count no tokens
    reference = theirs.compute_loss(theirs.model, own)
    reference.backward()
    line = mine.window.report(mine.window.sums, 1, paired=True, mixed=False)
    for name in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert line[name] == pytest.approx(theirs._metrics["train"][name][0], rel=1e-6), name
    # Two float32 sums of about 100 tokens, in another order.
    assert tiny.relative_difference(loss, reference) < 1e-6
    tiny.assert_same_training(mine.model, theirs.model, own)


def test_the_commands_dft_is_that_of_trl(toy_model: Path, tmp_path: Path) -> None:
    """`sftmix train --method dft` and ``loss_type="dft"``: the loss and all gradients of a step.

    The gradients are what plain SGD has taken from the weights, times 1,000.
    """
    data = tiny.examples(8).select_columns(["input_ids", "labels"])
    data.to_json(tmp_path / "tokens.jsonl")
    step = {
        **{"use_cpu": True, "disable_tqdm": True, "max_steps": 1, "logging_steps": 1, "seed": 3},
        **{"per_device_train_batch_size": 8, "optim": "sgd", "learning_rate": 1e3},
        **{"lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0},
        **{"save_strategy": "no", "report_to": "none", "max_grad_norm": 1e9},
    }
    run = tmp_path / "run"
    words = ["train", "--model", toy_model, "--data", tmp_path / "tokens.jsonl", "--output", run]
    words += [word for name, value in step.items() for word in (f"--{name}", value)]
    assert main([*map(str, words), "--method", "dft"]) == 0
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    found = next(line for line in log if "loss" in line)
    config = SFTConfig(str(tmp_path / "trl"), bf16=False, loss_type="dft", **step)
    theirs = SFTTrainer(str(toy_model), config, train_dataset=data)
    before = tiny.weights(theirs.model)
    theirs.train()
    (expected,) = (line for line in theirs.state.log_history if "loss" in line)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    mine = tiny.weights(AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32))
    moved = [
        torch.cat([(after[name] - weight).flatten() for name, weight in before.items()])
        for after in (mine, tiny.weights(theirs.model))
    ]
    assert moved[1].abs().max() > 1e-3
    assert tiny.relative_difference(*moved) < 1e-5


def test_it_trains_as_the_plain_trainer_on_the_same_tokens(
    toy_model: Path, chats: datasets.Dataset, tmp_path: Path
) -> None:
    tokenizer = marked_tokenizer(toy_model)
    changes = {"assistant_only_loss": True, "gradient_accumulation_steps": 2}
    given = {"processing_class": tokenizer}
    over_trl = ours(toy_model, tmp_path / "trl", chats, given, **changes)
    model = AutoModelForCausalLM.from_pretrained(toy_model, dtype=torch.float32)
    plain = tiny.trainer(
        model,
        tmp_path / "plain",
        over_trl.train_dataset.examples,
        gradient_accumulation_steps=2,
        lr_scheduler_type="linear",
        warmup_steps=0,
        weight_decay=0.0,
        gradient_checkpointing=True,
        seed=over_trl.args.seed,
    )
    over_trl.train()
    plain.train()
    names = ("loss", "ntp_loss", "mixup_loss", "grad_norm")
    assert tiny.losses(over_trl, *names) == tiny.losses(plain, *names)
    assert len(tiny.losses(plain, *names)) == 2
    assert tiny.same(tiny.weights(over_trl.model), tiny.weights(plain.model))


@pytest.mark.parametrize("layout", ["padding_free", "packed"])
def test_a_layout_changes_no_loss(
    layout: str, toy_model: Path, pairs: datasets.Dataset, tmp_path: Path
) -> None:
    losses = []
    length = 256 if layout == "packed" else None
    for changes in ({}, {"layout": layout, "pad_to_multiple_of": 4, "row_length": length}):
        trainer = ours(toy_model, tmp_path, pairs, **changes)
        batch = next(iter(trainer.get_train_dataloader()))
        losses.append(trainer.compute_loss(trainer.model, batch))
    assert batch["input_ids"].shape[0] < 4
    assert batch["input_ids"].shape[1] % 4 == 0
    assert tiny.relative_difference(losses[1], losses[0]) < 1e-6


PLAIN_SCRIPT = """
import sys
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

model, output = sys.argv[1:]
colours = ["red", "blue", "green", "black"]
dataset = Dataset.from_list(
    [
        {"prompt": [{"role": "user", "content": f"Say {colour} {n} times."}],
         "completion": [{"role": "assistant", "content": " ".join([colour] * n)}]}
        for colour in colours for n in (1, 2, 3)
    ]
)
args = SFTConfig(output, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True,
                 report_to="none", num_train_epochs=2, save_steps=3, logging_steps=3)
trainer = SFTTrainer(model, args, train_dataset=dataset, eval_dataset=dataset)
trainer.train(resume_from_checkpoint=RESUME)
print("evaluated", trainer.evaluate()["eval_loss"])
trainer.save_model()
"""
TWO_LINES = {
    "from trl import SFTConfig, SFTTrainer": (
        "from sftmix.integrations.trl import SFTMixSFTConfig as SFTConfig, "
        "SFTMixSFTTrainer as SFTTrainer, score"
    ),
    "trainer = SFTTrainer(model, args, train_dataset=dataset, eval_dataset=dataset)": (
        "trainer = SFTTrainer(model, args, train_dataset=dataset, eval_dataset=dataset,\n"
        "    confident=score(model, args, train_dataset=dataset, num_scorings=2))"
    ),
}


def test_a_script_with_two_lines_changed_trains_resumes_and_saves(
    toy_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = PLAIN_SCRIPT
    for line, replacement in TWO_LINES.items():
        assert changed.count(line) == 1
        changed = changed.replace(line, replacement)

    def run(script: str, output: str, resume: str | None = None) -> str:
        path = tmp_path / "script.py"
        path.write_text(script.replace("RESUME", repr(resume)))
        monkeypatch.setattr(sys, "argv", [str(path), str(toy_model), str(tmp_path / output)])
        runpy.run_path(str(path))
        return capsys.readouterr().out.split("evaluated ")[1]

    plain, mixed = run(PLAIN_SCRIPT, "trl"), run(changed, "sftmix")
    assert plain != mixed
    assert run(changed, "sftmix", str(tmp_path / "sftmix" / "checkpoint-3")) == mixed
    AutoModelForCausalLM.from_pretrained(tmp_path / "sftmix")
    card = (tmp_path / "sftmix" / "README.md").read_text()
    assert "SFTMix" in card
    assert "2410.05248" in card
    history = json.loads((tmp_path / "sftmix" / "checkpoint-6" / "trainer_state.json").read_text())
    assert "mixup_loss" in history["log_history"][0]


@pytest.fixture(scope="module")
def partition(
    toy_model: Path, pairs: datasets.Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Partition:
    config = SFTMixSFTConfig(**options(tmp_path_factory.mktemp("score")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "1")
        return score(str(toy_model), config, train_dataset=pairs, num_scorings=3)


def test_scores_are_those_of_the_reference_epoch(
    partition: Partition, toy_model: Path, pairs: datasets.Dataset, tmp_path: Path
) -> None:
    trainer = ours(toy_model, tmp_path, pairs, {"confident": None}, method="ntp")
    trainer.train()
    order = np.argsort(partition.id)
    assert partition.nll_sum.shape == (len(pairs), 3)
    for row in (0, 7):
        batch = trainer.data_collator([trainer.train_dataset[row]])
        labels = batch["labels"]
        with torch.no_grad():
            loss = trainer.model(input_ids=batch["input_ids"], labels=labels).loss
        tokens = int((labels[:, 1:] != -100).sum())
        assert partition.num_tokens[order[row]] == tokens
        last = partition.nll_sum[order[row], -1] / tokens
        assert tiny.relative_difference(torch.tensor(last), loss) < 1e-6


def test_a_model_given_to_score_is_left_alone(
    toy_model: Path, partition: Partition, pairs: datasets.Dataset, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(toy_model, dtype=torch.float32)
    before = tiny.weights(model)
    config = SFTMixSFTConfig(**options(tmp_path))
    again = score(model, config, train_dataset=pairs, num_scorings=3)
    assert tiny.same(tiny.weights(model), before)
    assert "forward" not in model.__dict__
    order = np.argsort(partition.id)
    assert np.array_equal(again.nll_sum, partition.nll_sum[order])


@pytest.mark.parametrize("shuffled", [False, True])
def test_halves_stay_with_their_rows(
    shuffled: bool, toy_model: Path, partition: Partition, pairs: datasets.Dataset, tmp_path: Path
) -> None:
    write_partition(tmp_path / "confidence.parquet", partition)
    rows = set(partition.id[partition.subset == "confident"].tolist())
    for confident in (partition, tmp_path / "confidence.parquet"):
        trainer = ours(
            toy_model, tmp_path, pairs, {"confident": confident}, shuffle_dataset=shuffled
        )
        ids = np.asarray(trainer.train_dataset.examples["id"][:])
        assert set(ids[trainer.confident_rows].tolist()) == rows
        assert (ids.tolist() != sorted(ids)) == shuffled


@pytest.mark.parametrize("shuffled", [False, True])
def test_weights_stay_with_their_rows(
    shuffled: bool, toy_model: Path, partition: Partition, pairs: datasets.Dataset, tmp_path: Path
) -> None:
    weights = [0.0, 0.5, 2.0, 1.0] * 4
    data = pairs.add_column("weight", weights)
    changes = {"shuffle_dataset": shuffled, "eval_strategy": "no"}
    given = {"confident": partition, "eval_dataset": data}  # a weight is no content
    trainer = ours(toy_model, tmp_path, data, given, **changes)
    found = trainer.train_dataset.examples
    assert found["weight"][:] == [weights[row] for row in found["id"]]
    assert "weight" not in trainer.eval_dataset.column_names
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["weight"].tolist() == [weights[row] for row in batch["ids"]]


def test_scores_have_no_weights(toy_model: Path, pairs: datasets.Dataset, tmp_path: Path) -> None:
    found = [
        score(
            str(toy_model), SFTMixSFTConfig(**options(tmp_path)), train_dataset=data, num_scorings=1
        )
        for data in (pairs, pairs.add_column("weight", [0.0, 9.0] * 8))
    ]
    assert found[0].confidence.tolist() == found[1].confidence.tolist()
    assert found[0].content_hash.tolist() == found[1].content_hash.tolist()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0] * 15 + [-1.0], r"^train_dataset: row 15: expected weight to be a .*, got -1.0"),
        (["1"] * 16, r"^train_dataset: row 0: expected weight to be a .*, got '1'"),
        ([0.0] * 16, r"^weight: expected a weight above 0, got 0 for all 16 examples"),
    ],
)
def test_weights_that_are_refused(
    weights: list[Any], message: str, toy_model: Path, pairs: datasets.Dataset, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        ours(toy_model, tmp_path, pairs.add_column("weight", weights))


def test_levels_stay_with_their_rows(
    toy_model: Path, partition: Partition, pairs: datasets.Dataset, tmp_path: Path
) -> None:
    by_levels = split(partition, "quantiles:4")
    trainer = ours(
        toy_model, tmp_path, pairs, {"confident": by_levels}, pairing="neighbours", method="equal"
    )
    ids = np.asarray(trainer.train_dataset.examples["id"][:])
    sides = [side for pool in trainer.pools for side in (pool.confident, pool.unconfident)]
    for number, rows in enumerate(sides, start=1):
        of_level = by_levels.id[by_levels.subset == f"level {number}"]
        assert sorted(ids[rows].tolist()) == sorted(of_level.tolist())


def test_a_partition_of_the_command_line_fits_the_same_rows(
    toy_model: Path, pairs: datasets.Dataset, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    pairs.remove_columns("id").to_json(file)
    examples = load_examples([file])
    hashes = [example.content_hash for example in examples]
    nll = np.arange(len(hashes), dtype=float)[:, None]
    scored = from_scores(range(len(hashes)), hashes, np.ones(len(hashes), dtype=int), nll)
    trainer = ours(toy_model, tmp_path, pairs, {"confident": scored})
    assert trainer.confident_rows.tolist() == list(range(8))
    changed = pairs.map(
        lambda row, i: {"completion": row["completion"] + "!" * (i == 3)}, with_indices=True
    )
    with pytest.raises(ValueError, match=r"^confident: the data changed after scoring: example 3"):
        ours(toy_model, tmp_path, changed, {"confident": scored})


def test_peft_trains_the_adapter_alone(
    toy_model: Path, pairs: datasets.Dataset, tmp_path: Path
) -> None:
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    partition = score(
        str(toy_model),
        SFTMixSFTConfig(**options(tmp_path, shuffle_dataset=True)),
        train_dataset=pairs,
        num_scorings=1,
        peft_config=adapter,
    )
    given = {"confident": partition, "peft_config": adapter, "eval_dataset": pairs}
    trainer = ours(toy_model, tmp_path / "run", pairs, given)
    before = tiny.weights(trainer.model)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    changed = {n for n, w in tiny.weights(trainer.model).items() if not torch.equal(w, before[n])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert trainer.evaluate()["eval_loss"] < first
    trainer.save_model()
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_evaluation_takes_raw_data_and_dicts(
    toy_model: Path, pairs: datasets.Dataset, tmp_path: Path
) -> None:
    held_out = {"train": pairs.select(range(4)), "short": pairs.select([5])}
    trainer = ours(toy_model, tmp_path, pairs, {"eval_dataset": held_out})
    metrics, again = trainer.evaluate(), trainer.evaluate(held_out)
    assert trainer.evaluate(pairs.select([5]))["eval_loss"] == metrics["eval_short_loss"]
    clocks = ("epoch", "_runtime", "_per_second")
    same = {name: value for name, value in metrics.items() if not name.endswith(clocks)}
    assert same.items() <= again.items()
    theirs = SFTTrainer(
        str(toy_model), SFTConfig(**options(tmp_path)), train_dataset=pairs, eval_dataset=held_out
    )
    expected = theirs.evaluate()
    # TRL takes the mean of batches; here all rows are one batch.
    assert metrics["eval_train_loss"] == pytest.approx(expected["eval_train_loss"], rel=1e-6)
    # TRL logs these without the data set's name, and does not return them.
    logged = next(line for line in theirs.state.log_history if "eval_train_loss" in line)
    for name in ("entropy", "mean_token_accuracy"):
        assert metrics[f"eval_train_{name}"] == pytest.approx(logged[f"eval_{name}"], rel=1e-6)
    with pytest.raises(NotImplementedError, match="predict"):
        trainer.predict(pairs)


def test_arguments_that_do_not_fit_are_refused(
    toy_model: Path, pairs: datasets.Dataset, chats: datasets.Dataset, tmp_path: Path
) -> None:
    def refused(kind: type[Exception], words: str, data: Any = pairs, **changes: Any) -> None:
        given = changes.pop("given", {})
        with pytest.raises(kind, match=words):
            ours(toy_model, tmp_path, data, given, **changes)

    refused(ValueError, "^confident: method='sftmix' needs", given={"confident": None})
    refused(
        ValueError, "^confident: expected one value for each of 16", given={"confident": [True]}
    )
    refused(
        ValueError, "^confident: expected a boolean .* got 'no'", given={"confident": ["no"] * 16}
    )
    with pytest.raises(ValueError, match=r"^confident: .*missing.parquet: cannot be read"):
        ours(toy_model, tmp_path, pairs, {"confident": tmp_path / "missing.parquet"})
    refused(ValueError, "^data_collator: not", given={"data_collator": lambda rows: rows})
    refused(ValueError, "^compute_metrics: not", given={"compute_metrics": len})
    refused(
        TypeError,
        r"^train_dataset: expected a datasets.Dataset.* got IterableDataset; .*stream.take\(n\)",
        pairs.to_iterable_dataset(),
        given={"confident": None},
    )
    refused(
        TypeError, "^eval_dataset: expected", given={"eval_dataset": pairs.to_iterable_dataset()}
    )
    refused(ValueError, "of 16 rows have no token to learn within max_length=9", max_length=9)
    refused(ValueError, "not training-compatible", chats, assistant_only_loss=True)
    for name in ("compute_loss_func", "preprocess_logits_for_metrics"):
        refused(ValueError, f"^{name}: not supported here: ", given={name: len})
    with pytest.raises(TypeError, match=r"^args: expected an SFTMixSFTConfig, got SFTConfig"):
        SFTMixSFTTrainer(str(toy_model), SFTConfig(**options(tmp_path)), train_dataset=pairs)
    with pytest.raises(TypeError, match=r"^args: expected an SFTMixSFTConfig, got SFTConfig"):
        score(str(toy_model), SFTConfig(**options(tmp_path)), train_dataset=pairs)
    stream = pairs.to_iterable_dataset()
    with pytest.raises(
        TypeError, match=r"^train_dataset: expected a datasets\.Dataset, .*stream.take"
    ):
        score(str(toy_model), SFTMixSFTConfig(**options(tmp_path)), train_dataset=stream)
