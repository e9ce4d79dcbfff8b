"""Loss, gradients, logs and evaluation of a training step, against dense compositions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from sftmix.methods import METHODS
from sftmix.pairs.collator import PairedCollator
from sftmix.training.config import SFTMixConfig
from sftmix.training.trainer import make_collator
from tests.sftmix import tiny

HEADS = {"Llama": {}, "Gemma2": {"cap": 0.5}, "Cohere": {"scale": 0.25}, "Phi": {}, "GPT2": {}}
TERMS = ("loss", "ntp_loss", "mixup_loss")


def dense_terms(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    pairs: list[tuple[int, int, float]],
    *,
    scale: float = 1.0,
    cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed NTP losses of each example (B,), summed Mixup loss, number of mixed pairs.

    ``pairs`` are examples (c, u, lam). Hidden states are mixed after the final norm, and the mixed
    ones go through the head; targets are dense.
    """
    seen = {}
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: seen.update(hidden=inputs[0])
    )
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits[:, :-1].double()
    hook.remove()
    labels = batch["labels"][:, 1:]
    ntp = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
    head = model.get_output_embeddings()
    bias = None if head.bias is None else head.bias.double()
    mixup, count = logits.new_zeros(()), 0
    for c, u, lam in pairs:
        places = [labels[row].ne(-100).nonzero().squeeze(-1) for row in (c, u)]
        shorter = min(map(len, places))
        z_c, z_u = (
            seen["hidden"][row, kept[:shorter]].double()
            for row, kept in zip((c, u), places, strict=True)
        )
        one_hot = [
            F.one_hot(labels[row, kept[:shorter]], logits.shape[-1]).double()
            for row, kept in zip((c, u), places, strict=True)
        ]
        mixed = F.linear(lam * z_c + (1 - lam) * z_u, head.weight.double(), bias) * scale
        if cap is not None:
            mixed = cap * torch.tanh(mixed / cap)
        target = lam * one_hot[0] + (1 - lam) * one_hot[1]
        mixup = mixup - (target * mixed.log_softmax(-1)).sum()
        count += shorter
    return ntp, mixup, torch.tensor(count)


