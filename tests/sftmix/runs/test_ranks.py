"""Two gloo processes train, score and stop as one does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.fsdp import StateDictType

from sftmix.cli import main
from sftmix.runs.checkpoints import list_checkpoints
from sftmix.training.metrics import MEASURED
from sftmix.training.parallelism import check_parallelism
from tests.sftmix import tiny
from tests.sftmix.ranks_worker import CASES, RANKS, TRAININGS

ROOT = Path(__file__).parents[3]
# In float32: gradients relative to the largest of their tensor, losses relative to themselves.
CLOSE = 1e-6
# With updates in between, gradients part by more than one rounding.
LEARNING = ("ddp, learning", "fsdp, learning")


Both = tuple[list[dict[str, Any]], dict[str, Any]]


def commands_in(folder: Path, model: Path, data: Path, held_out: Path) -> list[list[str]]:
    """`train` of two ranks, and of one. Sixteen pairs, six in a step: an epoch's last has one."""

    def command(name: str, batch: int, *more: str) -> list[str]:
        words = ["--model", str(model), "--data", str(data), "--use_cpu", "true"]
        words += ["--disable_tqdm", "true", "--learning_rate", "0.01", "--logging_steps", "1"]
        words += ["--output", str(folder / name), *more]
        return [*words, "--per_device_train_batch_size", str(batch)]

    assert main(["score", *command("score", 6)]) == 0
    more = ["--partition", str(folder / "score" / "confidence.parquet")]
    more += ["--eval_data", str(held_out), "--num_train_epochs", "2"]
    return [["train", *command("two", 6, *more)], ["train", *command("one", 12, *more)]]


@pytest.fixture(scope="module")
def commands(
    tmp_path_factory: pytest.TempPathFactory, toy_model: Path, toy_data: Path, held_out: Path
) -> list[list[str]]:
    """Those that `both` runs."""
    return commands_in(tmp_path_factory.mktemp("commands"), toy_model, toy_data, held_out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks leave what they found."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def both(folder: Path, commands: list[list[str]]) -> Both:
    """What every rank found, and what one process finds meanwhile."""
    two, one = commands
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "tests.sftmix.ranks_launcher", str(folder), json.dumps(two)]
    with subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as launched:
        alone = {name: case(folder / f"alone, {name}") for name, case in CASES.items()}
        assert main(one) == 0
        output, _ = launched.communicate(timeout=1800)
    assert launched.returncode == 0, output
    return [torch.load(folder / f"rank{number}.pt") for number in range(RANKS)], alone


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("scoring", "spikes", *LEARNING)])
def test_gradients_are_those_of_one_process(name: str, both: Both) -> None:
    ranks, alone = both
    expected = alone[name]["gradients"]
    for found in ranks:
        assert len(found[name]["gradients"]) == len(expected)
        for step, expected_step in zip(found[name]["gradients"], expected, strict=True):
            assert step.keys() == expected_step.keys()
            for weight, gradient in expected_step.items():
                assert tiny.relative_difference(step[weight], gradient) <= CLOSE, weight
        if "loss" in alone[name]:
            assert found[name]["loss"] == pytest.approx(alone[name]["loss"], rel=CLOSE)


@pytest.mark.parametrize("name", [*TRAININGS, *LEARNING, "ddp, trl"])
def test_logs_and_evaluation_are_those_of_one_process(name: str, both: Both) -> None:
    """Steps, epochs, losses, lam and truncated tokens: what fills up a batch is not counted."""
    ranks, alone = both
    for found in ranks:
        for line, expected in zip(found[name]["logs"], alone[name]["logs"], strict=True):
            assert line == pytest.approx(expected, rel=CLOSE)
        assert found[name]["evaluated"] == pytest.approx(alone[name]["evaluated"], rel=CLOSE)


@pytest.mark.parametrize("name", LEARNING)
def test_weights_are_those_of_one_process(name: str, both: Both) -> None:
    ranks, alone = both
    assert not tiny.same(alone[name]["weights"], tiny.weights(tiny.build("Llama")))
    for found in ranks:
        for weight, expected in alone[name]["weights"].items():
            difference = tiny.relative_difference(found[name]["weights"][weight], expected)
            assert difference <= CLOSE, weight


