"""What a plan says is held to what is held: bytes counted by hand, of real models, and measured."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    T5Config,
)

from sftmix.cli import main
from sftmix.commands.plan import DOES_NOT_FIT
from sftmix.model.head import HeadAdapter
from sftmix.model.tiled_mlp import tile_mlps
from sftmix.plan import plan_step
from sftmix.plan import step as planning
from sftmix.plan.optimizer import ao_states
from sftmix.plan.planned import SWITCHES, Alternative, Planned, advised, parse_bytes
from sftmix.plan.search import GRID, ends, largest_length, step_of
from sftmix.plan.trace import GRADIENTS, LOSS, OPTIMIZER, WEIGHTS
from sftmix.recipe.arguments import RunArguments
from sftmix.recipe.lora import add_lora
from sftmix.training.config import SFTMixConfig
from sftmix.training.loss import batch_counts, batch_loss
from tools.peak_memory import peak_extra_bytes

# PEFT asks for it under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def llama(**changes: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }
    return LlamaConfig(**{**sizes, **changes})


def run_arguments(**changes: Any) -> RunArguments:
    return RunArguments(model="", data=[], output="", **changes)


def options(tmp_path: Path, **changes: Any) -> SFTMixConfig:
    settings = {"per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True, **changes}
    return SFTMixConfig(output_dir=str(tmp_path), **settings)


# Parts, beside a real model


@pytest.mark.parametrize("lora", [None, 4])
def test_weights_gradients_and_states_are_those_of_a_real_model(
    tmp_path: Path, lora: int | None
) -> None:
    config, given = llama(), run_arguments(lora_rank=lora, dtype="bfloat16")
    model = add_lora(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), given, 0)
    model(torch.arange(8).unsqueeze(0), labels=torch.arange(8).unsqueeze(0)).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    # So few tokens that the update is the peak.
    settings = options(tmp_path, optim="adamw_torch_fused", max_grad_norm=0.0)
    plan = plan_step(config, given, settings, 2)
    parts = planning.traced_step(config, given, settings, 2, False).peaks["optimizer"]
    states = [s for state in optimizer.state.values() for s in state.values()]
    weights = sum(p.nbytes for p in model.parameters())
    assert parts[WEIGHTS] == weights + sum(b.nbytes for b in model.buffers())
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert plan.trained == sum(p.numel() for p in trained)
    if lora is None:
        assert parts[GRADIENTS] == sum(p.grad.nbytes for p in trained if p.grad is not None)
        assert parts[OPTIMIZER] == sum(s.nbytes for s in states)
        # On a GPU one that is not fused has the square roots of a group's second moments besides.
        settings.optim = "adamw_torch"
        roots = sum(p.nbytes for p in trained if p.dim() > 1)
        more = planning.traced_step(config, given, settings, 2, False).peaks["optimizer"]
        assert more[OPTIMIZER] == sum(s.nbytes for s in states) + roots


class RealStep:
    """Forward, loss and backward of a real model, as the plan sees them."""

    def __init__(self, config: PretrainedConfig, settings: SFTMixConfig, length: int) -> None:
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
        self.settings = settings
        self.head = HeadAdapter(self.model, settings.head, checked=False)
        if settings.mlp_tile_tokens is not None:
            tile_mlps(self.model, settings.mlp_tile_tokens)
        planning.enable_checkpointing(self.model, settings)
        self.batch = planning.planned_batch(settings, length)

    def __call__(self) -> Any:
        counts = batch_counts([self.batch], torch.device("cpu"))
        loss = batch_loss(self.model, self.head, self.batch, self.settings, counts)
        loss.loss.backward()
        return loss


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_checkpointing": True},
        pytest.param({"memory": "lean", "mlp_tile_tokens": 64}, marks=pytest.mark.slow),
        {"layout": "padding_free"},
        {"loss_max_bytes": 2**17},
        {"head": "logits"},
        {"method": "eaft"},
        pytest.param({"method": "gem", "head": "logits"}, marks=pytest.mark.slow),
        pytest.param({"method": "mixup"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_measured_step(tmp_path: Path, changes: dict[str, Any]) -> None:
    config, settings, length = llama(num_hidden_layers=5), options(tmp_path, **changes), 400
    plan = plan_step(config, run_arguments(), settings, length, on_cpu=True)
    measured = peak_extra_bytes(RealStep(config, settings, length))
    beside = sum(plan.parts.get(part, 0) for part in (WEIGHTS, OPTIMIZER))
    assert measured == pytest.approx(plan.peak - beside, rel=0.15)


def test_the_loss_workspace_is_what_the_loss_holds(tmp_path: Path) -> None:
    config, settings = llama(num_hidden_layers=1, vocab_size=8000), options(tmp_path)
    length = 600
    plan = plan_step(config, run_arguments(), settings, length, on_cpu=True)
    assert plan.moment == "loss"
    real = RealStep(config, settings, length)
    whole: list[int] = []
    head = real.head.head

    def measure(own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            results: list[Any] = []
            whole.append(peak_extra_bytes(lambda: results.append(own(*args, **kwargs))))
            return results[0]

        return forward

    head.forward = measure(head.forward)
    real()
    assert whole[0] == pytest.approx(plan.parts[LOSS], rel=0.1)


@pytest.mark.parametrize(
    ("config", "changes", "given"),
    [
        (llama(num_hidden_layers=7), {}, {}),
        pytest.param(
            llama(num_hidden_layers=5),
            {"memory": "lean", "mlp_tile_tokens": 128},
            {"lora_rank": 4, "lora_targets": ["q_proj", "up_proj"]},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            llama(num_hidden_layers=5),
            {"optim": "adamw_torch_8bit", "bf16": True},
            {},
            marks=pytest.mark.skipif(
                importlib.util.find_spec("torchao") is None, reason="needs torchao"
            ),
        ),
        (
            llama(num_hidden_layers=5),
            {"activation_checkpointing": True, "activation_offload": True},
            {"dtype": "bfloat16"},
        ),
    ],
)
def test_short_models_tell_what_a_whole_one_would(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: LlamaConfig,
    changes: dict[str, Any],
    given: dict[str, Any],
) -> None:
    settings, arguments = options(tmp_path, **changes), run_arguments(**given)
    extended = plan_step(config, arguments, settings, 300)
    monkeypatch.setattr(planning, "SHORT", (2, 100))
    whole = plan_step(config, arguments, settings, 300)
    assert extended == whole
    assert (extended.host > 0) == settings.activation_offload


def test_tiles_that_stand_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = options(tmp_path, memory="lean", mlp_tile_tokens=64)
    config = llama(num_hidden_layers=2)
    few = plan_step(config, run_arguments(), settings, 640)
    monkeypatch.setattr("sftmix.plan.tiles.TILES", 100)
    assert plan_step(config, run_arguments(), settings, 640) == few


def test_a_window_of_attention_needs_a_mask(tmp_path: Path) -> None:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    config = MistralConfig(
        **{name: getattr(llama(), name) for name in sizes},
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=256,
    )
    settings = options(tmp_path)
    half = run_arguments(dtype="bfloat16")
    below, above = (plan_step(config, half, settings, n).peak for n in (255, 256))
    assert above - below > 2 * 256**2 * (1 + 2 * 3)  # bool, and bfloat16 in each of three layers
    flash = run_arguments(dtype="bfloat16", attn_implementation="flash_attention_2")
    below, above = (plan_step(config, flash, settings, n).peak for n in (255, 256))
    assert above - below < 2 * 256**2


# Lengths


def test_longer_sequences_take_more(tmp_path: Path) -> None:
    settings = options(tmp_path, memory="lean", mlp_tile_tokens=64)
    config = llama(num_hidden_layers=1)
    peaks = [plan_step(config, run_arguments(), settings, n).peak for n in (64, 256, 300)]
    assert peaks == sorted(set(peaks))


@pytest.mark.parametrize("memory", [10**4, 10**6, 3 * 10**7, 10**9])
def test_the_largest_length_fits_and_a_step_more_does_not(memory: int) -> None:
    plans = []

    def peak_of(length: int) -> int:
        plans.append(length)
        return 5000 + 10 * length + max(0, 500 * (length - 3000)) + length**2 // 1000

    known = {n: peak_of(n) for n in (2048, 2560)}
    largest = largest_length(peak_of, memory, known)
    assert largest % GRID == 0
    assert largest == 0 or peak_of(largest) <= memory
    assert peak_of(largest + step_of(largest)) > memory
    assert len(plans) <= 40
    near = largest_length(peak_of, memory, known, proven=False)
    assert near == largest or peak_of(near) >= 0.99 * memory
    plans.clear()
    end = 8192
    within = largest_length(peak_of, memory, known, longest=end)
    assert within == min(largest, end - GRID)
    assert ends(within, end) == (largest >= end - GRID)
    assert max(plans, default=0) < end


@pytest.mark.parametrize("memory", [4 * 10**9, 10**10, 8 * 10**10])
def test_few_plans_find_the_end_of_a_curve(memory: int) -> None:
    """Scores of L x L: the line through two short lengths points far beyond."""
    tried = []

    def peak_of(length: int) -> int:
        tried.append(length)
        return 2 * 10**9 + 400_000 * length + 2000 * length**2

    known = {n: peak_of(n) for n in (512, 768)}
    tried.clear()
    largest = largest_length(peak_of, memory, known, proven=False)
    assert peak_of(largest) <= memory < peak_of(largest + GRID)
    assert len(tried) - 2 <= 4


@pytest.mark.parametrize(
    ("bits", "expected"), [(8, 4096 + (16 + 256) * 4), (4, 2048 + (16 + 16) * 4)]
)
def test_torchaos_states(bits: int, expected: int) -> None:
    """Of 4096 numbers: codes, a scale for each 256, and a table of their values."""
    weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))
    assert sum(one.nbytes for one in ao_states(weight, bits)) == expected
    assert [one.dtype for one in ao_states(weight[:3], bits)] == [torch.bfloat16]
    optim = pytest.importorskip("torchao.optim", reason="torchao is not installed")
    real = getattr(optim, f"AdamW{bits}bit")([weight], block_size=256)._new_buffer(weight, True)
    found = [getattr(real, name) for name in real.tensor_attrs]
    assert sum(one.nbytes for one in found) == expected


# The command

ALL_ON = [
    *("--memory", "lean", "--mlp_tile_tokens", "64", "--layout", "sequential"),
    *("--activation_offload", "true", "--activation_checkpointing", "true"),
    *("--loss_schedule", "vocab_tiles", "--loss_max_bytes", "65536"),
    *("--lora_rank", "2", "--lora_targets", "q_proj", "--dtype", "bfloat16", "--optim", "sgd"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and nothing else."""
    folder = tmp_path_factory.mktemp("model")
    llama(num_hidden_layers=1).save_pretrained(folder)
    return folder


