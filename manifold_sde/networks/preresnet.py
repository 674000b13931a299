"""The scale-invariant residual network of section 6.2."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from manifold_sde.arguments import check_integer, integer
from manifold_sde.errors import ArgumentError
from manifold_sde.networks.layers import MOST
from manifold_sde.networks.mlp import generator_of, initialise, normalisation, undrawn
from manifold_sde.paper import implements

Activation = Callable[[Tensor], Tensor]


def _convolution(before: int, after: int, *, kernel: int, stride: int = 1) -> nn.Conv2d:
    return undrawn(nn.Conv2d, before, after, kernel, stride=stride, padding=kernel // 2)


class PreActivationBlock(nn.Module):
    """Two convolutions, each behind a normalisation and an activation, added to the stream.

    Where the stream changes its width, a 1x1 convolution behind a normalisation takes it along.
    So everything that is added to the stream has degree 1 in the weights.

    Args:
        before: Channels of the stream before the block.
        after: Channels behind it.
        stride: Stride of the first convolution.
        norm: Makes a normalisation layer for a number of channels.
        activation: The activation.

    Source: He et al., "Identity mappings in deep residual networks" (2016).
    """

    def __init__(
        self,
        before: int,
        after: int,
        stride: int,
        norm: Callable[[int], nn.Module],
        activation: Activation,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.norm1, self.norm2 = norm(before), norm(after)
        self.conv1 = _convolution(before, after, kernel=3, stride=stride)
        self.conv2 = _convolution(after, after, kernel=3)
        self.shortcut: nn.Module | None = None
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(
                norm(before), _convolution(before, after, kernel=1, stride=stride)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Stream (N, before, H, W) -> (N, after, H / stride, W / stride)."""
        inner = self.conv1(self.activation(self.norm1(x)))
        branch = self.conv2(self.activation(self.norm2(inner)))
        return branch + (x if self.shortcut is None else self.shortcut(x))


@implements("Assumption 2.3")
class ScaleInvariantPreResNet(nn.Module):
    r"""Residual network of 6n + 2 layers that is scale-invariant in all trained weights together.

    A stem, three stages of n blocks with ``width``, ``2 width`` and ``4 width`` channels, a
    normalisation, the mean over positions, and a frozen last layer. No convolution has a bias, no
    normalisation an eps or affine parameters, and a normalisation stands before the 1x1 shortcut
    of each stage that has one and behind the last block. So the stream has degree 1 in the weights,
    and the outputs have degree 0.

    Args:
        depth: Number 6n + 2 of layers: 8, 14, 20, 26, 32, ...
        width: Channels of the first stage; the published setting has 16.
        in_channels: Channels of the images.
        classes: Number of outputs.
        norm: ``"layer"`` or ``"group"``, which normalise each sample by itself, ``"ghost"``
            (:class:`GhostBatchNorm`), or ``"batch"``, as published, for which no noise of the
            samples is defined.
        activation: The activation. The published ``torch.relu`` has not the four derivatives of
            Assumption 2.1; ``torch.nn.functional.softplus`` has.
        groups: Number of groups for ``norm="group"``.
        ghost_size: Number of samples in a ghost batch for ``norm="ghost"``.
        seed: Seed or generator of the initial weights, and of the frozen layer.

    Raises:
        ArgumentError: If the depth, the sizes or the normalisation cannot be used.

    Source: section 6.2 (depth 32, width 16, batch normalisation).
    """

    def __init__(
        self,
        depth: int = 8,
        width: int = 16,
        *,
        in_channels: int = 3,
        classes: int = 10,
        norm: str = "layer",
        activation: Activation = torch.relu,
        groups: int = 4,
        ghost_size: int | None = None,
        seed: int | torch.Generator = 0,
    ) -> None:
        super().__init__()
        layers = integer(depth)
        if layers is None or layers < 8 or layers % 6 != 2:
            raise ArgumentError(
                "depth is not that of a residual network of three equal stages",
                received=repr(depth),
                expected="6n + 2: 8, 14, 20, 26, 32, ...",
                remedy="depth=8 is the smallest, depth=32 the one of section 6.2",
            )
        sizes = {"width": width, "in_channels": in_channels, "classes": classes}
        for name, size in sizes.items():
            published = "width=16, in_channels=3 and classes=10 for CIFAR-10"
            check_integer(name, size, 1, MOST, published)
        generator = generator_of(seed)

        def make_norm(channels: int) -> nn.Module:
            return normalisation(norm, channels, groups=groups, ghost_size=ghost_size)

        self.activation = activation
        self.stem = _convolution(in_channels, width, kernel=3)
        blocks, before = [], width
        for stage in range(3):
            after = width * 2**stage
            for block in range((layers - 2) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(PreActivationBlock(before, after, stride, make_norm, activation))
                before = after
        self.blocks = nn.Sequential(*blocks)
        self.norm = make_norm(before)
        self.head = undrawn(nn.Linear, before, classes)
        initialise(self, generator)
        self.head.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) -> outputs (N, classes)."""
        x = self.activation(self.norm(self.blocks(self.stem(x))))
        return self.head(x.mean((-2, -1)))
