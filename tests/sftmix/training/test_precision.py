"""Half-precision weights: which updates rounding loses, who is told, and what keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from sftmix.cli import main
from sftmix.training.precision import lost_updates
from tests.sftmix import tiny

RATE = 2e-6
HALF = (torch.bfloat16, torch.float16)
NEAREST = {torch.bfloat16: 8, torch.float16: 11}  # significant bits
QUIET = ["--use_cpu", "true", "--disable_tqdm", "true"]


def sgd(*weights: Tensor, rate: float = RATE, **of_group: Any) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(w) for w in weights], **of_group}], rate)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "sftmix.training.precision"]


def train(folder: Path, dtype: torch.dtype, **changes: Any) -> tuple[dict[str, Tensor], Any]:
    """The weights before, and the trainer after fifteen steps at a small rate."""
    model = tiny.build("Llama").to(dtype)
    before = tiny.weights(model)
    options = {"num_train_epochs": 3, "learning_rate": RATE, "warmup_steps": 0, **changes}
    made = tiny.trainer(model, folder, tiny.examples(20), **options)
    made.train()
    return before, made


def moved(before: dict[str, Tensor], made: Any) -> Tensor:
    after = tiny.weights(made.model)
    return torch.cat([(after[n].float() - before[n].float()).flatten() for n in before])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rate", [2e-6, 1e-3])
def test_the_share_is_that_of_weights_too_large_for_the_rate(
    rate: float, dtype: torch.dtype
) -> None:
    """Numbers in [2^(e-1), 2^e) are 2^(e-bits) apart; a tie goes to the even one."""
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(200, 100)).to(dtype)
    _, exponent = np.frexp(weight.float().numpy())
    spacing = np.exp2(np.maximum(exponent - NEAREST[dtype], -24.0))
    expected = float((rate < spacing / 2).mean())
    message = str(lost_updates(sgd(weight, rate=rate)))
    assert f": {expected:.1%} would stay as they are" in message
    assert f"20,000 trained weights are {str(dtype)[6:]}, and SGD" in message
    assert f"the learning rate, {rate:g}." in message


def test_the_rate_is_the_highest_of_the_schedule() -> None:
    """A warm-up begins at 0, where every weight would stay."""
    optimizer = sgd(torch.full((4,), 1e-7, dtype=torch.bfloat16))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert optimizer.param_groups[0]["lr"] == 0
    assert ": 0.0% would stay" in str(lost_updates(optimizer))


def test_weights_of_several_dtypes_and_groups() -> None:
    """Float32 ones are not counted; each group's own rate is."""
    optimizer = sgd(torch.ones(3, dtype=torch.bfloat16), torch.ones(5), rate=1.0)
    optimizer.add_param_group({"params": [torch.ones(1, dtype=torch.float16)], "lr": 1e-6})
    message = str(lost_updates(optimizer))
    assert "4 trained weights are bfloat16 and float16" in message
    assert "25.0% would stay as they are in a step of the learning rate, 1." in message


@pytest.mark.parametrize(
    ("of_group", "of_optimizer", "dtype"),
    [
        ({}, {}, torch.float32),
        ({}, {"bf16_stochastic_round": True}, torch.bfloat16),
        ({}, {"master_weights": True}, torch.float16),
        ({"kahan_sum": True}, {}, torch.bfloat16),
        ({"kahan_sum": None}, {}, torch.float16),  # optimi's default: where it is needed
        ({"use_kahan_summation": True}, {}, torch.bfloat16),
    ],
)
def test_optimizers_that_keep_small_updates(
    of_group: dict[str, Any], of_optimizer: dict[str, Any], dtype: torch.dtype
) -> None:
    optimizer = sgd(torch.ones(4, dtype=dtype), **of_group)
    vars(optimizer).update(of_optimizer)
    assert lost_updates(optimizer) is None


