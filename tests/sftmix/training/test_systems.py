"""Every method and partition from the command line: what is trained is what was asked for."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftmix.cli import main
from sftmix.methods import METHODS
from sftmix.pairs.partition import read_partition, split
from sftmix.pairs.pools import pools_of
from sftmix.pairs.sampling import PairedSampler
from sftmix.recipe.arguments import TrainRunArguments
from sftmix.training.config import SFTMixOptions

QUIET = ["--use_cpu", "true", "--disable_tqdm", "true"]
ALPHA = 0.8

OWN_OPTIONS = set(SFTMixOptions.__annotations__)
NOT_DECISIVE = {
    *("output", "resume", "trust_remote_code", "eval_data", "eval_split"),
    "chat_template",  # its content is, as template_hash
    "remove_unused_columns",
    # What the first turns on is there by name; the second moves what it does not change.
    *("memory", "activation_offload"),
    # A checkpoint changes nothing of a training.
    "save_minutes",
    # Only says something.
    "spike_threshold",
}

Train = Callable[..., tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, toy_model: Path, toy_data: Path) -> Path:
    run = tmp_path_factory.mktemp("systems") / "scored"
    words = ["--model", str(toy_model), "--data", str(toy_data), "--output", str(run)]
    assert main(["score", *words, "--num_scorings", "2", *QUIET]) == 0
    return run


@pytest.fixture
def train(scored: Path, toy_model: Path, toy_data: Path, tmp_path: Path) -> Train:
    """Splits a copy of the scored run anew and trains an epoch; the manifest and the log line."""

    def run(by: str, *flags: str) -> tuple[dict[str, Any], dict[str, Any]]:
        shutil.copytree(scored, tmp_path / "scored")
        assert main(["split", str(tmp_path / "scored"), "--by", by, "--seed", "5"]) == 0
        partition = str(tmp_path / "scored/confidence.parquet")
        words = ["--model", str(toy_model), "--data", str(toy_data), "--partition", partition]
        words += ["--output", str(tmp_path / "run"), "--num_train_epochs", "1", "--seed", "3"]
        words += ["--alpha", str(ALPHA), "--logging_steps", "8", "--save_strategy", "no", *QUIET]
        assert main(["train", *words, *flags]) == 0
        manifest = json.loads((tmp_path / "run/manifest.json").read_text())
        log = json.loads((tmp_path / "run/trainer_state.json").read_text())["log_history"]
        return manifest, next(line for line in log if "loss" in line)

    return run


@pytest.mark.parametrize(
    ("by", "pairing"),
    [
        ("confidence", "outer"),
        ("random", "outer"),
        ("reversed", "outer"),
        ("quantiles:3", "outer"),
        ("quantiles:4", "outer"),
        ("quantiles:4", "neighbours"),
        ("confidence", "rank"),
    ],
)
def test_partitions_and_pairings(by: str, pairing: str, train: Train, scored: Path) -> None:
    """The mixed tokens and their lam are those of the pairs that this partition must give."""
    manifest, line = train(by, "--pairing", pairing)
    assert (manifest["method"], manifest["pairing"]) == ("sftmix", pairing)
    partition = split(read_partition(scored / "confidence.parquet"), by, seed=5)
    tokens = partition.num_tokens
    rows, lams = zip(*PairedSampler(pools_of(partition, pairing), alpha=ALPHA, seed=3), strict=True)
    lam = np.array(lams[::2])
    mixed = np.minimum(tokens[list(rows[::2])], tokens[list(rows[1::2])]) * ~np.isnan(lam)
    share = 1 - 2 * mixed.sum() / tokens[list(rows)].sum()
    assert line["unmixed_fraction"] == pytest.approx(share, rel=1e-9)
    mean = (np.nan_to_num(lam) * mixed).sum() / mixed.sum()
    assert line["lam_mean"] == pytest.approx(mean, rel=1e-6)


def test_partitions_differ(scored: Path) -> None:
    """Or the test above could not tell them apart."""
    partition = read_partition(scored / "confidence.parquet")
    ways = ("confidence", "random", "reversed", "quantiles:3", "quantiles:4")
    subsets = {tuple(split(partition, by, seed=5).subset.tolist()) for by in ways}
    assert len(subsets) == len(ways)


@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str, train: Train) -> None:
    manifest, line = train("confidence", "--method", method, "--mu", "0.3", "--kl_reg", "0.001")
    assert manifest["method"] == method
    # What a resumed run must not change, which is all that decides results.
    ours = {field.name for field in dataclasses.fields(TrainRunArguments)}
    ours = {name for name in ours if not name.startswith(("lora_", "load_in_"))} | OWN_OPTIONS
    assert ours - manifest.keys() == NOT_DECISIVE
    terms = {"ntp_loss": line.get("ntp_loss", 0.0), "mixup_loss": line.get("mixup_loss", 0.0)}
    expected = {
        "ntp": terms["ntp_loss"],
        "sftmix": terms["ntp_loss"] + 0.3 * terms["mixup_loss"],
        "equal": terms["ntp_loss"] + terms["mixup_loss"],
        "mixup": terms["mixup_loss"],
    }
    if method == "ir_dro":  # as good as the worst example's alone
        assert line["loss"] > line["ntp_loss"]
    elif method not in expected:
        assert line["loss"] != line["ntp_loss"]
        assert (line["loss"] < line["ntp_loss"]) == (method != "label_smoothing")
    else:
        assert line["loss"] == pytest.approx(expected[method], rel=1e-6)
