"""A fully connected network with a scale-invariant loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from manifold_sde.arguments import check_choice, integer
from manifold_sde.errors import ArgumentError
from manifold_sde.networks.layers import MOST, GhostBatchNorm, GroupNorm, LayerNorm
from manifold_sde.paper import implements
from manifold_sde.rng import seed_key

_Layer = TypeVar("_Layer", nn.Linear, nn.Conv2d)


def generator_of(seed: int | torch.Generator) -> torch.Generator:
    """The generator that a seed stands for; torch's global one is never used.

    Raises:
        ArgumentError: If the seed is neither an integer in [0, 2^64) nor a generator.
    """
    if isinstance(seed, torch.Generator):
        return seed
    low, high = seed_key(seed)
    # torch's generator on the CPU looks at 32 bits: the upper ones have to be mixed in.
    return torch.Generator().manual_seed((low + 0x9E3779B9 * high) % (1 << 32))


def undrawn(kind: Callable[..., _Layer], *sizes: int, **options: Any) -> _Layer:
    """A layer without bias, whose weights nobody has drawn yet.

    ``torch.nn.utils.skip_init`` is the same, and loads SymPy.
    """
    layer = kind(*sizes, bias=False, device="meta", **options)
    layer.weight = nn.Parameter(torch.empty(layer.weight.shape))
    return layer


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw all weights from N(0, 2 / fan-in), in the order of the module's parameters."""
    with torch.no_grad():
        for weight in module.parameters():
            fan_in = weight[0].numel()
            weight.normal_(0.0, (2.0 / fan_in) ** 0.5, generator=generator)


def normalisation(kind: str, channels: int, *, groups: int, ghost_size: int | None) -> nn.Module:
    """The normalisation layer of a network, by its name.

    Raises:
        ArgumentError: If there is none of this name, or ghost batches have no size.
    """
    remedy = 'norm="layer" normalises each sample by itself'
    kind = check_choice("norm", kind, ("layer", "group", "ghost", "batch"), remedy)
    if kind == "ghost" and ghost_size is None:
        raise ArgumentError(
            "ghost batches need a size",
            received='norm="ghost" without ghost_size',
            expected="the number of samples in a ghost batch",
            remedy="ghost_size=32, say, for a number of samples that is a multiple of it",
        )
    if kind in ("ghost", "batch"):
        return GhostBatchNorm(ghost_size if kind == "ghost" else None, channels)
    return GroupNorm(groups if kind == "group" else 1, channels)


@implements("Assumption 2.3")
class NormalizedMLP(nn.Module):
    r"""Fully connected layers, each followed by a normalisation; the last layer is frozen.

    No layer has a bias, and no normalisation an eps or affine parameters, so that the outputs do
    not change when the weights of a layer are multiplied by a positive number.

    Args:
        widths: Sizes of the input, of the hidden layers and of the output.
        norm: ``"layer"`` or ``"group"``, which normalise each sample by itself, ``"ghost"``
            (:class:`GhostBatchNorm`), or ``"batch"``, for which no noise of the samples is defined.
        activation: Function that follows each normalisation; the default has the four derivatives
            that Assumption 2.1 asks for, which ``torch.relu`` has not.
        groups: Number of groups for ``norm="group"``.
        ghost_size: Number of samples in a ghost batch for ``norm="ghost"``.
        seed: Seed or generator of the initial weights, and of the frozen layer.

    Attributes:
        hidden: The trained layers.
        head: The frozen last layer.

    Raises:
        ArgumentError: If the widths or the normalisation cannot be used.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        norm: str = "layer",
        activation: Callable[[Tensor], Tensor] = torch.tanh,
        groups: int = 4,
        ghost_size: int | None = None,
        seed: int | torch.Generator = 0,
    ) -> None:
        super().__init__()
        sizes = [integer(width) or 0 for width in widths] if isinstance(widths, Iterable) else []
        if len(sizes) < 3 or min(sizes) < 1 or max(sizes) > MOST:
            raise ArgumentError(
                "these are not the widths of a network",
                received=repr(widths),
                expected="at least three positive integers: input, hidden layers, output",
                remedy="widths=(64, 32, 10) for ten classes of 8 x 8 images",
            )
        generator = generator_of(seed)
        self.activation = activation
        self.hidden = nn.ModuleList(
            undrawn(nn.Linear, before, after) for before, after in itertools.pairwise(sizes[:-1])
        )
        self.norms = nn.ModuleList(
            LayerNorm(size)
            if norm == "layer"
            else normalisation(norm, size, groups=groups, ghost_size=ghost_size)
            for size in sizes[1:-1]
        )
        self.head = undrawn(nn.Linear, sizes[-2], sizes[-1])
        initialise(self, generator)
        self.head.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (N, ...), flattened to (N, widths[0]) -> outputs (N, widths[-1])."""
        x = x.flatten(1)
        for layer, norm in zip(self.hidden, self.norms, strict=True):
            x = self.activation(norm(layer(x)))
        return self.head(x)
