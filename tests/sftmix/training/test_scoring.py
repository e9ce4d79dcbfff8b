"""Scoring measures what the model says, and leaves the training as it would have been."""

from __future__ import annotations

import functools
import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sftmix.training.scoring
from sftmix.cli import main
from sftmix.model.head import HeadAdapter
from sftmix.pairs.collator import PairedCollator
from sftmix.pairs.partition import read_partition
from sftmix.training.scoring import (
    ScoringCallback,
    batches_by_length,
    score_examples,
    scoring_autocast,
    scoring_steps,
)
from sftmix_kernels import StreamingPerplexity
from tests.sftmix import tiny

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


@given(
    st.lists(st.integers(1, 50), max_size=40),
    st.integers(1, 200),
    st.sampled_from([0.0, 0.12, 0.5]),
)
def test_batches_hold_every_row_once_and_fit(
    lengths: list[int], max_tokens: int, padding: float
) -> None:
    def fits(batch: list[int]) -> bool:
        slots = len(batch) * lengths[batch[0]]
        empty = slots - sum(lengths[row] for row in batch)
        return len(batch) == 1 or (slots <= max_tokens and empty <= padding * slots)

    batches = batches_by_length(lengths, max_tokens, padding=padding)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(map(fits, batches))
    order = [(-lengths[row], row) for batch in batches for row in batch]
    assert order == sorted(order)
    # No batch could have taken the next one's first row as well.
    assert not any(fits([*batch, other[0]]) for batch, other in itertools.pairwise(batches))
    # What is left after some batches makes the same batches: a resumed scoring adds up alike.
    done = len(batches) // 2
    left = [row for batch in batches[done:] for row in batch]
    assert batches_by_length(lengths, max_tokens, left[::-1], padding=padding) == batches[done:]


def reading_padding(model: Any) -> None:
    """Let each token know how many of its row are padding."""
    model.get_input_embeddings().register_forward_hook(
        lambda _, args, output: output * (1 + (args[0] == 0).float().mean())
    )


