"""Normalisation layers that are exactly scale-invariant, and have the right derivatives.

None has an eps, an affine parameter or a bias. A group of values without variance has no
direction: it is mapped to 0, with derivatives 0. Whether a group is such a one is decided relative
to its own size, so that the decision is scale-invariant too. A group with a value that is not
finite is NaN, so that a network that diverged is seen to have. Everything is written in operations
that ``torch.func`` differentiates correctly four times, unlike those that
:mod:`manifold_sde.torch_norms` replaces.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

from manifold_sde.arguments import check_integer
from manifold_sde.errors import ArgumentError, DTypeError, ShapeError

#: Largest size of a layer.
MOST = 1 << 20
#: Deviation, in roundings of the size of the values, up to which a group counts as constant.
_ROUNDINGS = 16.0
#: Size of values up to which, and down to whose inverse, they are normalised as they are: the ninth
#: power is that of their fourth derivatives.
_USUAL = {torch.float64: 1e10, torch.float32: 1e3}


def _over_root(values: Tensor, square: Tensor, size: Tensor) -> Tensor:
    """Values / sqrt(square), and 0 where the root is within rounding of 0 for values of this size.

    What is not finite stays so. The branch that is not taken is finite, so that its derivatives do
    not spoil those of the other.
    """
    least = (_ROUNDINGS * torch.finfo(values.dtype).eps) ** 2 * size
    constant = square <= least
    return torch.where(constant, 0.0, values * torch.where(constant, 1.0, square).rsqrt())


def _in_range(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Groups as they are, or over their largest value where powers of it leave the range."""
    usual = _USUAL.get(x.dtype, math.inf)
    with torch._C.DisableTorchFunction():  # a factor that cancels: it cuts no derivative to be seen
        fixed = x.detach()
    size = fixed.abs().amax(dims, keepdim=True)
    unusual = (size > usual) | ((size > 0) & (size < 1.0 / usual))
    return x / torch.where(unusual, size.clamp(min=torch.finfo(x.dtype).tiny), 1.0)


def standardise(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Values of mean 0 and variance 1 over some dimensions; 0 where there is no variance.

    Args:
        x: Values (...).
        dims: The dimensions that are averaged over.

    Returns:
        Tensor of the shape of x, which does not change when x is multiplied by a positive number.

    Raises:
        ShapeError: If there are one or two values, whose normalised ones are constants.
    """
    count = math.prod(x.shape[dim] for dim in dims)
    if count < 3:
        raise ShapeError(
            "so few values are not normalised: two of mean 0 and variance 1 are always -1 and 1",
            received=f"groups of {count} in values {tuple(x.shape)}",
            expected="at least 3 values in a group",
            remedy="wider layers, fewer groups, or larger ghost batches",
        )
    x = _in_range(x, dims)
    centred = x - x.mean(dims, keepdim=True)
    variance = (centred * centred).mean(dims, keepdim=True)
    return _over_root(centred, variance, (x * x).mean(dims, keepdim=True))


class LayerNorm(nn.Module):
    """Mean 0 and variance 1 over the last dimensions, for each sample.

    Args:
        shape: Sizes of the dimensions that are normalised, or the size of the last one.

    Raises:
        ArgumentError: If a size is not a positive integer.

    Example:
        >>> import torch
        >>> from manifold_sde.networks import LayerNorm
        >>> x = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]], dtype=torch.float64)
        >>> LayerNorm(3)(x)
        tensor([[-1.2247,  0.0000,  1.2247],
                [ 0.0000,  0.0000,  0.0000]], dtype=torch.float64)
    """

    def __init__(self, shape: int | tuple[int, ...]) -> None:
        super().__init__()
        sizes = shape if isinstance(shape, (tuple, list, torch.Size)) else (shape,)
        self.shape = tuple(check_integer("shape", size, 1, MOST) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Values ``(..., *shape)`` -> ``(..., *shape)``.

        Raises:
            ShapeError: If the last dimensions are others.
        """
        count = len(self.shape)
        if tuple(x.shape[-count:]) != self.shape:
            raise ShapeError(
                "the values do not have the dimensions that are normalised",
                received=str(tuple(x.shape)),
                expected=f"(..., {', '.join(map(str, self.shape))})",
                remedy="LayerNorm(shape) with the sizes of the last dimensions",
            )
        return standardise(x, tuple(range(-count, 0)))

    def extra_repr(self) -> str:
        """The sizes, for ``print(module)``."""
        return str(self.shape)


