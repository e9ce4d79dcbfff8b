"""Train LoRA from the command line: a frozen model with low-rank updates, through PEFT.

Every linear layer except the LM head, which the loss reads as it is, becomes
`W + alpha / rank * B A` (Hu et al. 2022, arXiv 2106.09685). `A` is drawn by the run's seed, and `B`
begins at 0.

QLoRA (`--load_in_4bit`; Dettmers et al. 2023, arXiv 2305.14314): the frozen `W` is in NF4, 4 bits a
weight, and is made whole for each product. The head, the embeddings and the norms stay as they are.
"""

from __future__ import annotations

import importlib.util
import logging
from types import ModuleType
from typing import Any

import torch
from transformers import BitsAndBytesConfig, TrainingArguments

from sftmix.recipe.arguments import RunArguments
from sftmix.runs.failures import Naming
from sftmix.training.config import SFTMixConfig

logger = logging.getLogger(__name__)

# PEFT's word for every linear layer except the head.
ALL_LINEAR = "all-linear"


def lora_options(arguments: RunArguments) -> dict[str, Any]:
    """Return the options as the manifest records them, filled in; none without `--lora_rank`.

    Raises:
        ValueError: an option is out of range, or one is given without `--lora_rank`.
    """
    rank, alpha, dropout, targets = (
        getattr(arguments, f"lora_{name}") for name in ("rank", "alpha", "dropout", "targets")
    )
    if rank is None:
        if arguments.load_in_4bit:
            raise ValueError(
                "load_in_4bit: expected --lora_rank with it, since weights of 4 bits cannot be "
                "trained, only updates beside them"
            )
        given = {"alpha": alpha, "dropout": dropout or None, "targets": targets}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"lora_{name}: expected --lora_rank with it, got only {value!r}")
        return {}
    if rank < 1:
        raise ValueError(f"lora_rank: expected at least 1, got {rank}")
    alpha = 2.0 * rank if alpha is None else alpha
    if not 0 < alpha < float("inf"):
        raise ValueError(f"lora_alpha: expected a finite number above 0, got {alpha}")
    if not 0 <= dropout < 1:
        raise ValueError(
            f"lora_dropout: expected a number of at least 0 and below 1, got {dropout}"
        )
    targets = targets or [ALL_LINEAR]
    names = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")
    options = dict(zip(names, (rank, alpha, dropout, targets), strict=True))
    return {**options, "load_in_4bit": True} if arguments.load_in_4bit else options


def check_lora(arguments: RunArguments, config: TrainingArguments) -> None:
    """Check the options and that PEFT and bitsandbytes are installed, before anything is loaded.

    Raises:
        ImportError: one that is needed is not there.
        ValueError: as `lora_options` does; or `--load_in_4bit` with an option that it excludes.
    """
    if lora_options(arguments):
        require_peft()
        if config.learning_rate == SFTMixConfig.learning_rate:
            logger.warning(
                "learning_rate is %g, which is for training all weights: updates of --lora_rank "
                "want a larger one, such as --learning_rate 2e-4",
                config.learning_rate,
            )
    if not arguments.load_in_4bit:
        return
    if arguments.dtype == "auto":
        raise ValueError(
            "load_in_4bit: expected --dtype bfloat16 or float32 with it, in which products are "
            "computed, got auto"
        )
    if config.fsdp:
        raise ValueError(
            "load_in_4bit: not supported with --fsdp, which shards no weights of 4 bits; leave out "
            "one of the two"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("load_in_4bit: needs bitsandbytes: pip install peft bitsandbytes")


def four_bit(arguments: RunArguments, device: torch.device) -> dict[str, Any]:
    """Return the keywords of `from_pretrained` that load a model in NF4 on its device.

    There are none without `--load_in_4bit`. The scales of NF4's blocks are quantised, too (double
    quantisation, as in the paper): 4.13 bits a weight.
    """
    if not arguments.load_in_4bit:
        return {}
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=arguments.dtype,
    )
    return {"quantization_config": quantised, "device_map": {"": device}}


def add_lora(model: Any, arguments: RunArguments, seed: int) -> Any:
    """Return the model with fresh updates as the options say; unchanged if they ask for none.

    Raises:
        ImportError: PEFT is not there.
        ValueError: as `lora_options` does, or no layer of the model has a name of the targets; or
            the model's weights are quantised, and the options ask for no updates.
    """
    options = lora_options(arguments)
    if not options:
        quantiser = getattr(model, "hf_quantizer", None)
        if quantiser is not None and not quantiser.is_qat_trainable:
            raise ValueError(
                f"model: the weights of {arguments.model} are quantised, and cannot be trained; "
                "train updates beside them: --lora_rank 16"
            )
        return model
    peft = require_peft()
    largest = largest_side(model)
    if options["lora_rank"] > largest:
        raise ValueError(
            f"lora_rank: expected at most {largest:,}, the largest side of the model's layers, got "
            f"{options['lora_rank']:,}"
        )
    targets = options["lora_targets"]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=options["lora_rank"],
        lora_alpha=options["lora_alpha"],
        lora_dropout=options["lora_dropout"],
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        revision=arguments.revision,
    )
    # The model is still on the CPU, and so are its updates.
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        with Naming("lora_targets"):
            return peft.get_peft_model(model, config)


def largest_side(model: Any) -> int:
    """Return the most rows or columns that a weight of the model's layers has."""
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    sides = [
        int(side)
        for module in model.modules()
        if isinstance(weight := getattr(module, "weight", None), torch.Tensor)
        and id(module) not in ends
        and weight.dim() == 2
        for side in weight.shape
    ]
    return max(sides)


def require_peft() -> ModuleType:
    """Return the module `peft`.

    Raises:
        ImportError: it is not there.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("lora_rank: needs PEFT: pip install peft") from error
    return peft