def test_shared_scores_are_those_of_one_process(both: Both) -> None:
    ranks, alone = both
    for found in ranks:
        for sums in ("nll", "tokens", "resumed"):
            assert torch.equal(found["scoring"][sums], alone["scoring"][sums])
        assert torch.equal(found["scoring"]["resumed"], found["scoring"]["nll"])
    # Each has called the model as often as the other, and none scored what was scored already.
    # The check of padding takes four calls of each.
    calls = [found["scoring"]["forwards"] - 4 for found in ranks]
    assert calls[0] == calls[1] == -(-(alone["scoring"]["forwards"] - 4) // 2)


def test_a_spike_names_the_examples_of_all_ranks(both: Both) -> None:
    """The third of an epoch's steps has two examples, and a filler on the second rank."""
    ranks, alone = both
    assert alone["spikes"]["spikes"]
    assert [found["spikes"] for found in ranks] == [alone["spikes"], {"spikes": []}]


@pytest.mark.parametrize("name", ["ddp, resumed", "fsdp, resumed"])
def test_a_resumed_training_is_the_unbroken_one(name: str, both: Both) -> None:
    for found in both[0]:
        (losses, weights), (losses_after, weights_after) = found[name]["trainings"]
        assert losses_after == losses
        assert tiny.same(weights_after, weights)
        assert tiny.same(found[name]["saved"], weights)


def test_all_ranks_end_with_the_best_checkpoint(both: Both) -> None:
    for found in (rank["best"] for rank in both[0]):
        assert tiny.same(found["weights"], found["best"])


def test_a_loss_that_is_not_finite_stops_all_ranks(both: Both) -> None:
    first, second = (found["stopped"] for found in both[0])
    assert first["nan"] == (
        "RankError: the loss of another rank is not finite at step 2; the model was not updated"
    )
    expected = f"FloatingPointError: loss is nan at step 2, examples {second['ids']}; the model"
    assert second["nan"].startswith(expected)
    for told in (first, second):
        assert told["untouched"]
        assert told["steps"] == 1


@pytest.mark.parametrize("name", ["ddp, spoilt", "fsdp, spoilt"])
def test_a_gradient_that_is_not_finite_stops_all_ranks(name: str, both: Both) -> None:
    """All have it by then: the first names the examples of all."""
    first, second = (found[name] for found in both[0])
    expected = r"FloatingPointError: the norm of the gradients is nan at step 3 \(losses [\d.]+\)"
    found = re.search(expected + r", examples (\[.*\]); the model was not updated$", first["told"])
    assert found, first["told"]
    assert json.loads(found[1]) == first["ids"] + second["ids"]
    assert second["told"] == (
        "RankError: the gradients are not finite at step 3; the model was not updated"
    )
    for rank in (first, second):
        assert rank["finite"]
        assert rank["checkpoints"] == ["checkpoint-2"]


def test_a_signal_to_one_rank_stops_all_after_the_same_step(both: Both) -> None:
    first, second = (found["signalled"] for found in both[0])
    assert first["told"] == second["told"]
    assert re.search(r"stopped by SIGTERM after step 2 of 4: .*/checkpoint-2 is s", first["told"])
    assert first["same"]
    assert second["same"]


@pytest.mark.parametrize(
    ("name", "message"), [("mu", "got 0.25 on rank 0 and 0.75 on rank 1"), ("train_dataset", "got")]
)
def test_ranks_that_differ_are_refused(name: str, message: str, both: Both) -> None:
    first, second = (found["stopped"][name.removeprefix("train_")[:4]] for found in both[0])
    said = f"{name}: expected the same on all ranks, {message}"
    assert first.startswith(f"ValueError: {said}")
    assert second.startswith(f"RankError: rank 0: {said}")


def test_an_error_is_told_once_and_ends_all_ranks(both: Both) -> None:
    first, second = (found["agreed"] for found in both[0])
    assert first["both"] == "OSError: rank 0 cannot"
    assert second["both"] == "RankError: rank 0: rank 0 cannot"
    assert first["second"] == "RankError: rank 1: rank 1 cannot"
    assert second["second"] == "OSError: rank 1 cannot"
    assert first["folder"].startswith("ValueError: output: ")
    assert second["folder"] == f"RankError: rank 0: {first['folder'].removeprefix('ValueError: ')}"
    assert first["none"] == second["none"] == "no error"
    assert first["main"] == second["main"] == 0


class Mesh:
    """What `accelerate.ParallelismConfig` says of itself."""

    def __init__(self, **sizes: int) -> None:
        self.__dict__ |= {"cp_size": 1, "sp_size": 1, "tp_size": 1, **sizes}


@pytest.mark.parametrize(
    ("where", "name", "value", "expected"),
    [
        ("args", "n_gpu", 2, "nn.DataParallel is not supported; start one process for each GPU"),
        ("args", "save_on_each_node", True, "save_on_each_node: expected one folder"),
        ("args", "fsdp", True, "fsdp: accelerate does not shard on cpu"),
        ("split", "split_batches", True, "accelerator_config: split_batches parts pairs"),
        ("split", "dispatch_batches", True, "accelerator_config: dispatch_batches parts pairs"),
        ("accelerator", "distributed_type", DistributedType.MEGATRON_LM, "Megatron-LM"),
        ("accelerator", "distributed_type", DistributedType.DEEPSPEED, "deepspeed: not supported"),
        ("accelerator", "parallelism_config", Mesh(cp_size=2), "cp_size = 2, context parallelism"),
        ("accelerator", "parallelism_config", Mesh(sp_size=4), "sp_size = 4, sequence parallel"),
        ("accelerator", "parallelism_config", Mesh(tp_size=2), "tp_size = 2, tensor parallelism"),
        ("plugin", "fsdp_version", 1, "fsdp_config: expected version 2, got 1"),
        ("plugin", "state_dict_type", StateDictType.SHARDED_STATE_DICT, "FULL_STATE_DICT, got SHA"),
        ("model", "tp_size", 2, "model: loaded with a tp_plan, whose head is sharded over the voc"),
        ("model", "hf_device_map", {"a": 0, "b": 1}, "device_map over several devices, pipeline"),
    ],
)
def test_what_is_not_supported_is_refused(where: str, name: str, value: Any, expected: str) -> None:
    parts: dict[str, Any] = {
        "split": SimpleNamespace(split_batches=False, dispatch_batches=None),
        "plugin": SimpleNamespace(fsdp_version=2, state_dict_type=StateDictType.FULL_STATE_DICT),
        "model": torch.nn.Module(),
    }
    parts["args"] = SimpleNamespace(
        accelerator_config=parts["split"],
        n_gpu=1,
        world_size=2,
        save_on_each_node=False,
        fsdp=False,
        checkpoints_activations=False,
        device=torch.device("cpu"),
    )
    parts["accelerator"] = SimpleNamespace(
        distributed_type=DistributedType.FSDP,
        parallelism_config=None,
        state=SimpleNamespace(fsdp_plugin=parts["plugin"] if where != "args" else None),
    )
    checked = [parts[part] for part in ("args", "accelerator", "model")]
    check_parallelism(*checked)
    setattr(parts[where], name, value)
    with pytest.raises(ValueError, match=re.escape(expected)):
        check_parallelism(*checked)


def test_a_head_sharded_over_the_vocabulary_is_refused(both: Both) -> None:
    for found in both[0]:
        assert found["sharded head"]["message"].startswith(
            "ValueError: model: lm_head.weight is a DTensor, sharded already"
        )


def test_a_model_is_not_evaluated_before_it_is_sharded(both: Both) -> None:
    for found in both[0]:
        assert found["evaluated early"]["message"].startswith("ValueError: evaluate: the model is")


ACCELERATE = ("accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_machines", "1")
LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--nproc_per_node", str(RANKS), "--rdzv_backend", "c10d"),
    "accelerate": (*ACCELERATE, "--num_processes", str(RANKS), "--mixed_precision", "no"),
}
FREE_PORT = {
    "torchrun": ("--rdzv_endpoint", "localhost:0"),
    "accelerate": ("--dynamo_backend", "no", "--main_process_port", "0"),
}


