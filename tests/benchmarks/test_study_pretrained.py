"""The study of pretrained models: its frozen lower layers, its plan, its data and its runs."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.study.__main__ import main
from benchmarks.study.parts import write_messages
from benchmarks.study.pretrained import runs
from benchmarks.study.pretrained.answers import distinct_bigrams, exact_match, last_number
from benchmarks.study.pretrained.data import (
    Prepared,
    draw,
    draw_questions,
    pubmedqa,
    read_material,
    read_prepared,
    write_prepared,
)
from benchmarks.study.pretrained.frozen import activations, put_back, upper_part
from benchmarks.study.pretrained.plan import Plan, Run
from benchmarks.study.pretrained.settings import QUICK, SEARCH_SEED, TRAINED, Sizes
from sftmix.evaluation.medical import Questions
from sftmix.model.head import HeadAdapter
from sftmix.pairs.collator import PairedCollator
from sftmix.recipe.arguments import RunArguments
from sftmix.recipe.loading import load_model, load_tokenizer
from sftmix.toy import build_toy_model
from sftmix.training import reference
from sftmix.training.config import SFTMixConfig
from sftmix.training.loss import Counts, batch_counts, batch_loss
from sftmix.training.trainer import SFTMixTrainer

VOCAB = 40
LENGTHS = (9, 5, 7, 12)


SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "tie_word_embeddings": True,
}


@pytest.fixture(params=["llama", "gemma3"])
def whole(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    if request.param == "llama":
        return LlamaForCausalLM(LlamaConfig(**SMALL))
    # Its embeddings are scaled, and its layers of two kinds: the window is shorter than examples.
    config = Gemma3TextConfig(**SMALL, num_key_value_heads=1, head_dim=8, sliding_window=4)
    config.layer_types = ["sliding_attention", "sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(config)


def examples() -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(1)
    found = []
    for number, length in enumerate(LENGTHS):
        tokens = torch.randint(1, VOCAB, (length,), generator=random).tolist()
        labels = [-100, -100, *tokens[2:]]
        found.append({"id": number, "input_ids": tokens, "labels": labels, "lam": 0.3})
    return found


def as_rows(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the examples with the rows of the table for tokens."""
    found, start = [], 1
    for one in given:
        length = len(one["input_ids"])
        found.append({**one, "input_ids": list(range(start, start + length))})
        start += length
    return found


def loss_of(model: Any, given: list[dict[str, Any]], tmp_path: Path) -> torch.Tensor:
    """Return SFTMix's loss of one batch, after its gradients were made."""
    batch = PairedCollator(0)(given)
    counts = Counts(*torch.stack(batch_counts([batch], torch.device("cpu"))))
    options = SFTMixConfig(output_dir=str(tmp_path), method="sftmix", use_cpu=True)
    loss = batch_loss(model, HeadAdapter(model), batch, options, counts).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("trained_layers", [1, 2])
def test_losses_and_gradients_are_those_of_the_whole_model(
    whole: Any, trained_layers: int, tmp_path: Path
) -> None:
    given = examples()
    read = activations(whole, trained_layers, [one["input_ids"] for one in given])
    upper = upper_part(copy.deepcopy(whole), trained_layers, read)
    for part in (whole.model.embed_tokens, *whole.model.layers[:-trained_layers]):
        part.requires_grad_(False)
    expected = loss_of(whole, given, tmp_path)
    torch.testing.assert_close(loss_of(upper, as_rows(given), tmp_path), expected)
    trained = {n: p for n, p in upper.named_parameters() if p.requires_grad}
    own = dict(whole.model.layers[-trained_layers:].named_parameters(prefix="model.layers"))
    own["model.norm.weight"] = whole.model.norm.weight
    assert len(trained) == len(own)
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, own[name].grad)


def test_activations_do_not_depend_on_who_shares_a_batch(whole: Any) -> None:
    tokens = [one["input_ids"] for one in examples()]
    alone = torch.cat([activations(whole, 1, [ids]) for ids in tokens])
    torch.testing.assert_close(activations(whole, 1, tokens), alone)
    assert len(whole.model.layers) == whole.config.num_hidden_layers == 3


