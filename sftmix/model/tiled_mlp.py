"""The MLPs of a model's layers, a tile of tokens at a time.

An MLP treats every token by itself, so that

    MLP(x) = [MLP(x_1), MLP(x_2), ...]      x = [x_1, x_2, ...], tiles of tokens

and its inner activations, several times as wide as the hidden states, need be there for one tile
alone. Backward computes them again, tile by tile. The gradients of weights, sums over tiles, are
kept in float32 meanwhile: sums of many terms lose digits in bfloat16.

Legend: B, L batch and length, N = B L tokens, D hidden size.
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sftmix.model.head import without_peft
from sftmix.model.probe import evaluating
from sftmix.model.stand_in import unbound_forward

# What transformers' layers call them.
NAMES = ("mlp", "feed_forward", "ffn")
CHECKED = 8
WAY_OUT = "leave it off (memory='lean' turns it on: give its other switches instead)"


class Circumstances(NamedTuple):
    """What a forward depends on besides its inputs: autocast, and dropout's random numbers."""

    device: str
    autocast: bool
    dtype: torch.dtype
    random: Tensor
    devices: list[int]
    device_random: list[Tensor]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Restore the circumstances, with gradients on."""
        device = "cuda" if self.device == "cpu" else self.device
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(self.devices, device_type=device))
            stack.enter_context(torch.enable_grad())
            # Not cached: each tile's graph has a cast of its own.
            stack.enter_context(
                torch.autocast(self.device, self.dtype, self.autocast, cache_enabled=False)
            )
            torch.set_rng_state(self.random)
            set_device_states(self.devices, self.device_random, device_type=device)
            yield


def circumstances(hidden: Tensor) -> Circumstances:
    """Return the circumstances of this moment."""
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return Circumstances(device, *autocast, torch.get_rng_state(), *get_device_states(hidden))


class TiledMLP(torch.autograd.Function):
    """An MLP on tiles; the weights are inputs so that autograd asks for their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Tensor], Tensor],
        tokens: int,
        hidden: Tensor,  # (1, N, D)
        *weights: Tensor,
    ) -> Tensor:  # (1, N, D)
        ctx.run, ctx.tokens, ctx.before = run, tokens, circumstances(hidden)
        ctx.weights = weights
        ctx.save_for_backward(hidden)
        return torch.cat([run(tile) for tile in hidden.split(tokens, dim=1)], dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        with ctx.before.again():
            gradients = tile_gradients(ctx.run, ctx.tokens, hidden, ctx.weights, upstream)
        return None, None, *gradients


def tile_gradients(
    run: Callable[[Tensor], Tensor],
    tokens: int,
    hidden: Tensor,  # (1, N, D)
    weights: tuple[Tensor, ...],
    upstream: Tensor,  # (1, N, D)
) -> list[Tensor | None]:
    """Return gradients of hidden and each weight; None for one that the MLP does not read."""
    gradient = torch.empty_like(hidden)
    sums: list[Tensor | None] = [None] * len(weights)
    tiles = (tensor.split(tokens, dim=1) for tensor in (hidden, upstream, gradient))
    for tile, of_output, of_tile in zip(*tiles, strict=True):
        leaf = tile.detach().requires_grad_()
        mine, *parts = torch.autograd.grad(
            run(leaf), [leaf, *weights], of_output, allow_unused=True
        )
        of_tile.copy_(mine)
        sums = [added(total, part) for total, part in zip(sums, parts, strict=True)]
    return [
        gradient,
        *(
            total if total is None else total.to(weight.dtype)
            for total, weight in zip(sums, weights, strict=True)
        ),
    ]


def added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Return a sum in float32 or better."""
    if part is None:
        return total
    part = part.to(torch.promote_types(part.dtype, torch.float32))
    return part if total is None else total.add_(part)


def tile_mlps(model: nn.Module, tokens: int, *, checked: bool = True) -> None:
    """Make the MLP of each layer run on so many tokens at a time.

    ``checked``: whether the weights are there to be checked. Only the given model is changed.

    Raises:
        ValueError: ``tokens`` is below 1; the layers have no MLP of a known name; or what one makes
            of a token hangs on other tokens.
    """
    if tokens < 1:
        raise ValueError(f"mlp_tile_tokens: expected at least 1, got {tokens}")
    found = mlps(without_peft(model))
    if checked:
        check_by_tokens(model, found[0])
    for mlp in found:
        mlp.__dict__["forward"] = types.MethodType(tiled_forward(mlp, tokens), mlp)


def refuse_router(coefficient: float) -> None:
    """Refuse tiles where a router's loss counts.

    Raises:
        ValueError: it does, and needs the logits of whole MLPs.
    """
    if coefficient:
        raise ValueError(
            "mlp_tile_tokens: the router's auxiliary loss needs whole MLPs; turn off the model's "
            f"output_router_logits, or {WAY_OUT}"
        )


def mlps(model: PreTrainedModel) -> list[nn.Module]:
    """Return the MLPs of the layers.

    Raises:
        ValueError: there are none.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    children = (getattr(layer, name, None) for layer in layers for name in NAMES)
    found = [child for child in children if isinstance(child, nn.Module)]
    if not found:
        names = ", ".join(NAMES)
        raise ValueError(
            f"mlp_tile_tokens: the layers of {type(model).__name__} have no {names}; {WAY_OUT}"
        )
    return found


@torch.no_grad()
def check_by_tokens(model: nn.Module, mlp: nn.Module) -> None:
    """See that an MLP gives some tokens what it gives each alone, up to rounding: half the digits.

    Raises:
        ValueError: it does not, or takes more than hidden states.
    """
    weight = next(mlp.parameters())
    size = without_peft(model).config.get_text_config().hidden_size
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, CHECKED, size, generator=generator).to(weight.device, dtype)
    needed = [
        argument
        for argument in inspect.signature(type(mlp).forward).parameters.values()
        if argument.default is argument.empty and argument.kind is argument.POSITIONAL_OR_KEYWORD
    ]
    with evaluating(mlp):
        together = mlp(tokens) if len(needed) == 2 else None  # self and hidden
        if isinstance(together, Tensor) and together.shape == tokens.shape:
            alone = torch.cat([mlp(token) for token in tokens.split(1, dim=1)], dim=1)
            # Routers compute in float32 whatever the model's dtype.
            eps = max(torch.finfo(dtype).eps for dtype in (together.dtype, torch.float32))
            if (alone - together).abs().max() <= eps**0.5 * together.abs().max():
                return
    raise ValueError(
        f"mlp_tile_tokens: {type(mlp).__name__} of {type(without_peft(model)).__name__} does not "
        f"treat each token by itself, as an MLP does; {WAY_OUT}"
    )


def tiled_forward(
    mlp: nn.Module, tokens: int, tiled: Callable[..., Tensor] = TiledMLP.apply
) -> Callable[..., Any]:
    """Return an MLP's forward that goes by tiles if there are more tokens than one holds.

    ``tiled(run, tokens, hidden, *weights)`` is what goes by them.
    """
    own_forward = unbound_forward(mlp)
    own_forward = getattr(own_forward, "untiled", own_forward)

    # What is computed again in backward is not to be compiled with the layer.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(module: nn.Module, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        if rows.shape[1] <= tokens:
            output: Tensor = own_forward(module, hidden)
            return output
        run = types.MethodType(own_forward, module)
        weights = [weight for weight in module.parameters() if weight.requires_grad]
        return tiled(run, tokens, rows, *weights).reshape(*hidden.shape[:-1], -1)

    forward.untiled = own_forward
    return forward  # type: ignore[no-any-return]
