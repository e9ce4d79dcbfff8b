"""A model's own forward with something else where its LM head is, or its backbone.

Legend: N chosen rows, M rows given to the head, D hidden size, V vocabulary.

For the time of one call a `StandIn` takes the head's place: it gets what the head reads, whatever
the model did to it before, and calls the head itself. With a function of (hidden, weight, bias) the
loss is made right there and logits never are; with other rows the head and all the model does after
it run on those. Either way the head's module is called once, so that wrappers that gather a sharded
weight in its hooks (FSDP2), replace it (PEFT) or cast its inputs (autocast) keep working,
and a router's auxiliary loss is the model's own. The backbone is reached in the same way
(`one_by_one.py`).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sftmix.model.one_by_one import Saving, backbone_path, reading

# f(hidden rows (N, D), head weight (V, D), head bias (V,) or None) -> tensors
HeadFunction = Callable[[Tensor, Tensor, Tensor | None], Any]
# f(hidden rows (N, D)) -> the rows (M, D) that the head is to read
HeadInput = Callable[[Tensor], Tensor]


class HeadOutput(NamedTuple):
    """What a call with ``head_function`` or ``head_input`` gives."""

    value: Any  # the function's result, or the logits (M, V) of the rows given to the head
    router_loss: Tensor | None  # a mixture of experts' auxiliary loss, before its coefficient


class StandIn(nn.Module):
    """Takes a module's place: ``call(module, what it would get)``, for one call."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["module"] = module  # no child: its parameters are not the stand-in's
        self.__dict__["call"] = call
        self.calls = 0

    # Each call brings another function: torch.compile would compile the model anew.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model is to take for the module's output."""
        self.calls += 1
        return self.__dict__["call"](self.__dict__["module"], *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Some forwards look at the dtype of the head's weight.
        return getattr(self.__dict__["module"], name)


@contextlib.contextmanager
def standing_in(
    model: nn.Module, path: str, call: Callable[..., Any], what: str = "head"
) -> Iterator[None]:
    """Put a `StandIn` where a module is and take it away again, come what may.

    Raises:
        ValueError: the module was not called exactly once.
    """
    parent, _, name = path.rpartition(".")
    owner, module = model.get_submodule(parent), model.get_submodule(path)
    stand_in = StandIn(module, call)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, module)
    if stand_in.calls != 1:
        raise ValueError(
            f"model: expected {type(model).__name__} to call its {what} {path} once, "
            f"got {stand_in.calls} calls"
        )


def model_forward(model: PreTrainedModel, path: str) -> Callable[..., Any]:
    """Return a model's forward with the keywords that `HeadAdapter` describes."""
    own_forward = unbound_forward(model)

    # Eager under torch.compile, as the stand-in; what it calls is compiled.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def forward(
        module: PreTrainedModel,
        *args: Any,
        rows: Tensor | None = None,
        head_function: HeadFunction | None = None,
        head_input: HeadInput | None = None,
        parts: Sequence[int] | None = None,
        saving: Saving | None = None,
        **kwargs: Any,
    ) -> Any:
        if head_function is None and head_input is None:
            return own_forward(module, *args, **kwargs)
        values: list[Any] = []

        def call(head: nn.Module, hidden: Tensor) -> Tensor:
            hidden = hidden.reshape(-1, hidden.shape[-1])
            if rows is not None:
                hidden = hidden.index_select(0, rows)
            if head_input is not None:
                logits: Tensor = head(head_input(hidden).unsqueeze(0))
                return logits
            values.append(head(hidden, head_function=head_function))
            # The model goes on with one row that nobody reads.
            return hidden.new_zeros(1, 1, module.config.get_text_config().vocab_size)

        with contextlib.ExitStack() as stack:
            stack.enter_context(standing_in(module, path, call))
            if parts is not None or saving is not None:
                read = reading(parts, saving)
                stack.enter_context(
                    standing_in(module, backbone_path(module), read, what="backbone")
                )
            output = own_forward(module, *args, **kwargs)
        value = output.logits.squeeze(0) if head_input is not None else values[0]
        return HeadOutput(value, router_loss(output))

    # `generate` looks at the signature to see which inputs a model takes.
    forward.__signature__ = inspect.signature(type(model).forward)
    return forward  # type: ignore[no-any-return]


def linear_forward(linear: nn.Linear) -> Callable[..., Any]:
    """Return a linear head's forward that knows ``head_function``."""
    own_forward = unbound_forward(linear)

    def forward(
        module: nn.Linear, hidden: Tensor, head_function: HeadFunction | None = None
    ) -> Any:
        if head_function is None:
            return own_forward(module, hidden)
        return head_function(hidden, module.weight, module.bias)

    return forward


def unbound_forward(module: nn.Module) -> Callable[..., Any]:
    """Return a module's forward as it is now, to be called with the module first."""
    own = module.__dict__.get("forward")
    if own is None:
        return type(module).forward
    return getattr(own, "__func__", lambda _, *args, **kwargs: own(*args, **kwargs))


def router_loss(output: Any) -> Tensor | None:
    """Return a mixture of experts' auxiliary loss, where its config asks for one."""
    loss = getattr(output, "aux_loss", None)
    return loss if isinstance(loss, Tensor) else None