def in_pairs(batch: dict[str, Tensor]) -> list[tuple[int, int, float]]:
    """The pairs of a batch in order, their lam found through the first row of each."""
    found = []
    for c in range(0, len(batch["ids"]), 2):
        mine = batch["owner"][batch["pair_c"]] == c
        found.append((c, c + 1, float(batch["lam"][mine][0])))
    return found


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class Recorder(TrainerCallback):
    """Keeps the gradients of every step before they are used."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(gradients(kwargs["model"]))


class Seen(PairedCollator):
    """Keeps the batches it makes."""

    def __init__(self) -> None:
        super().__init__(0)
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, examples: Any) -> dict[str, Tensor]:
        self.batches.append(super().__call__(examples))
        return self.batches[-1]


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("mu", [0.2, 3.0])
def test_loss_and_gradients_of_a_micro_batch(family: str, mu: float, tmp_path: Path) -> None:
    model, dense = tiny.build(family), tiny.build(family)
    made = tiny.trainer(model, tmp_path, tiny.examples(6), per_device_train_batch_size=6, mu=mu)
    batch = next(iter(made.get_train_dataloader()))
    loss = made.compute_loss(model, batch)
    assert isinstance(loss, Tensor)
    loss.backward()
    ntp, mixup, pairs = dense_terms(dense, batch, in_pairs(batch), **HEADS[family])
    expected = ntp.sum() / batch["rows"].numel() + mu * mixup / pairs
    expected.backward()
    assert batch["pair_c"].numel() == pairs < batch["rows"].numel() / 2
    assert tiny.relative_difference(loss, expected) <= 1e-5
    found, wanted = gradients(model), gradients(dense)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert tiny.relative_difference(found[name], gradient) <= 1e-5, name


def one_step(folder: Path, size: int, windows: int, **changes: Any) -> tuple[Any, Any]:
    recorder, model = Recorder(), tiny.build("Llama")
    # Trainer divides the loss of such a model by the number of micro-batches, if it is let.
    model.accepts_loss_kwargs = False
    made = tiny.trainer(
        model,
        folder,
        tiny.examples(16),
        callbacks=[recorder],
        per_device_train_batch_size=size,
        gradient_accumulation_steps=windows,
        max_grad_norm=0.0,
        **changes,
    )
    made.train()
    return recorder.steps, tiny.losses(made, *TERMS)


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    """Uneven micro-batches: a mean of their means would be another loss."""
    whole, whole_logs = one_step(tmp_path, 8, 1, learning_rate=0.0)
    assert len(whole) == len(whole_logs) == 2
    for size, windows in ((4, 2), (2, 4)):
        steps, logs = one_step(tmp_path, size, windows, learning_rate=0.0)
        for found, expected in zip(steps, whole, strict=True):
            for name, gradient in expected.items():
                assert tiny.relative_difference(found[name], gradient) <= 1e-6, (size, name)
        for line, expected_line in zip(logs, whole_logs, strict=True):
            assert line == pytest.approx(expected_line, rel=1e-6)


def test_a_window_cut_short_is_a_mean_too(tmp_path: Path) -> None:
    """Eight batches in windows of six: the last window has two, and is a step of four examples."""
    steps, logs = one_step(tmp_path, 2, 6, learning_rate=0.0)
    quarters, quarter_logs = one_step(tmp_path, 4, 1, learning_rate=0.0)
    assert len(steps) == 2
    for name, gradient in quarters[-1].items():
        assert tiny.relative_difference(steps[-1][name], gradient) <= 1e-6, name
    assert logs[-1] == pytest.approx(quarter_logs[-1], rel=1e-6)


def test_logged_metrics(tmp_path: Path) -> None:
    """Two log lines of two steps each, over batches whose order the sampler drew."""
    seen, model = Seen(), tiny.build("Llama")
    data = tiny.examples(16)
    made = tiny.trainer(
        model, tmp_path, data, learning_rate=0.0, logging_steps=2, mu=0.7, eval_dataset=data
    )
    made.data_collator = seen
    made.train()
    lines = [line for line in made.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    confident = {data[row]["id"] for row, c in enumerate(tiny.halves(16)) if c}
    for line, batches in zip(lines, (seen.batches[:2], seen.batches[2:]), strict=True):
        expected = expected_log(tiny.build("Llama"), batches, confident)
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-5), name
        assert line["loss"] == pytest.approx(line["ntp_loss"] + 0.7 * line["mixup_loss"], rel=1e-6)
        assert line["tokens_per_second"] > 0
        assert 0 < line["peak_memory_gib"] < 1024


@torch.no_grad()
def expected_log(
    model: PreTrainedModel, batches: list[dict[str, Tensor]], confident: set[int]
) -> dict[str, float]:
    steps: list[tuple[float, float]] = []
    nll, tokens = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    lam, mixed = 0.0, 0
    for batch in batches:
        ntp, mixup, pairs = dense_terms(model, batch, in_pairs(batch))
        counts = (batch["labels"][:, 1:] != -100).sum(1)
        steps.append(((ntp.sum() / counts.sum()).item(), (mixup / pairs).item()))
        for place, name in enumerate(batch["ids"].tolist()):
            nll[name in confident] += float(ntp[place])
            tokens[name in confident] += int(counts[place])
        for c, u, share in in_pairs(batch):
            lam += share * int(min(counts[c], counts[u]))
        mixed += int(pairs)
    return {
        "ntp_loss": sum(ntp for ntp, _ in steps) / len(steps),
        "mixup_loss": sum(mixup for _, mixup in steps) / len(steps),
        "ntp_loss_confident": nll[True] / tokens[True],
        "ntp_loss_unconfident": nll[False] / tokens[False],
        "unmixed_fraction": 1 - 2 * mixed / (tokens[True] + tokens[False]),
        "lam_mean": lam / mixed,
    }


def test_evaluation_is_a_mean_over_tokens(tmp_path: Path) -> None:
    model, held_out = tiny.build("Llama"), tiny.examples(7, seed=5)
    batch = PairedCollator(0)(list(held_out))
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        own = float(model(**inputs).loss)
    for dataset in (held_out, list(held_out)):
        made = tiny.trainer(model, tmp_path, tiny.examples(8), eval_dataset=dataset)
        metrics = made.evaluate()
        assert metrics["eval_loss"] == pytest.approx(own, rel=1e-5)
        assert metrics["eval_perplexity"] == pytest.approx(math.exp(own), rel=1e-4)
        assert made.state.log_history[-1]["eval_loss"] == metrics["eval_loss"]
        assert {"test_loss", "test_perplexity"} <= made.evaluate(metric_key_prefix="test").keys()


def ids_and_weights(folder: Path, **changes: Any) -> tuple[list[list[int]], Any, Any]:
    seen, model = Seen(), tiny.build("GPT2", resid_pdrop=0.1, embd_pdrop=0.1)
    confident = tiny.halves(10)
    made = tiny.trainer(
        model, folder, tiny.examples(10), confident=confident, num_train_epochs=2, **changes
    )
    made.data_collator = seen
    made.train()
    ids = [batch["ids"].tolist() for batch in seen.batches]
    return ids, tiny.losses(made, "ntp_loss", "ntp_loss_confident"), tiny.weights(model)


def test_ntp_and_mu_0_are_the_same_training(tmp_path: Path) -> None:
    ids, logs, weights = ids_and_weights(tmp_path, method="ntp", mu=0.7)
    confident = {10 + row for row, is_c in enumerate(tiny.halves(10)) if is_c}
    assert all(set(batch[::2]) <= confident for batch in ids)
    assert not any(set(batch[1::2]) & confident for batch in ids)
    for names in (ids[:3], ids[3:]):
        assert sorted(name for batch in names for name in batch) == list(range(10, 20))
    assert ids[:3] != ids[3:]
    same_ids, same_logs, same_weights = ids_and_weights(tmp_path, mu=0.0)
    assert same_ids == ids
    assert same_logs == logs
    assert tiny.same(same_weights, weights)
    mixed_ids, mixed_logs, mixed_weights = ids_and_weights(tmp_path, mu=0.7)
    assert mixed_ids == ids
    # Pairs are other products of the same rows.
    assert mixed_logs[0] == pytest.approx(logs[0], rel=1e-6)
    assert logs[0] != logs[-1] != mixed_logs[-1]
    assert not tiny.same(mixed_weights, weights)


def test_unequal_halves_are_paired_by_repeating_the_smaller(tmp_path: Path) -> None:
    seen = Seen()
    confident = [row in (2, 5) for row in range(7)]
    made = tiny.trainer(tiny.build("Llama"), tmp_path, tiny.examples(7), confident=confident)
    made.data_collator = seen
    made.train()
    ids = [name for batch in seen.batches for name in batch["ids"].tolist()]
    assert sorted(ids[::2]) == [12, 12, 12, 15, 15] or sorted(ids[::2]) == [12, 12, 15, 15, 15]
    assert sorted(ids[1::2]) == [10, 11, 13, 14, 16]


def test_ntp_needs_no_partition_and_takes_odd_batches(tmp_path: Path) -> None:
    seen = Seen()
    made = tiny.trainer(
        tiny.build("Llama"),
        tmp_path,
        tiny.examples(7),
        method="ntp",
        per_device_train_batch_size=3,
        num_train_epochs=2,
    )
    made.data_collator = seen
    made.train()
    assert [len(batch["ids"]) for batch in seen.batches] == [3, 3, 1] * 2
    line = made.state.log_history[0]
    assert line["loss"] == line["ntp_loss"]
    assert not {"mixup_loss", "lam_mean", "ntp_loss_confident"} & line.keys()


class Poison(TrainerCallback):
    """Spoils a weight when the step that was asked for begins, and keeps what there was then."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                kwargs["model"].get_input_embeddings().weight.fill_(float("nan"))
            self.weights = tiny.weights(kwargs["model"])