@pytest.mark.parametrize("trained_layers", [1, 2])
@torch.no_grad()
def test_what_was_learnt_goes_back_into_the_whole_model(whole: Any, trained_layers: int) -> None:
    whole.eval()
    tokens = [one["input_ids"] for one in examples()]
    read = activations(whole, trained_layers, tokens)
    upper = upper_part(copy.deepcopy(whole), trained_layers, read).eval()
    before = whole(torch.tensor([tokens[0]])).logits
    for parameter in upper.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    put_back(whole, upper)
    rows = [one["input_ids"] for one in as_rows(examples())]
    for ids, own in zip(tokens, rows, strict=True):
        logits = whole(torch.tensor([ids])).logits
        torch.testing.assert_close(logits, upper(torch.tensor([own]), use_cache=False).logits)
    assert not torch.allclose(before, whole(torch.tensor([tokens[0]])).logits)


@pytest.mark.parametrize("trained_layers", [0, 3])
def test_a_model_is_parted_between_two_layers(whole: Any, trained_layers: int) -> None:
    with pytest.raises(ValueError, match=rf"expected 1 to 2 .* got {trained_layers}"):
        activations(whole, trained_layers, [[1, 2]])
    with pytest.raises(ValueError, match="trained_layers"):
        upper_part(whole, trained_layers, torch.zeros(2, 16))


def plan(tmp_path: Path, seeds: tuple[int, ...] = (0, 1)) -> Plan:
    for name in ("out", "cache"):
        (tmp_path / name).mkdir(exist_ok=True)
    return Plan(("gsm8k", "alpaca"), seeds, QUICK, tmp_path / "out", tmp_path / "cache")


def finish(own: Plan, run: Run, seconds: float = 10.0, **measures: float) -> None:
    record = {"cpu_seconds": seconds, "measures": measures}
    own.file(run).write_text(json.dumps(record), encoding="utf-8")
    if (kept := own.kept(run)) is not None:
        kept.touch()


def test_runs_come_in_an_order_in_which_each_has_what_it_needs(tmp_path: Path) -> None:
    own = plan(tmp_path)
    order = []
    while ready := own.ready():
        order.append(ready[0])
        finish(own, ready[0])
    assert sorted(order, key=str) == sorted(own.runs(), key=str)
    assert len(order) == 2 * (2 + 2 + 2) + 2 * 2 * (3 + len(TRAINED))
    seeds = [run.seed for run in order]
    assert seeds == sorted(seeds, key=[SEARCH_SEED, 0, 1].index)
    for place, run in enumerate(order):
        assert set(own.needs(run)) <= set(order[:place])
    assert own.status().splitlines()[0] == "gsm8k       30 of 30 runs done"


def test_the_longest_run_of_a_seed_comes_first(tmp_path: Path) -> None:
    own = plan(tmp_path, (0,))
    for run in own.runs():
        if run.seed == SEARCH_SEED or run.what in ("prepare", "reference"):
            finish(own, run)
    finish(own, Run("alpaca", 0, "dft"), seconds=5.0)
    finish(own, Run("alpaca", 0, "mixup"), seconds=500.0)
    assert own.ready()[0] == Run("gsm8k", 0, "mixup")
    assert own.ready()[-1] == Run("gsm8k", 0, "dft")


def test_a_run_is_claimed_once_and_free_again_when_its_process_ends(tmp_path: Path) -> None:
    own = plan(tmp_path)
    run = own.ready()[0]
    with own.claimed(run) as first, own.claimed(run) as second:
        assert (first, second) == (True, False)
        assert f"running: {run.name}" in own.status()
    # What a killed process leaves is the file of its lock.
    assert (tmp_path / "out/locks" / run.name / ".lock").exists()
    assert "running: none" in own.status()
    with own.claimed(run) as again:
        assert again
    finish(own, run)
    with own.claimed(run) as made_meanwhile:
        assert not made_meanwhile


def test_a_lost_cache_is_filled_again_for_those_who_need_it(tmp_path: Path) -> None:
    own = plan(tmp_path, (0,))
    for run in own.runs():
        finish(own, run)
    assert own.ready() == []
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
    assert own.ready() == []
    own.file(Run("gsm8k", 0, "dft")).unlink()
    assert own.ready() == [Run("gsm8k", 0, "prepare")]
    finish(own, Run("gsm8k", 0, "prepare"))
    assert own.ready() == [Run("gsm8k", 0, "reference")]
    finish(own, Run("gsm8k", 0, "reference"))
    assert own.ready() == [Run("gsm8k", 0, "dft")]


