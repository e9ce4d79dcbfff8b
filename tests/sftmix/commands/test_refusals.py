"""Wrong words, folders and files of every command: one message, the flag as typed, exit code 2."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from sftmix.cli import main
from tests.sftmix.refusals import refused


@pytest.fixture(autouse=True)
def _away(offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # The harness is asked for before questions are read.
    monkeypatch.setattr("sftmix.commands.evaluate.require_harness", lambda: None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--learing_rate 1", "--learing_rate: sftmix train has no such option; did you mean --lea"),
        (
            "--warmup_ratio 0.1",
            "--warmup_ratio: sftmix train has no such option; did you mean --wa",
        ),
        ("--batch_size 4", "--batch_size: sftmix train has no such option; did you mean --per_dev"),
        (
            "--save_only_model true",
            "--save_only_model: not supported here, got True: a run could not go on from such a "
            "checkpoint; --save_total_limit 1 keeps one at a time",
        ),
        ("--xyzzy", "--xyzzy: sftmix train has no such option; `sftmix train --help` lists them"),
        ("--warmup-ratio 1", "--warmup-ratio: sftmix train has no such option; did you mean --wa"),
        ("xyzzy", "'xyzzy': sftmix train has no such option; `sftmix train --help` lists them"),
        ("mu 0.3", "'mu': sftmix train has no such option; did you mean --mu?"),
        ("--mu much", "--mu: invalid float value: 'much'; see `sftmix train --help`"),
        ("--method dro", "--method: invalid choice: 'dro'"),
        ("--method ntpp", "--method: invalid choice: 'ntpp' (choose from "),
        ("--eval-strategy sometimes", "--eval-strategy: invalid choice: 'sometimes'"),
        ("--max-steps 0", "--max-steps: expected at least 1, or -1 for all of num_train_epochs; g"),
        ("--data-split test", "--data-split: expected a folder or a data set with splits, got 'te"),
        ("--resume-from-checkpoint x", "--resume-from-checkpoint: give --resume; see `sftmix tra"),
        ("--row-length 64", "--row-length: only --layout packed has it, got 'padded'"),
        ("--loss_max_bytes 9 --head logits", "--loss_max_bytes: expected --head fused; --head l"),
        ("--deepspeed no.json", "--deepspeed: not supported here, got 'no.json': its checkpoints"),
        ("--bf16 maybe", "--bf16: Truthy value expected"),
        ("--model", "--model: expected one argument"),
        (
            "--gradient_accumulation_steps 0",
            "--gradient_accumulation_steps: expected at least 1 a",
        ),
        ("--lr_scheduler_type wsd", "--lr_scheduler_type: expected one of linear"),
        ("--report_to tensorboard wandbx", "--report_to: expected one of azure_ml"),
        ("--fp16 true", "--fp16: not supported on the CPU"),
        ("--fsdp", "--fsdp: expected several processes, got one; start them with `accelerate lau"),
        ("--eval_strategy epoch", "--eval_strategy: there is nothing to evaluate, got epoch; expe"),
        ("--eval_on_start true", "--eval_on_start: there is nothing to evaluate"),
        ("--max_length 1", "--max_length: expected at least 2"),
        ("--lora_rank 0", "--lora_rank: expected at least 1, got 0"),
        ("--lora_targets q_proj", "--lora_targets: expected --lora_rank with it"),
        ("--lora_rank 2 --lora_targets nothing", "--lora_targets: Target modules {'nothing'} not"),
        ("--attn_implementation foo", "--attn_implementation: the model in "),
        ("--per_device_train_batch_size 64", "--data: expected at least one batch of 64 examples"),
        ("--config nowhere.yaml", "--config: no such file or directory: 'nowhere.yaml'"),
        ("--data no.json", "--data: no such data file: no.json"),
        ("--data nothing", "--data: no file or folder 'nothing', and no data set of this name"),
        ("--data_split test", "--data_split: expected a folder or a data set with splits, got 'te"),
        ("--eval_data no.json", "--eval_data: no such data file: no.json"),
        ("--eval_data DATA --eval_split test", "--eval_split: expected a folder or a data set w"),
        ("--select keys:no.txt", "--select: no such file or directory: 'no.txt'"),
        ("--metric_for_best_model foo", "--metric_for_best_model: expected --eval_strategy epoch"),
        (
            "--eval_data DATA --eval_strategy epoch --metric_for_best_model foo",
            "--metric_for_best_model: expected one of eval_loss, eval_perplexity, "
            "eval_entropy, eval_mean_token_accuracy, got 'foo'",
        ),
        ("--lora_rank 999999", "--lora_rank: expected at most 24, the largest side of the model's"),
        ("--partition no.parquet", "--partition: expected the confidence.parquet of a run of `sft"),
        ("--partition /", "--partition: expected the confidence.parquet of a run of `sftmix scor"),
        ("--model ./typo", "--model: no folder ./typo; a name on the hub would be such as org/nam"),
        ("--model typo", "--model: no folder ./typo, and no such name in the hub's cache; the hub"),
        ("--model org/typo", "--model: no folder ./org/typo, and no such name in the hub's cache"),
        ("--model a/b/c", "--model: no folder a/b/c; a name on the hub would be such as org/name"),
        ("--model ~/model", "--model: no folder ~/model; the shell expands ~ only without quotes"),
        ("--model /", "--model: / is no model: it has no config.json"),
        ("--model \x1b[31mred", r"--model: no folder \x1b[31mred; a name on"),
        ("--model \x1b]0;x\x07.json --typo", r"--typo: sftmix train has no such option"),
        ("--\x1b[31m 1", r"--\x1b[31m: sftmix train has no such option"),
    ],
)
def test_wrong_words(
    flags: str, message: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = flags.replace("DATA", words[words.index("--data") + 1])
    assert refused(capsys, [*words, *flags.split(" ")]).startswith(message)
    assert not list(tmp_path.iterdir())


def test_nothing_is_loaded_before_the_options_are_known_to_fit(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of 16 GB would be read first."""
    for command in ("train", "score"):
        monkeypatch.setattr(f"sftmix.commands.{command}.load_model", None)
    batch = ["--per-device-train-batch-size", "64"]
    found = refused(capsys, [*words, *batch])
    assert found.startswith("--data: expected at least one batch of 64 examples, got ")
    assert found.endswith("take a smaller --per-device-train-batch-size")
    scoring = ["score", *words[1:7], "--num-scorings", "99", *words[-4:]]
    assert refused(capsys, scoring).startswith("--num-scorings: expected 1 to ")
    assert refused(capsys, [*scoring, *batch]).startswith("--data: expected at least one batch")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("train --modle x", "--modle: sftmix train has no such option; did you mean --model?"),
        ("split r --lvels 3", "--lvels: sftmix split has no such option; `sftmix split --help` li"),
        ("report r --ouput x", "--ouput: sftmix report has no such option; did you mean --output?"),
        ("split r --sed=1", "--sed: sftmix split has no such option; did you mean --seed?"),
        ("split r output", "'output': sftmix split has no such option; `sftmix split --help` lis"),
        ("demo --outputt x", "--outputt: sftmix demo has no such option; did you mean --output?"),
        ("demo --output x sed", "'sed': sftmix demo has no such option; did you mean --seed?"),
        ("doctor -x", "-x: sftmix doctor has no such option; `sftmix doctor --help` lists them"),
        ("plan --model x --method mixap", "--method: invalid choice: 'mixap' (choose from "),
    ],
)
def test_what_was_meant(words: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = refused(capsys, words.split())
    assert found.startswith(hint)
    assert "mixap" not in found or found.endswith("; did you mean mixup?")


@pytest.mark.parametrize(
    ("word", "meant"), [("trian", "train"), ("version", "--version"), ("--verison", "--version")]
)
def test_a_command_that_was_meant(
    word: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word]) == 2
    assert f"no command {word!r}; did you mean {meant}?\n" in capsys.readouterr().err


