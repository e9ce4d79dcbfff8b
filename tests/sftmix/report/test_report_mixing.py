"""What was mixed: counted from the pairs drawn again, beside what training logged."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftmix.cli import main
from sftmix.pairs.partition import Partition, from_scores, read_partition, split
from sftmix.report.mixing import (
    Drawn,
    beta_density,
    drawn_pairs,
    lam_picture,
    steps_of,
    truncation,
    truncation_picture,
)
from sftmix.report.runs import Run, find_partition, read_run

QUIET = ["--use_cpu", "true", "--disable_tqdm", "true"]


def lengths(*tokens: int, subset: str = "cucu") -> Partition:
    """Examples of so many tokens, named by "c" or "u"."""
    found = from_scores(range(len(tokens)), ["h"] * len(tokens), tokens, np.ones((len(tokens), 1)))
    names = {"c": "confident", "u": "unconfident"}
    return replace(found, subset=np.array([names[letter] for letter in subset]))


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, toy_model: Path, toy_data: Path) -> Path:
    run = tmp_path_factory.mktemp("mixing") / "scored"
    words = ["--model", str(toy_model), "--data", str(toy_data), "--output", str(run)]
    assert main(["score", *words, "--num_scorings", "1", *QUIET]) == 0
    return run


@pytest.mark.parametrize(
    ("by", "flags"),
    [
        ("confidence", ["--num_train_epochs", "2"]),
        ("random", ["--max_steps", "7", "--lambda_scope", "batch", "--seed", "3"]),
        ("quantiles:3", ["--gradient_accumulation_steps", "2", "--method", "mixup"]),
        ("confidence", ["--pairing", "rank", "--dataloader_drop_last", "true"]),
    ],
)
def test_counts_are_those_that_training_logged(
    by: str, flags: list[str], scored: Path, toy_model: Path, toy_data: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(scored, tmp_path / "scored")
    assert main(["split", str(own), "--by", by]) == 0
    words = ["--model", str(toy_model), "--data", str(toy_data), "--output", str(tmp_path / "run")]
    words += ["--partition", str(own / "confidence.parquet"), "--logging_steps", "3", *QUIET]
    words += ["--save_strategy", "no", "--num_train_epochs", "1"]
    assert main(["train", *words, *flags]) == 0
    run = read_run(tmp_path / "run")
    partition = find_partition(run, [run])
    drawn = drawn_pairs(run, partition)
    logged = [line for line in run.log if "unmixed_fraction" in line]
    assert logged
    first = 0
    for line in logged:
        inside = (drawn.steps > first) & (drawn.steps <= line["step"])
        window = Drawn(partition, drawn.rows[inside], drawn.lam[inside[::2]], drawn.steps[inside])
        fraction = window.unmixed_fraction
        assert fraction == pytest.approx(line["unmixed_fraction"], rel=1e-12)
        tokens = window.mixed_tokens[::2]
        lam = float((np.nan_to_num(window.lam) * tokens).sum() / tokens.sum())
        assert lam == pytest.approx(line["lam_mean"], rel=1e-6)  # training's lam is float32
        first = line["step"]
    assert drawn.steps.max() == first == run.steps


def test_the_pairs_of_another_order_are_refused(scored: Path) -> None:
    run = read_run(scored)
    partition = read_partition(scored / "confidence.parquet")
    log = [{"step": 1, "loss": 1.0}]
    assert len(drawn_pairs(replace(run, log=log), partition).rows) == 4
    with pytest.raises(ValueError, match="scored has logged no step"):
        drawn_pairs(replace(run, log=[]), partition)
    other = replace(partition, content_hash=partition.content_hash[::-1])
    with pytest.raises(ValueError, match="in another order"):
        drawn_pairs(replace(run, log=log), other)


class Keys:
    """A sampler of an epoch of numbered keys."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        return iter([(10 * self.epoch + number, 0.5) for number in range(10)])


def test_steps_of_several_ranks() -> None:
    recipe: dict[str, Any] = {"per_device_train_batch_size": 2, "world_size": 2}
    sizes = []
    for more in ({}, {"gradient_accumulation_steps": 2}, {"dataloader_drop_last": True}):
        run = Run(Path("x"), "x", {**recipe, **more}, {}, {}, [], {}, True)
        steps = steps_of(Keys(), run)  # type: ignore[arg-type]
        found = [next(steps) for _ in range(4)]
        assert [step for step, _ in found] == [1, 2, 3, 4]
        sizes.append([len(keys) for _, keys in found])
    assert sizes == [[4, 4, 2, 4], [8, 2, 8, 2], [4, 4, 4, 4]]
    run = Run(
        Path("x"), "x", {**recipe, "per_device_train_batch_size": 8} | {}, {}, {}, [], {}, True
    )
    late = replace(run, recipe={**run.recipe, "dataloader_drop_last": True})
    with pytest.raises(ValueError, match="no batch of 16"):
        next(steps_of(Keys(), late))  # type: ignore[arg-type]


def test_truncation_worked_out_by_hand() -> None:
    partition = lengths(2, 10, 6, 6)
    # Pairs (2, 10): 2 mixed, (6, 6): all; (6, 10) is not mixed.
    drawn = Drawn(
        partition, np.array([0, 1, 2, 3, 2, 1]), np.array([0.5, 0.9, np.nan]), np.ones(6, int)
    )
    assert drawn.mixed_tokens.tolist() == [2, 2, 6, 6, 0, 0]
    assert drawn.unmixed_fraction == pytest.approx(1 - 16 / 40)
    found = truncation([drawn, drawn])
    assert list(found.subsets) == ["confident", "unconfident"]
    assert found.tokens.sum(axis=1).tolist() == [28, 52]
    assert found.mixed.sum(axis=1).tolist() == [16, 16]
    column = int(np.searchsorted(found.edges, 6, side="right")) - 1
    assert found.lost[:, column].tolist() == [0.5, 0.0]
    picture = truncation_picture("a run", [drawn], 0.6)
    assert "60.0 % were not mixed (confident 42.9 %, unconfident 69.2 %)" in picture.caption
    assert "Training logged a mean of 60.0 %." in picture.caption


def test_levels_and_equal_lengths_can_be_drawn() -> None:
    partition = split(lengths(5, 5, 5, 5, 5, 5, subset="cucucu"), "quantiles:3")
    drawn = Drawn(partition, np.arange(6), np.array([0.5, 0.1, 0.2]), np.ones(6, int))
    found = truncation([drawn])
    assert list(found.subsets) == ["level 1", "level 2", "level 3"]
    assert found.edges.tolist() == [1, 6]
    assert "0.0 % were not mixed" in truncation_picture("x", [drawn], None).caption


def test_the_lam_histogram() -> None:
    stats = pytest.importorskip("scipy.stats")
    grid = np.linspace(0.01, 0.99, 50)
    for alpha in (0.2, 0.5, 1.0, 4.0):
        assert beta_density(grid, alpha) == pytest.approx(stats.beta.pdf(grid, alpha, alpha))
    lam = np.array([0.25, 0.75, np.nan, 0.8])
    drawn = Drawn(lengths(*[3] * 8, subset="cucucucu"), np.arange(8), lam, np.ones(8, int))
    caption = lam_picture("x", [drawn], 0.5).caption
    assert "lam of the 3 pairs" in caption
    assert "mean 0.600" in caption
