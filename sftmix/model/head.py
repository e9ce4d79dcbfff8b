"""The LM head of a causal language model, and a forward that ends in a function of its input.

Legend: N chosen rows, M rows given to the head, D hidden size, V vocabulary.

`stand_in.py` says how the head is reached. What the model does to its logits is not read off its
config, whose names differ, but found by giving it raw logits. Only the given instance is changed;
`HeadAdapter.detach` undoes it.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from sftmix.model.one_by_one import Saving
from sftmix.model.stand_in import (
    HeadOutput,
    linear_forward,
    model_forward,
    router_loss,
    standing_in,
)

# The fused ops' types.
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tokens of the self-check, and what it has for raw logits: two for the scale and the cap, the rest
# to see that nothing else is done to them.
CHECKED = 8
TINY, HUGE = 2.0**-27, 2.0**100
RAW_LOGITS = (TINY, HUGE, -300.0, -60.0, -3.0, -0.5, 0.0, 0.25, 2.0, 17.0)
CERTAIN = 1e4
OTHER_WAY = "; --head logits goes through the model's own logits"


class Probe(NamedTuple):
    """What a function gives in a check, of the form of a loss."""

    total: Tensor
    rows: Tensor


class HeadAdapter:
    """The head of a model and what becomes of its logits, checked against the model's own.

    Attached, ``model(input_ids, ..., rows=rows, head_function=f)`` returns a `HeadOutput` of
    ``f(hidden.reshape(-1, D)[rows], weight, bias)``, where hidden is what the head reads, and
    ``head_input=g`` instead of it one of the model's own logits of ``g(hidden...[rows])``. With
    ``parts``, lengths of the examples in a row, the backbone reads them one by one; ``saving``
    makes the context in which it does (`backbone.py`). Calls with none of them are the model's own.
    ``head="fused"`` allows both functions, and finds scale and softcap; ``head="logits"`` the
    second alone, from any head.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: str = "fused",
        *,
        checked: bool = True,
        saving: Saving | None = None,
    ) -> None:
        """Find the head and check it.

        ``saving`` is for those who call the model to train it. ``checked``: whether the weights are
        there to be checked; on all ranks but the first they are not, where accelerate loads them
        there alone (``cpu_ram_efficient_loading``).

        Raises:
            ValueError: the model has no LM head or none that is called once for a batch; with
                "fused" it is not linear, its weight is quantised, or the model's logits are not
                ``cap * tanh(scale * (W h + b) / cap)``; the model's own loss has a term besides
                next-token prediction and a router's auxiliary loss.
        """
        outer: nn.Module = model
        model = without_peft(model)
        self.model, self.saving = model, saving
        self.fused = head == "fused"
        self.path = head_path(model)
        self.linears = linear_heads(model, self.head) if self.fused else []
        self.logit_scale = 1.0
        self.softcap: float | None = None
        self.router_coefficient = 0.0
        self.checked_hooks = self.hooks(outer)
        with contextlib.ExitStack() as undo:
            undo.callback(self.detach)
            self.attach()
            if checked:
                self.check_hooks(outer)
                self.check()
            undo.pop_all()

    @property
    def head(self) -> Any:
        """The head's module as it is now."""
        return self.model.get_submodule(self.path)

    @property
    def weight(self) -> nn.Parameter:
        """The head's first parameter: its device and dtype are the head's."""
        return next(self.head.parameters())  # type: ignore[no-any-return]

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of the fused ops that describe this head."""
        return {"logit_scale": self.logit_scale, "softcap": self.softcap}

    def logits(self, raw: Tensor) -> Tensor:
        """The model's logits from those of the linear head: scaled, then softcapped."""
        scaled = raw * self.logit_scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def attach(self) -> None:
        """Give the model and a linear head a forward that knows the functions."""
        # Everything goes through the module that is called: a deep copy runs its own weights.
        self.saved = [(m, m.__dict__.get("forward")) for m in (self.model, *self.linears)]
        for linear in self.linears:
            linear.__dict__["forward"] = types.MethodType(linear_forward(linear), linear)
        forward = model_forward(self.model, self.path)
        self.model.__dict__["forward"] = types.MethodType(forward, self.model)

    def detach(self) -> None:
        """Give the model and its head back the forward they had."""
        for module, forward in self.saved:
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward

    def hooked_parts(self, outer: nn.Module) -> list[nn.Module]:
        """Return the modules whose hooks would see what a function gives."""
        through = [part for part in outer.modules() if self.model in part.modules()]
        return [*self.head.modules(), *through] if self.fused else through

    def hooks(self, outer: nn.Module) -> set[int]:
        """Return the keys of the hooks that `check_hooks` looks at."""
        kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
        parts = self.hooked_parts(outer)
        return {key for part in parts for kind in kinds for key in getattr(part, f"_{kind}")}

    def check_new_hooks(self, outer: nn.Module) -> None:
        """Check hooks again if one has come since.

        Raises:
            ValueError: as `check_hooks`.
        """
        if not self.hooks(outer) <= self.checked_hooks:
            self.check_hooks(outer)

    def check_hooks(self, outer: nn.Module) -> None:
        """See that what a function gives comes out of the model as it is.

        Hooks on the head, or on what the model is called through, would see the loss where they
        expect logits. They run here as they do in training.

        Raises:
            ValueError: one changes what it sees or fails at it, or sees gradients of logits; or
                ``outer`` does not call the model's forward.
        """
        parts = self.hooked_parts(outer)
        for part in parts:
            if part._backward_hooks or part._backward_pre_hooks:
                raise ValueError(self.hooked("backward hook", [part]))
        hooking = [part for part in parts if part._forward_hooks or part._forward_pre_hooks]
        seen = Probe(torch.zeros(()), torch.ones(3))
        given = {"head_function": lambda *_: seen} if self.fused else {"head_input": lambda h: h}
        with evaluating(outer), torch.no_grad():
            # Some hooks, such as noise, are for training alone.
            for part in parts:
                part.training = True
            try:
                output = outer(input_ids=self.tokens, use_cache=False, **given)
            except (TypeError, AttributeError, LookupError, RuntimeError) as error:
                if not hooking:
                    raise
                raise ValueError(f"{self.hooked('hook', hooking)} ({error})") from error
        kept = type(output) is HeadOutput and (not self.fused or output.value is seen)
        if not kept or seen.total != 0 or (seen.rows != 1).any():
            if hooking:
                raise ValueError(self.hooked("forward hook", hooking))
            raise ValueError(
                f"model: {type(outer).__name__} does not call the forward of "
                f"{type(self.model).__name__} in which the loss is made; pass the model itself"
            )

    def hooked(self, kind: str, parts: list[nn.Module]) -> str:
        """Say that a hook stands where the loss is made."""
        names = {module: name for name, module in self.model.named_modules()}
        where = " or ".join(names.get(part) or type(part).__name__ for part in parts)
        on_head = self.fused and any(part in self.head.modules() for part in parts)
        return (
            f"model: a {kind} on {where} would see the loss instead of the logits; remove it"
            f"{OTHER_WAY if on_head else ''}"
        )

    @property
    def tokens(self) -> Tensor:
        """A few tokens for the checks, (1, CHECKED)."""
        vocab_size: int = self.model.config.get_text_config().vocab_size
        tokens = torch.arange(CHECKED, device=self.weight.device) * 7919 % vocab_size
        return tokens.unsqueeze(0)

    @torch.no_grad()
    def check(self) -> None:
        """Find scale, softcap and the router's coefficient on a few tokens; compare the logits.

        The hidden states and the matrix product are the same, so only the head's last operations
        (bias, scale, softcap, a cast) may round differently: four roundings of the head's dtype.

        Raises:
            ValueError: the logits differ, with the two values that differ most; see the class.
        """
        inputs = {"input_ids": self.tokens, "use_cache": False}
        # Backwards, to see that nothing hangs on where a row stands.
        rows = torch.arange(CHECKED - 1, -1, -1, device=self.weight.device)
        with evaluating(self.model):
            own = self.model(**inputs).logits
            self.check_numbers(own)
            self.check_causal(inputs, own)
            if self.fused:
                self.find_scale_and_softcap(inputs)
                found = self.model(**inputs, rows=rows, head_function=F.linear).value
                found = self.logits(found.float())
            else:
                found = self.model(**inputs, rows=rows, head_input=lambda hidden: hidden).value
            self.compare(own, found.flip(0))
            self.find_router_coefficient(inputs, own)

    def check_numbers(self, own: Tensor) -> None:
        """The model's own logits are numbers, or nothing could be learnt from them.

        Raises:
            ValueError: one is NaN or plus infinity; minus infinity forbids a token.
        """
        wrong = own.isnan() | own.isposinf()
        if wrong.any():
            raise ValueError(
                f"model: {int(wrong.sum())} of {wrong.numel()} of its logits are not numbers (NaN "
                "or infinite) for a few tokens: its weights are damaged, or too large for "
                f"{own.dtype}; take a model whose answers are numbers"
            )

    def check_causal(self, inputs: dict[str, Any], own: Tensor) -> None:
        """Another last token leaves the logits before it alone, up to rounding: half the digits.

        Raises:
            ValueError: they change.
        """
        tokens = inputs["input_ids"].clone()
        tokens[:, -1] = (tokens[:, -1] + 1) % self.model.config.get_text_config().vocab_size
        changed = self.model(**{**inputs, "input_ids": tokens}).logits
        difference = (changed.float() - own.float())[:, :-1].abs().max()
        if difference > torch.finfo(own.dtype).eps ** 0.5 * own.float().abs().max():
            raise ValueError(
                f"model: expected a causal language model; a token's logits in "
                f"{type(self.model).__name__} change by {difference:.3g} with a later token"
            )

    def compare(self, own: Tensor, found: Tensor) -> None:
        """Hold logits (N, V) beside the model's own (1, N, V)."""
        kind = type(self.model).__name__
        if own.shape != (1, *found.shape):
            raise ValueError(
                f"model: expected logits (1, {CHECKED}, V) of {kind}, got {tuple(own.shape)} and "
                f"from its head {tuple(found.shape)}{self.way_out}"
            )
        # Of a quantised head the logits' dtype is all there is.
        weight_dtype = self.weight.dtype
        eps = torch.finfo(weight_dtype if weight_dtype.is_floating_point else own.dtype).eps
        expected, found = own[0].float(), found.float()
        allowed = 4 * eps * expected.abs().max()
        difference = (found - expected).abs()
        if not (difference <= allowed).all():
            worst = int(difference.argmax())
            raise ValueError(
                f"model: the logits of {kind} are not softcap({self.softcap}) of "
                f"{self.logit_scale} * (W h + b): expected {expected.flatten()[worst]:.6g}, "
                f"found {found.flatten()[worst]:.6g}{self.way_out}"
            )

    @property
    def way_out(self) -> str:
        """What else a refused model can be trained with."""
        return OTHER_WAY if self.fused else ""

    def find_scale_and_softcap(self, inputs: dict[str, Any]) -> None:
        """See what the model makes of raw logits: ``cap * tanh(scale * x / cap)``, or refuse.

        They are given in float64, so that a scale such as 1 / 3 is found to its last digits.
        """
        kind, device = type(self.model).__name__, self.weight.device
        values = torch.tensor(RAW_LOGITS, dtype=torch.float64, device=device)
        shape = (CHECKED, self.model.config.get_text_config().vocab_size)
        places = torch.arange(shape[0], device=device).unsqueeze(1) * 3
        places = (places + torch.arange(shape[1], device=device)) % len(values)
        with torch.enable_grad():
            found = self.after_head(values[places], inputs).logits
        if found.requires_grad:
            raise ValueError(f"model: {kind} trains what it does to its logits{OTHER_WAY}")
        if found.shape != (1, *shape):
            raise ValueError(
                f"model: {kind} makes logits {tuple(found.shape)} of {(1, *shape)}{OTHER_WAY}"
            )
        found, eps = found[0].double(), 4 * torch.finfo(torch.float32).eps
        scale, highest = float(found[places == 0][0] / TINY), float(found[places == 1][0])
        self.logit_scale = 1.0 if abs(scale - 1) <= eps else scale
        self.softcap = highest if abs(highest) < HUGE * abs(scale) / 2 else None
        expected = self.logits(values[places])
        wrong = ~((found - expected).abs() <= eps * expected.abs())
        if scale == 0 or wrong.any():
            worst = int(wrong.flatten().int().argmax())
            raise ValueError(
                f"model: the logits of {kind} are not a scale and a softcap of the head's: "
                f"{values[places].flatten()[worst]:.6g} becomes {found.flatten()[worst]:.6g}, "
                f"expected {expected.flatten()[worst]:.6g}{OTHER_WAY}"
            )

    def find_router_coefficient(self, inputs: dict[str, Any], own: Tensor) -> None:
        """See what the model's own loss adds to next-token prediction; 0 without a router's loss.

        Logits that are certain of every label leave nothing but the addition, and its quotient by
        the auxiliary loss is the coefficient. The model's own logits must then give the same.
        """
        if "labels" not in inspect.signature(type(self.model).forward).parameters:
            return
        labels = torch.zeros_like(inputs["input_ids"])
        certain = torch.full_like(own[0], -CERTAIN).index_fill_(1, labels[0, :1], CERTAIN)
        outputs = [
            self.after_head(certain, {**inputs, "labels": labels}),
            self.model(**inputs, labels=labels),
        ]
        if outputs[0].loss is None:
            return
        aux = router_loss(outputs[1])
        if aux is not None:
            # The quotient has float32's error; a coefficient has few digits.
            quotient = float(added(outputs[0], labels, 0.0)[0] / aux)
            rounded = float(f"{quotient:.6g}") if math.isfinite(quotient) else 0.0
            close = abs(rounded - quotient) <= 4 * torch.finfo(torch.float32).eps * abs(quotient)
            self.router_coefficient = rounded if close else quotient
        for output in outputs:
            expected = 0.0 if aux is None else self.router_coefficient * float(aux)
            extra, allowed = added(output, labels, expected)
            if not abs(extra - expected) <= allowed:
                raise ValueError(
                    f"model: the loss of {type(self.model).__name__} adds {extra:.6g} to "
                    f"next-token prediction, expected {expected:.6g} (a router's auxiliary loss); "
                    "turn the other term off in its config"
                )

    def after_head(self, raw: Tensor, inputs: dict[str, Any]) -> Any:
        """The model's output were the head's raw logits these (N, V)."""
        # The adapter's own forward is passed by: without a function it is the model's.
        with standing_in(self.model, self.path, lambda head, hidden: raw.unsqueeze(0)):
            return self.model(**inputs)