@pytest.mark.parametrize("method", ["sftmix", "ntp"])
def test_a_loss_that_is_not_finite_stops_before_the_step(method: str, tmp_path: Path) -> None:
    seen, model, poison = Seen(), tiny.build("Llama"), Poison(2)
    made = tiny.trainer(
        model,
        tmp_path,
        tiny.examples(16),
        callbacks=[poison],
        method=method,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=1,
    )
    made.data_collator = seen
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 2, examples \[") as caught:
        made.train()
    assert str(seen.batches[2]["ids"].tolist()) in str(caught.value)
    for name, weight in tiny.weights(model).items():
        assert torch.equal(weight.nan_to_num(7), poison.weights[name].nan_to_num(7)), name
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": -0.1}, "mu: expected a finite number of at least 0, got -0.1"),
        ({"mu": float("nan")}, "mu: .*got nan"),
        ({"mu": float("inf")}, "mu: .*got inf"),
        ({"alpha": 0.0}, "alpha: expected a finite number above 0, got 0.0"),
        ({"alpha": float("nan")}, "alpha: .*got nan"),
        ({"method": "dro"}, "method: expected sftmix, ntp, equal, mixup, ir_dro, .*; got 'dro'"),
        ({"lambda_scope": "row"}, "lambda_scope: expected pair, batch; got 'row'"),
        ({"pairing": "inner"}, "pairing: expected outer, .*; got 'inner'"),
        ({"kl_reg": 0.0}, "kl_reg: expected a finite number above 0, got 0.0"),
        ({"kl_reg": float("inf")}, "kl_reg: .*got inf"),
        ({"method": "mixup", "per_device_train_batch_size": 3}, "batch_size: .*even.*got 3"),
        ({"loss_schedule": "rows"}, "loss_schedule: expected auto, .*; got 'rows'"),
        ({"per_device_train_batch_size": 3}, "per_device_train_batch_size: .*even.*got 3"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"power_k": -1.0}, "power_k: expected at least 0 .*, got -1.0"),
        ({"power_k": float("inf")}, "power_k: expected a finite number, got inf"),
        ({"eaft_alpha": -0.5}, "eaft_alpha: expected at least 0 .*, got -0.5"),
        ({"gem_beta": 0.0}, "gem_beta: expected a number above 0 .*, got 0.0"),
        ({"gem_beta": float("nan")}, "gem_beta: expected a finite number, got nan"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy: not supported"),
        ({"data_seed": 3}, "data_seed: not supported"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size: not supported"),
        ({"bf16_full_eval": True}, "bf16_full_eval: not supported"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices: not supported"),
        ({"push_to_hub": True, "hub_strategy": "every_save"}, "hub_strategy: expected 'end'"),
    ],
)
def test_a_wrong_config_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        SFTMixConfig(output_dir=str(tmp_path), use_cpu=True, **changes)


def test_wrong_data_is_refused(tmp_path: Path) -> None:
    model, data = tiny.build("Llama"), tiny.examples(6)
    for method in (name for name, method in METHODS.items() if method.mixed):
        args = tiny.config(tmp_path, method=method)
        with pytest.raises(ValueError, match=f"confident: method='{method}' needs a partition"):
            tiny.SFTMixTrainer(model=model, args=args, train_dataset=data)
    for length in (5, 7):
        with pytest.raises(ValueError, match=r"one value for each of 6 .*got shape \(\d,\)"):
            tiny.trainer(model, tmp_path, data, confident=([True, False] * 4)[:length])
    with pytest.raises(ValueError, match="at least one batch of 8 examples, got 6"):
        tiny.trainer(model, tmp_path, data, per_device_train_batch_size=8)
    with pytest.raises(ValueError, match="both sides of every pair, got 6 confident and 0"):
        tiny.trainer(model, tmp_path, data, confident=[True] * 6)


def test_the_collator_pads_with_what_the_tokenizer_has() -> None:
    class Tokens:
        def __init__(self, pad: int | None, eos: int | None) -> None:
            self.pad_token_id, self.eos_token_id = pad, eos

    assert make_collator(Tokens(5, 2)).pad_token_id == 5
    assert make_collator(Tokens(0, 2)).pad_token_id == 0
    assert make_collator(Tokens(None, 2)).pad_token_id == 2
    assert make_collator(Tokens(None, None)).pad_token_id == 0


def test_bfloat16_autocast_trains(tmp_path: Path) -> None:
    model = tiny.build("Llama")
    data = tiny.examples(8)
    made = tiny.trainer(model, tmp_path, data, bf16=True, eval_dataset=data)
    before = made.evaluate()["eval_loss"]
    made.train()
    assert made.evaluate()["eval_loss"] != before
    assert all(p.dtype == torch.float32 for p in model.parameters())
    exact = tiny.trainer(tiny.build("Llama"), tmp_path, data, eval_dataset=data).evaluate()
    # Autocast rounds to 8 bits, a relative error of 0.4 % at most for each rounding.
    assert before == pytest.approx(exact["eval_loss"], rel=0.05)
    assert before != exact["eval_loss"]