@pytest.fixture
def plan(model: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs `sftmix plan`; its exit code and what it printed, errors included."""

    def run(*flags: str) -> tuple[int, str]:
        words = ["--model", str(model), "--max-length", "512", "--disable_tqdm", "true"]
        words += ["--per_device_train_batch_size", "2"]
        code = main(["plan", *words, *flags])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_the_command_says_what_fits_and_what_helps(plan: Callable[..., tuple[int, str]]) -> None:
    code, said = plan("--gpu-memory", "40MB", *ALL_ON)
    assert code == 0
    assert "fits: 0.0 GiB of 0.0" in said
    assert re.search(r"longest that fits: [1-9]\d+ tokens", said)
    assert "every switch that saves memory is on" in said
    assert "loses small updates" not in said  # LoRA's are float32
    code, said = plan("--gpu-memory", "1KB", "--max-length", "64", *ALL_ON[:-2])
    assert code == DOES_NOT_FIT
    assert re.search(r"^does not fit: 0.0 GiB of 0.0$", said, re.MULTILINE)
    assert re.search(r"^it does not fit (even )?with", said, re.MULTILINE)
    assert "--optim adamw_torch_8bit *" in said
    assert "no length fits" in said


def test_the_command_answers_before_it_tries_switches(
    plan: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever stops it then knows whether the step fits."""

    def stopped(*_: Any) -> Alternative:
        raise ValueError("stopped here")

    monkeypatch.setattr("sftmix.plan.planned.row_of", stopped)
    code, said = plan("--gpu-memory", "40MB", "--max-length", "64", *ALL_ON[:-2])
    assert code == 2
    assert re.search(r"fits: 0.0 GiB of 0.0\nlongest that fits: \d+ .*\n\n.*stopped here\n$", said)


def test_words_that_mean_the_same_share_plans(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--memory lean` turns on what two of the switches would turn on once more."""
    monkeypatch.setattr("sftmix.plan.planned.plan_step", lambda *_, **__: object())
    lean = Planned(["--model", str(model), "--memory", "lean"])
    config = lean.read_config()
    found = {lean.plan(config, 64)}
    for name, value in ("layout", "sequential"), ("activation_checkpointing", "true"):
        found.add(lean.with_words([f"--{name}", value]).plan(config, 64))
    assert len(found) == 1
    assert lean.with_words(["--optim", "sgd"]).plan(config, 64) not in found


def test_the_command_says_where_its_search_ends(
    plan: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small model and a large GPU: millions of tokens would fit, and take minutes to plan."""
    monkeypatch.setattr("sftmix.plan.planned.SEARCHED", 4096)
    one = [switch for switch in SWITCHES if switch.name == "lora_rank"]
    monkeypatch.setattr("sftmix.plan.planned.SWITCHES", one)
    code, said = plan("--gpu-memory", "80GiB")
    assert code == 0
    assert "longest that fits: 3840 tokens or more; the search ends at 4096" in said
    assert re.search(r"^switch .* products$", said, re.MULTILINE)  # and no column of lengths


def test_no_length_is_tried_that_a_packed_row_does_not_hold(
    plan: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftmix.plan.planned.SWITCHES", ())
    for row in ("512", "600"):
        packed = ("--layout", "packed", "--row_length", row)
        code, said = plan("--gpu-memory", "80GiB", *packed)
        assert code == 0
        assert f"longest that fits: 512 tokens; a row holds {row}" in said
        assert re.search(r"^activations +\d+\.\d+ +[1-9]\d*\.\d$", said, re.MULTILINE)


def test_the_command_says_what_bfloat16_loses(
    plan: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftmix.plan.planned.SWITCHES", ())
    without_lora = [*ALL_ON[:-8], "--max-length", "64", "--dtype", "bfloat16"]
    rounding = ["--optim", "adamw_torch_8bit", "--optim_args", "bf16_stochastic_round=True"]
    assert "loses small updates" in plan(*without_lora, "--optim", "sgd")[1]
    assert "loses small updates" not in plan(*without_lora, *rounding)[1]


def test_the_command_reads_what_train_reads(
    plan: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftmix.plan.planned.SWITCHES", ())
    file = tmp_path / "config.yaml"
    shared = {"data": ["x"], "score": {"output": "y"}}
    own = {"output": "z", "partition": "p", "memory": "lean", "lora_rank": 8, "bf16": True}
    file.write_text(json.dumps({**shared, "train": own}))
    code, said = plan(
        "--config",
        str(file),
        "--max-length",
        "4097",
        *ALL_ON[6:14],
        "--dtype",
        "bfloat16",
        "--optim",
        "sgd",
    )
    assert code == 0
    for words in ("LoRA of rank 8", "4097 tokens, sequential", "--memory lean", "4096 positions"):
        assert words in said
    assert "fits" not in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu-memory", "much"], "--gpu-memory: expected bytes such as 80GiB"),
        (["--gpu-memory", "-1"], "--gpu-memory"),
        (["--optim", "lion_32bit"], "optim: expected one that the plan knows"),
        (["--fsdp", "full_shard"], "expected one process"),
        (["--use_liger_kernel", "true"], "--use_liger_kernel: not supported here, got True"),
        (["--max-length", "1"], "--max-length: expected at least 2"),
        (["--max_length", str(10**30)], "and below 2^31, got 1000"),
        (["--max_length", str(10**8)], "expected at most 67,108,864 tokens"),
        (["--gpu_memory", "1e400"], "--gpu_memory: expected less than 2^63 bytes"),
        (["--layout", "packed", "--row_length", "100"], "row_length"),
    ],
)
def test_what_is_refused(
    plan: Callable[..., tuple[int, str]], flags: list[str], message: str
) -> None:
    code, said = plan(*flags)
    assert code == 2
    assert message in said


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="T5Config"):
        plan_step(T5Config(), run_arguments(), options(tmp_path), 64)
    quantised = llama(quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ValueError, match="quantised"):
        plan_step(quantised, run_arguments(), options(tmp_path), 64)


def test_advice(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--model", str(model), "--max-length", "64", "--disable_tqdm", "true"]
    planned = Planned(words)
    config = planned.read_config()
    lean, lora = (
        Alternative("--memory lean", True, peak=600),
        Alternative("--lora_rank 4", False, peak=500),
    )
    says = [advised(planned, config, memory, [lean, lora]) for memory in (700, 550)]
    assert [text.split(" (")[0] for text in says] == [
        "it fits best with --memory lean",
        "it fits best with --lora_rank 4",
    ]
    alone = Planned([*words, "--lora_rank", "4"]).plan(config, 64).peak
    both = advised(planned, config, alone, [Alternative("--lora_rank 4", False, peak=alone + 1)])
    assert both.startswith("it fits with --lora_rank 4 together")


def test_bytes() -> None:
    texts = ("80GiB", "80GB", "80e9", "1.5 KiB", "7")
    assert [parse_bytes(text) for text in texts] == [80 * 2**30, 80 * 10**9, 80 * 10**9, 1536, 7]