def launch(launcher: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Two processes, which find each other at a free port."""
    launching = [sys.executable, "-m", *LAUNCHERS[launcher], *FREE_PORT[launcher], *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        launching, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )


def run_of(words: list[str]) -> Path:
    return Path(words[words.index("--output") + 1])


def assert_same_runs(two: list[str], one: list[str]) -> None:
    """The weights and the log of two ranks are those of one process."""
    found, expected = (load_file(run_of(words) / "model.safetensors") for words in (two, one))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert tiny.relative_difference(found[name], weight) <= CLOSE, name
    assert log(run_of(two)) == [pytest.approx(line, rel=CLOSE) for line in log(run_of(one))]


def test_a_command_ends_with_a_crashed_rank_and_goes_on(
    both: Both, folder: Path, commands: list[list[str]]
) -> None:
    crashed = json.loads((folder / "crashed.json").read_text())
    assert (folder / "crashed1.txt").read_text() == "KeyError('the second rank fails')"
    assert crashed["ended"]
    assert crashed["checkpoints"] == ["checkpoint-3"]
    resumed = [json.loads((folder / f"command{rank}.json").read_text()) for rank in range(RANKS)]
    assert [found["code"] for found in resumed] == [0, 0]
    printed = "".join(found["printed"] for found in resumed)
    assert printed.count("wrote the model to") == printed.count("eval_loss") == 1
    assert_same_runs(*commands)


@pytest.mark.slow
def test_launchers_end_with_a_crashed_rank_and_go_on(
    tmp_path: Path, toy_model: Path, toy_data: Path, held_out: Path
) -> None:
    """The same by the commands that users type: 50 s, as each process imports torch."""
    two, one = commands_in(tmp_path, toy_model, toy_data, held_out)
    crashed = launch("torchrun", str(Path(__file__).parents[1] / "crash.py"), *two)
    assert crashed.returncode != 0
    assert "KeyError: 'the second rank fails'" in crashed.stderr
    assert [path.name for path in list_checkpoints(run_of(two))] == ["checkpoint-3"]
    resumed = launch("accelerate", "-m", "sftmix", *two, "--resume", "true")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("wrote the model to") == resumed.stdout.count("eval_loss") == 1
    assert main(one) == 0
    assert_same_runs(two, one)


def log(run: Path) -> list[dict[str, float]]:
    """What a run logged, without what the machine decides and the sums over a training."""
    state = json.loads((run / "trainer_state.json").read_text())
    return [
        {k: v for k, v in line.items() if k not in MEASURED}
        for line in state["log_history"]
        if "train_loss" not in line
    ]
