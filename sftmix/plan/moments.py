"""Name the moments of a planned step, by hooks on the head and on the layers.

A moment is a stretch of the step whose peak is a linear function of the number of layers. Forward
and update hold more with every layer; backward is at its peak at one of its ends, depending on
whether a layer's activations or its gradients are larger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from sftmix.model.head import HeadAdapter
from sftmix.plan.trace import LOSS, MemoryTrace

FORWARD, OF_LOSS, BACKWARD, UPDATE = "forward", "loss", "backward", "optimizer"
AGAIN, UPPER, LOWER, EMBEDDINGS = (
    f"{BACKWARD}: {where}"
    for where in ("forward again", "upper layers", "lower layers", "embeddings")
)


def decoder_layers(model: nn.Module, count: int) -> Sequence[nn.Module]:
    """Return the model's list of `count` layers; an empty list if it has none."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    return ()


def name_moments(trace: MemoryTrace, head: HeadAdapter) -> None:
    """Make the trace follow where in a step it is."""

    def enter_loss(*_: Any) -> None:
        trace.part, trace.moment = LOSS, OF_LOSS

    def enter_again(*_: Any) -> None:
        if trace.moment.startswith(BACKWARD):
            trace.moment = AGAIN

    head.head.register_forward_pre_hook(enter_loss)
    layers = decoder_layers(head.model, head.model.config.get_text_config().num_hidden_layers)
    for place, layer in enumerate(layers):
        layer.register_forward_pre_hook(enter_again)
        moment = UPPER if 2 * place >= len(layers) else LOWER
        layer.register_forward_hook(on_gradient(trace, moment))
    for layer in layers[:1]:
        layer.register_forward_pre_hook(on_gradient(trace, EMBEDDINGS))


def on_gradient(trace: MemoryTrace, moment: str) -> Callable[..., None]:
    """Return a hook that begins a moment once a layer's gradient is there.

    As a forward hook it waits for the gradient of the layer's output, as a pre-hook for that of its
    input.
    """

    def begin(_: Tensor) -> None:
        trace.moment = moment

    def watch(_: nn.Module, inputs: Any, output: Any = None) -> None:
        found = inputs if output is None else output
        tensor = found if isinstance(found, Tensor) else found[0]
        if tensor.requires_grad:
            tensor.register_hook(begin)

    return watch