def test_a_file_that_is_not_there_to_include(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("include: gone.yaml")
    assert refused(capsys, [*words, "--config", str(file)]) == (
        f"--config: {file}: include: no such file: {str(tmp_path / 'gone.yaml')!r}"
    )


def test_a_damaged_manifest_of_a_resumed_run(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    for text in ("{", "[]"):
        (tmp_path / "run" / "manifest.json").write_text(text)
        found = refused(capsys, [*words, "--resume"])
        assert found.startswith(f"--resume: {tmp_path / 'run' / 'manifest.json'} is damaged: ")


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("learning_rate: fast", "", "--config: FILE: learning_rate: invalid float value: 'fast'"),
        ("max-length: 1", "", "--config: FILE: max_length: expected at least 2"),
        ("train: {mu: -1}", "", "--config: FILE: mu: expected a finite number of at least 0"),
        ("eval_data: no.json", "", "--config: FILE: eval_data: no such data file: no.json"),
        ("mu: -1", "--mu -2", "--mu: expected a finite number of at least 0, got -2.0"),
        ("mu: 1", "--alpha 0", "--alpha: expected a finite number above 0, got 0.0"),
    ],
)
def test_wrong_values_of_a_file(
    text: str,
    flags: str,
    message: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    found = refused(capsys, [*words, "--config", str(file), *flags.split()])
    assert found.startswith(message.replace("FILE", str(file)))


@pytest.mark.parametrize("name", ["model", "partition", "output", "data_split"])
def test_empty_words(name: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, [*words, f"--{name}", ""]).startswith(f"--{name}: expected ")


def test_folders_for_the_run(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").write_text("x")
    for name, message in (
        ("file", "expected a folder, got the file "),
        ("file/below", "not a directory: "),
        ("used", f"{str(tmp_path / 'used')!r} already holds a run; pass --resume"),
    ):
        found = refused(capsys, [*words, "--output", str(tmp_path / name)])
        assert found.startswith(f"--output: {message}")
    found = refused(capsys, [*words, "--output", str(tmp_path / "none"), "--resume"])
    assert found.startswith("--output: there is no run to resume in ")


def test_split(
    toy_model: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for given in (str(run), "", str(toy_data)):
        found = refused(capsys, ["split", given])
        assert found.startswith("RUN: expected a folder that `sftmix score` wrote, got ")
    words = ["score", "--model", str(toy_model), "--data", str(toy_data), "--output", str(run)]
    quiet = ["--num_scorings", "1", "--use_cpu", "true", "--disable_tqdm", "true"]
    assert main([*words, *quiet]) == 0
    for by in ("half", "quantiles:0", "quantiles:x", "quantiles:", ""):
        assert refused(capsys, ["split", str(run), "--by", by]).startswith("--by: expected ")
    assert refused(capsys, ["split", str(run), "--by", "random", "--seed", "-1"]) == (
        "--seed: expected 0 .. 2^64-1, got -1"
    )
    assert refused(capsys, ["split", str(run), "--seed", "x"]).startswith("--seed: invalid int")
    before = (run / "confidence.parquet").read_bytes()
    for text in ("{", "[]", "\x00"):
        (run / "manifest.json").write_text(text)
        found = refused(capsys, ["split", str(run), "--by", "reversed"])
        assert found.startswith(f"RUN: {run / 'manifest.json'} is damaged: ")
    assert (run / "confidence.parquet").read_bytes() == before
    (run / "manifest.json").unlink()
    (run / "confidence.parquet").write_bytes(before[:100])
    found = refused(capsys, ["split", str(run)])
    assert found.startswith(f"RUN: {run / 'confidence.parquet'}: cannot be read as a partition: ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("split", "the following arguments are required: RUN"),
        ("score --model MODEL --data x --output x --mu 1", "--mu: expected no such option, sftmix"),
        ("score --model MODEL --data x --output x --kl-reg=2", "--kl-reg: expected no such option"),
        ("report", "the following arguments are required: RUN"),
        ("report nowhere", "RUN: nowhere is no run of sftmix: it has no manifest.json"),
        ("report nowhere --examples -1", "--examples: expected at least 0, got -1"),
        ("report nowhere --output /", "--output: expected a file, got the folder /"),
        ("demo", "the following arguments are required: --output"),
        ("demo --output x --seed -1", "--seed: expected 0 .. 2^32-1, got -1"),
        ("demo --output ../x", "--output: a run name cannot leave its folder"),
        ("doctor now", "'now': sftmix doctor has no such option; `sftmix doctor --help` lists "),
        ("plan", "the following arguments are required: --model"),
        ("plan --model typo", "--model: no folder ./typo, and no such name in the hub's cache"),
        ("plan --model MODEL --gpu_memory much", "--gpu_memory: expected bytes such as 80GiB"),
        ("plan --model MODEL --optim adamm", "--optim: invalid choice: 'adamm'"),
        ("generate --model ./typo", "the following arguments are required: "),
        ("evaluate --model typo", "--model: no folder ./typo, and no such name in the hub's cache"),
        ("evaluate --model ./typo", "--model: no folder ./typo; a name on the hub would be such"),
        ("evaluate --model MODEL --tasks x", "--tasks: expected some of "),
        ("evaluate --model MODEL --batch_size 0", "--batch_size: expected at least 1, got 0"),
        ("evaluate --model MODEL --output no/x", "--output: there is no folder 'no'"),
        ("evaluate --model MODEL --tasks medqa --medqa_data no", "--medqa_data: no file or folde"),
        ("evaluate --model MODEL --tasks medqa --medqa_data no.json", "--medqa_data: no such data"),
        ("evaluate --model MODEL --tasks pubmedqa", "--pubmedqa_data: no data set of the hub has"),
        (
            "evaluate --model MODEL --tasks pubmedqa --pubmedqa_data MODEL/config.json "
            "--pubmedqa_ids no.json",
            "--pubmedqa_ids: no.json is not a JSON file: no such file or directory: 'no.json'",
        ),
    ],
)
def test_other_commands(
    flags: str,
    message: str,
    toy_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = flags.replace("MODEL", str(toy_model)).split(" ")
    assert refused(capsys, words).startswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model ./typo", "--model: no folder ./typo"),
        ("--questions no.json", "--questions: no such data file: no.json"),
        ("--questions no", "--questions: no file or folder 'no', and no data set of this name"),
        ("", "--max_new_tokens: question 'one owl' needs 2075 positions with answers of 2048 to"),
        ("--batch_size 0", "--batch_size: expected at least 1, got 0"),
        ("--max_new_tokens 0", "--max_new_tokens: expected at least 1, got 0"),
        ("--temperature -1", "--temperature: expected at least 0, got -1.0"),
        ("--top_k -1", "--top_k: expected at least 0, which means all, got -1"),
        ("--format x", "--format: invalid choice: 'x'"),
    ],
)
def test_generate(
    flags: str,
    message: str,
    toy_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("questions.json").write_text('[{"instruction": "one owl", "dataset": "x"}]')
    words = ["generate", "--model", str(toy_model), "--format", "alpaca_eval"]
    words += ["--questions", "questions.json", "--output", "out.json", "--use_cpu", "true"]
    assert refused(capsys, [*words, *flags.split()]).startswith(message)
    assert [path.name for path in Path().iterdir()] == ["questions.json"]


def test_only_the_first_rank_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("sftmix")
    for rank, level in (("0", logging.NOTSET), ("1", logging.ERROR)):
        monkeypatch.setenv("RANK", rank)
        try:
            assert main(["split", "nowhere"]) == 2
            assert logger.level == level
        finally:
            logger.setLevel(logging.NOTSET)


def test_no_message_shows_the_terminal_a_command(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "\x1b[31mred\u202e.json"
    odd.write_text("{")
    found = refused(capsys, [*words, "--data", str(odd)])
    assert r"\x1b[31mred\u202e.json" in found
    assert "\x1b" not in found


@pytest.mark.parametrize("command", ["train", "score"])
def test_a_loss_that_the_device_cannot_compute_leaves_no_run(
    command: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before a manifest is there, with which the mended command would not agree."""
    words = words if command == "train" else ["score", *words[1:7], *words[-4:]]
    found = refused(capsys, [*words, "--loss_schedule", "vocab_tiles"])
    assert found.startswith("--loss_schedule: vocab_tiles needs a CUDA device")
    assert not list(tmp_path.iterdir())
