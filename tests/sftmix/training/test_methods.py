"""Every method's loss and gradients against dense compositions, and what is logged of it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import LabelSmoother

from sftmix import methods
from sftmix.pairs.collator import PairedCollator
from sftmix.pairs.sampling import filler
from sftmix.training.loss import BatchLoss, Counts, FusedHead, Head, batch_counts
from sftmix.training.trainer import SFTMixTrainer
from tests.sftmix import tiny
from tests.sftmix.training.test_trainer import Recorder, in_pairs

METHODS = tuple(methods.METHODS)
OBJECTIVES = ("dft", "power", "eaft", "gem", "label_smoothing")
CAPS = {"Llama": None, "Gemma2": 0.5}
KL_REG, POWER_K, EAFT_ALPHA, GEM_BETA, SMOOTHING = 0.3, 2.0, 1.5, 0.6, 0.2
# The methods' options, other than their defaults.
OPTIONS: dict[str, Any] = {
    **{"mu": 0.7, "kl_reg": KL_REG},
    **{"power_k": POWER_K, "eaft_alpha": EAFT_ALPHA, "gem_beta": GEM_BETA},
}


def options_of(method: str) -> dict[str, Any]:
    """A method with what it is told, which is refused with most others where it is smoothing."""
    smoothed = {"label_smoothing_factor": SMOOTHING} if method == "label_smoothing" else {}
    return {"method": method, **OPTIONS, **smoothed}


def token_losses(logits: Tensor, labels: Tensor, method: str) -> Tensor:
    """The loss of each token (B, L) by an objective, 0 where nothing is learnt."""
    log_probs = logits.log_softmax(-1)
    p = log_probs.exp()
    own = log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    entropy = -(p * log_probs).sum(-1) / math.log(logits.shape[-1])
    q = (logits / GEM_BETA).softmax(-1).detach()
    losses = {
        "dft": -own.exp().detach() * own,
        "power": -(own.exp() ** POWER_K).detach() * own,
        "eaft": -(entropy**EAFT_ALPHA).detach() * own,
        "gem": (q * (log_probs - own.unsqueeze(-1))).sum(-1),
        "label_smoothing": -(1 - SMOOTHING) * own - SMOOTHING * log_probs.mean(-1),
    }
    return losses[method] * (labels != -100)


def dense_loss(
    model: PreTrainedModel, batch: dict[str, Tensor], method: str, cap: float | None
) -> Tensor:
    """The method's formula over full logits, in the model's dtype."""
    seen = {}
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.update(hidden=inputs[0]))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits[:, :-1]
    hook.remove()
    labels = batch["labels"][:, 1:]
    counts = (labels != -100).sum(1)
    if method in OBJECTIVES:
        return token_losses(logits, labels, method).sum() / counts.sum()
    token_loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # (B, L)
    ntp = token_loss.sum() / counts.sum()
    if method == "ntp":
        return ntp
    if method == "ir_dro":
        example_loss = token_loss.sum(1) / counts
        return (example_loss * (example_loss.detach() / KL_REG).softmax(0)).sum()
    terms = []
    for c, u, lam in in_pairs(batch):
        places = [labels[row].ne(-100).nonzero().squeeze(-1) for row in (c, u)]
        shorter = min(map(len, places))
        z_c, z_u = (
            seen["hidden"][row, place[:shorter]] for row, place in zip((c, u), places, strict=True)
        )
        mixed = F.linear(lam * z_c + (1 - lam) * z_u, head.weight)
        mixed = mixed if cap is None else cap * torch.tanh(mixed / cap)
        y_c, y_u = (labels[row, place[:shorter]] for row, place in zip((c, u), places, strict=True))
        loss_c, loss_u = (F.cross_entropy(mixed, y, reduction="none") for y in (y_c, y_u))
        terms.append(lam * loss_c + (1 - lam) * loss_u)
    mixup = torch.cat(terms).mean()
    return {"sftmix": ntp + OPTIONS["mu"] * mixup, "equal": ntp + mixup, "mixup": mixup}[method]


def flat_gradients(model: PreTrainedModel) -> Tensor:
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("head", ["fused", "logits"])
@pytest.mark.parametrize("family", CAPS)
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients(
    method: str, family: str, head: str, device: str, tmp_path: Path
) -> None:
    model, plain = tiny.build(family), tiny.build(family).to(device)
    exact = copy.deepcopy(plain).double()
    made = tiny.trainer(
        model,
        tmp_path,
        tiny.examples(6),
        confident=tiny.halves(6),
        per_device_train_batch_size=6,
        head=head,
        use_cpu=device == "cpu",
        **options_of(method),
    )
    batch = next(iter(made.get_train_dataloader()))
    loss = made.compute_loss(model, batch)
    assert isinstance(loss, Tensor)
    losses = [dense_loss(dense, batch, method, CAPS[family]) for dense in (plain, exact)]
    for one in (loss, *losses):
        one.backward()
    tiny.assert_in_budget("loss", loss.reshape(1), losses[0].reshape(1), losses[1].reshape(1))
    found = [flat_gradients(one) for one in (model, plain, exact)]
    tiny.assert_in_budget("gradients", *found)


def test_methods_are_different_losses(tmp_path: Path) -> None:
    """What the parametrised test compares would agree if all methods were one."""
    model, found = tiny.build("Llama"), []
    for method in METHODS:
        made = tiny.trainer(
            model, tmp_path, tiny.examples(6), per_device_train_batch_size=6,
            confident=tiny.halves(6), **options_of(method),
        )  # fmt: skip
        loss = made.compute_loss(model, next(iter(made.get_train_dataloader())))
        assert isinstance(loss, Tensor)
        found.append(loss.item())
    for place, value in enumerate(found):
        assert min(abs(value - other) for other in found[:place] or [math.inf]) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_what_is_logged(method: str, tmp_path: Path) -> None:
    made = tiny.trainer(
        tiny.build("Llama"), tmp_path, tiny.examples(8), method=method, confident=tiny.halves(8)
    )
    made.train()
    line = made.state.log_history[0]
    mixed = {"mixup_loss", "unmixed_fraction", "lam_mean"}
    ntp = {"ntp_loss", "ntp_loss_confident", "ntp_loss_unconfident"}
    expected = (mixed if methods.METHODS[method].mixed else set()) | (
        ntp if method != "mixup" else set()
    )
    assert line.keys() & (mixed | ntp) == expected
    if method == "equal":
        assert line["loss"] == pytest.approx(line["ntp_loss"] + line["mixup_loss"], rel=1e-6)
    if method == "mixup":
        assert line["loss"] == line["mixup_loss"]
    if method == "ir_dro":
        # Harder examples weigh more than their tokens do.
        assert line["loss"] > line["ntp_loss"]
    if method in ("dft", "power", "eaft"):
        assert 0 < line["loss"] < line["ntp_loss"]


def assert_right(method: str, made: SFTMixTrainer) -> None:
    """The loss and the gradients of a batch beside those of the dense formula, and NTP's loss."""
    batch = next(iter(made.get_train_dataloader()))
    dense = [tiny.build("Llama"), tiny.build("Llama").double()]
    loss, found = made.compute_loss(made.model, batch, return_outputs=True)
    losses = [loss, *(dense_loss(one, batch, method, None) for one in dense)]
    if found.ntp is not None:
        ntp = dense_loss(dense[1], batch, "ntp", None).item()
        assert found.ntp.item() == pytest.approx(ntp, rel=1e-6)
    for loss in losses:
        loss.backward()
    tiny.assert_in_budget("loss", *(loss.detach().reshape(1) for loss in losses))
    tiny.assert_in_budget("gradients", *map(flat_gradients, (made.model, *dense)))


