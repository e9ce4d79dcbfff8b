"""What is saved ends its turns as training taught: template, end of turn, generation config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, pipeline

from sftmix.cli import main
from sftmix.evaluation.answering import stops
from sftmix.evaluation.medical import load
from sftmix.templates.chat import PLAIN_TEMPLATE
from sftmix.templates.tokenizing import tokenize_examples
from sftmix.templates.turn_ends import TurnEnds, end_token, stop_advice
from sftmix.training.config import SFTMixConfig
from sftmix.training.trainer import SFTMixTrainer
from tests.sftmix import chats, tiny
from tests.sftmix.chats import TWO, tokenizer_of

QUIET = ["--use_cpu", "true", "--disable_tqdm", "true", "--save_strategy", "no"]


def saved_base(folder: Path, template: str | None, **tokens: str) -> Path:
    """A base model whose texts end with </s>, and its tokenizer."""
    tokenizer = tokenizer_of(template, **tokens)
    tokenizer.save_pretrained(folder)
    model = tiny.build("Llama", vocab_size=len(tokenizer), max_position_embeddings=256)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    row = {"question": "one", "answer": "the answer"}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    return path


def trained(base: Path, rows: Path, run: Path, *more: str) -> Path:
    words = ["--model", base, "--data", rows, "--output", run, "--method", "ntp"]
    assert main(["train", *map(str, words), *QUIET, *more]) == 0
    return run


def eos_of(folder: Path) -> list[int]:
    found = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    return found if isinstance(found, list) else [found]


def tokens_of(tokenizer: PreTrainedTokenizerFast, *names: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(name) for name in names]


# The end among those that generation stops at

ENDS = {
    "chatml": (chats.CHATML, "<|im_end|>"),
    "llama3": (chats.LLAMA3, "<|eot_id|>"),
    "gemma": (chats.GEMMA, "<end_of_turn>"),
    "phi3": (chats.PHI3, "<|end|>"),
    "glm": (chats.GLM4, "<|user|>"),
    "marked": (chats.MARKED, "<|im_end|>"),
    "zephyr": (chats.ZEPHYR, "</s>"),
    "plain": (None, "</s>"),
}


@pytest.mark.parametrize("name", ENDS)
def test_generation_stops_where_training_ends_a_turn(name: str) -> None:
    template, end = ENDS[name]
    tokenizer = tokenizer_of(template)
    token = end_token(tokenizer)
    assert [token] == tokens_of(tokenizer, end)
    for before in (None, 2, [2, 7], token, [5, token]):
        model = tiny.build("Llama", vocab_size=len(tokenizer))
        model.generation_config.eos_token_id = before
        for _ in range(2):
            TurnEnds(tokenizer).align(model)
            found = model.generation_config.eos_token_id
            known = [before] if isinstance(before, int) else before or []
            kept = [*known, token] if token not in known else known
            assert (found if isinstance(found, list) else [found]) == kept
    assert token in stops(tokenizer, None)[0]
    assert f"That is token {token}:" in stop_advice(tokenizer)


def test_a_base_model_that_ends_otherwise(tmp_path: Path, rows: Path) -> None:
    """The saved model has ChatML's end beside its own, and the template, in checkpoints too."""
    base = saved_base(tmp_path / "base", chats.CHATML)
    run = trained(base, rows, tmp_path / "run", "--save_strategy", "epoch")
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert eos_of(run) == tokens_of(tokenizer, "</s>", "<|im_end|>")
    assert tokenizer.chat_template == chats.CHATML
    (checkpoint,) = sorted(run.glob("checkpoint-*"))[-1:]
    assert set(tokens_of(tokenizer, "</s>", "<|im_end|>")) <= set(eos_of(checkpoint))


def test_the_pipeline_ends_its_turns(tmp_path: Path, rows: Path) -> None:
    """Trained until it says so, transformers' own pipeline gets the answer and no more."""
    base = saved_base(tmp_path / "base", chats.CHATML)
    more = ["--num_train_epochs", "30", "--learning_rate", "0.05", "--warmup_steps", "0"]
    run = trained(base, rows, tmp_path / "run", *more)
    ask = pipeline("text-generation", model=str(run), device="cpu")
    with torch.inference_mode():
        (found,) = ask([{"role": "user", "content": "one"}], max_new_tokens=30, do_sample=False)
    assert found["generated_text"][-1]["content"] == "the answer"