def test_status_says_what_is_left(tmp_path: Path) -> None:
    own = plan(tmp_path, (0,))
    run = Run("gsm8k", SEARCH_SEED, "prepare")
    finish(own, run, seconds=3600)
    lines = own.status().splitlines()
    assert lines[0] == "gsm8k        1 of 18 runs done"
    assert lines[1] == "alpaca       0 of 18 runs done"
    assert lines[-1].startswith("35 left: ")
    assert lines[-1].endswith("1.0 core-hours spent")


def test_each_model_has_its_own_seeds_and_systems(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["status", "--study", "gemma3", "--out", str(tmp_path)])
    # Preparation and three rates; for each seed preparation, two references, base and four systems.
    searches, seeds = 1 + 3 + 1, 3 * (4 + 4)
    assert f"pubmedqa     0 of {searches + seeds} runs done" in capsys.readouterr().out
    main(["status", "--study", "gemma3", "--seeds", "7", "--out", str(tmp_path)])
    assert f"pubmedqa     0 of {searches + 8} runs done" in capsys.readouterr().out


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return runs.toy_model(tmp_path_factory.mktemp("toy") / "model")


def prepared(toy: str, tmp_path: Path, seed: int = 0, **changes: Any) -> Prepared:
    arguments = RunArguments(toy, [], "")
    model, tokenizer = load_model(arguments), load_tokenizer(arguments)
    material = read_material("demo", None)
    sizes = Sizes(**{**vars(QUICK), **changes})
    path = tmp_path / "prepared.safetensors"
    tokens = write_prepared(path, model, tokenizer, material, seed, sizes, "this")
    found = read_prepared(path, "this")
    assert len(found.read) == tokens
    with pytest.raises(ValueError, match=r"--cache: .* was made for this, expected that"):
        read_prepared(path, "that")
    return found


def test_what_is_prepared_is_what_was_drawn(toy: str, tmp_path: Path) -> None:
    found = prepared(toy, tmp_path)
    tokenizer = load_tokenizer(RunArguments(toy, [], ""))
    pool = read_material("demo", None).source.pool
    train = draw(pool, QUICK.train_examples, 0, tokenizer, QUICK.max_length["demo"])
    assert found.parts["train"]["labels"][:] == train["labels"][:]
    model = load_model(RunArguments(toy, [], ""))
    expected = activations(model, QUICK.trained_layers, train["input_ids"][:])
    torch.testing.assert_close(found.read[: len(expected)], expected)
    rows = [row for part in found.parts.values() for ids in part["input_ids"] for row in ids]
    assert rows == list(range(1, len(found.read) + 1))
    assert found.scale > 0