def four_examples(output: Path, **options: Any) -> SFTMixTrainer:
    """A trainer of four examples of uneven lengths, one batch."""
    data, halves = tiny.examples(4), tiny.halves(4)
    return tiny.trainer(tiny.build("Llama"), output, data, confident=halves, **options)


@pytest.mark.parametrize("method", ["ntp", "dft", "power", "sftmix"])
def test_methods_that_vocabulary_tiles_have(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is made there of the ops is right; the tiles themselves are tested with the kernels."""
    monkeypatch.setattr(FusedHead, "recomputes", True)
    assert_right(method, four_examples(tmp_path, **options_of(method)))


WEIGHTED = [
    *((method, "fused") for method in ("ntp", *OBJECTIVES)),
    *((method, "logits") for method in ("ntp", *OBJECTIVES)),
    *((method, "recomputed") for method in ("ntp", "dft", "power")),
]


@pytest.mark.parametrize(("method", "head"), WEIGHTED)
def test_weights_of_examples(
    method: str, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They multiply the losses of an example's tokens, and the number of tokens stays."""
    if head == "recomputed":
        monkeypatch.setattr(FusedHead, "recomputes", True)
    head = "logits" if head == "logits" else "fused"
    made = four_examples(tmp_path, head=head, **options_of(method))
    batch = next(iter(made.get_train_dataloader()))
    weight = torch.tensor([2.0, 0.0, 0.5, 1.0])
    plain, exact = tiny.build("Llama"), tiny.build("Llama").double()
    loss, found = made.compute_loss(made.model, {**batch, "weight": weight}, return_outputs=True)
    losses = [loss]
    for model in (plain, exact):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits, labels = model(**inputs).logits[:, :-1], batch["labels"][:, 1:]
        nll = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        rows = nll if method == "ntp" else token_losses(logits, labels, method)
        losses.append((weight.unsqueeze(1) * rows).sum() / (labels != -100).sum())
    for one in losses:
        one.backward()
    tiny.assert_in_budget("loss", *(one.detach().reshape(1) for one in losses))
    tiny.assert_in_budget("gradients", *map(flat_gradients, (made.model, plain, exact)))
    learnt = (labels != -100) & (weight != 0).unsqueeze(1)
    assert found.ntp.item() == pytest.approx(nll[learnt].mean().item(), rel=1e-6)


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_power_off_by_one_is_found(
    recomputes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FusedHead, "recomputes", recomputes)
    wrong = {**options_of("power"), "power_k": POWER_K + 1}
    with pytest.raises(AssertionError, match="loss is over the error budget"):
        assert_right("power", four_examples(tmp_path, **wrong))


def test_a_gate_that_is_differentiated_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which the loss is the same."""

    def undetached(self: FusedHead, k: float) -> BatchLoss:
        tokens = self.tokens()
        return self.of_tokens(((-k * tokens).exp() * tokens).sum() / self.counts.tokens, tokens)

    monkeypatch.setattr(FusedHead, "recomputes", True)
    monkeypatch.setattr(FusedHead, "_powered", undetached)
    with pytest.raises(AssertionError, match="gradients is over the error budget"):
        assert_right("dft", four_examples(tmp_path, **options_of("dft")))


@pytest.mark.parametrize("head", ["fused", "logits"])
@pytest.mark.parametrize("method", ["ntp", "label_smoothing"])
def test_smoothing_is_that_of_transformers(method: str, head: str, tmp_path: Path) -> None:
    """As `transformers.Trainer` has it for the same tokens, over a window of two micro-batches."""
    recorder, plain = Recorder(), tiny.build("Llama")
    exact = copy.deepcopy(plain).double()
    made = tiny.trainer(
        tiny.build("Llama"), tmp_path, tiny.examples(6), callbacks=[recorder], method=method,
        label_smoothing_factor=SMOOTHING, gradient_accumulation_steps=2, max_grad_norm=0.0,
        learning_rate=0.0, head=head, confident=tiny.halves(6),
    )  # fmt: skip
    batches = list(made.get_train_dataloader())
    made.train()
    tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    losses = []
    for dense in (plain, exact):
        total = torch.zeros((), dtype=dense.dtype)
        for batch in batches:
            output = dense(**{name: batch[name] for name in ("input_ids", "attention_mask")})
            smoother = LabelSmoother(epsilon=SMOOTHING)
            # An older transformers has only the mean of a micro-batch.
            own = (batch["labels"][:, 1:] != -100).sum()
            total += smoother(output, batch["labels"], True) * own / tokens
        total.backward()
        losses.append(total.item())
    (step,) = recorder.steps
    found = torch.cat([step[name].flatten() for name, _ in plain.named_parameters()])
    tiny.assert_in_budget("gradients", found, flat_gradients(plain), flat_gradients(exact))
    ((loss, ntp),) = tiny.losses(made, "loss", "ntp_loss")
    assert loss == pytest.approx(losses[1], rel=1e-6)
    assert abs(ntp - loss) > 0.01


def test_smoothing_is_of_the_method_that_is_called_so(tmp_path: Path) -> None:
    def smoothing(**options: Any) -> float | None:
        return tiny.config(tmp_path, **options).label_smoothing_factor

    assert smoothing(method="ntp") == smoothing(method="sftmix") == 0.0
    assert smoothing(method="label_smoothing") == methods.LABEL_SMOOTHING == 0.1
    assert smoothing(method="label_smoothing", label_smoothing_factor=0.3) == 0.3


def test_ir_dro_counts_micro_batches_by_their_examples(tmp_path: Path) -> None:
    """A window of a batch of four and one of two: 4/6 and 2/6, not a half each."""
    recorder, plain = Recorder(), tiny.build("Llama")
    exact = copy.deepcopy(plain).double()
    made = tiny.trainer(
        tiny.build("Llama"), tmp_path, tiny.examples(6), callbacks=[recorder], method="ir_dro",
        kl_reg=KL_REG, gradient_accumulation_steps=2, max_grad_norm=0.0, learning_rate=0.0,
    )  # fmt: skip
    batches = list(made.get_train_dataloader())
    assert [len(batch["ids"]) for batch in batches] == [4, 2]
    made.train()
    for dense in (plain, exact):
        for batch in batches:
            (len(batch["ids"]) / 6 * dense_loss(dense, batch, "ir_dro", None)).backward()
    (step,) = recorder.steps
    found = torch.cat([step[name].flatten() for name, _ in plain.named_parameters()])
    tiny.assert_in_budget("gradients", found, flat_gradients(plain), flat_gradients(exact))


def test_a_batch_shares_its_lam(tmp_path: Path) -> None:
    """Over accumulated micro-batches too: another way to make the same step changes nothing."""

    def lams(**changes: Any) -> list[float]:
        made = tiny.trainer(tiny.build("Llama"), tmp_path, tiny.examples(16), **changes)
        return [lam for batch in made.get_train_dataloader() for *_, lam in in_pairs(batch)]

    assert len(set(lams())) == 8
    shared = lams(lambda_scope="batch", per_device_train_batch_size=8)
    assert len(set(shared)) == 2
    assert shared[:4] == shared[:1] * 4
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert lams(lambda_scope="batch", **changes) == shared


class Given(Head):
    """A head whose token losses are given."""

    losses: Tensor

    def tokens(self) -> Tensor:
        return self.losses


def test_fillers_have_no_weight_in_ir_dro(tmp_path: Path) -> None:
    rows = list(tiny.examples(3))
    losses = torch.rand(PairedCollator(0)(rows)["rows"].numel())

    def hard_examples(batch: Any, counts: Counts, losses: Tensor) -> Tensor:
        head = Given(batch, counts, tiny.config(tmp_path, method="ir_dro", kl_reg=KL_REG))
        head.losses = losses
        loss: Tensor = methods.METHODS["ir_dro"].loss(head).loss
        return loss

    found = []
    for fillers in ([], [filler()], [filler()] * 5):
        batch = PairedCollator(0)([*rows, *fillers])
        counts = batch_counts([batch], torch.device("cpu"))
        assert counts.examples == 3
        found.append(hard_examples(batch, counts, losses))
    assert found[0] == found[1] == found[2] > 0
    # A rank that has fillers alone.
    nothing, ones = PairedCollator(0)([filler()] * 2), Counts(*torch.ones(len(Counts._fields)))
    assert hard_examples(nothing, ones, losses[:0]) == 0
