"""The LM head of a causal language model, and a forward that ends in a function of its input.

The loss runs inside the model's forward and *through the head module*: wrappers that gather a
sharded weight in module hooks (FSDP2, ZeRO-3) or cast inputs (autocast) keep working, and logits
are never made. Only the given instance is changed; `HeadAdapter.detach` undoes it.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# f(hidden rows (N, D), head weight (V, D), head bias (V,) or None) -> tensors
HeadFunction = Callable[[Tensor, Tensor, Tensor | None], Any]


class HeadAdapter:
    """Backbone, head, logit scale and softcap of a model, checked against its own logits.

    Attached, ``model(input_ids, ..., rows=rows, head_function=f)`` returns
    ``f(hidden.reshape(-1, D)[rows], weight, bias)``, where hidden is what the head reads (after the
    final norm). Calls without ``head_function`` are the model's own.
    """

    def __init__(self, model: PreTrainedModel, *, checked: bool = True) -> None:
        """Find the head and check it.

        ``checked``: whether the weights are there to be checked; on all ranks but the first they
        are not, where accelerate loads them there alone (``cpu_ram_efficient_loading``).

        Raises:
            ValueError: the model has no linear LM head, or its logits are not
                ``cap * tanh(scale * (W h + b) / cap)`` with the scale and cap of its config.
        """
        model = without_peft(model)
        self.model = model
        self.backbone = model.base_model
        self.head = model.get_output_embeddings()
        if not isinstance(self.head, nn.Linear) or self.backbone is model:
            raise ValueError(
                f"model: expected a causal language model with a linear LM head, "
                f"got {type(model).__name__} with {type(self.head).__name__}"
            )
        self.logit_scale = logit_scale(model)
        self.softcap: float | None = getattr(
            model.config.get_text_config(), "final_logit_softcapping", None
        )
        if getattr(model.config, "output_router_logits", False):
            raise ValueError(
                "model: the router's auxiliary loss (output_router_logits) is not supported"
            )
        if checked:
            self.check()
        self.attach()

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of the fused ops that describe this head."""
        return {"logit_scale": self.logit_scale, "softcap": self.softcap}

    @torch.no_grad()
    def check(self) -> None:
        """Compare the logits found by this adapter with the model's own on a few tokens.

        The hidden states and the matrix product are the same, so only the head's last operations
        (bias, scale, softcap, a cast) may round differently: four roundings of the head's dtype.

        Raises:
            ValueError: they differ, with the two values that differ most.
        """
        device, vocab_size = self.head.weight.device, self.head.weight.shape[0]
        tokens = (torch.arange(8, device=device) * 7919 % vocab_size).unsqueeze(0)
        training = self.model.training
        self.model.eval()
        expected = self.model(input_ids=tokens, use_cache=False).logits.float()
        hidden = self.backbone(input_ids=tokens, use_cache=False)[0]
        self.model.train(training)
        found = self.head(hidden).float() * self.logit_scale
        if self.softcap is not None:
            found = self.softcap * torch.tanh(found / self.softcap)
        allowed = 4 * torch.finfo(self.head.weight.dtype).eps * expected.abs().max()
        difference = (found - expected).abs()
        if not (difference <= allowed).all():
            worst = int(difference.argmax())
            raise ValueError(
                f"model: the logits of {type(self.model).__name__} are not "
                f"softcap({self.softcap}) of {self.logit_scale} * (W h + b): "
                f"expected {expected.flatten()[worst]:.6g}, found {found.flatten()[worst]:.6g}"
            )

    def attach(self) -> None:
        """Give the model and its head a forward that knows ``head_function``."""
        # Everything goes through the module that is called: a deep copy runs its own weights.
        own_forward, own_head = unbound_forward(self.model), unbound_forward(self.head)

        def head_forward(
            module: nn.Linear, hidden: Tensor, head_function: HeadFunction | None = None
        ) -> Any:
            if head_function is None:
                return own_head(module, hidden)
            return head_function(hidden, module.weight, module.bias)

        def forward(
            module: PreTrainedModel,
            *args: Any,
            rows: Tensor | None = None,
            head_function: HeadFunction | None = None,
            **kwargs: Any,
        ) -> Any:
            if head_function is None:
                return own_forward(module, *args, **kwargs)
            hidden = module.base_model(*args, **kwargs)[0]
            hidden = hidden.reshape(-1, hidden.shape[-1])
            if rows is not None:
                hidden = hidden.index_select(0, rows)
            return module.get_output_embeddings()(hidden, head_function=head_function)

        # `generate` looks at the signature to see which inputs a model takes.
        forward.__signature__ = inspect.signature(type(self.model).forward)  # type: ignore[attr-defined]
        self.head.forward = types.MethodType(head_forward, self.head)
        self.model.forward = types.MethodType(forward, self.model)

    def detach(self) -> None:
        """Give the model and its head back the forward of their classes."""
        for module in (self.model, self.head):
            module.__dict__.pop("forward", None)


def unbound_forward(module: nn.Module) -> Callable[..., Any]:
    """A module's forward as it is now, called with the module as first argument."""
    own = module.__dict__.get("forward")
    if own is None:
        return type(module).forward
    return getattr(own, "__func__", lambda _, *args, **kwargs: own(*args, **kwargs))


def without_peft(model: Any) -> PreTrainedModel:
    """The model that a PEFT wrapper adapts: the wrapper passes unknown keywords on to it."""
    inner: PreTrainedModel = model
    if hasattr(model, "get_base_model"):
        if model.active_peft_config.is_prompt_learning:
            raise ValueError(
                "model: PEFT's virtual tokens shift the rows of the loss; use another kind"
            )
        inner = model.get_base_model()
    return inner


def logit_scale(model: PreTrainedModel) -> float:
    """What a model multiplies its raw logits with: Cohere, Granite and Falcon-H1 families."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    if scale is not None:
        return float(scale)
    if getattr(config, "logits_scaling", None) is not None:
        return 1.0 / float(config.logits_scaling)
    return float(getattr(config, "lm_head_multiplier", None) or 1.0)