def test_a_search_measures_on_what_may_be_trained_on(toy: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(RunArguments(toy, [], ""))
    material = read_material("demo", None)
    number = QUICK.train_examples + QUICK.held_out_examples
    both = draw(material.source.pool, number, SEARCH_SEED, tokenizer, 96)
    found = prepared(toy, tmp_path, SEARCH_SEED)
    assert list(found.parts) == ["train", "held_out"]
    ids = [*found.parts["train"]["id"][:], *found.parts["held_out"]["id"][:]]
    assert ids == both["id"][:]
    assert len(set(ids)) == number


def test_examples_that_are_too_long_are_not_drawn(toy: str) -> None:
    tokenizer = load_tokenizer(RunArguments(toy, [], ""))
    pool = read_material("demo", None).source.pool
    assert max(map(len, draw(pool, 5, 0, tokenizer, 60)["input_ids"])) <= 60
    with pytest.raises(ValueError, match=r"expected (\d+) of \1 examples to have at most 60"):
        draw(pool, len(pool), 0, tokenizer, 60)


def test_pubmedqa_keeps_its_test_questions_apart(tmp_path: Path) -> None:
    row = {"CONTEXTS": ["a", "b"], "final_decision": "yes", "LONG_ANSWER": "It does."}
    rows = {str(n): {**row, "QUESTION": f"Does {n}?"} for n in range(5)}
    file, ids = tmp_path / "rows.json", tmp_path / "ids.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    ids.write_text(json.dumps({"1": "yes", "3": "yes"}), encoding="utf-8")
    found = pubmedqa(file, ids)
    assert [one.id for one in found.source.held_out] == [1, 3]
    assert [one.id for one in found.source.pool] == [0, 2, 4]
    assert found.questions is not None
    assert found.questions.documents["QUESTION"][:] == ["Does 1?", "Does 3?"]
    assert found.source.pool[0].messages == [
        {"role": "user", "content": "Does 0?"},
        {"role": "assistant", "content": "It does."},
    ]


def questions() -> Questions:
    config = {"doc_to_choice": ["a", "b", "c"], "doc_to_target": "right", "doc_to_text": "{{Q}}:"}
    rows = [{"Q": f"word {n} and {n * n}", "right": "abc"[n % 3]} for n in range(7)]
    return Questions(config, datasets.Dataset.from_list(rows), "here")


def test_seeds_share_the_questions_out(toy: str) -> None:
    tokenizer = load_tokenizer(RunArguments(toy, [], ""))
    drawn = [draw_questions(questions(), seed, tokenizer, 2)[0] for seed in range(4)]
    distinct = {tuple(prompt) for share in drawn for prompt in share}
    assert len(distinct) == 7
    config = {**questions().config, "doc_to_choice": ["a", "a"]}
    same = Questions(config, questions().documents, "here")
    with pytest.raises(ValueError, match="to begin with another token"):
        draw_questions(same, 0, tokenizer, 2)


def test_accuracy_is_that_of_the_whole_model(toy: str) -> None:
    arguments = RunArguments(toy, [], "")
    model, tokenizer = load_model(arguments), load_tokenizer(arguments)
    prompts, known = draw_questions(questions(), 0, tokenizer, 7)
    choices, right = known["questions.choices"], known["questions.right"]
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in prompts])
    expected = (logits[:, choices].argmax(-1) == right).double().mean().item()
    read = activations(model, 1, prompts)
    upper = upper_part(model, 1, read)
    HeadAdapter(upper)
    rows = [one["input_ids"] for one in as_rows([{"input_ids": ids} for ids in prompts])]
    given: Any = SimpleNamespace(questions=rows, right=right, choices=choices)
    assert runs.accuracy(upper, given) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So 3 + 4 = <<3+4=7>>7 eggs.\n#### 7", "7"),
        ("It costs $1,250.", "1250"),
        ("It costs $12.50.", "12.50"),
        ("-5 degrees", "-5"),
        ("7 eggs... 3 left", "3"),
        # As the harness has it.
        ("7 eggs...", ".."),
        ("It is 12., so", "12"),
        ("It costs 18.$", "18"),
        ("3-2", "-2"),
        ("none", None),
    ],
)
def test_the_last_number_is_what_the_harness_takes(text: str, number: str | None) -> None:
    assert last_number(text) == number


def test_an_answer_matches_by_its_last_number() -> None:
    responses = ["So $1,200.\n#### 1,200", "#### 7", "#### 7"]
    assert exact_match(["#### 1200", "6 or 7", "7 or 6"], responses) == pytest.approx(2 / 3)
    assert exact_match(["7", "7"], ["#### 7", "seven"]) is None


