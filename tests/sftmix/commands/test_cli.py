"""The command line: what it reads, what it refuses, and what it says then."""

from __future__ import annotations

import json
import logging
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.cli import main
from sftmix.pairs.partition import read_partition
from sftmix.toy import build_toy_model

QUIET = ["--use_cpu", "true", "--disable_tqdm", "true"]
REAL_DATA = Path(__file__).parents[3] / "../shared/data"


def test_what_a_library_says_of_inference_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """On a CPU with AVX512-BF16, before the output of each command."""
    assert main(["data", "--formats"]) == 0
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no module")
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, toy_model: Path, toy_data: Path) -> Path:
    """A scored run; tests that change it take a copy."""
    run = tmp_path_factory.mktemp("cli") / "scored"
    words = ["--model", str(toy_model), "--data", str(toy_data), "--output", str(run)]
    assert main(["score", *words, "--num_scorings", "2", *QUIET]) == 0
    return run


@pytest.fixture
def train(toy_model: Path, toy_data: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs `sftmix train` of one NTP epoch into RUN; flags come last and override."""

    def run(*flags: str, model: Path = toy_model, data: Path = toy_data) -> int:
        words = ["--model", str(model), "--data", str(data), "--output", str(tmp_path / "run")]
        short = ["--method", "ntp", "--num_train_epochs", "1", "--save_strategy", "no"]
        return main(["train", *words, *short, *QUIET, *flags])

    return run


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """What a refused command printed."""
    error = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in error
    assert re.search(r"^sftmix (train|score|split|doctor): error: ", error, re.MULTILINE), error
    return error


# Arguments


def test_a_config_file_and_flags_that_override_it(
    train: Callable[..., int], tmp_path: Path, toy_data: Path, held_out: Path
) -> None:
    config = tmp_path / "config.yaml"
    values = {
        "data": [str(toy_data), str(held_out)],
        "method": "ntp",
        "learning_rate": 0.003,
        "mu": 0.5,
        "seed": 3,
        "max_steps": 2,
        "bf16": False,
        "partition": None,
        "output": str(tmp_path / "other"),
        "lr_scheduler_kwargs": {"num_cycles": 0.5},
    }
    config.write_text(yaml.safe_dump(values))
    assert train("--config", str(config), "--seed", "4", "--max_steps", "1") == 0
    assert not (tmp_path / "other").exists()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["seed"], manifest["max_steps"]) == (4, 1)
    assert (manifest["mu"], manifest["learning_rate"]) == (0.5, 0.003)
    assert manifest["lr_scheduler_kwargs"] == {"num_cycles": 0.5}
    # --data on the command line names one file, the config two.
    assert manifest["num_examples"] == 31
    again = ["train", "--config", str(config), "--model", manifest["model"], *QUIET]
    assert main([*again, "--num_train_epochs", "1", "--save_strategy", "no"]) == 0
    assert json.loads((tmp_path / "other/manifest.json").read_text())["num_examples"] == 40


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 0.1\n", "did you mean learning_rate"),
        ("- a\n- b\n", "must hold names and values"),
        ("", "must hold names and values"),
        ("a: [1\n", "is not YAML"),
    ],
)
def test_a_wrong_config_file(
    text: str,
    message: str,
    train: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(text)
    assert message in refused(capsys, train("--config", str(config)))
    assert not (tmp_path / "run").exists()


def test_a_config_file_that_is_not_there(
    train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nowhere.yaml" in refused(capsys, train("--config", "nowhere.yaml"))


def test_wrong_flags(
    train: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for flags, message in (
        (["--mu", "-1"], "mu: expected"),
        (["--alpha", "0"], "alpha: expected"),
        (["--method", "sftmix"], "which --method sftmix needs, got none"),
        (["--max_length", "1"], "--max_length: expected at least 2"),
        (["--per_device_train_batch_size", "64"], "at least one batch of 64 examples, got 31"),
        (["--learning_rat", "1"], "learning_rat"),
        (["--eval_data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--partition", "nowhere.parquet"], "nowhere.parquet"),
        (["--model", "./nowhere"], "nowhere"),
    ):
        assert message in refused(capsys, train(*flags))
        assert not list(tmp_path.iterdir())
    # The folder can be used once the flag is mended.
    assert train() == 0


def test_flags_that_argparse_refuses(
    train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, message in (
        (["--mu", "much"], "--mu: invalid float value"),
        (["--method", "dro"], "invalid choice: 'dro'"),
        (["--on_bad_row", "ignore"], "invalid choice: 'ignore'"),
        (["--output_dir", "x"], "give the folder as --output"),
        (["--resume-from-checkpoint=x"], "give --resume"),
    ):
        with pytest.raises(SystemExit) as caught:
            train(*flags)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--model", "x"])
    assert "required: --data, --output" in capsys.readouterr().err


def test_score_is_one_epoch_of_ntp(
    toy_model: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["score", "--model", str(toy_model), "--data", str(toy_data), *QUIET]
    words += ["--output", str(tmp_path / "run")]
    message = refused(capsys, main([*words, "--num_train_epochs", "2"]))
    assert "--num_train_epochs: score trains one epoch of next-token prediction" in message
    assert "num_scorings: expected 1 to 8" in refused(capsys, main([*words, "--num_scorings", "9"]))


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "a folder\x1b[31m")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("versions", "torch", torch.__version__, "device", "loss kernels", "extension"):
        assert word in text
    for word in ("machine", "memory", "--traceback", r"HF_HOME          a folder\x1b[31m"):
        assert word in text
    assert "hf_secret" not in text
    assert re.search(r"^  peft +\d+\.", text, re.MULTILINE)
    assert not re.search(r"^  \w+ *$", text, re.MULTILINE)  # a name without a value


def test_warnings_between_libraries_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a first run on a CPU, and of LoRA."""

    def noisy(words: list[str]) -> None:
        warnings.warn("'pin_memory' argument is set as true but ...", UserWarning, stacklevel=1)
        warnings.warn("`is_gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)

    monkeypatch.setattr("sftmix.commands.doctor.main", noisy)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert main(["doctor"]) == 0
    assert [str(one.message) for one in shown] == ["something else"]


# Data


def test_bad_rows(
    train: Callable[..., int], toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = toy_data.read_text().splitlines()
    lines[4] = '{"question": "and the answer?"}'
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(lines))
    assert f"{bad}:5: 'answer' is missing" in refused(capsys, train(data=bad))
    assert train("--on-bad-row", "skip", data=bad) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["num_examples"] == 30


def test_a_traceback_only_where_it_is_asked_for(toy_model: Path, tmp_path: Path) -> None:
    words = ["train", "--model", str(toy_model), "--data", str(tmp_path / "no.jsonl"), *QUIET]
    words += ["--method", "ntp", "--output", str(tmp_path / "run")]
    assert main(words) == 2
    with pytest.raises(FileNotFoundError):
        main(["--traceback", *words])


def test_a_partition_of_other_data_is_refused(
    train: Callable[..., int],
    scored: Path,
    toy_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    partition = str(scored / "confidence.parquet")
    changed = tmp_path / "changed.jsonl"
    text = toy_data.read_text()
    for other in (
        text.replace("owl", "fox", 1),
        text + text.splitlines()[0],
        text[text.index("\n") :],
    ):
        changed.write_text(other)
        line = refused(capsys, train("--method", "sftmix", "--partition", partition, data=changed))
        assert "the data changed after scoring: example " in line
    assert train("--method", "sftmix", "--partition", partition) == 0


def test_split(scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "scored"
    run.mkdir()
    path = run / "confidence.parquet"
    path.write_bytes((scored / "confidence.parquet").read_bytes())
    (run / "manifest.json").write_bytes((scored / "manifest.json").read_bytes())
    before = read_partition(path)
    assert main(["split", str(run), "--by", "reversed"]) == 0
    assert (read_partition(path).subset != before.subset).all()
    assert main(["split", str(run), "--by", "random", "--seed", "3"]) == 0
    random = read_partition(path).subset
    noted = json.loads((run / "manifest.json").read_text())["split"]
    assert noted == {"by": "random", "seed": 3}
    assert (random == "confident").sum() == 16
    assert (random != before.subset).any()
    assert main(["split", str(run)]) == 0
    assert (read_partition(path).subset == before.subset).all()
    assert "unconfident" in capsys.readouterr().out
    assert "expected a folder that `sftmix score` wrote" in refused(
        capsys, main(["split", str(tmp_path / "nothing")])
    )


# Folders


def test_folders_outside_of_the_run_are_refused(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    for output in ("../x", str(tmp_path / "a" / ".." / "b")):
        assert "cannot leave its folder" in refused(capsys, train("--output", output))
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "target").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "target")
    assert "symbolic link" in refused(capsys, train())
    assert not list((tmp_path / "target").iterdir())


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pickled_model_is_never_opened(
    train: Callable[..., int], toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copy_without_weights(toy_model, tmp_path / "model")
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "opened")))
    assert "safetensors" in refused(capsys, train(model=model))
    torch.save({"lm_head.weight": Canary(tmp_path / "opened")}, model / "pytorch_model.bin")
    assert "safetensors" in refused(capsys, train("--output", str(tmp_path / "again"), model=model))
    assert not (tmp_path / "opened").exists()


def copy_without_weights(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_weights_that_are_cut_off(
    train: Callable[..., int], toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copy_without_weights(toy_model, tmp_path / "model")
    weights = (toy_model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-100])
    assert f"the weights of {model} are damaged" in refused(capsys, train(model=model))


def test_code_beside_a_model_is_not_run(
    train: Callable[..., int], toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copy_without_weights(toy_model, tmp_path / "model")
    (model / "model.safetensors").write_bytes((toy_model / "model.safetensors").read_bytes())
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    (model / "own.py").write_text(code)
    config = json.loads((model / "config.json").read_text())
    config["model_type"] = "our-own"
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (model / "config.json").write_text(json.dumps(config))
    assert "trust_remote_code" in refused(capsys, train(model=model))
    assert not (tmp_path / "ran").exists()


# Whole runs


def test_the_final_model_loads(
    train: Callable[..., int], scored: Path, toy_model: Path, held_out: Path, tmp_path: Path
) -> None:
    partition = str(scored / "confidence.parquet")
    flags = ["--method", "sftmix", "--partition", partition, "--eval_data", str(held_out)]
    assert train(*flags, "--logging_steps", "2", "--learning_rate", "0.01") == 0
    run = tmp_path / "run"
    model, start = (AutoModelForCausalLM.from_pretrained(path) for path in (run, toy_model))
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    text = AutoTokenizer.from_pretrained(run)
    assert (
        text("one owl").input_ids == AutoTokenizer.from_pretrained(toy_model)("one owl").input_ids
    )
    lines = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in lines if "mixup_loss" in line] == [2, 4, 6, 8]
    assert sum("eval_loss" in line for line in lines) == 1
    assert not list(run.glob(".tmp-*"))


def test_heads_and_layouts_train_alike(
    train: Callable[..., int], scored: Path, tmp_path: Path
) -> None:
    partition = str(scored / "confidence.parquet")
    common = ["--method", "sftmix", "--partition", partition, "--logging_steps", "2"]
    losses = []
    of_no_result = ("--memory", "--activation_offload")
    lean = ["--mlp_tile_tokens", "16", "--memory", "lean", "--activation_offload", "true"]
    for flags in ([], ["--head", "logits"], ["--layout", "packed", "--row_length", "128"], lean):
        run = tmp_path / f"run-{len(losses)}"
        assert train(*common, *flags, "--output", str(run)) == 0
        manifest = json.loads((run / "manifest.json").read_text())
        for flag, value in zip(flags[::2], flags[1::2], strict=True):
            assert flag in of_no_result or str(manifest[flag[2:]]) == value
        lines = json.loads((run / "trainer_state.json").read_text())["log_history"]
        losses.append([line["mixup_loss"] for line in lines if "mixup_loss" in line])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)
    assert losses[3] == pytest.approx(losses[0], rel=1e-6)
    assert (manifest["layout"], manifest["mlp_tile_tokens"]) == ("sequential", 16)


@pytest.mark.parametrize("name", ["alpaca_9k.json", "gsm8k_train.jsonl"])
def test_real_data(name: str, tmp_path: Path) -> None:
    if not (REAL_DATA / name).is_file():
        pytest.skip(f"needs ../shared/data/{name}")
    rows = (REAL_DATA / name).read_text().splitlines()[:64]
    data = tmp_path / "rows.jsonl"
    if name.endswith(".json"):
        rows = [json.dumps(row) for row in json.loads((REAL_DATA / name).read_text())[:64]]
    data.write_text("\n".join(rows))
    model = tmp_path / "model"
    build_toy_model(model, [data], vocab_size=512, hidden_size=8, num_layers=1, num_heads=2)
    common = ["--model", str(model), "--data", str(data), "--max_length", "192", *QUIET]
    common += ["--on_bad_row", "skip", "--per_device_train_batch_size", "8"]
    assert main(["score", *common, "--output", str(tmp_path / "scored")]) == 0
    partition = str(tmp_path / "scored" / "confidence.parquet")
    common += ["--num_train_epochs", "1", "--save_strategy", "no", "--logging_steps", "2"]
    assert (
        main(["train", *common, "--partition", partition, "--output", str(tmp_path / "run")]) == 0
    )
    lines = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert all(0 < line["mixup_loss"] < 10 for line in lines if "loss" in line)
    assert 48 < len(read_partition(Path(partition)).id) <= 64
