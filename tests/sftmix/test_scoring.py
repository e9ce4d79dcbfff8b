"""Scoring measures what the model says, and leaves the training as it would have been."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sftmix.cli import main
from sftmix.head import HeadAdapter
from sftmix.pairing import PairedCollator
from sftmix.partition import match, read_partition
from sftmix.scoring import ScoringCallback, batches_by_length, score_examples, scoring_steps
from sftmix_kernels import StreamingPerplexity

from . import tiny

FAMILIES = ("Llama", "Gemma2", "Cohere", "Phi", "GPT2")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_tokens", [1, 40, 8192])
def test_sums_are_the_models_own_losses(family: str, max_tokens: int) -> None:
    model, data = tiny.build(family), tiny.examples(9)
    own = []
    with torch.no_grad():
        for example in data:
            inputs = {k: torch.tensor([example[k]]) for k in ("input_ids", "labels")}
            count = sum(label != -100 for label in example["labels"][1:])
            own.append((float(model(**inputs).loss) * count, count))
    scores = score_examples(
        model,
        HeadAdapter(model),
        data,
        collator=PairedCollator(0),
        max_tokens=max_tokens,
        disable_progress=True,
    )
    assert scores.num_tokens.tolist() == [count for _, count in own]
    assert scores.nll_sum.shape == (9, 1)
    expected = torch.tensor([total for total, _ in own], dtype=torch.float64)
    assert ((scores.nll_sum[:, 0] - expected).abs() <= 1e-5 * expected).all()


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_batches_hold_every_row_once_and_fit(lengths: list[int], max_tokens: int) -> None:
    batches = batches_by_length(lengths, max_tokens)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[r] for r in batch) <= max_tokens
    order = [lengths[row] for batch in batches for row in batch]
    assert order == sorted(order, reverse=True)
    # No batch could have taken the next one's first row as well.
    for batch in batches[:-1]:
        assert (len(batch) + 1) * lengths[batch[0]] > max_tokens


def test_steps_are_even_and_end_at_the_end() -> None:
    for max_steps in range(1, 60):
        for number in range(1, max_steps + 1):
            steps = scoring_steps(max_steps, number)
            assert len(set(steps)) == number
            assert steps == sorted(steps)
            assert steps[-1] == max_steps
            for c, step in enumerate(steps, start=1):
                assert abs(step - max_steps * c / number) <= 0.5
    assert scoring_steps(100, 5) == [20, 40, 60, 80, 100]


@pytest.mark.parametrize(("max_steps", "number"), [(4, 5), (4, 0), (4, -1)])
def test_wrong_numbers_of_scorings_are_refused(max_steps: int, number: int) -> None:
    with pytest.raises(ValueError, match=f"expected 1 to {max_steps} .*, got {number}"):
        scoring_steps(max_steps, number)


@pytest.mark.parametrize("training", [False, True])
def test_scoring_leaves_mode_random_state_and_gradients(training: bool) -> None:
    model = tiny.build("GPT2", resid_pdrop=0.5, embd_pdrop=0.5).train(training)
    adapter, data = HeadAdapter(model), tiny.examples(6)
    before, state = tiny.weights(model), torch.random.get_rng_state()
    scored = [
        score_examples(model, adapter, data, collator=PairedCollator(0), disable_progress=True)
        for _ in range(2)
    ]
    assert torch.equal(scored[0].nll_sum, scored[1].nll_sum)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert tiny.same(tiny.weights(model), before)
    assert all(module.training == training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_nothing_to_score_is_refused() -> None:
    model = tiny.build("Llama")
    with pytest.raises(ValueError, match="at least one, got none"):
        score_examples(model, HeadAdapter(model), [], collator=PairedCollator(0))


@pytest.mark.parametrize("scorings", [1, 4])
def test_training_is_bitwise_the_same_with_scoring(scorings: int, tmp_path: Path) -> None:
    found = []
    for scored in (False, True):
        model, data = tiny.build("GPT2", resid_pdrop=0.2, embd_pdrop=0.2), tiny.examples(16)
        made = tiny.trainer(model, tmp_path, data, method="ntp")
        batches = len(made.get_train_dataloader())
        score = functools.partial(
            score_examples,
            model,
            made.head,
            data,
            collator=PairedCollator(0),
            disable_progress=True,
        )
        callback = ScoringCallback(
            StreamingPerplexity(16, "cpu"), scoring_steps(batches, scorings), score
        )
        if scored:
            made.add_callback(callback)
        made.train()
        found.append((tiny.losses(made, "loss", "grad_norm"), tiny.weights(model)))
    assert callback.perplexity.nll_sum.shape == (16, scorings)
    assert found[0][0] == found[1][0]
    assert tiny.same(found[0][1], found[1][1])


# Through the command line


def score(model: Path, data: Path, run: Path, *flags: str) -> None:
    words = ["--model", str(model), "--data", str(data), "--output", str(run), *flags]
    words += ["--disable_tqdm", "true", "--use_cpu", "true", "--learning_rate", "0.01"]
    assert main(["--traceback", "score", *words]) == 0


def test_the_files_of_a_scored_run(
    toy_model: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score(toy_model, toy_data, tmp_path / "run", "--num_scorings", "3", "--seed", "4")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        ".lock",
        "confidence.parquet",
        "manifest.json",
    ]
    rows = [json.loads(line) for line in toy_data.read_text().splitlines()]
    partition = read_partition(tmp_path / "run" / "confidence.parquet")
    assert partition.id.tolist() == list(range(len(rows)))
    assert partition.nll_sum.shape == (len(rows), 3)
    assert np.isfinite(partition.confidence).all()
    # The model learns: later scorings are better than the first.
    assert partition.nll_sum[:, 2].sum() < partition.nll_sum[:, 0].sum()
    confident = match(partition, partition.id, partition.content_hash)
    assert confident.sum() == (len(rows) + 1) // 2
    assert partition.confidence[confident].min() >= partition.confidence[~confident].max()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    expected = {
        "model": str(toy_model),
        "data": [str(toy_data)],
        "num_examples": len(rows),
        "method": "ntp",
        "num_scorings": 3,
        "num_train_epochs": 1.0,
        "seed": 4,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 4,
        "dtype": "float32",
    }
    assert {name: manifest[name] for name in expected} == expected
    assert {"sftmix", "python", "torch", "transformers"} <= manifest["versions"].keys()
    assert len(manifest["data_hash"]) == len(manifest["template_hash"]) == 64
    printed = capsys.readouterr().out
    assert "confident" in printed
    assert "wrote" in printed


def test_a_scored_run_can_be_resumed(
    toy_model: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--num_scorings", "4", "--save_strategy", "steps", "--save_steps", "2"]
    score(toy_model, toy_data, tmp_path / "whole", *flags)

    class Stop(BaseException):
        """Not an exception that anything here may catch."""

    own, seen = ScoringCallback.on_step_end, []

    def stopping(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seen.append(state.global_step)
        if state.global_step == 5:
            raise Stop
        own(self, args, state, control, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(ScoringCallback, "on_step_end", stopping)
        with pytest.raises(Stop):
            score(toy_model, toy_data, tmp_path / "broken", *flags)
    assert seen == [1, 2, 3, 4, 5]
    assert not (tmp_path / "broken" / "confidence.parquet").exists()
    score(toy_model, toy_data, tmp_path / "broken", *flags, "--resume")
    parquet = [(tmp_path / n / "confidence.parquet").read_bytes() for n in ("whole", "broken")]
    assert parquet[0] == parquet[1]
    # Once more, from the last checkpoint, where nothing is left to do.
    score(toy_model, toy_data, tmp_path / "broken", *flags, "--resume")
    assert (tmp_path / "broken" / "confidence.parquet").read_bytes() == parquet[0]
