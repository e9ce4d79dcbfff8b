"""The table of methods: where it is read, and that a new entry is all that a method needs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest

from sftmix.cli import main
from sftmix.methods import METHODS, OPTIONS, Method, method_of
from sftmix.recipe.arguments import TrainRunArguments, parse
from sftmix.training.config import SFTMixConfig
from tests.sftmix import tiny

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def _focal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry that the page shows, the focal loss, and nothing else."""
    page = (REPOSITORY / "docs" / "methods.md").read_text(encoding="utf-8")
    table: dict[str, Method] = {}
    [code] = re.findall(r"```python\n(def focal.*?)```", page, re.DOTALL)
    exec(code, {"METHODS": table, "Method": Method})
    monkeypatch.setitem(METHODS, "focal", table["focal"])


@pytest.mark.usefixtures("_focal")
def test_an_entry_is_all_that_a_method_needs(
    toy_model: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--model", str(toy_model), "--data", str(toy_data), "--use_cpu", "true"]
    words += ["--disable_tqdm", "true", "--max_steps", "2", "--logging_steps", "1"]
    words += ["--learning_rate", "0.01", "--save_strategy", "no"]
    losses = {}
    for method, head in (("ntp", "fused"), ("focal", "fused"), ("focal", "logits")):
        run = tmp_path / f"{method}-{head}"
        assert main([*words, "--output", str(run), "--method", method, "--head", head]) == 0
        log = json.loads((run / "trainer_state.json").read_text())["log_history"]
        losses[run.name] = [line["loss"] for line in log if "loss" in line]
    assert losses["focal-fused"] == pytest.approx(losses["focal-logits"], rel=1e-5)
    assert 0.5 * losses["ntp-fused"][0] < losses["focal-fused"][0] < losses["ntp-fused"][0]
    card = (tmp_path / "focal-fused" / "README.md").read_text()
    assert "fine-tuned with Focal loss" in card
    assert "each token weighted by the square of what its probability lacks." in card
    pytest.importorskip("matplotlib")
    runs = [str(tmp_path / name) for name in losses]
    capsys.readouterr()
    page = tmp_path / "report.html"
    assert main(["report", *runs[:2], "--output", str(page), "--examples", "0"]) == 0
    assert "\nFocal loss " in capsys.readouterr().out
    assert "Focal loss" in page.read_text()


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
@pytest.mark.usefixtures("_focal")
def test_trl_trains_with_a_new_method(
    toy_model: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    monkeypatch.setenv("CI", "1")  # TRL tells its makers of every trainer otherwise
    from sftmix.integrations.trl import SFTMixSFTConfig, SFTMixSFTTrainer

    rows = [json.loads(line) for line in toy_data.read_text().splitlines()][:8]
    data = datasets.Dataset.from_list(
        [{"prompt": row["question"], "completion": " " + row["answer"]} for row in rows]
    )
    args = SFTMixSFTConfig(
        output_dir=str(tmp_path), method="focal", use_cpu=True, bf16=False, max_steps=1,
        disable_tqdm=True, logging_steps=1, save_strategy="no", report_to="none",
    )  # fmt: skip
    made = SFTMixSFTTrainer(str(toy_model), args, train_dataset=data)
    made.train()
    ((loss, ntp),) = tiny.losses(made, "loss", "ntp_loss")
    assert 0 < loss < ntp


def test_an_unknown_method_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"^method: expected sftmix, ntp, .*; got 'other'$"):
        method_of("other")


def test_options_are_of_the_methods_that_read_them() -> None:
    of_pairs = ("alpha", "lambda_scope", "pairing")
    objectives = ("power_k", "eaft_alpha", "gem_beta")
    assert ("mu", *of_pairs, "label_smoothing_factor", "kl_reg", *objectives) == OPTIONS
    assert METHODS["sftmix"].options == ("mu", "alpha", "lambda_scope", "pairing")
    assert METHODS["ir_dro"].options == ("kl_reg",)
    assert METHODS["ntp"].options == ("label_smoothing_factor",)
    assert METHODS["dft"].options == ()


@pytest.mark.parametrize("name", METHODS)
def test_the_page_has_the_line_of_a_method(name: str) -> None:
    method = METHODS[name]
    lines = (REPOSITORY / "docs" / "methods.md").read_text(encoding="utf-8").splitlines()
    assert f"| `{name}` | {method.formula} | {method.source} |" in lines


@pytest.mark.parametrize(
    ("method", "typed", "told"),
    [
        ("ntp", ["--mu", "0.9", "--kl-reg=3", "--alpha", "1"], ["--alpha, --kl-reg, --mu"]),
        ("equal", ["--mu", "0.9", "--alpha", "1"], ["--mu"]),
        ("sftmix", ["--mu", "0.9", "--alpha", "1"], []),
        ("dft", ["--power_k", "3", "--gem_beta", "1"], ["--gem_beta, --power_k"]),
        ("power", ["--power_k", "3"], []),
        ("ntp", [], []),
    ],
)
def test_typed_options_that_the_method_does_not_read_are_named(
    method: str, typed: list[str], told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = ["--model", "m", "--data", "d", "--output", "o", "--use_cpu", "true", "--bf16", "false"]
    parse([*words, "--method", method, *typed], TrainRunArguments, SFTMixConfig, "sftmix train")
    found = [r.getMessage() for r in caplog.records if r.name == "sftmix.recipe.arguments"]
    assert found == [f"not used by --method {method}: {names}" for names in told]
