"""Time a whole training step: SFTMix and NTP by our trainer, and as a user would write them.

Timed is `one_step`: forward, backward, AdamW and zero_grad, through a trainer's own
`training_step`, which clips no gradients. Ours is timed beside `transformers.Trainer` on NTP, on
SFTMix in dense PyTorch, and with Liger-Kernel. Every method trains the same weights with the same
optimizer on the same batch, so that a large model and its AdamW states are in memory once. The
plain Trainer projects every position to logits, as models do that are given labels; ours only the
response tokens. Each is checked against its dense form first. Figures: "step" in RESULTS.md,
README's sentence on steps, `cpu-step.svg`.

Legend: B examples, L padded length, D hidden size, P mixed pairs of tokens.
"""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.integrations.liger import apply_liger_kernel
from transformers.models.llama import modeling_llama

from sftmix import SFTMixConfig, SFTMixTrainer
from sftmix.conventions import IGNORE_INDEX
from sftmix.model.head import without_peft
from sftmix.pairs.collator import PairedCollator
from tools.peak_memory import peak_extra_bytes

from . import records as names
from .bench_loss import dense_mixup
from .inputs import MU, Inputs
from .measure import SuiteError, interleaved_samples
from .result_file import Results
from .settings import Settings

SFTMIX, NTP = "sftmix", "ntp"
DENSE_OF = {SFTMIX: names.THEIR_SFTMIX, NTP: names.THEIR_NTP}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16, "meta": torch.bfloat16}
# How far a right method may be from the dense one, as `check` measures it. In float32 5e-7 was
# seen. In bfloat16 backward rounds anew what differs in one bit: 0.9e-2 was seen with 2 to 32
# layers, 1.2e-2 where attention was computed otherwise. Errors too small for that limit are for
# float32 to find.
LIMITS = {"cpu": 1e-4, "cuda": 2e-2}
LIGER_LIMIT = 5e-2  # it also replaces norms, MLPs and positions, and sums the head's in bfloat16