def test_the_plain_template_is_saved(tmp_path: Path, rows: Path) -> None:
    base = saved_base(tmp_path / "base", None)
    assert AutoTokenizer.from_pretrained(base).chat_template is None
    # Where nothing is tokenised that could have given it, too.
    assert load(str(base))[1].chat_template == PLAIN_TEMPLATE
    run = trained(base, rows, tmp_path / "run")
    found = AutoTokenizer.from_pretrained(run)
    assert found.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == (
        "<s>### Instruction:\na"
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_has_the_template(tmp_path: Path, rows: Path) -> None:
    pytest.importorskip("peft")
    base = saved_base(tmp_path / "base", None)
    (tmp_path / "t.jinja").write_text(chats.CHATML)
    more = ["--lora_rank", "2", "--chat_template", str(tmp_path / "t.jinja")]
    run = trained(base, rows, tmp_path / "run", *more)
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert tokenizer.chat_template == chats.CHATML
    (token,) = tokens_of(tokenizer, "<|im_end|>")
    card = (run / "README.md").read_text()
    assert f"It ends its turns with `<|im_end|>`. That is token {token}:" in card
    assert chats.CHATML in card


# Warnings


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "sftmix.templates.turn_ends"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (chats.ENDLESS, "ends no turn: the model does not learn where to stop"),
        (chats.WORDS, "ends a turn with the text '\\n### End', of which no token"),
        (
            chats.MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"),
            "ends no turn",
        ),
        (chats.CHATML.replace("im_end", "unknown"), "ends a turn with the text '<|unknown|>'"),
    ],
    ids=["no end", "words", "end outside the marks", "no such token"],
)
def test_a_turn_that_does_not_end_is_warned_about_once(
    template: str, said: str, tmp_path: Path, rows: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(saved_base(tmp_path / "base", template), rows, tmp_path / "run")
    (line,) = lines(caplog)
    assert said in line


def test_no_warning_where_turns_end(
    tmp_path: Path, rows: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(saved_base(tmp_path / "base", chats.CHATML), rows, tmp_path / "run")
    assert lines(caplog) == []


# In a script of one's own


def script(tmp_path: Path, tokenizer: Any, **more: Any) -> SFTMixTrainer:
    data = tokenize_examples([TWO] * 4, tokenizer)
    return SFTMixTrainer(
        model=more.pop("model", None) or tiny.build("Llama", vocab_size=len(tokenizer)),
        args=SFTMixConfig(
            output_dir=str(tmp_path / "run"),
            method="ntp",
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            per_device_train_batch_size=2,
            max_steps=1,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        **more,
    )


def test_the_trainer_in_a_script(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_of(chats.CHATML)
    made = script(tmp_path, tokenizer)
    made.train()
    made.save_model(str(tmp_path / "model"))
    assert set(tokens_of(tokenizer, "<|im_end|>", "</s>")) <= set(eos_of(tmp_path / "model"))
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == chats.CHATML
    assert lines(caplog) == []


def test_options_that_transformers_does_not_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Found out before training, not when the trained model is saved."""
    tokenizer = tokenizer_of(chats.CHATML)
    model = tiny.build("Llama", vocab_size=len(tokenizer))
    model.generation_config.temperature, model.generation_config.top_p = 0.6, 0.9
    made = script(tmp_path, tokenizer, model=model)
    assert "do_sample is set to true" in caplog.text
    made.train()
    made.save_model(str(tmp_path / "model"))
    saved = GenerationConfig.from_pretrained(tmp_path / "model")
    assert (saved.do_sample, saved.temperature, saved.top_p) == (True, 0.6, 0.9)
    model.generation_config.length_penalty = 0.5
    with pytest.raises(ValueError, match=r"^model: expected a generation_config\.json that .*beam"):
        script(tmp_path, tokenizer, model=model)


def test_a_script_s_plain_template_is_saved(tmp_path: Path) -> None:
    made = script(tmp_path, tokenizer_of(None))
    made.save_model(str(tmp_path / "model"))
    assert "### Response:" in AutoTokenizer.from_pretrained(tmp_path / "model").chat_template


def test_a_template_that_is_changed_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tokenizer_of(chats.CHATML)
    made = script(tmp_path, tokenizer)
    tokenizer.chat_template = chats.LLAMA3
    made.save_model(str(tmp_path / "model"))
    (line,) = lines(caplog)
    assert "changed since the trainer was made: what is saved ends its turns with" in line
    assert "'<|eot_id|>', training with '<|im_end|>'" in line


def test_a_script_is_warned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script(tmp_path, tokenizer_of(chats.ENDLESS))
    assert len(lines(caplog)) == 1
