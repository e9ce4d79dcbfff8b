"""The LM head of a causal language model, and a forward that ends in a function of its input.

Legend: N chosen rows, M rows given to the head, D hidden size, V vocabulary.

`stand_in.py` says how the head is reached, and `probe.py` how it is found out what the model does
to its logits. Only the given instance is changed; `HeadAdapter.detach` undoes it.
"""

from __future__ import annotations

import contextlib
import types
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from sftmix.model.four_bits import keep_four_bits
from sftmix.model.one_by_one import Saving
from sftmix.model.probe import (
    CHECKED,
    OTHER_WAY,
    check_causal,
    check_logits,
    check_numbers,
    evaluating,
    find_router_coefficient,
    find_scale_and_softcap,
    some_tokens,
    transformed,
)
from sftmix.model.stand_in import HeadOutput, linear_forward, model_forward

# The fused ops' types.
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Marked(NamedTuple):
    """What a function gives in a check of hooks, of the form of a loss."""

    total: Tensor
    rows: Tensor


class HeadAdapter:
    """The head of a model and what becomes of its logits, checked against the model's own.

    While it is attached, the model takes more keywords. With ``hidden`` what its head reads:

    - ``rows=r, head_function=f``: it returns a `HeadOutput` of
      ``f(hidden.reshape(-1, D)[r], weight, bias)``. For this ``head="fused"`` finds scale and
      softcap of a linear head.
    - ``rows=r, head_input=g``: it returns a `HeadOutput` of its own logits for
      ``g(hidden.reshape(-1, D)[r])``. ``head="logits"`` allows only this, of any head.
    - ``parts=(12, 7, 4), saving=s``, beside one of them: the backbone reads the examples of a row,
      of so many tokens, one by one, and ``s()`` makes the context of that (`one_by_one.py`).

    Calls with none of them are the model's own.
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

        Args:
            model: the model, or PEFT's wrapper of it.
            head: "fused" or "logits"; see the class.
            checked: whether the weights are there to be checked. Where accelerate loads them on
                the first rank only (``cpu_ram_efficient_loading``), the other ranks have none.
            saving: kept for those who call the model to train it.

        Raises:
            ValueError: the model has no LM head or none that is called once for a batch; with
                "fused" it is not linear, its weight is quantised, or the model's logits are not
                ``cap * tanh(scale * (W h + b) / cap)``; the model's own loss has a term besides
                next-token prediction and a router's auxiliary loss. Or as `keep_four_bits`.
        """
        outer: nn.Module = model
        keep_four_bits(model)
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
        """Return the head's module as it is now."""
        return self.model.get_submodule(self.path)

    @property
    def weight(self) -> nn.Parameter:
        """Return the head's first parameter, whose device and dtype are the head's."""
        return next(self.head.parameters())  # type: ignore[no-any-return]

    @property
    def options(self) -> dict[str, Any]:
        """Return the keywords of the fused ops that describe this head."""
        return {"logit_scale": self.logit_scale, "softcap": self.softcap}

    def logits(self, raw: Tensor) -> Tensor:
        """Return the model's logits from those of the linear head: scaled, then softcapped."""
        return transformed(raw, self.logit_scale, self.softcap)

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
        """Check that what a function gives comes out of the model as it is.

        Hooks on the head, or on a module through which the model is called, would see the loss
        where they expect logits. They run here as they do in training.

        Raises:
            ValueError: one changes what it sees or fails at it, or sees gradients of logits; or
                ``outer`` does not call the model's forward.
        """
        parts = self.hooked_parts(outer)
        tokens = some_tokens(self.model, self.weight.device)
        for part in parts:
            if part._backward_hooks or part._backward_pre_hooks:
                raise ValueError(self.hooked("backward hook", [part]))
        hooking = [part for part in parts if part._forward_hooks or part._forward_pre_hooks]
        seen = Marked(torch.zeros(()), torch.ones(3))
        given = {"head_function": lambda *_: seen} if self.fused else {"head_input": lambda h: h}
        with evaluating(outer), torch.no_grad():
            # Some hooks, such as noise, act only in training.
            for part in parts:
                part.training = True
            try:
                output = outer(input_ids=tokens, use_cache=False, **given)
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
        """Return the message that a hook stands where the loss is made."""
        names = {module: name for name, module in self.model.named_modules()}
        where = " or ".join(names.get(part) or type(part).__name__ for part in parts)
        on_head = self.fused and any(part in self.head.modules() for part in parts)
        return (
            f"model: a {kind} on {where} would see the loss instead of the logits; remove it"
            f"{OTHER_WAY if on_head else ''}"
        )

    @torch.no_grad()
    def check(self) -> None:
        """Find scale, softcap and the router's coefficient on a few tokens; compare the logits.

        Raises:
            ValueError: see the class.
        """
        inputs = {
            "input_ids": some_tokens(self.model, self.weight.device),
            "use_cache": False,
        }
        # Backwards, to see that nothing hangs on where a row stands.
        rows = torch.arange(CHECKED - 1, -1, -1, device=self.weight.device)
        with evaluating(self.model):
            own = self.model(**inputs).logits
            check_numbers(own)
            check_causal(self.model, inputs, own)
            if self.fused:
                found_out = find_scale_and_softcap(self.model, self.path, inputs)
                self.logit_scale, self.softcap = found_out
                found = self.model(**inputs, rows=rows, head_function=F.linear).value
                found = self.logits(found.float())
            else:
                found = self.model(**inputs, rows=rows, head_input=lambda hidden: hidden).value
            formula = f"softcap({self.softcap}) of {self.logit_scale} * (W h + b)"
            way_out = OTHER_WAY if self.fused else ""
            check_logits(self.model, own, found.flip(0), self.weight.dtype, formula, way_out)
            self.router_coefficient = find_router_coefficient(self.model, self.path, inputs, own)


def without_peft(model: Any) -> PreTrainedModel:
    """Return the model that a PEFT wrapper adapts, or the model as it is.

    The wrapper passes unknown keywords on to it.

    Raises:
        ValueError: an adapter past which the loss would go, or that shifts its rows.
    """
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
    """Return the name of the head in its model.

    Raises:
        ValueError: the model has no LM head.
    """
    head = model.get_output_embeddings()
    names = (name for name, module in model.named_modules() if module is head and name)
    path: str | None = next(names, None)
    if path is None:
        raise ValueError(
            f"model: expected a causal language model with an LM head, got {type(model).__name__}"
        )
    return path


def linear_heads(model: PreTrainedModel, head: nn.Module) -> list[nn.Linear]:
    """Return the linear layers that a head may end in: itself, or PEFT's copies and the original.

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
