"""The study's runs: parts that share nothing, the same numbers again, and what is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.study.measures import BINS, calibration_error, on_held_out, on_training_data
from benchmarks.study.parts import Source, alpaca, as_tokens, demo, draw
from benchmarks.study.runs import Case, choose_learning_rate, prepare, study
from benchmarks.study.settings import QUICK, SEARCH_SEED, Sizes
from benchmarks.study.small import main

SMALL = Sizes(**{**vars(QUICK), "base_steps": 2, "train_examples": 16, "held_out_examples": 8})


@pytest.fixture(scope="module")
def source() -> Source:
    return demo()


@pytest.fixture(scope="module")
def case(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return prepare(draw(source, 3, SMALL), 3, SMALL, tmp_path_factory.mktemp("case"))


@pytest.mark.slow
def test_a_run_that_was_broken_off_ends_with_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    words = ["--quick", "--out", str(tmp_path), "--seeds", "0", "--systems", "ntp", "sftmix-random"]
    main(words)
    file = tmp_path / "demo-0.json"
    whole, record = file.read_bytes(), json.loads(file.read_text("utf-8"))
    assert record["systems"]["ntp"] != record["systems"]["sftmix-random"]
    assert record["systems"]["ntp"]["train_loss"] < record["base"]["train_loss"]
    assert "SFTMix, random halves" in capsys.readouterr().out
    del record["systems"]["sftmix-random"]
    file.write_text(json.dumps(record), encoding="utf-8")
    main(words)
    assert file.read_bytes() == whole
    assert (tmp_path / "study.svg").exists()


def test_no_two_parts_share_an_example(source: Source) -> None:
    allowed = {example.content_hash for example in source.pool}
    others = {example.content_hash for example in source.held_out}
    for search in (False, True):
        parts = draw(source, 5, QUICK, search=search)
        base, train, held_out = (
            {example.content_hash for example in part}
            for part in (parts.base, parts.train, parts.held_out)
        )
        assert base | train <= allowed
        assert len(base | train | held_out) == len(base) + len(train) + len(held_out)
        assert held_out <= (allowed if search else others)
    assert draw(source, 5, QUICK) == draw(source, 5, QUICK) != draw(source, 6, QUICK)


def test_alpaca_is_parted_by_content(tmp_path: Path) -> None:
    rows = [{"instruction": f"say {n % 300}", "output": "so"} for n in range(600)]
    file = tmp_path / "alpaca.json"
    file.write_text(json.dumps([*rows, {"instruction": "none", "output": ""}]), encoding="utf-8")
    found = alpaca(file)
    pool, held_out = (
        [example.content_hash for example in part] for part in (found.pool, found.held_out)
    )
    assert not set(pool) & set(held_out)
    assert len(pool) + len(held_out) == 600
    assert 0 < len(held_out) < 200


def test_a_source_that_is_too_small_is_refused(source: Source) -> None:
    few = Source("few", source.pool[:50], source.held_out)
    with pytest.raises(ValueError, match="few: expected 105 training examples, got 50"):
        draw(few, 0, QUICK)
    with pytest.raises(ValueError, match="few: expected 17 held-out examples, got 3"):
        draw(Source("few", source.pool, source.held_out[:3]), 0, QUICK)


def test_examples_that_cannot_be_learnt_are_made_up_for_or_refused(
    source: Source, case: Case
) -> None:
    short = Sizes(**{**vars(SMALL), "max_length": 30})
    assert len(as_tokens(source.pool[:50], case.tokenizer, 2, SMALL)) == 2
    with pytest.raises(ValueError, match="max_length: expected 50 of 50 examples"):
        as_tokens(source.pool[:50], case.tokenizer, 50, short)


def test_calibration_error_is_that_of_the_bins() -> None:
    random = np.random.default_rng(0)
    confidence, correct = random.random(200), random.random(200) < 0.4
    confidence[:3] = 0.0, 1.0, 2 / BINS
    expected = 0.0
    for m in range(BINS):
        inside = (confidence > m / BINS) & (confidence <= (m + 1) / BINS)
        inside |= (m == 0) & (confidence == 0)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            expected += inside.sum() / 200 * gap
    assert calibration_error(confidence, correct) == pytest.approx(expected, rel=1e-12)
    assert calibration_error(np.array([0.75, 0.75]), np.array([True, False])) == 0.25
    with pytest.raises(ValueError, match="got none"):
        calibration_error(np.array([]), np.array([], dtype=bool))
    with pytest.raises(ValueError, match=r"expected 0 \.\. 1"):
        calibration_error(np.array([1.5]), np.array([True]))


def test_measures_are_those_of_the_models_own_logits(case: Case) -> None:
    trainer = case.trainer(case.train, method="ntp")
    model, head, collator = trainer.model, trainer.head, trainer.data_collator.padded()
    held_out, train = (own_losses(model, dataset) for dataset in (case.held_out, case.train))
    found = on_held_out(model, head, case.held_out, collator)
    losses, hits = (torch.cat(parts) for parts in zip(*held_out, strict=True))
    torch.testing.assert_close(torch.tensor(found["held_out_loss"]), losses.mean())
    assert found["held_out_accuracy"] == hits.double().mean().item()
    assert found["held_out_loss"] == pytest.approx(trainer.evaluate(case.held_out)["eval_loss"])
    found = on_training_data(model, head, case.train, collator)
    perplexity = torch.stack([losses.mean().exp() for losses, _ in train])
    torch.testing.assert_close(torch.tensor(found["confidence_mean"]), -perplexity.mean())
    spread = perplexity.std(correction=0)
    torch.testing.assert_close(torch.tensor(found["confidence_std"]), spread, rtol=1e-4, atol=0)


def own_losses(model: Any, dataset: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Loss of each response token, and whether the likeliest was right, example by example."""
    found = []
    model.eval()
    for example in dataset:
        labels = torch.tensor(example["labels"][1:])
        with torch.no_grad():
            logits = model(torch.tensor([example["input_ids"]])).logits[0, :-1]
        learnt = labels != -100
        logits, labels = logits[learnt], labels[learnt]
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        found.append((losses, logits.argmax(-1) == labels))
    return found


def test_results_of_other_sizes_and_the_searchs_seed_are_refused(
    source: Source, tmp_path: Path
) -> None:
    record = {"data": "demo", "seed": SEARCH_SEED, "sizes": {}, "losses": {"1": 2.0}}
    (tmp_path / "demo-search.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ValueError, match="was made with examples = None"):
        choose_learning_rate(source, QUICK, tmp_path)
    with pytest.raises(ValueError, match=f"seeds: {SEARCH_SEED}"):
        study(source, [SEARCH_SEED], [], QUICK, tmp_path)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "give --gsm8k-train"),
        (["--gsm8k-train", "x"], "give both"),
        (["--quick"], "give --out"),
    ],
)
def test_wrong_words_are_refused(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert reason in capsys.readouterr().err