def test_bigrams_are_counted_over_all_texts_and_none_spans_two() -> None:
    assert distinct_bigrams(["a b c", "b c", "d"]) == pytest.approx(2 / 3)
    assert distinct_bigrams(["a", ""]) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_answers_are_those_of_the_trained_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    weights: list[torch.Tensor] = []
    answer = runs.answers_of

    def tell(model: Any, tokenizer: Any, chosen: Any, tokens: int) -> dict[str, float]:
        asked.append([one.messages[0]["content"] for one in chosen])
        weights.append(model.model.layers[-1].mlp.down_proj.weight.detach().clone())
        return answer(model, tokenizer, chosen, tokens)

    monkeypatch.setattr(runs, "answers_of", tell)
    study = quick_study(tmp_path, ("ntp",), max_new_tokens=3)
    runs.make_all(study)
    run, base = Run("demo", 0, "ntp"), Run("demo", 0, "base")
    found = study.plan.record(run)
    assert found["max_new_tokens"] == 3
    assert 0 < found["measures"]["answer_tokens"] <= 3
    assert 0 <= found["measures"]["answers_ended"] <= 1
    assert study.plan.record(base)["responses"]["answer_tokens"] > 3
    # The base and NTP, on the same questions; the search asks none.
    assert len(asked) == 2
    assert asked[0] == asked[1] == [one.messages[0]["content"] for one in study.held_out(run)]
    ids = {one.id for one in read_material("demo", None).source.held_out}
    assert set(study.prepared(run).parts["held_out"]["id"][:]) <= ids
    untrained = load_model(RunArguments(study.model, [], "")).model.layers[-1].mlp.down_proj.weight
    assert torch.equal(weights[0], untrained)
    assert not torch.equal(weights[1], untrained)
    silent = dataclasses.replace(study, max_new_tokens=None)
    with pytest.raises(ValueError, match=r"made with max_new_tokens = 3, now it is None; give"):
        runs.make(silent, run)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_a_quick_study_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    out, cache = tmp_path / "out", tmp_path / "cache"
    words = ["--quick", "--seeds", "0", "--out", str(out)]
    main(["run", "--next", *words, "--cache", str(cache)])
    assert [file.name for file in out.glob("*.json")] == ["demo-search-prepare.json"]
    main(["run", "--all", *words, "--cache", str(cache)])
    made = {file.name: file.read_text("utf-8") for file in out.glob("*.json")}
    assert len(made) == 18
    records = {name: json.loads(text) for name, text in made.items()}
    ntp, base = records["demo-0-ntp.json"], records["demo-0-base.json"]
    assert [point["epoch"] for point in ntp["curve"]] == [0.5, 1.0]
    assert ntp["measures"]["train_loss"] < base["measures"]["train_loss"]
    assert ntp["measures"]["held_out_loss"] == ntp["curve"][-1]["held_out_loss"]
    losses = {
        name: record["measures"]["held_out_loss"]
        for name, record in records.items()
        if record["what"] in TRAINED
    }
    assert len(set(losses.values())) == len(TRAINED)
    # Made again it is the same.
    (out / "demo-0-ntp.json").unlink()
    main(["run", "--next", *words, "--cache", str(cache)])
    again = json.loads((out / "demo-0-ntp.json").read_text("utf-8"))
    assert again["curve"] == ntp["curve"]
    assert again["measures"] == ntp["measures"]
    main(["status", *words])
    assert "18 of 18 runs done" in capsys.readouterr().out
    main(["report", str(out)])
    said = capsys.readouterr().out
    assert "| NTP, noise on activations |" in said
    assert (out / "curves.svg").exists()
    main(["run", "--next", *words, "--cache", str(cache)])
    assert "no run to make now" in capsys.readouterr().out