@pytest.mark.parametrize("max_tokens", [1, 40, 8192])
@pytest.mark.parametrize("exact", [True, False])
def test_padding_reaches_only_a_model_that_does_not_read_it(exact: bool, max_tokens: int) -> None:
    model, data = tiny.build("Llama"), tiny.examples(30)
    if not exact:
        reading_padding(model)
    adapter, seen = HeadAdapter(model), []

    def spy(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        assert not args
        assert kwargs.get("attention_mask") is None
        seen.append(kwargs["input_ids"])

    score = functools.partial(
        score_examples, model, adapter, data, collator=PairedCollator(0), disable_progress=True
    )
    alone = score(max_tokens=1)
    hook = model.model.register_forward_pre_hook(spy, with_kwargs=True)
    scores = score(max_tokens=max_tokens)
    hook.remove()
    # An example is the same beside others as by itself, up to rounding.
    assert torch.equal(scores.num_tokens, alone.num_tokens)
    assert torch.allclose(scores.nll_sum, alone.nll_sum, rtol=1e-5)
    batches = seen[4:]  # behind those of the check
    rows = [row for batch in batches for row in batch.tolist()]
    cut = [row[: len(row) - row[::-1].index(next(filter(None, row[::-1])))] for row in rows]
    assert sorted(cut) == sorted(data["input_ids"])
    padded = sum(map(len, rows)) - sum(map(len, cut))
    if exact and max_tokens > 1:
        lengths = {len(tokens) for tokens in data["input_ids"]}
        assert 0 < padded <= 0.12 * sum(map(len, rows))
        assert len(batches) < len(lengths) or max_tokens == 40
    else:
        assert padded == 0


@pytest.mark.parametrize("exact", [True, False])
def test_a_collator_that_pads_to_a_multiple_brings_its_mask_where_one_is_needed(
    exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sftmix.training.scoring, "ignores_padding", lambda *_: exact)
    model, data = tiny.build("Llama"), tiny.examples(9)
    adapter, masks = HeadAdapter(model), []
    plain = score_examples(
        model, adapter, data, collator=PairedCollator(0), max_tokens=1, disable_progress=True
    )
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    collator = PairedCollator(5, pad_to_multiple_of=8)
    padded = score_examples(model, adapter, data, collator=collator, disable_progress=True)
    assert all(mask is None for mask in masks) == exact
    assert torch.equal(plain.num_tokens, padded.num_tokens)
    assert torch.allclose(plain.nll_sum, padded.nll_sum, rtol=1e-5)


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


class Stop(BaseException):
    """Not an exception that anything here may catch."""


@pytest.mark.parametrize("resumed_max_tokens", [14, 40, 8192])
def test_a_scoring_goes_on_from_its_sums(
    resumed_max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tiny.build("Llama"), tiny.examples(30)
    adapter, own = HeadAdapter(model), sftmix.training.scoring.score_batch
    scored: list[int] = []

    def spy(model: Any, head: Any, batch: Any, examples: torch.Tensor, *sums: Any) -> None:
        scored.extend(examples.tolist())
        own(model, head, batch, examples, *sums)

    monkeypatch.setattr(sftmix.training.scoring, "score_batch", spy)
    score = functools.partial(
        score_examples, model, adapter, data, collator=PairedCollator(0), disable_progress=True
    )
    whole = score(max_tokens=14)
    assert sorted(scored) == list(range(30))
    scored.clear()

    state: dict[str, torch.Tensor] = {}
    perplexity = StreamingPerplexity(30, "cpu")

    def save() -> None:
        if len(scored) > 10:
            state.update(perplexity.state_dict())
            raise Stop

    monkeypatch.setattr(sftmix.training.scoring, "SAVE_SECONDS", 0)
    with pytest.raises(Stop):
        score(perplexity=perplexity, max_tokens=14, save=save)
    assert 10 < len(scored) < 20
    resumed = StreamingPerplexity(30, "cpu")
    resumed.load_state_dict(state)
    score(perplexity=resumed, max_tokens=resumed_max_tokens)
    # Batches of another size fit as well: each example is scored once.
    assert sorted(scored) == list(range(30))
    assert torch.equal(resumed.num_tokens, whole.num_tokens)
    assert torch.allclose(resumed.nll_sum, whole.nll_sum, rtol=1e-5)
    if resumed_max_tokens == 14:
        assert torch.equal(resumed.nll_sum, whole.nll_sum)


def test_progress_is_saved_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tiny.build("Llama"), tiny.examples(24)
    now, own, saved = [0.0], sftmix.training.scoring.score_batch, []

    def slow(*arguments: Any) -> None:
        own(*arguments)
        now[0] += 7

    monkeypatch.setattr(sftmix.training.scoring, "score_batch", slow)
    monkeypatch.setattr(sftmix.training.scoring, "time", SimpleNamespace(monotonic=lambda: now[0]))
    score_examples(
        model,
        HeadAdapter(model),
        data,
        collator=PairedCollator(0),
        max_tokens=1,
        disable_progress=True,
        save=lambda: saved.append(now[0]),
    )
    # A batch takes 7 s: every fifth is the first one after 30 s.
    assert saved == [35, 70, 105, 140]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_says_what_is_left_and_writes_few_lines_into_a_log(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    own = sftmix.training.scoring.score_batch

    def slow(*arguments: Any) -> None:
        own(*arguments)
        now[0] += 10

    monkeypatch.setattr(sftmix.training.scoring, "score_batch", slow)
    model, data = tiny.build("Llama"), tiny.examples(24)
    total = sum(map(len, data["input_ids"]))
    score_examples(
        model, HeadAdapter(model), data, collator=PairedCollator(0), max_tokens=1, description="all"
    )
    said = [line for line in capsys.readouterr().err.split("\r") if line.strip()]
    assert len(said) == (26 if terminal else 5)  # at the start, meanwhile, and at the end
    assert all(re.match(rf"all: +\d+%.*/{total} \[\d+:\d+<", line) for line in said)
    # After half of the time half of it is left, up to a batch and the lengths.
    middle = re.search(r"\[02:[0-3]0<0[12]:\d\d", said[12 if terminal else 2])
    assert middle


def test_sums_of_other_examples_are_refused() -> None:
    model = tiny.build("Llama")
    with pytest.raises(ValueError, match="perplexity: expected sums of 6 examples, got 7"):
        score_examples(
            model,
            HeadAdapter(model),
            tiny.examples(6),
            collator=PairedCollator(0),
            perplexity=StreamingPerplexity(7, "cpu"),
        )


def test_scoring_in_bfloat16_autocast_is_close_and_leaves_no_trace() -> None:
    model, data = tiny.build("Llama"), tiny.examples(12)
    adapter, before = HeadAdapter(model), tiny.weights(model)
    score = functools.partial(
        score_examples, model, adapter, data, collator=PairedCollator(0), disable_progress=True
    )
    exact = score()
    rounded = score(context=functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16))
    assert not torch.equal(rounded.nll_sum, exact.nll_sum)
    assert torch.allclose(rounded.nll_sum, exact.nll_sum, rtol=0.05)
    assert torch.equal(score().nll_sum, exact.nll_sum)
    assert tiny.same(tiny.weights(model), before)


@pytest.mark.parametrize(
    ("is_cuda", "dtype", "training", "has_bfloat16", "expected"),
    [
        (True, torch.float32, "no", True, "bfloat16"),
        (True, torch.float32, "bf16", True, "bfloat16"),
        (True, torch.float32, "fp16", True, "as it trains"),
        (True, torch.float32, "no", False, "as it trains"),
        (True, torch.bfloat16, "no", True, "as it trains"),
        (False, torch.float32, "no", True, "as it trains"),
        (False, torch.float32, "bf16", True, "as it trains"),
    ],
)
def test_the_precision_of_scoring(
    is_cuda: bool,
    dtype: torch.dtype,
    training: str,
    has_bfloat16: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    head = SimpleNamespace(weight=SimpleNamespace(dtype=dtype))
    device = torch.device("cuda" if is_cuda else "cpu")
    accelerator = SimpleNamespace(mixed_precision=training, autocast=object(), device=device)
    found: Any = scoring_autocast(head, accelerator)
    if expected == "as it trains":
        assert found is accelerator.autocast
    else:
        assert (found.func, found.args) == (torch.autocast, ("cuda",))
        assert found.keywords == {"dtype": torch.bfloat16}


@pytest.mark.parametrize(("step", "finished"), [(0, 1), (2, 0), (3, 0), (4, 1), (6, 1), (8, 4)])
def test_a_wrong_number_of_finished_scorings_is_refused(step: int, finished: int) -> None:
    perplexity = StreamingPerplexity(1, "cpu")
    for _ in range(finished):
        perplexity.end_checkpoint()
    callback = ScoringCallback(perplexity, [1, 3, 6], lambda **_: pytest.fail("scored"))
    state: Any = SimpleNamespace(global_step=step)
    with pytest.raises(ValueError, match=f"finished scorings at step {step}, got {finished}"):
        callback.on_train_begin(None, state, None)  # type: ignore[arg-type]


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
    confident = partition.subset == "confident"
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
