r"""Sizes and products of the gradients of samples from what layers receive: no gradient is made.

A linear layer that gets a of a sample, and whose output has the derivative d there, gives the
gradient :math:`d a^\top` of the sample's loss: its square is :math:`|d|^2 |a|^2`, and its product
with that of another sample :math:`(d\cdot d')(a\cdot a')`. Where a sample has several rows,
:math:`|\sum_t d_t a_t^\top|^2 = \sum_{tu} (d_t\cdot d_u)(a_t\cdot a_u)`. Samples do not act on each
other, so that one reverse pass has d of all of them.

Source: Goodfellow, "Efficient per-example gradient computations", arXiv:1510.01799; for rows that
share a layer Li et al., "Large language models can be strong differentially private learners",
ICLR 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from manifold_sde.derivatives import is_followed
from manifold_sde.loss import LeastSquaresLoss, Loss
from manifold_sde.loss_checks import fixed_directions
from manifold_sde.reverse_mode import gradient

#: Dimension above which points are taken one after the other.
_SINGLY = 1000
#: Samples whose gradients are made once, to see that their squares are right; units of rounding.
_CHECKED, _ROUNDING = 4, 1e5


class _Part(NamedTuple):
    """What a part of x does: where it is, what its layer receives, and the layer's output.

    A bias receives ones.
    """

    place: slice
    received: Tensor
    output: Tensor


def is_by_layers(loss: Loss, x: Tensor) -> bool:
    """Whether what follows is to be had at a point (D,), which is no part of a transform."""
    if loss.per_sample is None or loss.by_layers is False or is_followed(x) or get_proxy_mode():
        return False
    if loss.by_layers is None:
        loss.by_layers = _is_right(loss, x)
    return loss.by_layers


def singly(loss: Loss, x: Tensor) -> bool:
    """Whether points (D, n) are better taken one after the other than together."""
    return x.shape[1] > 1 and loss.dim > _SINGLY and is_by_layers(loss, x[:, 0])


def mean_and_squares(loss: Loss, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Gradient of the mean loss, and the squares of the gradients of all sample losses.

    Args:
        loss: The loss.
        x: Point (D,).

    Returns:
        Tensors (D,) and (Xi,); ``None`` where they are not to be had: samples act on each other, a
        weight does not enter by one linear layer alone, or a derivative is followed.
    """
    return _mean_and_squares(loss, x) if is_by_layers(loss, x) else None


class LayerJacobian(NamedTuple):
    """The Jacobian J of residuals at a point, as what layers receive and how residuals follow them.

    Attributes:
        places: Of each part of x where it is.
        received: What its layer receives, (Xi, k) each.
        slopes: Derivatives of the residuals by the layer's output, (Xi, K, m) each.
    """

    places: list[slice]
    received: list[Tensor]
    slopes: list[Tensor]

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return sum(part.numel() for part in (*self.received, *self.slopes))

    def gram(self) -> Tensor:
        """J J^T: (Xi K, Xi K)."""
        n, k = self.slopes[0].shape[:2]
        total = self.slopes[0].new_zeros(n, k, n, k)
        for a, d in zip(self.received, self.slopes, strict=True):
            rows = d.flatten(0, 1)
            total += (rows @ rows.T).reshape(n, k, n, k) * (a @ a.T)[:, None, :, None]
        return total.reshape(n * k, n * k)

    def product(self, v: Tensor) -> Tensor:
        """J v: (D,) -> (Xi K,)."""
        found = []
        for place, a, d in zip(*self, strict=True):
            moved = a @ v[place].reshape(d.shape[2], a.shape[1]).T
            found.append((d @ moved[..., None]).flatten())
        return torch.stack(found).sum(0)

    def transposed_product(self, w: Tensor) -> Tensor:
        """J^T w: (Xi K,) -> (D,)."""
        found = {}
        for place, a, d in zip(*self, strict=True):
            weighted = (w.reshape(len(d), 1, -1) @ d)[:, 0]
            found[place.start] = (weighted.T @ a).flatten()
        return torch.cat([found[first] for first in sorted(found)])


