"""A small model's partition trains a larger one that has another tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from sftmix.cli import main
from sftmix.pairs.partition import partition_hash, read_partition
from sftmix.recipe.manifest import warn_of_other_template
from sftmix.toy import build_toy_model
from tests.sftmix.conftest import write_rows

QUIET = ["--use_cpu", "true", "--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data, a strong model, and the partition of a weak one."""
    folder = tmp_path_factory.mktemp("weak")
    data = write_rows(folder / "rows.jsonl", 24)
    weak, strong, run = (folder / name for name in ("weak", "strong", "scored"))
    build_toy_model(weak, [data], vocab_size=260, hidden_size=4, num_layers=1, num_heads=1)
    build_toy_model(strong, [data], vocab_size=320, hidden_size=16, num_layers=2, num_heads=2)
    words = ["score", "--model", str(weak), "--data", str(data), "--output", str(run)]
    assert main([*words, "--num_scorings", "2", *QUIET]) == 0
    return {
        "data": data,
        "weak": weak,
        "strong": strong,
        "partition": run / "confidence.parquet",
    }


def train(weak: dict[str, Path], data: Path, output: Path) -> int:
    words = ["train", "--model", str(weak["strong"]), "--data", str(data), "--output", str(output)]
    words += ["--partition", str(weak["partition"]), "--max_steps", "2", "--logging_steps", "1"]
    return main([*words, "--save_strategy", "no", *QUIET])


def test_a_weak_models_halves_train_a_strong_one(weak: dict[str, Path], tmp_path: Path) -> None:
    small, large = (len(AutoTokenizer.from_pretrained(weak[name])) for name in ("weak", "strong"))
    assert small < large
    assert train(weak, weak["data"], tmp_path / "run") == 0
    partition = read_partition(weak["partition"])
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["partition"] == partition_hash(partition)
    assert manifest["num_examples"] == len(partition.id) == 24
    assert (
        "| confident, unconfident examples | 12, 12 |" in (tmp_path / "run/README.md").read_text()
    )
    config = AutoConfig.from_pretrained(tmp_path / "run")
    assert (config.vocab_size, config.hidden_size) == (large, 16)
    log = json.loads((tmp_path / "run/trainer_state.json").read_text())["log_history"]
    assert all(line["mixup_loss"] > 0 for line in log if "loss" in line)


def test_another_chat_template_is_told(
    weak: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(weak["strong"])
    warn_of_other_template(weak["partition"], tokenizer)
    assert not caplog.messages
    tokenizer.chat_template += " "
    warn_of_other_template(weak["partition"], tokenizer)
    [told] = caplog.messages
    assert told.startswith(f"partition: {weak['partition']} was scored under another chat template")


def test_a_row_that_changed_is_refused(
    weak: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = weak["data"].read_text().splitlines()
    row = json.loads(lines[7])
    lines[7] = json.dumps({**row, "answer": row["answer"].swapcase()})
    changed = tmp_path / "changed.jsonl"
    changed.write_text("\n".join(lines))
    assert train(weak, changed, tmp_path / "run") == 2
    assert "the data changed after scoring: example 7 " in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()
