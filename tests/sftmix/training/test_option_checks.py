"""Options of transformers: heeded, refused or said to have no effect; wrong values are named."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from sftmix.integrations.trl import SFTMixSFTConfig
from sftmix.methods import METHODS
from sftmix.recipe.arguments import TrainRunArguments, parse
from sftmix.training.config import CHECKPOINTING, SFTMixConfig
from sftmix.training.option_checks import NAMES, UNSUPPORTED, WITHOUT_EFFECT
from sftmix.training.parallelism import check_parallelism

# Older versions of transformers do not have every option.
FIELDS = {field.name for field in dataclasses.fields(SFTMixConfig)}
# What this trainer, or transformers' below it, does as the option says.
HEEDED = {
    *("output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim"),
    *("optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("optim_target_modules", "gradient_accumulation_steps", "max_grad_norm", "bf16", "fp16"),
    *("tf32", "activation_checkpointing", "activation_checkpointing_kwargs"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_compile"),
    *("torch_compile_backend", "torch_compile_mode", "use_cache", "neftune_noise_alpha"),
    *("torch_empty_cache_steps", "logging_strategy", "logging_steps", "logging_first_step"),
    *("log_on_each_node", "include_num_input_tokens_seen", "log_level", "log_level_replica"),
    *("disable_tqdm", "report_to", "run_name", "project", "trackio_space_id"),
    *("trackio_bucket_id", "trackio_static_space_id", "eval_strategy", "eval_steps"),
    *("eval_delay", "eval_on_start", "save_strategy", "save_steps", "save_total_limit"),
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"),
    *("hub_always_push", "hub_revision", "load_best_model_at_end", "metric_for_best_model"),
    *("greater_is_better", "ignore_data_skip", "restore_callback_states_from_checkpoint"),
    *("full_determinism", "seed", "use_cpu", "accelerator_config", "dataloader_drop_last"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
    *("ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "debug"),
    *("skip_memory_metrics", "enable_jit_checkpoint", "label_smoothing_factor"),
    # Of older versions, which heed them.
    *("logging_dir", "warmup_ratio"),
}
# Refused elsewhere than in `option_checks.UNSUPPORTED`: by the config, the devices, the parser.
REFUSED = {"remove_unused_columns", "save_on_each_node", "parallelism_config"}
# They say nothing of what a training does, or only together with an option that is refused.
SILENT = {
    *("do_train", "do_eval", "resume_from_checkpoint", "local_rank", "logging_nan_inf_filter"),
    *("liger_kernel_config", "length_column_name"),
}


def test_every_option_of_transformers_is_sorted() -> None:
    """A field that a newer transformers brings has to be looked at."""
    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    groups = [HEEDED, set(UNSUPPORTED), set(WITHOUT_EFFECT), REFUSED, SILENT]
    assert fields - set().union(*groups) == set()
    assert sum(map(len, groups)) == len(set().union(*groups))


def test_the_documentation_names_what_is_refused() -> None:
    text = (Path(__file__).parents[3] / "docs/command_line.md").read_text(encoding="utf-8")
    for name in (*UNSUPPORTED, *WITHOUT_EFFECT, "save_on_each_node"):
        assert f"`{name}`" in text


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")  # TRL's own
def test_the_defaults_are_accepted() -> None:
    SFTMixConfig(use_cpu=True)
    SFTMixSFTConfig(use_cpu=True, bf16=False)


def refused(error: type[Exception] = ValueError, **options: Any) -> str:
    """What a config says to these options."""
    with pytest.raises(error) as caught:
        SFTMixConfig(**{"use_cpu": True, **options})
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(FIELDS & UNSUPPORTED.keys()))
def test_what_would_not_be_heeded_is_refused(name: str) -> None:
    allowed = UNSUPPORTED[name][0][0]
    value = not allowed if isinstance(allowed, bool) else {"data_seed": 3}.get(name, ["x"])
    assert refused(**{name: value}).startswith(f"{name}: not supported here, got ")


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_what_has_no_effect_is_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sftmix"):
        SFTMixConfig(use_cpu=True)
        assert not caplog.messages
        SFTMixConfig(use_cpu=True, **{name: 3})
    assert [line.partition(":")[0] for line in caplog.messages] == [f"{name}=3 has no effect"]


def test_options_of_fsdp_without_it_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """A recipe may hold them for the runs on several GPUs."""
    with caplog.at_level(logging.WARNING, logger="sftmix"):
        SFTMixConfig(use_cpu=True, fsdp_config={"version": 2})
    assert caplog.messages == ["fsdp_config has no effect without --fsdp"]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("gradient_accumulation_steps", 0, "at least 1"),
        ("gradient_accumulation_steps", 1.5, "a whole number"),
        ("per_device_train_batch_size", 0, "at least 1"),
        ("per_device_train_batch_size", -2, "at least 1"),
        ("per_device_eval_batch_size", 0, "at least 1"),
        ("dataloader_num_workers", -1, "at least 0"),
        ("dataloader_prefetch_factor", 0, "at least 1"),
        ("save_total_limit", 0, "at least 1"),
        ("torch_empty_cache_steps", 0, "at least 1"),
        ("eval_delay", -1, "at least 0"),
        ("ddp_timeout", 0, "at least 1"),
        ("learning_rate", NAN, "a finite number"),
        ("learning_rate", INF, "a finite number"),
        ("learning_rate", -1.0, "at least 0"),
        ("learning_rate", "1e-5", "a number"),
        ("learning_rate", True, "a number"),
        ("weight_decay", -0.1, "at least 0"),
        ("adam_beta1", 1.0, "at least 0 and below 1"),
        ("adam_beta2", -0.5, "at least 0 and below 1"),
        ("adam_epsilon", NAN, "a finite number"),
        ("max_grad_norm", -1.0, "at least 0"),
        ("warmup_steps", -1, "at least 0"),
        ("warmup_steps", 2.5, "a whole number of steps"),
        ("warmup_steps", NAN, "a finite number"),
        ("num_train_epochs", INF, "a finite number above 0"),
        ("neftune_noise_alpha", -3.0, "a number above 0"),
        ("neftune_noise_alpha", 1e300, "a number above 0 and below 1e+30"),
        ("power_k", 1e100, "at least 0 and below 1e+30"),
        ("label_smoothing_factor", -0.1, "at least 0 and below 1"),
        ("label_smoothing_factor", 1.0, "at least 0 and below 1"),
        ("label_smoothing_factor", "0.1", "a number"),
        ("seed", -1, "at least 0 and below 4294967296"),
        ("seed", 2**32, "at least 0 and below 4294967296"),
        ("logging_steps", 0, "a whole number of steps"),
        ("logging_steps", -1, "a whole number of steps"),
        ("logging_steps", 2.5, "a whole number of steps"),
        ("row_length", 1, "at least 2"),
        ("per_device_train_batch_size", 10**19, "at least 1 and below 16777216, got 1000"),
        ("loss_max_bytes", 10**25, "at least 1 and below 2^63, got 1000"),
    ],
)
def test_numbers_out_of_range(name: str, value: Any, expected: str) -> None:
    message = refused(**{name: value})
    assert message.startswith(f"{name}: expected {expected}")
    assert str(value) in message


@pytest.mark.parametrize(("strategy", "name"), [("save", "save_steps"), ("eval", "eval_steps")])
def test_intervals_count_only_where_they_are_used(strategy: str, name: str) -> None:
    assert refused(**{f"{strategy}_strategy": "steps", name: -5}).startswith(f"{name}: expected a")
    SFTMixConfig(use_cpu=True, **{name: -5, f"{strategy}_strategy": "no"})


def test_an_infinite_gradient_norm_is_a_limit_that_is_never_reached() -> None:
    assert SFTMixConfig(use_cpu=True, max_grad_norm=INF).max_grad_norm == INF


@pytest.mark.parametrize("name", sorted(FIELDS & NAMES.keys()))
def test_unknown_names(name: str) -> None:
    known = next(iter(NAMES[name]))
    message = refused(**{name: f"{known}x"})
    assert message.startswith(f"{name}: expected one of {known}")
    assert message.endswith(f"got '{known}x'; did you mean {known}?")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp16": True}, "fp16: not supported on the CPU, where it would have no effect"),
        ({"fp16": True, "bf16": True}, "fp16: expected one of --fp16 and --bf16, got both"),
        ({"tf32": True}, "tf32: requires Ampere"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end: True needs --eval_strategy"),
        ({"save_strategy": "best"}, "save_strategy: best needs --eval_strategy"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type: reduce_lr_on_plateau"),
        ({"lr_scheduler_type": "greedy"}, "lr_scheduler_type: greedy needs --eval_strategy"),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "lr_scheduler_type: warmup_stable_decay needs num_decay_steps: --lr_scheduler_kwargs",
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs: cosine_with_min_lr: "),
        (
            {"lr_scheduler_type": "polynomial", "learning_rate": 1e-8},
            "lr_scheduler_kwargs: polynomial: lr_end (1e-07) must be smaller than initial lr",
        ),
        (
            {
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr": 1e-7},
                "learning_rate": 0,
            },
            "learning_rate: expected above 0 with min_lr, got 0",
        ),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"power": NaN}'},
            "lr_scheduler_kwargs: power: expected a number, got nan",
        ),
        ({"optim": "sgd", "optim_args": "momentum=nan"}, "optim_args: expected NAME=VALUE,NAME="),
        (
            {"accelerator_config": {"even_batches": "no"}},
            "accelerator_config: even_batches: expected true or false, got 'no'",
        ),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": "off"}}},
            "accelerator_config: sync_each_batch: expected true or false, got 'off'",
        ),
        (
            {f"{CHECKPOINTING}_kwargs": {"use_reentrant": "no"}},
            f"{CHECKPOINTING}_kwargs: use_reentrant: expected true or false, got 'no'",
        ),
        (
            {f"{CHECKPOINTING}_kwargs": {"use_reentrant": "maybe"}},
            f"{CHECKPOINTING}_kwargs: use_reentrant: expected true or false, got 'maybe'",
        ),
        (
            {"fsdp": True, "fsdp_config": {"activation_checkpoint": True}},
            "fsdp_config: expected one of version",
        ),
        (
            {"fsdp": True, "fsdp_config": {"cpu_offload": "no"}},
            "fsdp_config: cpu_offload: expected true or false, got 'no'",
        ),
        ({"lr_scheduler_kwargs": {"cycles": 1}}, "lr_scheduler_kwargs: expected one of num_cycles"),
        ({"lr_scheduler_kwargs": '{"num_cycles'}, "lr_scheduler_kwargs: expected JSON, got Un"),
        ({"lr_scheduler_kwargs": "half"}, "lr_scheduler_kwargs: expected JSON such as {...}, got"),
        ({"accelerator_config": "no.json"}, "accelerator_config: expected JSON such as {...} or"),
        ({"accelerator_config": {"split": True}}, "accelerator_config: expected one of split_bat"),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}},
            "accelerator_config: expected the number as --gradient_accumulation_steps",
        ),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"steps": 2}}},
            "accelerator_config: TypeError: ",
        ),
        ({"fsdp": "nonsense"}, "fsdp: expected one of full_shard"),
        ({"fsdp": True, "fsdp_config": "no.json"}, "fsdp_config: expected JSON such as {...} or"),
        ({"deepspeed": "no.json"}, "deepspeed: not supported here, got 'no.json': its checkpoints"),
        ({"deepspeed": {"zero": 2}}, "deepspeed: not supported here"),
        ({"debug": "all"}, "debug: expected one of underflow_overflow"),
        ({"torch_compile_backend": "inducter"}, "torch_compile_backend: expected one of"),
        ({"torch_compile_mode": "faster"}, "torch_compile_mode: expected one of default"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor: expected --dataloader_n"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers: expected --data"),
        (
            {f"{CHECKPOINTING}_kwargs": {"reentrant": True}},
            f"{CHECKPOINTING}_kwargs: expected one of use_reentrant",
        ),
        ({"optim": "lomo"}, "optim: lomo is not supported: it updates weights in backward"),
        ({"optim": "galore_adamw_layerwise"}, "optim: galore_adamw_layerwise is not supported"),
        ({"optim": "schedule_free_adamw"}, "optim: schedule_free_adamw is not supported"),
        ({"optim": "galore_adamw"}, "optim: galore_adamw needs --optim_target_modules"),
        ({"optim": "adamw_torch_npu_fused"}, "optim: Trainer failed to import"),
        ({"optim_target_modules": "all-linear"}, "optim_target_modules: adamw_torch_fused has"),
        ({"optim_args": "momentum"}, "optim_args: expected NAME=VALUE,NAME=VALUE, got 'momentum'"),
        ({"optim_args": "momentum=0.9"}, "optim_args: adamw_torch_fused has no 'momentum'"),
        ({"optim": "sgd", "optim_args": "momentum=high"}, "optim_args: could not convert"),
        ({"optim": "sgd", "optim_args": "nesterov=true"}, "optim_args: Nesterov momentum requires"),
        ({"optim": "sgd", "optim_args": "momentun=0.9"}, "optim_args: sgd has no 'momentun'"),
        ({"report_to": "tensorbored"}, "report_to: expected one of azure_ml"),
        ({"report_to": ["none", "tensorboard"]}, "report_to: expected one of azure_ml"),
    ],
)
def test_what_does_not_fit(options: dict[str, Any], message: str) -> None:
    assert refused(**options).startswith(message)


SMOOTHS = ("ntp", "label_smoothing")


@pytest.mark.parametrize("method", sorted({*METHODS} - {*SMOOTHS}))
def test_smoothing_is_refused_where_the_loss_has_none(method: str) -> None:
    message = refused(method=method, label_smoothing_factor=0.1)
    assert message.startswith(f"label_smoothing_factor: expected 0 with method='{method}'")
    assert message.endswith("got 0.1; leave it out, or take method='label_smoothing'")
    SFTMixConfig(use_cpu=True, method=method, label_smoothing_factor=0.0)


def test_smoothing_by_nothing_is_refused() -> None:
    message = refused(method="label_smoothing", label_smoothing_factor=0.0)
    assert message == (
        "label_smoothing_factor: expected a number above 0 with method='label_smoothing', got 0; "
        "method='ntp' is without smoothing"
    )


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"method": "eaft"}, "eaft"),
        ({"method": "gem"}, "gem"),
        ({"method": "label_smoothing"}, "label_smoothing"),
        ({"method": "ntp", "label_smoothing_factor": 0.1}, "ntp with label smoothing"),
    ],
)
def test_methods_that_vocabulary_tiles_do_not_have(options: dict[str, Any], what: str) -> None:
    assert refused(loss_schedule="vocab_tiles", **options) == (
        f"loss_schedule: expected auto or row_chunks with method {what}, whose loss needs whole "
        "rows of logits, got 'vocab_tiles'"
    )
    # The schedule is not read there.
    SFTMixConfig(use_cpu=True, loss_schedule="vocab_tiles", head="logits", **options)


@pytest.mark.parametrize("method", ["ntp", "dft", "power", "ir_dro", "sftmix"])
def test_methods_that_vocabulary_tiles_have(method: str) -> None:
    SFTMixConfig(use_cpu=True, loss_schedule="vocab_tiles", method=method)


def test_packages_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.integrations as integrations

    for name, check, package in (
        ("wandb", "wandb", "wandb"),
        ("comet_ml", "comet", "comet-ml"),
        ("mlflow", "mlflow", "mlflow"),
        ("trackio", "trackio", "trackio"),
        ("tensorboard", "tensorboard", "tensorboard"),
    ):
        monkeypatch.setattr(integrations, f"is_{check}_available", lambda: False)
        for given in (name, [name]):
            message = refused(ImportError, report_to=given)
            assert message == f"report_to: {name} is not installed: pip install {package}"
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    assert "pip install -U bitsandbytes" in refused(ImportError, optim="adamw_bnb_8bit")


@pytest.mark.parametrize(
    "options",
    [
        {"optim": "sgd", "optim_args": "momentum=0, nesterov=false"},
        {"optim": "rmsprop", "optim_args": "centered=False"},
        {"optim": "adafactor"},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 9}},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "constant", "warmup_steps": 0.0},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 0.0}},
        {f"{CHECKPOINTING}_kwargs": {"use_reentrant": "false"}},
        {"fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": False}},
        {"accelerator_config": '{"even_batches": true}', "logging_steps": 0.1},
        {"report_to": ["tensorboard"], "debug": "underflow_overflow", "fsdp": "false"},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
    ],
)
def test_what_fits_is_accepted(options: dict[str, Any]) -> None:
    SFTMixConfig(use_cpu=True, **options)


def test_reporters_on_the_command_line(tmp_path: Path) -> None:
    words = ["--model", "m", "--data", "d", "--output", str(tmp_path), "--use_cpu", "true"]
    for flags, expected in (([], []), (["--report_to", "none"], [])):
        _, config = parse([*words, *flags], TrainRunArguments, SFTMixConfig, "sftmix train")
        assert config.report_to == expected
    two = ["--report_to", "tensorboard", "tensorboard"]
    _, config = parse([*words, *two], TrainRunArguments, SFTMixConfig, "sftmix train")
    assert config.report_to == ["tensorboard", "tensorboard"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("report_to: [tensorboard, wandbx]\n")
    with pytest.raises(ValueError, match=r"^report_to: .*got 'wandbx'; did you mean wandb\?"):
        parse([*words, "--config", str(recipe)], TrainRunArguments, SFTMixConfig, "sftmix train")


def test_a_learning_rate_of_zero_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sftmix"):
        SFTMixConfig(use_cpu=True, learning_rate=0.0)
    assert caplog.messages == ["learning_rate is 0: the weights stay as they are"]


def test_reentrant_checkpointing_of_an_adapter_on_several_devices_is_refused() -> None:
    accelerator = SimpleNamespace(
        distributed_type=None, parallelism_config=None, state=SimpleNamespace(fsdp_plugin=None)
    )
    model = torch.nn.Linear(2, 2)
    options: dict[str, Any] = {
        "use_cpu": True,
        CHECKPOINTING: True,
        f"{CHECKPOINTING}_kwargs": {"use_reentrant": True},
    }

    def args(ranks: int, **changes: Any) -> Any:
        made = SFTMixConfig(**{**options, **changes})
        names = ("accelerator_config", "n_gpu", "save_on_each_node", "fsdp")
        values = {name: getattr(made, name) for name in (*names, *options)}
        on = made.checkpoints_activations
        return SimpleNamespace(**values, world_size=ranks, checkpoints_activations=on)

    check_parallelism(args(2), accelerator, model)
    adapter: Any = torch.nn.Linear(2, 2)
    adapter.peft_config = {}
    check_parallelism(args(1), accelerator, adapter)
    check_parallelism(args(2, **{f"{CHECKPOINTING}_kwargs": None}), accelerator, adapter)
    check_parallelism(args(2, **{CHECKPOINTING: False}), accelerator, adapter)
    with pytest.raises(ValueError, match=r"_checkpointing_kwargs: expected use_reentrant false"):
        check_parallelism(args(2), accelerator, adapter)


def test_options_can_be_copied() -> None:
    """What transformers makes of mappings is accepted again."""
    config = SFTMixConfig(use_cpu=True, fsdp_config={"version": 2})
    kept = config.to_dict()
    names = ("fsdp_config", "accelerator_config", f"{CHECKPOINTING}_kwargs")
    again = SFTMixConfig(use_cpu=True, **{name: kept[name] for name in names})
    assert again.fsdp_config == config.fsdp_config
    assert again.accelerator_config == config.accelerator_config
