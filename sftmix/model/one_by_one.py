"""A model's backbone, read with less memory: examples one after another, activations on the host.

Of examples that are read one after another only the last hidden states are kept for the loss, which
needs them all. Backward then goes through one example at a time: autograd runs the nodes that were
made last first, and an example's are made anew (`torch.utils.checkpoint`) when its turn comes. The
last one's are still there; so are all, on the host, with `saved_on_host`.

Legend: T tokens of all examples, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# Makes the context in which the backbone's forward runs.
Saving = Callable[[], AbstractContextManager[Any]]


def saved_on_host() -> AbstractContextManager[Any]:
    """Return a context that keeps what backward needs on the host, pinned if there is a GPU.

    With activation checkpointing that is the input of each layer, and hardly anything else.
    """
    return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())


def backbone_path(model: PreTrainedModel) -> str:
    """Return the name of the backbone in its model.

    Raises:
        ValueError: the model has none of its own.
    """
    path: str = model.base_model_prefix
    if not path or not isinstance(getattr(model, path, None), nn.Module):
        raise ValueError(f"model: {type(model).__name__} has no backbone apart from its head")
    return path


def reading(parts: Sequence[int] | None, saving: Saving | None) -> Callable[..., Any]:
    """Return ``call(backbone, input_ids, ...)``, which reads ``parts`` tokens at a time.

    Without ``parts`` all are read at once. What it returns has the backbone's own form, the
    examples' hidden states (1, T, D) one after another.
    """

    def call(backbone: nn.Module, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        def read(tokens: Tensor) -> Any:
            with nullcontext() if saving is None else saving():
                return backbone(tokens, *args, **kwargs)

        if parts is None:
            return read(input_ids)
        refuse_more(args, kwargs)
        *first, last = input_ids.split(list(parts), dim=1)
        again = functools.partial(checkpoint, read, use_reentrant=False)
        # What `saving` takes is there in backward: nothing is made anew.
        return joined([*map(again if saving is None else read, first), read(last)])

    return call


def refuse_more(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse what a model gives its backbone of all examples together.

    Raises:
        ValueError: there is such a tensor.
    """
    names = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
    if names or any(isinstance(value, Tensor) for value in args):
        raise ValueError(
            "layout: 'sequential' needs a model whose backbone is given only tokens, got "
            f"{', '.join(names) or 'other tensors'} too"
        )


def joined(outputs: Sequence[Any]) -> Any:
    """Return one output of the backbone for all examples, from those of single ones.

    Raises:
        ValueError: they hold something besides hidden states and, of each layer, a router's logits.
    """
    together: dict[str, Any] = {}
    for name, value in outputs[0].items():
        values = [output[name] for output in outputs]
        if isinstance(value, Tensor) and value.dim() == 3:
            together[name] = torch.cat(values, dim=1)
        elif isinstance(value, tuple) and all(logits.dim() == 2 for logits in value):
            together[name] = tuple(torch.cat(layer) for layer in zip(*values, strict=True))
        else:
            kind = type(outputs[0]).__name__
            raise ValueError(f"layout: 'sequential' cannot join {name} of {kind}")
    return type(outputs[0])(**together)
