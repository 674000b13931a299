"""Euler's theorem for each parameter of a network, as measured numbers."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manifold_sde.loss import Loss
from manifold_sde.loss_checks import fixed_directions
from manifold_sde.networks.function import NetworkFunction
from manifold_sde.networks.module_checks import RUNNING
from manifold_sde.scale_invariance import outside_symmetries
from manifold_sde.torch_norms import ElementaryFunction

#: Relative Euler defect above which it is no rounding, in double precision.
TOLERANCE = 1e-10
#: Number of sample losses that are looked at.
SAMPLES = 8
#: Part of the gradient's size below which a parameter has no effect on the loss.
_NO_EFFECT = 1e-12
#: An eps so small that it counts as none, and still keeps a group without variance from NaN.
_TINY = 1e-30
#: Size of the perturbation that makes points generic, relative to the norm.
_SPREAD = 0.5


@dataclass(frozen=True)
class Measured:
    """Euler's terms of each parameter, at some points and samples.

    Attributes:
        terms: <x_g, grad_g L_xi>, divided by the largest |x| |grad L_xi|: (n, P).
        own: The largest |<x_g, grad_g L_xi>|, divided by the largest |x_g| |grad_g L_xi|: (P,).
        effect: The largest |grad_g L_xi|, divided by the largest |grad L_xi|: (P,).
        rows: Like ``own`` for each row x_g[i] of each parameter.
        size: The largest |x| |grad L_xi|.
    """

    terms: Tensor
    own: Tensor
    effect: Tensor
    rows: tuple[Tensor, ...]
    size: float

    def joint(self, columns: Tensor | None = None) -> float:
        """The violation of all parameters together, or of some of them: () float."""
        terms = self.terms if columns is None else self.terms[:, columns]
        return float(terms.sum(1).abs().max()) if terms.shape[1] else 0.0

    def breaking(self, columns: Tensor | None = None) -> Tensor:
        """Which parameters are in no scaling that leaves the loss alone and scales all of them.

        The scalings x_g -> exp(c_g t) x_g that do are the null space of the terms. Its element
        nearest to (1, ..., 1) differs from it at the parameters that are at fault.

        Args:
            columns: The parameters that have to be scale-invariant together, as a mask (P,); the
                others are constants.

        Returns:
            Mask (P,), all false where the parameters are scale-invariant together.
        """
        count = self.terms.shape[1]
        columns = torch.ones(count, dtype=torch.bool) if columns is None else columns
        result = torch.zeros(count, dtype=torch.bool)
        if self.joint(columns) <= TOLERANCE:
            return result
        rows = self.terms[:, columns] / len(self.terms) ** 0.5
        _, values, basis = torch.linalg.svd(rows, full_matrices=False)
        result[columns] = outside_symmetries(values, basis, 0.1 * TOLERANCE)
        return result


def points_near(x: Tensor, count: int) -> Tensor:
    """A point and generic points around it, (count, D), in double precision."""
    x = x.to(torch.float64)
    spread = _SPREAD * x.norm() * fixed_directions(len(x), count).to(x.device)
    spread[0] = 0.0
    return x + spread


def points_needed(network: NetworkFunction) -> int:
    """So many points that the equations for the scalings outnumber the parameters by half."""
    each = network.n_blocks if network.samples else 1
    return math.ceil((1.5 * len(network.weights.parameters) + 4) / each) + 1


def measure(network: NetworkFunction, points: Tensor) -> Measured:
    """Euler's terms at some points (n, D), one reverse mode for each sample and point.

    Args:
        network: The network on the samples to look at.
        points: The points.
    """
    blocks = network.weights.parameters.values()
    n_samples = network.n_blocks if network.samples else None
    loss = Loss(ElementaryFunction(network.losses), network.weights.dim, n_samples)
    sums, sizes, norms, row_sums, row_sizes = [], [], [], [], []
    for z in points:
        gradients = loss.gradient(z)[None] if n_samples is None else loss.sample_gradients(z)
        terms = gradients * z
        sums.append(torch.stack([terms[:, b.index].sum(1) for b in blocks], 1))
        of_gradient = torch.stack([gradients[:, b.index].norm(dim=1) for b in blocks], 1)
        of_point = torch.stack([z[b.index].norm() for b in blocks])
        sizes.append(of_gradient * of_point)
        norms.append(torch.stack([z.norm() * gradients.norm(dim=1), gradients.norm(dim=1)], 1))
        norms[-1] = torch.cat([norms[-1], of_gradient], 1)
        row_sums.append([_rows(terms[:, b.index], b.shape).sum(-1) for b in blocks])
        row_sizes.append(
            [
                _rows(gradients[:, b.index], b.shape).norm(dim=-1)
                * _rows(z[None, b.index], b.shape).norm(dim=-1)
                for b in blocks
            ]
        )
    every = torch.cat(norms).amax(0)
    largest, gradient, effect = every[0], every[1], every[2:]
    rows = [
        _ratio(torch.cat(a).abs().amax(0), torch.cat(b).amax(0))
        for a, b in zip(zip(*row_sums, strict=True), zip(*row_sizes, strict=True), strict=True)
    ]
    terms = torch.cat(sums)
    own = terms.abs().amax(0) / _nonzero(torch.cat(sizes).amax(0))
    effect = effect / _nonzero(gradient)
    return Measured(
        terms=terms / _nonzero(largest),
        own=torch.where(effect > _NO_EFFECT, own, 0.0),
        effect=torch.where(effect > _NO_EFFECT, effect, 0.0),
        rows=tuple(rows),
        size=float(largest),
    )


def _rows(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Values (m, n) of a parameter by its rows: (m, rows, n / rows); one row for a vector."""
    return values.reshape(len(values), shape[0] if len(shape) > 1 else 1, -1)


def _nonzero(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, 1.0)


def _ratio(sums: Tensor, sizes: Tensor) -> Tensor:
    """Defects of rows, relative to their sizes; those of nearly no effect to that of the others."""
    return sums / _nonzero(torch.maximum(sizes, 1e-3 * sizes.max()))


# The same network with something mended, to see what that changes.


def mended(
    network: NetworkFunction, *, eps: Iterable[str] = (), statistics: Iterable[str] = ()
) -> NetworkFunction:
    """The network with no eps, and statistics of the batch in place of running ones.

    Args:
        network: The network.
        eps: Names of the layers that keep their eps.
        statistics: Names of the layers that keep their running statistics.
    """
    keep_eps, keep_statistics = set(eps), set(statistics)
    other = copy.copy(network)
    other.module = copy.deepcopy(network.module)
    for name, module in other.module.named_modules():
        if name not in keep_eps and has_eps(module):
            module.eps = _TINY
        if name not in keep_statistics and has_fixed_statistics(module):
            module.training, module.track_running_stats = True, False
    return other


def has_eps(module: nn.Module) -> bool:
    """Whether a layer adds an eps to something."""
    eps = getattr(module, "eps", None)
    return isinstance(eps, float) and eps > 0.0


def has_fixed_statistics(module: nn.Module) -> bool:
    """Whether a layer normalises by running statistics, which do not follow the weights."""
    return isinstance(module, RUNNING) and not module.training and module.track_running_stats