def without_peft(model: Any) -> PreTrainedModel:
    """The model that a PEFT wrapper adapts: the wrapper passes unknown keywords on to it."""
    inner: PreTrainedModel = model
    if hasattr(model, "get_base_model"):
        kinds = {getattr(one.peft_type, "value", "") for one in model.peft_config.values()}
        if "ADAPTION_PROMPT" in kinds:
            raise ValueError(
                "model: PEFT's AdaptionPrompt calls the model's forward as it was before, past the "
                "loss; use another kind, such as LoRA"
            )
        if model.active_peft_config.is_prompt_learning:
            raise ValueError(
                "model: PEFT's virtual tokens shift the rows of the loss; use another kind"
            )
        inner = model.get_base_model()
    return inner


def head_path(model: PreTrainedModel) -> str:
    """Where the head is in its model."""
    head = model.get_output_embeddings()
    names = (name for name, module in model.named_modules() if module is head and name)
    path: str | None = next(names, None)
    if path is None:
        raise ValueError(
            f"model: expected a causal language model with an LM head, got {type(model).__name__}"
        )
    return path


def linear_heads(model: PreTrainedModel, head: nn.Module) -> list[nn.Linear]:
    """The linear layers that a head may end in: itself, or PEFT's trained copies and the original.

    Raises:
        ValueError: the head, or a part of it, is something else.
    """
    kind = type(model).__name__
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"model: an adapter sits on the LM head of {kind}; expected it linear: "
            f"leave {head_path(model).rpartition('.')[2]} out of PEFT's target_modules{OTHER_WAY}"
        )
    parts = [head]
    if isinstance(copies := getattr(head, "modules_to_save", None), nn.ModuleDict):
        parts = [*copies.values(), head.original_module]  # type: ignore[list-item]
    for part in parts:
        if not isinstance(part, nn.Linear):
            raise ValueError(
                f"model: expected a causal language model with a linear LM head, "
                f"got {kind} with {type(part).__name__}{OTHER_WAY}"
            )
        if part.weight.dtype not in FUSED_DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FUSED_DTYPES)
            raise ValueError(
                f"model: expected the LM head's weight in {names}, got {type(part).__name__} in "
                f"{str(part.weight.dtype).removeprefix('torch.')}; leave the head out of the "
                f"quantisation{OTHER_WAY}"
            )
    return [part for part in parts if isinstance(part, nn.Linear)]


def added(output: Any, labels: Tensor, expected: float) -> tuple[float, float]:
    """What a model's loss adds to the cross-entropy of its logits, and how far it may be off.

    A few decoders of encoder-decoder families do not shift labels; and float32's sum over a large
    vocabulary is off by up to 1e-4, in the model's loss as in ours: what is nearest counts.
    """
    extras = [
        float(output.loss.double() - F.cross_entropy(logits[:end], labels[0, :end]).double())
        for logits in (output.logits[0].double(), output.logits[0].float())
        for end in (CHECKED - 1, CHECKED)
    ]
    eps = torch.finfo(output.loss.dtype).eps
    nearest = min(extras, key=lambda extra: abs(extra - expected))
    # A certain token's log(1 + x) is rounded at 1.
    return nearest, 4 * eps * (1 + float(output.loss.abs()) + abs(expected))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and each module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
