"""From scores and data to `confident`, and what is refused of it."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

import sftmix
from sftmix.data.examples import load_examples
from sftmix.pairs.partition import Partition, from_scores, levels, split, write_partition
from sftmix.training import partitions
from sftmix.training.config import ScoreConfig
from sftmix.training.partitions import identities, matched, partition_of
from sftmix.training.trainer import SFTMixTrainer
from sftmix_kernels import StreamingPerplexity
from tests.sftmix import tiny


def scored(data: Any) -> Partition:
    """A partition of the data whose confidence is no pattern of rows."""
    ids, hashes = identities(data)
    nll = np.random.default_rng(3).uniform(1, 9, (len(ids), 2))
    return from_scores(ids, hashes, [1] * len(ids), nll)


def trainer(data: Any, confident: Any, folder: Path) -> SFTMixTrainer:
    return SFTMixTrainer(
        tiny.build("Llama"), tiny.config(folder), train_dataset=data, confident=confident
    )


def bare(data: datasets.Dataset) -> datasets.Dataset:
    """Tokens and labels alone, as another tool makes them."""
    return data.select_columns(["input_ids", "labels"])


def confident_contents(made: SFTMixTrainer) -> set[str]:
    """The contents of the rows that a trainer takes as confident."""
    hashes = identities(made.examples)[1]
    return {hashes[row] for row in made.confident_rows}


def test_the_example() -> None:
    found = doctest.testmod(partitions)
    assert found.attempted
    assert not found.failed


def test_public_names_are_there() -> None:
    for name in sftmix.__all__:
        assert getattr(sftmix, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'scores'"):
        _ = sftmix.scores  # type: ignore[attr-defined]


def test_a_partition_finds_the_rows_of_shuffled_data(tmp_path: Path) -> None:
    """By the columns that go along with the rows; from a list, a file, or through a transform."""
    data = tiny.examples(10)
    partition, path = scored(data), tmp_path / "confidence.parquet"
    write_partition(path, partition)
    wanted = set(partition.content_hash[levels(partition) == 1].tolist())
    shuffled = data.shuffle(seed=1)
    seen = shuffled.with_transform(lambda rows: rows)
    for rows, confident in (
        (data, partition),
        (shuffled, partition),
        (list(shuffled), path),
        (seen, str(path)),
    ):
        assert confident_contents(trainer(rows, confident, tmp_path)) == wanted


@pytest.mark.parametrize("as_list", [False, True])
def test_a_partition_beside_rows_in_another_order_is_refused(as_list: bool, tmp_path: Path) -> None:
    """Nothing but their contents tells rows of another tool apart; equal lengths do not suffice."""
    data = bare(tiny.examples(10))
    partition, shuffled = scored(data), data.shuffle(seed=1)
    made = trainer(data, partition, tmp_path)
    assert confident_contents(made) == set(partition.content_hash[levels(partition) == 1].tolist())
    rows = [{"input_ids": torch.tensor(row["input_ids"]), **row} for row in shuffled]
    with pytest.raises(ValueError, match=r"^confident: the data were put into another order after"):
        trainer(rows if as_list else shuffled, partition, tmp_path)


def test_a_partition_of_other_data_is_refused(tmp_path: Path) -> None:
    data, other = tiny.examples(10), tiny.examples(10, seed=1)
    for rows in (bare(other), data.select(range(8)), tiny.examples(12)):
        with pytest.raises(ValueError, match=r"^confident: the data changed after scoring: exampl"):
            trainer(rows, scored(bare(data) if len(rows) == 10 else data), tmp_path)


def test_a_file_that_is_no_partition_is_refused(tmp_path: Path) -> None:
    (tmp_path / "confidence.parquet").write_bytes(b"nothing")
    for name in ("confidence.parquet", "missing.parquet"):
        with pytest.raises(ValueError, match=rf"^confident: .*{name}: cannot be read as a partit"):
            trainer(tiny.examples(8), tmp_path / name, tmp_path)


def test_a_partition_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^confident: expected train_dataset, whose exampl.*None"):
        trainer(None, scored(tiny.examples(8)), tmp_path)


def test_an_id_that_is_there_twice_is_refused_before_training(tmp_path: Path) -> None:
    """As where data sets were joined that `tokenize_examples` made; contents alone will do."""
    joined = datasets.concatenate_datasets([tiny.examples(8), tiny.examples(8, seed=1)])
    config = ScoreConfig(str(tmp_path), num_scorings=1, use_cpu=True, disable_tqdm=True)
    words = r"id: expected another one in each row, got 10 in 2 rows; where data sets were joi"
    with pytest.raises(ValueError, match=f"^{words}"):
        sftmix.score(tiny.build("Llama"), config, train_dataset=joined)
    assert not [*tmp_path.iterdir()]
    with pytest.raises(ValueError, match=f"^confident: {words}"):
        trainer(joined, scored(bare(joined)), tmp_path)
    assert trainer(bare(joined), scored(bare(joined)), tmp_path).paired


def test_booleans_are_taken_as_they_are() -> None:
    halves = tiny.halves(8)
    assert matched(halves, tiny.examples(8)) is halves


def test_rows_of_tokens_are_known_as_score_knows_them(tmp_path: Path) -> None:
    """By what a file of them gives, whatever stands beside the tokens."""
    data = bare(tiny.examples(6))
    ones = [[1] * len(ids) for ids in data["input_ids"]]
    path = tmp_path / "rows.parquet"
    data.add_column("attention_mask", ones).to_parquet(path)
    examples = load_examples([path])
    ids, hashes = identities(data)
    assert ids == list(examples.ids)
    assert hashes == list(examples.content_hashes)


def test_scores_that_make_no_partition_are_refused() -> None:
    data = tiny.examples(3)
    scores = StreamingPerplexity(3, "cpu")
    with pytest.raises(ValueError, match=r"^scores: nll_sum: expected shape \(S, C\) with C >= 1"):
        partition_of(scores, data)
    scores.add(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]))
    scores.end_checkpoint()
    with pytest.raises(ValueError, match=r"^scores: num_tokens: expected at least 1, got 0 for"):
        partition_of(scores, data)
    with pytest.raises(ValueError, match=r"^scores: num_tokens: expected 4 examples as in id, got"):
        partition_of(scores, tiny.examples(4))


def test_score_trains_a_copy_and_scores_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A checkpoint at each step, where any are written: nothing would go on from them.
    monkeypatch.setattr("sftmix.training.config.SAVE_MINUTES", 1e-9)
    data, model = tiny.examples(9), tiny.build("Llama")
    before = tiny.weights(model)
    options: dict[str, Any] = {"use_cpu": True, "disable_tqdm": True, "num_scorings": 2}
    config = ScoreConfig(str(tmp_path), per_device_train_batch_size=4, **options)
    found = sftmix.score(model, config, train_dataset=data)
    assert tiny.same(tiny.weights(model), before)
    assert found.nll_sum.shape == (9, 2)
    assert found.id.tolist() == data["id"][:]
    assert not list(tmp_path.glob("checkpoint-*"))
    assert trainer(data, split(found, "reversed"), tmp_path).paired
    with pytest.raises(TypeError, match=r"^args: expected ScoreConfig, got SFTMixConfig; it has"):
        sftmix.score(model, tiny.config(tmp_path), train_dataset=data)  # type: ignore[arg-type]
