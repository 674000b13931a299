r"""The direction diffusion of several groups of weights, in a clock in which all can be stepped.

Where the loss can be scaled by groups of weights separately, and the noise has no part along any
group's weights, the norms follow :math:`q_g = \|Y_g\|^4`, :math:`dq_g = (-4c q_g + 2 V_g)\,dt`,
with V_g the trace of the group's noise at norm 1. A group's direction moves by :math:`V_g / q_g` in
the time t. In the intrinsic clock u, :math:`du = \|Y\|^{-4} dt`, that is
:math:`V_g \|Y\|^4 / q_g`, which has no bound: at norms that are 100 to 1 apart steps of u would
have to be 10^8 times smaller. In

.. math::

    ds = \frac{dt}{Q}, \qquad \frac1Q = \sum_g \frac{w_g}{q_g},

no group moves by more than :math:`V_g / w_g`, whatever the norms. Q is of degree 4 in the weights,
as :math:`\|Y\|^4` is, so that all that holds of the clock u holds of s, with :math:`N = Q^{1/4}` in
place of the norm: (direction, log Q) is autonomous, :math:`Q(s) = Q(0)\, e^{a}`, and the path of
(8) at ratio 0 is here at time :math:`Q(0) \int e^{a} ds`, with

.. math::

    \frac{da}{ds} = 2 Q^2 \sum_g \frac{w_g V_g}{q_g^2} .

With one group, w = 1, it is the clock u. The factor depends on the groups' norms alone, along which
there is no noise: the Ito and the Stratonovich form are multiplied by it alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from manifold_sde.arguments import check_point, kind_of
from manifold_sde.columns import column_norms
from manifold_sde.equations import ManifoldEquation
from manifold_sde.errors import ArgumentError, NoiseError, ScaleInvarianceError
from manifold_sde.geometry import Geometry
from manifold_sde.loss_checks import fixed_directions
from manifold_sde.networks.groups import InvariantGroups
from manifold_sde.paper import implements
from manifold_sde.problem import Problem
from manifold_sde.scale_invariance import SOLVED_DIM, euler_products, scaling_groups
from manifold_sde.sdes import DirectionDiffusion, FixedRatioDiffusion

#: Largest part along a group's weights, of gradients and of noise, that counts as rounding.
_RADIAL = 1e-6
#: Smallest weight of a group in the clock, over the largest: a group without noise stands still.
_LEAST = 1e-3
#: Products of sigma with vectors that stand for it where it is large.
_NUMBERS, _PROBES = 1 << 20, 8

Groups = InvariantGroups | Sequence[Sequence[int]]


class GroupDirectionDiffusion(DirectionDiffusion):
    r"""The direction of several groups of weights that can be scaled separately, in their clock s.

    The process is that of :class:`~manifold_sde.DirectionDiffusion`, on the unit vectors, where the
    shares of the groups' norms are a part of the state; its clock is another one, in which steps
    need not shrink where a group's norm is small. The w_g are the V_g at the first start.

    Args:
        problem: The problem.
        calculus: "ito" or "stratonovich".
        geometry: The geometry of the problem; by default ``Geometry(problem)``.
        groups: The groups, which have all coordinates: of
            :func:`~manifold_sde.networks.invariant_groups`, or indices of each. By default they
            are found by measurement, in at most 512 dimensions.

    Attributes:
        groups: The indices of the coordinates of each group.

    Raises:
        ScaleInvarianceError: If the loss cannot be scaled by a group alone.
        NoiseError: If the noise has a part along the weights of a group, as that of (18) has.
        ArgumentError: If these are no groups, or have to be given.

    Example:
        >>> from manifold_sde import GroupDirectionDiffusion, Problem, SamplingNoise
        >>> def samples(x):
        ...     a, b = x[:3] / x[:3].norm(), x[3:] / x[3:].norm()
        ...     tilts = a[0] * b[0] + a[1], a[0] - b[1], b[0] + b[1]
        ...     return a[2] ** 2 + b[2] ** 2 + 0.3 * torch.stack([*tilts, -sum(tilts)])
        >>> GroupDirectionDiffusion(Problem(samples, 6, SamplingNoise())).groups
        ((0, 1, 2), (3, 4, 5))

    Source: the extension of Theorem 5.4 to groups (docs/groups.md), by a change of time.
    """

    time_unit = "clock s of the groups"

    def __init__(
        self,
        problem: Problem,
        calculus: str = "ito",
        *,
        geometry: Geometry | None = None,
        groups: Groups | None = None,
    ) -> None:
        super().__init__(problem, calculus, geometry=geometry)
        self.groups = _checked(problem, _measured(problem) if groups is None else groups)
        _require_separate(problem, self.groups)
        self.group_sizes = tuple(map(len, self.groups))
        number = torch.empty(problem.dim, dtype=torch.int64)
        for g, group in enumerate(self.groups):
            number[list(group)] = g
        self._number = number
        self._weights: Tensor | None = None

    def __repr__(self) -> str:
        return (
            f"GroupDirectionDiffusion({self.problem!r}, calculus={self.calculus!r}, "
            f"{len(self.groups)} groups)"
        )

    def with_calculus(self, calculus: str) -> GroupDirectionDiffusion:
        """The same process in the other form."""
        other = GroupDirectionDiffusion(
            self.problem, calculus, geometry=self.geometry, groups=self.groups
        )
        other._weights = self._weights
        return other

    def require_on_manifold(self, y: Tensor) -> None:
        """As for the others; the clock is that of the first of the starts."""
        super().require_on_manifold(y)
        own = self.traces(y.reshape(-1, self.dim)[:1])[0]
        self._weights = own.clamp(min=_LEAST * float(own.max()))

    # The groups.

    def norms(self, y: Tensor) -> Tensor:
        """Norms of the groups over the norm of all: (..., D) -> (..., G)."""
        y = check_point(y, self.dim, name="y", allow_nan=True)
        squares = self._sums(y.movedim(-1, 0).square()).movedim(0, -1)
        return (squares / squares.sum(-1, keepdim=True)).sqrt()

    def traces(self, y: Tensor) -> Tensor:
        """V_g, the trace of each group's noise where all groups have norm 1: (..., D) -> (..., G).

        Where the noise scales with the groups, which that of drawing samples does, it depends on
        the groups' directions alone.
        """
        flat = check_point(y, self.dim, name="y", allow_nan=True).reshape(-1, self.dim)
        unit = flat / flat.norm(dim=1, keepdim=True)
        squares = self._sums(unit.T.square())
        own = self._noise_of_groups(flat.T)
        return (own * squares).T.reshape(*y.shape[:-1], len(self.groups))

    @implements("Theorem 5.4")
    def balanced(self, y: Tensor) -> Tensor:
        """Points of the same group directions whose norms are in balance with the noise there.

        These are the q_g in proportion to V_g at which dq_g / q_g is the same for all groups: the
        fixed point of the ratios where the V_g do not vary, and a start near their equilibrium
        where they do. On the manifold they are minimisers too.

        Args:
            y: Points (..., D).

        Returns:
            Unit vectors (..., D).
        """
        wanted = self.traces(y)
        wanted = wanted.clamp(min=1e-12 * float(wanted.max())) ** 0.25
        scaled = y * (wanted / self.norms(y))[..., self._number.to(y.device)]
        return scaled / scaled.norm(dim=-1, keepdim=True)

    def _sums(self, values: Tensor) -> Tensor:
        """Sums over the coordinates of each group: (D, ...) -> (G, ...)."""
        zeros = values.new_zeros(len(self.groups), *values.shape[1:])
        return zeros.index_add(0, self._number.to(values.device), values)

    def _noise_of_groups(self, x: Tensor) -> Tensor:
        """The traces of the groups' noise at the directions of states: (D, n) -> (G, n)."""
        noise, loss = self.problem.noise, self.problem.pointwise
        variances: Tensor = self.kernels.run_last(
            "variances", lambda z: noise.factor(loss, z).square().sum(1), x / column_norms(x)
        )
        return self._sums(variances)

    def _clock(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Q at the directions of states, and the squared norms of the groups: -> (n,), (G, n)."""
        squares = self._sums(x.square())
        squares = squares / squares.sum(0)
        weights = self._weights
        if weights is None:
            weights = squares.new_ones(len(self.groups))
        weights = weights.to(x).reshape(-1, *(1,) * (x.dim() - 1))
        return 1.0 / (weights / squares.square()).sum(0), squares

    # The clock.

    def gauge(self, y: Tensor) -> Tensor:
        """N / |y|: the norm that goes with the clock, over the norm: (..., D) -> (...)."""
        return self._clock(y.movedim(-1, 0))[0] ** 0.25

    def noise_trace(self, x: Tensor) -> Tensor:
        """Half the rate of growth of log Q in the clock: (D, n) -> (n,)."""
        q, squares = self._clock(x)
        assert self._weights is not None
        each = q.square() * self._weights.to(x)[:, None] / squares**3
        return (each * self._noise_of_groups(x)).sum(0)

    def start_trace(self, y: Tensor) -> Tensor:
        """Half the rate of growth where the norms are in balance: (n, D) -> (n,)."""
        return self.noise_trace(self.balanced(y).T.contiguous())

    # The coefficients.

    def drift(self, x: Tensor, basis: Tensor) -> Tensor:
        """Drift at the direction: (D, n), (D, d, n) -> (D, n)."""
        return self._clock(x)[0] * super().drift(x, basis)

    def noise(self, x: Tensor, basis: Tensor, w: Tensor) -> Tensor:
        """P sigma w at the direction: (D, n), (D, d, n), (m, n) -> (D, n)."""
        return self._clock(x)[0].sqrt() * super().noise(x, basis, w)

    def drift_and_noise(self, x: Tensor, basis: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Drift, and P sigma w, at the direction: (D, n) each."""
        drift, noise = super().drift_and_noise(x, basis, w)
        speed = self._clock(x)[0]
        return speed * drift, speed.sqrt() * noise

    def moved_by_noise(self, x: Tensor, moved: Tensor) -> Tensor:
        """The states with the groups' norms of before, which the noise does not change."""
        factors = (self._sums(x.square()) / self._sums(moved.square())).sqrt()
        return moved * factors[self._number.to(x.device)]

    def walked(self, x: Tensor, h: Tensor, end: Tensor) -> Tensor:
        """The end of a walk of length h, with norms of the groups that follow their equations."""
        q, before = self._clock(x)
        wanted = (before * torch.exp(h * q / before * self._noise_of_groups(x))).sqrt()
        factors = wanted / self._sums(end.square()).sqrt()
        moved = end * factors[self._number.to(x.device)]
        return moved / column_norms(moved)

    def tangent_increment(
        self, x: Tensor, basis: Tensor, h: Tensor, w: Tensor, draw: Callable[[int], Tensor]
    ) -> Tensor:
        """Tangent part of the Ito drift times h, and P sigma w: -> (D, n)."""
        speed = self._clock(x)[0]
        return super().tangent_increment(x, basis, speed * h, speed.sqrt() * w, draw)

    def factor(self, x: Tensor, basis: Tensor) -> Tensor:
        """P sigma at the direction: (D, n), (D, d, n) -> (D, m, n)."""
        return self._clock(x)[0].sqrt() * super().factor(x, basis)

    def ambient_noise(self, x: Tensor, w: Tensor) -> Tensor:
        """The product sigma w, not projected: (D, n), (m, n) -> (D, n)."""
        return self._clock(x)[0].sqrt() * super().ambient_noise(x, w)


def direction_diffusion(
    problem: Problem, geometry: Geometry, groups: Groups | None
) -> DirectionDiffusion:
    """The direction, for a diffusion with a norm, in the clock in which it is best stepped.

    Args:
        problem: The problem.
        geometry: Its geometry.
        groups: Its groups; where they are not given, those that are measured.
    """
    form = "stratonovich"
    if groups is None and problem.dim <= SOLVED_DIM:
        measured = scaling_groups(problem.pointwise, fixed_directions(problem.dim))
        if len(measured) > 1 and max(_radial_parts(problem, measured)) <= _RADIAL:
            groups = measured
    if groups is None:
        return DirectionDiffusion(problem, form, geometry=geometry)
    return GroupDirectionDiffusion(problem, form, geometry=geometry, groups=groups)


def balanced(equation: ManifoldEquation, y: Tensor) -> Tensor:
    """Points with the norms of several groups of weights in balance; or as they are: (n, D)."""
    if isinstance(equation, FixedRatioDiffusion):
        equation = direction_diffusion(equation.problem, equation.geometry, equation.groups)
    return equation.balanced(y) if isinstance(equation, GroupDirectionDiffusion) else y


def _measured(problem: Problem) -> Groups:
    if problem.dim <= SOLVED_DIM:
        return scaling_groups(problem.pointwise, fixed_directions(problem.dim))
    raise ArgumentError(
        "the groups of weights are not known",
        received=f"dimension {problem.dim}: they are looked for in at most {SOLVED_DIM}",
        expected="groups",
        remedy="groups=manifold_sde.networks.invariant_groups(problem)",
    )


def _checked(problem: Problem, groups: Any) -> tuple[tuple[int, ...], ...]:
    """The indices of the coordinates of each group.

    Raises:
        ArgumentError: If each coordinate is not in one group.
    """
    if isinstance(groups, InvariantGroups):
        every = torch.arange(problem.dim)
        groups = [group.of(every).tolist() for group in groups.groups]
    try:
        found = tuple(tuple(int(i) for i in group) for group in groups)
        whole = sorted(i for group in found for i in group) == list(range(problem.dim))
    except (TypeError, ValueError):
        found, whole = (), False
    if whole and all(found):
        return found
    raise ArgumentError(
        "these are not the groups of the weights",
        received=f"{kind_of(groups)} of {sum(map(len, found))} indices in {len(found)} groups"
        if found
        else kind_of(groups),
        expected=f"each of the indices 0 to {problem.dim - 1} in one group",
        remedy="groups=manifold_sde.networks.invariant_groups(problem) of a network, or leave "
        f"them out in up to {SOLVED_DIM} dimensions",
    )


def _radial_parts(problem: Problem, groups: Sequence[Sequence[int]]) -> tuple[float, float]:
    """The largest part along a group's weights, of gradients and of the noise, relative to all."""
    points = fixed_directions(problem.dim)
    gradients = euler_products(problem.pointwise, points)
    size = gradients[1].max().clamp(min=1e-300)
    loss = max(float((gradients[0][..., list(g)].sum(-1) / size).abs().max()) for g in groups)
    if problem.dim * problem.n_noise <= _NUMBERS:
        factor = problem.noise_factor(points)
    else:
        probes = fixed_directions(problem.n_noise, _PROBES)
        factor = torch.stack(
            [problem.noise_product(points, v.expand(len(points), -1)) for v in probes], -1
        )
    along = factor * points[..., None]
    whole = factor.flatten(1).norm(dim=1)[:, None].clamp(min=1e-300)
    noise = max(float((along[:, list(g)].sum(1) / whole).abs().max()) for g in groups)
    return loss, noise


def _require_separate(problem: Problem, groups: Sequence[Sequence[int]]) -> None:
    """Refuse groups by which the loss cannot be scaled, and noise along their weights."""
    loss, noise = _radial_parts(problem, groups)
    if not loss <= _RADIAL:
        raise ScaleInvarianceError(
            "the loss cannot be scaled by each of these groups alone",
            violation=loss,
            received=f"|<x_g, grad L>| / (|x| |grad L|) = {loss:.3g} for one of {len(groups)}",
            expected=f"at most {_RADIAL:g} for each",
            remedy="groups=manifold_sde.networks.invariant_groups(problem), or leave them out",
        )
    if not noise <= _RADIAL:
        raise NoiseError(
            "the noise moves the norms of the groups",
            received=f"{problem.noise!r}, whose part along the weights of a group is {noise:.3g}",
            expected="sigma^T x_g = 0 for each group, as of the noise of drawing samples",
            remedy="DirectionDiffusion(problem), in the clock u; or noise of each group by itself, "
            "CustomNoise(factor)",
        )