def jacobian(loss: LeastSquaresLoss, x: Tensor) -> LayerJacobian | None:
    """J of the residuals at a point (D,).

    ``None`` as for :func:`mean_and_squares`, and where a sample has several rows in a layer.
    """
    if not is_by_layers(loss, x):
        return None
    samples = loss.per_sample
    assert samples is not None
    places: list[slice] = []
    found = []
    for which in samples.passes(2):
        parts, count, sums = _taken_apart(samples.function, x, samples.data_for(x, which))
        if any(len(part.received) != count for part in parts):
            return None
        places = [part.place for part in parts]
        outputs = [part.output for part in parts]
        slopes = [torch.autograd.grad(c, outputs, retain_graph=True) for c in sums]
        by_part = zip(parts, *slopes, strict=True)
        found.append([(part.received, torch.stack(d, 1)) for part, *d in by_part])
    joined = [map(torch.cat, zip(*passes, strict=True)) for passes in zip(*found, strict=True)]
    received, slopes_of = zip(*joined, strict=True)
    return LayerJacobian(places, list(received), list(slopes_of))


def _is_right(loss: Loss, x: Tensor) -> bool:
    """Whether squares are those of the gradients of some of the samples, in a fixed direction."""
    x = fixed_directions(loss.dim, 1)[0].to(x)
    found = _mean_and_squares(loss, x)
    if found is None:
        return False
    numbers = torch.linspace(0, len(found[1]) - 1, _CHECKED).round().long()
    rows = [loss.map_samples(gradient, x, slice(i, i + 1))[0] for i in numbers.tolist()]
    exact = torch.stack(rows).square().sum(1)
    rounding = _ROUNDING * torch.finfo(x.dtype).eps * exact
    return bool(((found[1][numbers.to(x.device)] - exact).abs() <= rounding).all())


def _mean_and_squares(loss: Loss, x: Tensor) -> tuple[Tensor, Tensor] | None:
    assert loss.per_sample is not None
    summed, squares = torch.zeros_like(x), []
    for which in loss.per_sample.passes(2):
        parts, count, sums = _taken_apart(loss._losses_of, x, loss.per_sample.data_for(x, which))
        if not _cover(parts, loss.dim) or any(len(part.received) % count for part in parts):
            return None
        slopes = torch.autograd.grad(sums[0], [part.output for part in parts])
        own = x.new_zeros(count)
        for part, slope in zip(parts, slopes, strict=True):
            d = slope.reshape(count, -1, slope.shape[-1])
            a = part.received.reshape(count, d.shape[1], -1)
            summed[part.place] += (d.flatten(0, 1).T @ a.flatten(0, 1)).flatten()
            own += _squares(d, a)
        squares.append(own)
    whole = torch.cat(squares)
    return summed / len(whole), whole


def _cover(parts: list[_Part], dim: int) -> bool:
    """Whether the places of parts are all of x, each once."""
    places = sorted((part.place.start, part.place.stop) for part in parts)
    return [0, *(last for _, last in places)] == [*(first for first, _ in places), dim]


def _squares(d: Tensor, a: Tensor) -> Tensor:
    """|sum over t of d_t a_t^T|^2 of each sample: (n, T, m), (n, T, k) -> (n,)."""
    rows, m, k = d.shape[1], d.shape[2], a.shape[2]
    if rows == 1:
        return d.square().sum((1, 2)) * a.square().sum((1, 2))
    if rows * (m + k) <= m * k:
        return ((d @ d.mT) * (a @ a.mT)).sum((1, 2))
    return (d.mT @ a).square().sum((1, 2))


def _taken_apart(
    function: Callable[..., Tensor], x: Tensor, data: tuple[Tensor, ...]
) -> tuple[list[_Part], int, tuple[Tensor, ...]]:
    """What the parts of x do in a function of x and of the data of some samples.

    Returns:
        The parts, the number of samples, and the sum of each of the function's outputs over these.
    """
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad(), _LinearLayers(leaf) as seen:
        values = function(leaf, *data)
        sums = values.reshape(len(values), -1).sum(0).unbind()
    return seen.parts, len(values), sums


class _LinearLayers(TorchFunctionMode):
    """Keeps what linear layers receive and return whose weights are parts of a vector.

    Args:
        x: The vector (D,).

    Attributes:
        parts: The parts.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x
        self.parts: list[_Part] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is functional.linear:
            self._keep(result, *args, **(kwargs or {}))
        return result

    def _keep(
        self, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> None:
        if torch._C._functorch.is_functorch_wrapped_tensor(output):
            return
        rows = input.detach().reshape(-1, input.shape[-1])
        ones = rows.new_ones(len(rows), 1)
        for value, received in ((weight, rows), (bias, ones)):
            if value is not None and self._has(value):
                first = value.storage_offset()
                self.parts.append(_Part(slice(first, first + value.numel()), received, output))

    def _has(self, value: Tensor) -> bool:
        """Whether a tensor is a part of the vector, in order."""
        same = value.untyped_storage().data_ptr() == self.x.untyped_storage().data_ptr()
        return same and value.is_contiguous()