@pytest.mark.parametrize(
    ("of_group", "of_optimizer", "dtype"),
    [
        ({}, {"bf16_stochastic_round": False}, torch.bfloat16),
        ({}, {"bf16_stochastic_round": True}, torch.float16),  # torchao rounds these to nearest
        ({}, {"master_weights": False}, torch.bfloat16),
        ({"kahan_sum": False}, {}, torch.bfloat16),
        ({"use_kahan_summation": False}, {}, torch.bfloat16),
    ],
)
def test_optimizers_that_do_not(
    of_group: dict[str, Any], of_optimizer: dict[str, Any], dtype: torch.dtype
) -> None:
    optimizer = sgd(torch.ones(4, dtype=dtype), **of_group)
    vars(optimizer).update(of_optimizer)
    assert ": 100.0% would stay" in str(lost_updates(optimizer))


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"optim": "adafactor"}, {"optim": "sgd"}])
def test_training_bfloat16_weights_warns_and_hardly_moves_them(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``bf16`` is autocast, which makes no float32 weights of them."""
    before, made = train(tmp_path, torch.bfloat16, **options)
    (message,) = warnings_of(caplog)
    for part in ("bfloat16", "2e-06", "--dtype float32 --bf16 true", "bf16_stochastic_round=True"):
        assert part in message
    assert float((moved(before, made) != 0).float().mean()) < 0.05


def test_float32_weights_keep_every_update_under_bfloat16_products(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, made = train(tmp_path, torch.float32, bf16=True)
    assert warnings_of(caplog) == []
    assert float((moved(before, made) != 0).float().mean()) > 0.99
    assert made.model.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("in_float32", [True, False])
def test_lora_warns_where_its_updates_are_not_float32(
    in_float32: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny.build("Llama").to(torch.bfloat16),
        peft.LoraConfig(r=2, target_modules=["q_proj"]),
        autocast_adapter_dtype=in_float32,
    )
    tiny.trainer(model, tmp_path, tiny.examples(8), max_steps=1).train()
    assert len(warnings_of(caplog)) == (not in_float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("command", ["score", "train"])
def test_the_commands_warn(
    command: str,
    dtype: str,
    toy_model: Path,
    toy_data: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = ["--model", str(toy_model), "--data", str(toy_data), "--output", str(tmp_path / "run")]
    own = ["--num_scorings", "1"] if command == "score" else ["--method", "ntp", "--max_steps", "1"]
    assert main([command, *words, "--dtype", dtype, *own, *QUIET]) == 0
    assert len(warnings_of(caplog)) == (dtype == "bfloat16")


class RandomSGD(torch.optim.SGD):
    """Draws a random number a step, as an optimizer does that rounds by them."""

    bf16_stochastic_round = True

    def __init__(self, parameters: Any, rate: float) -> None:
        super().__init__(parameters, rate)
        self.drawn: list[float] = []

    def step(self, closure: Any = None) -> Any:
        self.drawn.append(float(torch.rand(())))
        return super().step(closure)


class Drawing(TrainerCallback):
    """Draws as many numbers before each step, and notes what would come after the last."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        torch.rand(self.number)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.left = float(torch.rand(()))


def drawn(tmp_path: Path, number: int, optimizer: type[torch.optim.SGD], **changes: Any) -> Any:
    model, drawing = tiny.build("Llama"), Drawing(number)
    made = tiny.trainer(
        model, tmp_path, tiny.examples(20), callbacks=[drawing], max_steps=5, **changes
    )
    made.optimizer = optimizer(model.parameters(), 1e-3)
    made.train()
    return made.optimizer.optimizer, drawing.left


def test_rounding_at_random_goes_by_seed_and_step_alone(tmp_path: Path) -> None:
    """As ranks under DDP have to, some of which have drawn more numbers for noise or dropout."""
    (few, _), (many, left) = (drawn(tmp_path, number, RandomSGD) for number in (1, 7))
    assert few.drawn == many.drawn
    assert len(set(few.drawn)) == 5
    other, _ = drawn(tmp_path, 1, RandomSGD, seed=1)
    assert not set(other.drawn) & set(few.drawn)
    # Noise and dropout go on as if no step had drawn.
    assert left == drawn(tmp_path, 7, torch.optim.SGD)[1]


def rounding_at_random(monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: Any) -> Any:
    """As `train`, by torchao's optimizer without its compiler: the same operations one by one."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    rounding = {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}
    return train(folder, torch.bfloat16, **{**rounding, **changes})


def test_rounding_at_random_is_right_on_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes along float32's updates, while rounding to nearest moves hardly a weight."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    exact = moved(*train(tmp_path, torch.float32))
    nearest = moved(*train(tmp_path, torch.bfloat16))
    caplog.clear()
    rounded = moved(*rounding_at_random(monkeypatch, tmp_path))
    assert warnings_of(caplog) == []
    along = [float(found @ exact / (exact @ exact)) for found in (nearest, rounded)]
    assert along == [pytest.approx(0.0, abs=0.2), pytest.approx(1.0, abs=0.2)]
    assert float((rounded != 0).float().mean()) < 0.9


def test_a_resumed_training_rounds_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on with the noise's random numbers too."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 10, "neftune_noise_alpha": 1}
    _, unbroken = rounding_at_random(monkeypatch, tmp_path, **options)
    model = tiny.build("Llama").to(torch.bfloat16)
    again = {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True", **options}
    again |= {"num_train_epochs": 3, "learning_rate": RATE, "warmup_steps": 0}
    made = tiny.trainer(model, tmp_path, tiny.examples(20), **again)
    made.train(str(tmp_path / "checkpoint-5"))
    assert tiny.same(tiny.weights(unbroken.model), tiny.weights(model))
