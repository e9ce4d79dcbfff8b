"""Plan tiled MLPs: two tiles stand for all, since all are of one size.

It allocates what `tiled_mlp.py` does, in its order; a long sequence has too many tiles to run all.

Legend: N tokens, D hidden size.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sftmix.model.head import without_peft
from sftmix.model.tiled_mlp import TiledMLP, circumstances, mlps, tile_gradients, tiled_forward
from sftmix.plan.trace import active_trace

TILES = 2


class PlannedTiles(torch.autograd.Function):
    """Run `tiled_mlp.TiledMLP` on the first tiles, with the other tiles' tensors beside them."""

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
        traced = TILES * tokens
        with active_trace().standing_for(hidden.shape[1] / traced):
            first = run(hidden[:, :tokens])
            # The last tile runs while the output of all others is held.
            others = first.new_empty(1, hidden.shape[1] - traced, first.shape[2])
            last = run(hidden[:, tokens:traced])
        return torch.cat([first, others, last], dim=1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        traced = TILES * ctx.tokens
        rest = torch.empty_like(hidden[:, traced:])
        some = (hidden[:, :traced], ctx.weights, upstream[:, :traced])
        with ctx.before.again(), active_trace().standing_for(hidden.shape[1] / traced):
            first, *of_weights = tile_gradients(ctx.run, ctx.tokens, *some)
        # All tiles write into one tensor, which takes the place of these two.
        del first, rest
        return None, None, torch.empty_like(hidden), *of_weights


def plan_tiles(model: nn.Module, tokens: int) -> None:
    """Tile the MLPs of a planned step, as `tiled_mlp.tile_mlps` does for a real one.

    Raises:
        ValueError: the layers have no MLP of a known name.
    """
    for mlp in mlps(without_peft(model)):
        forward = tiled_forward(mlp, tokens, planned_tiles)
        mlp.__dict__["forward"] = types.MethodType(forward, mlp)


def planned_tiles(
    run: Callable[[Tensor], Tensor], tokens: int, hidden: Tensor, *weights: Tensor
) -> Tensor:
    """Run `PlannedTiles` if there are more tokens than two tiles hold, else `TiledMLP`."""
    function = PlannedTiles if hidden.shape[1] > TILES * tokens else TiledMLP
    tiled: Tensor = function.apply(run, tokens, hidden, *weights)  # type: ignore[no-untyped-call]
    return tiled