def quick_study(tmp_path: Path, systems: tuple[str, ...], **more: Any) -> runs.Study:
    """Return a study of the bundled data with one seed and no mus."""
    for name in ("out", "cache"):
        (tmp_path / name).mkdir(parents=True)
    sizes = Sizes(**{**vars(QUICK), "mus": (), **more.pop("sizes", {})})
    own = Plan(("demo",), (0,), sizes, tmp_path / "out", tmp_path / "cache", systems)
    return runs.Study(own, runs.toy_model(tmp_path / "toy"), None, **more)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_halves_of_another_model_are_those_that_it_scored(tmp_path: Path) -> None:
    other = quick_study(tmp_path / "other", ("ntp",), sizes={"learning_rates": (7e-3,)})
    examples = tmp_path / "examples.jsonl"
    write_messages(examples, read_material("demo", None).source.pool)
    wider = {"vocab_size": 400, "hidden_size": 24, "num_layers": 2}
    build_toy_model(tmp_path / "wider", [examples], **wider, max_length=96, seed=1)
    other = dataclasses.replace(other, model=str(tmp_path / "wider"))
    runs.make_all(other)
    study = quick_study(tmp_path / "own", ("sftmix", "sftmix-other"), other=other)
    runs.make_all(study)
    record = {run.what: study.plan.record(run) for run in study.plan.runs() if run.seed == 0}
    assert record["other"]["learning_rate"] == 7e-3
    assert record["other"]["other_model"] == runs.weights_hash(other.model)
    assert record["other"]["partition"] != record["reference"]["partition"]
    # The other study drew the same examples, and its reference is what scores here.
    own = other.plan.record(Run("demo", 0, "reference"))
    assert record["other"]["median_confidence"] == pytest.approx(own["median_confidence"])
    run = Run("demo", 0, "sftmix-other")
    assert study.partition(run, "other").id.tolist() == study.partition(run).id.tolist()
    assert 0 < record["sftmix-other"]["same_half"] < 1
    assert record["sftmix-other"]["curve"] != record["sftmix"]["curve"]
    # What another study left in the same cache is not taken.
    shutil.copy(tmp_path / "other/cache/demo-0-reference.parquet", tmp_path / "own/cache")
    with pytest.raises(ValueError, match=r"--cache: .*demo-0-reference.parquet is not what .*json"):
        study.partition(run)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_trains_updates_of_the_upper_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    learnt: list[dict[str, tuple[int, ...]]] = []

    def tell(**given: Any) -> SFTMixTrainer:
        of = given["model"].named_parameters()
        learnt.append({name: tuple(p.shape) for name, p in of if p.requires_grad})
        assert given["model"].peft_config["default"].lora_alpha == 32
        return SFTMixTrainer(**given)

    monkeypatch.setattr(runs, "SFTMixTrainer", tell)
    monkeypatch.setattr(reference, "SFTMixTrainer", tell)
    study = quick_study(tmp_path, ("ntp",), lora_rank=16)
    runs.make_all(study)
    # Two rates and two references, and NTP.
    assert len(learnt) == 5
    layers = ("q", "k", "v", "o", "gate", "up", "down")
    for shapes in learnt:
        names = {name.partition(".layers.")[2] for name in shapes}
        assert {name.split(".")[2] for name in names} == {f"{layer}_proj" for layer in layers}
        assert {name.split(".")[0] for name in names} == {"0"}
        assert len(names) == 2 * len(layers)
        assert all(16 in shape for shape in shapes.values())
    ntp, base = (study.plan.record(Run("demo", 0, what)) for what in ("ntp", "base"))
    assert ntp["measures"]["train_loss"] < base["measures"]["train_loss"]
    full = dataclasses.replace(study, lora_rank=None)
    with pytest.raises(ValueError, match=r"made with lora_rank = 16, now it is None; give another"):
        runs.make(full, Run("demo", 0, "ntp"))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["gemma3", "--model", "m"], "--other-model: expected the folder that"),
        (["lora", "--model", "m", "--other-model", "o"], "and none with other studies or --quick"),
        (["gemma3", "--quick", "--other-model", "o"], "and none with other studies or --quick"),
    ],
)
def test_another_model_is_given_where_it_is_used(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--next", "--out", "o", "--cache", "c", "--study", *words])
    assert reason in capsys.readouterr().err


def test_another_model_has_to_be_the_one_of_the_results(toy: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--other-model: expected the weights that .* `fetch sm"):
        runs.finished("smollm2", toy, None)
    with pytest.raises(ValueError, match=r"--other-model: no file"):
        runs.finished("smollm2", str(tmp_path), None)


def test_results_of_other_sizes_are_refused(tmp_path: Path) -> None:
    own = plan(tmp_path)
    run = own.ready()[0]
    record = {"sizes": {"epochs": 7}}
    own.file(run).write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ValueError, match=r"--out: .* give another folder"):
        runs.check_alike(runs.Study(own, "nowhere", None), run)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["run", "--next", "--out", "o", "--cache", "c"], "--model: expected the folder"),
        (["run", "--out", "o", "--cache", "c"], "one of the arguments --next --all is required"),
        (["status"], "--out"),
        (["fetch", "gpt5", "--output", "x"], "invalid choice: 'gpt5'"),
    ],
)
def test_wrong_words_are_refused(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err


def test_a_wrong_command_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected one of fetch, run, status, report, small"):
        main(["walk"])
    with pytest.raises(ValueError, match=r"--data-folder: no file .*gsm8k_train.jsonl"):
        read_material("gsm8k", tmp_path)
    with pytest.raises(ValueError, match=r"--data-folder: expected a folder with alpaca_9k.json"):
        read_material("alpaca", None)
    with pytest.raises(ValueError, match=r"--model: no file .*model.safetensors; `fetch` makes"):
        runs.weights_hash(str(tmp_path))