class GroupNorm(nn.Module):
    """Mean 0 and variance 1 over groups of channels and all positions, for each sample.

    With one group it is the layer normalisation of images, with a group a channel the instance
    normalisation.

    Args:
        groups: Number of groups.
        channels: Number of channels, a multiple of it.

    Raises:
        ArgumentError: If the channels do not divide into the groups.
    """

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__()
        self.groups, self.channels = (
            check_integer("groups", groups, 1, MOST),
            check_integer("channels", channels, 1, MOST),
        )
        if self.channels % self.groups:
            raise ArgumentError(
                "the channels do not divide into the groups",
                received=f"{channels} channels in {groups} groups",
                expected="a number of channels that is a multiple of the number of groups",
                remedy=f"groups=1, or another divisor of {channels}",
            )

    def forward(self, x: Tensor) -> Tensor:
        """Values (N, channels, ...) -> (N, channels, ...).

        Raises:
            ShapeError: If the second dimension is not the channels.
        """
        _require_channels(x, self.channels)
        grouped = x.reshape(x.shape[0], self.groups, -1)
        return standardise(grouped, (-1,)).reshape(x.shape)

    def extra_repr(self) -> str:
        """The groups, for ``print(module)``."""
        return f"groups={self.groups}, channels={self.channels}"


class GhostBatchNorm(nn.Module):
    r"""Batch normalisation over fixed ghost batches of the data set.

    The N samples that come in are divided into blocks of ``size`` that follow each other: 0 to
    size - 1, and so on. In each block every channel is brought to mean 0 and variance 1 over the
    samples of the block and all positions. So a sample's output depends on the samples of its
    block, and on no others.

    A sample alone has then no loss of its own; a ghost batch has one. What the theory calls a
    sample xi is a ghost batch: :meth:`Problem.from_module` takes the mean loss over each block as
    one L_xi, so that Xi = N / size, and sampling noise draws whole ghost batches. The blocks are
    fixed by the order of the data, where usual training draws them anew in every epoch; a ghost
    batch a step is therefore the mini-batch of usual training with its composition held fixed.

    Args:
        size: Number of samples in a ghost batch; ``None`` is the whole batch, the usual batch
            normalisation, for which no noise of the samples is defined.
        channels: Number of channels, checked where it is given.

    Raises:
        ArgumentError: If the size is not an integer of at least 2.
    """

    def __init__(self, size: int | None, channels: int | None = None) -> None:
        super().__init__()
        self.size = None if size is None else check_integer("size", size, 1, MOST)
        self.channels = None if channels is None else check_integer("channels", channels, 1, MOST)
        if self.size == 1:
            raise ArgumentError(
                "a ghost batch of one sample has no statistics",
                received="size=1",
                expected="an integer of at least 2",
                remedy="LayerNorm or GroupNorm, which normalise each sample by itself",
            )

    def forward(self, x: Tensor) -> Tensor:
        """Values (N, channels, ...) -> (N, channels, ...), for N a multiple of the size.

        Raises:
            ShapeError: If the samples do not divide into ghost batches.
        """
        if self.channels is not None:
            _require_channels(x, self.channels)
        n_samples = x.shape[0]
        size = n_samples if self.size is None else self.size
        require_ghost_batches(n_samples, size)
        blocks = x.reshape(n_samples // size, size, *x.shape[1:])
        dims = (1, *range(3, blocks.dim()))
        return standardise(blocks, dims).reshape(x.shape)

    def extra_repr(self) -> str:
        """The size, for ``print(module)``."""
        return f"size={self.size}"


class WeightNorm(nn.Module):
    """A linear or convolution layer whose filters are used by their directions: w / |w|.

    Each filter, the weights of one output, is a scale-invariant group of its own. There is no gain
    parameter. A filter of zeros stays one.

    Args:
        layer: ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` without bias; its
            weight is the parameter ``layer.weight``.

    Raises:
        DTypeError: If it is another module.
        ArgumentError: If it has a bias.

    Source: Salimans and Kingma, "Weight normalization" (2016), without the gain.
    """

    def __init__(self, layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            raise DTypeError(
                "weights are normalised in linear and convolution layers",
                received=type(layer).__name__,
                expected="nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d",
                remedy="LayerNorm, GroupNorm or GhostBatchNorm behind the layer",
            )
        if layer.bias is not None:
            raise ArgumentError(
                "a bias is not scale-invariant",
                received=f"{layer} with a bias",
                expected="a layer without one",
                remedy="bias=False",
            )
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """What the layer computes, with filters of norm 1."""
        weight = self.layer.weight
        dims = tuple(range(1, weight.dim()))
        weight = _in_range(weight, dims)
        square = (weight * weight).sum(dims, keepdim=True)
        directions = _over_root(weight, square, torch.zeros_like(square))
        return functional_call(self.layer, {"weight": directions}, (x,))


def _require_channels(x: Tensor, channels: int) -> None:
    if x.dim() < 2 or x.shape[1] != channels:
        raise ShapeError(
            "the values do not have the channels that are normalised",
            received=str(tuple(x.shape)),
            expected=f"(N, {channels}, ...)",
            remedy="channels is the size of the second dimension",
        )


def require_ghost_batches(n_samples: int, size: int) -> None:
    """Check that samples divide into ghost batches of a size.

    Raises:
        ShapeError: If they do not.
    """
    if n_samples == 0 or n_samples % size:
        raise ShapeError(
            "the samples do not divide into ghost batches",
            received=f"{n_samples} samples, in ghost batches of {size}",
            expected=f"a multiple of {size} samples",
            remedy="leave samples out, or choose a size that divides their number",
        )