class ModelSize(NamedTuple):
    """A Llama model's shape and the batch it is trained on."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool
    batch: int
    length: int
    turns: int = 1  # rounds of a step as short as this one's for each of a long one's


BATCH_SHAPE = ("batch", "length")
QUICK = ModelSize(512, 64, 128, 2, 2, 1, False, batch=4, length=32)
MODELS: dict[str, dict[str, ModelSize]] = {
    "cpu": {
        "1M": ModelSize(2000, 192, 512, 2, 4, 4, False, batch=16, length=128, turns=2),
        "20M": ModelSize(8192, 384, 1024, 8, 6, 6, False, batch=8, length=512),
        "60M": ModelSize(32000, 576, 1536, 12, 9, 3, True, batch=4, length=128),
    },
    "cuda": {
        "0.27B": ModelSize(256000, 640, 2048, 18, 4, 1, True, batch=16, length=512),
        "1B": ModelSize(128256, 2048, 8192, 16, 32, 8, True, batch=16, length=512),
        # Weights, gradients and AdamW states take 64 GB, activations about 6 MB for each token.
        "8B": ModelSize(128256, 4096, 14336, 32, 32, 8, False, batch=8, length=512),
    },
}


def limit(name: str, device: str) -> float:
    """Return what `check` may find for a method that is right."""
    return LIGER_LIMIT if name == names.LIGER_NTP else LIMITS[device]


class Method:
    """A trainer, the batch it is given, and which loss it computes: SFTMIX or NTP."""

    def __init__(
        self,
        task: str,
        trainer: Trainer,
        batch: dict[str, Tensor],
        rope: Callable[..., Any] = modeling_llama.apply_rotary_pos_emb,
    ) -> None:
        """Keep what a step needs; ``rope`` is what Liger-Kernel replaces in all Llama models."""
        self.task, self.trainer, self.batch, self.rope = task, trainer, batch, rope
        # What the trainer divides its sums by; `Trainer.train` asks it before `training_step`.
        self.counts = trainer._get_num_items_in_batch([batch], trainer.args.device)

    def backward(self) -> Tensor:
        """Run forward and backward as the trainer does; return the loss, detached."""
        model: Any = self.trainer.model
        with patch.object(modeling_llama, "apply_rotary_pos_emb", self.rope):
            return self.trainer.training_step(model, self.batch, self.counts)


class DenseSFTMixTrainer(Trainer):
    """SFTMix as a user writes it without our kernels: logits of all positions and of the mixed."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return ``NTP + mu * Mixup`` of a batch that is a whole step, each a mean over tokens."""
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        model = without_peft(model)
        hidden = model.model(**tokens, use_cache=False).last_hidden_state  # (B, L, D)
        ntp = model.loss_function(
            logits=model.lm_head(hidden),
            labels=inputs["labels"],
            vocab_size=model.config.vocab_size,
            num_items_in_batch=num_items_in_batch,
        )
        targets = F.pad(inputs["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:].flatten()
        mixed = torch.cat([inputs["rows"][inputs[name]] for name in ("pair_c", "pair_u")])  # (2P,)
        rows, weight = hidden.flatten(0, 1)[mixed], model.lm_head.weight
        return ntp + MU * dense_mixup(Inputs(rows, weight, targets[mixed], inputs["lam"]))


def make_examples(size: ModelSize) -> list[dict[str, Any]]:
    """Return random tokens of uneven lengths, the second half a response, and a lam a pair."""
    random = np.random.default_rng(0)
    lengths = random.integers(size.length // 2, size.length + 1, size.batch).tolist()
    lam = random.beta(0.5, 0.5, size.batch // 2).repeat(2).tolist()
    examples = []
    for length, mixed in zip(lengths, lam, strict=True):
        tokens = random.integers(0, size.vocab_size, length).tolist()
        labels = [IGNORE_INDEX] * (length // 2) + tokens[length // 2 :]
        examples.append({"input_ids": tokens, "labels": labels, "lam": mixed})
    return examples


def make_batch(size: ModelSize, device: str) -> dict[str, Tensor]:
    """Return the one batch, on the device already."""
    return {name: x.to(device) for name, x in PairedCollator(0)(make_examples(size)).items()}


def make_model(size: ModelSize, device: str, dtype: torch.dtype | None = None) -> LlamaForCausalLM:
    """Return a seeded random model, made where it stays; by default in the device's dtype."""
    config = LlamaConfig(**{n: v for n, v in size._asdict().items() if n not in BATCH_SHAPE})
    gc.collect()  # trainers are cyclic: an earlier model would stay in memory beside this one
    torch.manual_seed(0)
    with torch.device(device):
        # Unlike a cast afterwards, this leaves the frequencies of the positions in float32.
        model: LlamaForCausalLM = LlamaForCausalLM._from_config(
            config, dtype=dtype or DTYPES[device]
        )
    return model


def twin(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return other modules over the same tensors: no other method sees what one changes."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def our_trainer(
    model: LlamaForCausalLM, size: ModelSize, options: dict[str, Any], **choices: Any
) -> Trainer:
    """Return `SFTMixTrainer` over its own twin of the model."""
    return SFTMixTrainer(
        model=twin(model),
        args=SFTMixConfig(**options, mu=MU, **choices),
        train_dataset=make_examples(size),
        data_collator=PairedCollator(0),
        confident=np.arange(size.batch) % 2 == 0,
    )


def liger_method(
    model: LlamaForCausalLM, options: dict[str, Any], batch: dict[str, Tensor]
) -> Method:
    """Return the plain Trainer with all that Liger-Kernel replaces by default in a Llama model."""
    args = TrainingArguments(**options, use_liger_kernel=True)
    trainer = Trainer(model=twin(model), args=args)
    # `Trainer.train` does it at its start. Besides the model it changes the module of all Llama
    # models, where the other methods must find it unchanged.
    with patch.dict(vars(modeling_llama)):
        apply_liger_kernel(trainer.model, args.liger_kernel_config)
        rope = modeling_llama.apply_rotary_pos_emb
    return Method(NTP, trainer, batch, rope)


def make_methods(
    model: LlamaForCausalLM, size: ModelSize, device: str, folder: str
) -> tuple[dict[str, Method], dict[str, str]]:
    """Return all methods over one model, and why one is left out."""
    options: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": size.batch,
        "use_cpu": device == "cpu",
        "disable_tqdm": True,
        "report_to": "none",
    }
    batch = make_batch(size, device)
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    args = TrainingArguments(**options)
    methods = {
        names.OUR_SFTMIX: Method(SFTMIX, our_trainer(model, size, options), batch),
        names.OUR_NTP: Method(NTP, our_trainer(model, size, options, method="ntp"), batch),
        names.THEIR_NTP: Method(NTP, Trainer(model=twin(model), args=args), plain),
        names.THEIR_SFTMIX: Method(SFTMIX, DenseSFTMixTrainer(model=twin(model), args=args), batch),
    }
    if device == "cpu":
        return methods, dict.fromkeys((names.OUR_TILES, names.LIGER_NTP), "needs CUDA")
    tiles = our_trainer(model, size, options, loss_schedule="vocab_tiles")
    methods[names.OUR_TILES] = Method(SFTMIX, tiles, batch)
    left_out = {}
    try:
        methods[names.LIGER_NTP] = liger_method(model, options, plain)
    except ImportError as reason:
        left_out[names.LIGER_NTP] = f"{type(reason).__name__}: {reason}"
    return methods, left_out


def one_step(method: Method, optimizer: torch.optim.Optimizer) -> None:
    """Run what is timed."""
    method.backward()
    optimizer.step()
    optimizer.zero_grad()


def measure(settings: Settings, results: Results) -> None:
    """Time the steps of every model."""
    sizes = {"quick": QUICK} if settings.quick else MODELS[settings.device]
    for name, size in sizes.items():
        gc.collect()
        if settings.device != "cpu":
            torch.cuda.empty_cache()
        work = partial(measure_steps, name, size, settings, results)
        results.attempt(f"steps of {name}", work, ours=True)


def measure_steps(name: str, size: ModelSize, settings: Settings, results: Results) -> None:
    """Time all methods on one model that agree with the dense one, in turns."""
    device = settings.device
    far = check(size, device, results)
    model = make_model(size, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-6, weight_decay=0.1, fused=True)
    with tempfile.TemporaryDirectory() as folder:
        methods, left_out = make_methods(model, size, device, folder)
        results.leave_out(left_out)
        steps, peaks = dict[str, Callable[[], object]](), dict[str, int]()
        for who in far:
            if settings.peers or is_ours(who):
                step = partial(one_step, methods[who], optimizer)
                work = partial(weighed, step, far[who], limit(who, device), device)
                peak = results.attempt(f"{who}, {name}", work, ours=is_ours(who))
                if peak is not None:
                    steps[who], peaks[who] = step, peak
        samples = interleaved_samples(
            steps,
            settings.repeats * size.turns,
            device,
            says=f"step of {name}",
            stop=lambda: settings.out_of_time,
        )
    shared = {"measure": "step", "case": name, "model": name, **facts(model, size, methods)}
    for who, seconds in samples.items():
        own = {"difference": far[who], "peak_bytes": peaks[who]}
        results.add_times(seconds, **shared, who=who, ours=is_ours(who), **own)


def facts(model: LlamaForCausalLM, size: ModelSize, methods: dict[str, Method]) -> dict[str, Any]:
    """Return what records say of the model and its batch."""
    batch = methods[names.OUR_SFTMIX].batch
    return {
        "batch": size.batch,
        "length": size.length,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": int(batch["attention_mask"].sum()),
        "response_tokens": batch["rows"].numel(),
        "mixed_positions": batch["pair_c"].numel(),
    }


def weighed(step: Callable[[], object], far: float, most: float, device: str) -> int:
    """Return the peak of one step.

    Raises:
        SuiteError: the method differs from the dense one by more than ``most``, or by NaN.
    """
    if not far <= most:
        raise SuiteError(f"off by {far:.3g}, allowed {most:.3g}")
    return peak_extra_bytes(step, device)


def check(size: ModelSize, device: str, results: Results) -> dict[str, float]:
    """Return how far each method is from the dense one with its loss; NaN where anything is NaN.

    It is the largest of three relative differences by norms: of the loss, of the LM head's gradient
    and of all others. The two are apart, so that neither hides an error in the other. A method that
    cannot run is noted in the results.
    """
    model = make_model(size, device)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        methods, _ = make_methods(model, size, device, folder)
        for task, dense in DENSE_OF.items():
            reference = loss_and_gradients(model, methods[dense])
            for name, method in methods.items():
                if method.task != task:
                    continue
                work = partial(loss_and_gradients, model, method)
                result = results.attempt(name, work, ours=is_ours(name))
                model.zero_grad()
                if result is not None:
                    found[name] = difference(result, reference)
    return {name: found[name] for name in methods if name in found}


def is_ours(name: str) -> bool:
    """Tell whether a method is this repository's."""
    return name.startswith("SFTMixTrainer")


def loss_and_gradients(model: LlamaForCausalLM, method: Method) -> list[list[Tensor]]:
    """Return [loss], [the head's gradient] and all other gradients before the optimizer's step."""
    loss = method.backward()
    head = model.lm_head.weight
    result = [[loss], [head.grad], [p.grad for p in model.parameters() if p is not head]]
    model.zero_grad()
    return result


def difference(found: list[list[Tensor]], expected: list[list[Tensor]]) -> float:
    """Return the largest, over the groups, of the norm of the difference over the norm."""
    ratios = []
    for ours, theirs in zip(found, expected, strict=True):
        apart = norm([norm([a - b]) for a, b in zip(ours, theirs, strict=True)])
        ratios.append(apart / norm(theirs))
    return float(torch.stack(ratios).max())


def norm(tensors: list[Tensor]) -> Tensor:
    """Return the norm of all numbers together, summed in float32."""
    norms = [tensor.norm(dtype=torch.float32) for tensor in tensors]
    return torch.stack(norms).norm()
