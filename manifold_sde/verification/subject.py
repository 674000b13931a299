"""The system under test: a problem, and the code that answers for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from manifold_sde.arguments import check_point
from manifold_sde.deadline import Attempts, shared_property
from manifold_sde.errors import ArgumentError, ShapeError
from manifold_sde.geometry import Geometry
from manifold_sde.geometry.dense import DENSE_LIMIT
from manifold_sde.geometry.matrix_free_route import DEFAULT_MEMORY
from manifold_sde.geometry.minimizers import find_minimizer, limits, random_directions
from manifold_sde.problem import Problem, require_problem
from manifold_sde.sdes import FixedRatioDiffusion, LimitingDiffusion
from manifold_sde.solvers import run_sgd, solve
from manifold_sde.time_scale import TimeScale
from manifold_sde.verification import sampling
from manifold_sde.verification.sampling import unit
from manifold_sde.verification.spectra import HessianRange, hessian_range

T = TypeVar("T")

#: Bytes that blocks of vectors may take, at least.
_LEAST_MEMORY = 2**26

#: Steps of the walk over the manifold, and their length in radians.
_WALK = (12, 0.5)
_SHORT_WALK = (2, 0.3)
#: Norms of the points of the cone.
_NORMS = (1e-6, 1e6)
#: Points of the walks and restarts from which points are chosen that are far apart, and how much
#: higher their loss may be than at the start, relative to the losses off the manifold.
_WALKED, _RESTARTS, _SAME_LOSS = 256, 32, 1e-6
#: Largest part of the norm by which a point of the attraction set is off the manifold.
_AWAY = 0.3


@dataclass(frozen=True)
class Subject:
    """The system under test: a problem and the code that answers for it.

    Checks use these parts and nothing else of the toolkit, so that each can be replaced by a broken
    one, as the negative controls of the tests do.

    Attributes:
        problem: The problem.
        geometry: Phi and its derivatives.
        x_init: Where the user's training starts (D,), or ``None``.
        seed: Seed of all that is drawn.
        run_sgd: SGD.
        solve: The solver.
        time_scale: The time scale.
        fixed_ratio_diffusion: The equation (8).
        limiting_diffusion: The equation (13).
    """

    problem: Problem
    geometry: Geometry
    x_init: Tensor | None = None
    seed: int = 0
    run_sgd: Callable[..., Any] = field(default=run_sgd, repr=False)
    solve: Callable[..., Any] = field(default=solve, repr=False)
    time_scale: Callable[..., Any] = field(default=TimeScale, repr=False)
    fixed_ratio_diffusion: Callable[..., Any] = field(default=FixedRatioDiffusion, repr=False)
    limiting_diffusion: Callable[..., Any] = field(default=LimitingDiffusion, repr=False)

    @classmethod
    def of(
        cls, problem: Problem | Subject, *, x_init: Tensor | None = None, seed: int = 0
    ) -> Subject:
        """The system under test of a problem; one that is given is returned as it is.

        Raises:
            DTypeError: If it is no problem.
            ArgumentError, ShapeError: If the start or the seed cannot be used.
        """
        if isinstance(problem, Subject):
            return problem
        require_problem(problem)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ArgumentError(
                "the seed is not usable",
                received=repr(seed),
                expected="an integer in [0, 2**63)",
                remedy="seed=0",
            )
        if x_init is not None:
            x_init = check_point(x_init, problem.dim, values=True).detach().to(torch.float64)
            if x_init.dim() != 1:
                raise ShapeError(
                    "training starts at one point",
                    received=str(tuple(x_init.shape)),
                    expected=f"({problem.dim},)",
                    remedy="verify each start for itself",
                )
        return cls(problem, _geometry(problem), x_init, seed)

    @property
    def by_products(self) -> bool:
        """Whether the problem is too large for matrices of D x D: then products take their place.

        It is so wherever the geometry is matrix-free.
        """
        matrix_free = getattr(self.geometry, "products", None) is not None
        return matrix_free or self.problem.dim > DENSE_LIMIT

    def generator(self, use: int) -> torch.Generator:
        """Random numbers for one use."""
        return torch.Generator().manual_seed((self.seed << 8) % 2**63 + use)

    def normals(self, use: int, *shape: int) -> Tensor:
        """Standard normals for one use, float64."""
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator(use))

    @cached_property
    def shared(self) -> dict[Any, Any]:
        """What checks have computed of this subject and share: empty at first.

        A subject with another part in place of one of these begins with nothing.
        """
        return {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is shared under a key; it is made where it is not there."""
        if key not in self.shared:
            with self._attempts.making(key):
                self.shared[key] = make()
        found: T = self.shared[key]
        return found

    @cached_property
    def _attempts(self) -> Attempts:
        """What was tried and failed."""
        return Attempts()

    # Points.

    def limits(self, x: Tensor) -> Tensor:
        """Phi at points (n, D), with NaN where the flow does not reach the manifold."""
        return limits(self.geometry, x)

    @shared_property
    def start(self) -> Tensor:
        """A unit vector on the manifold (D,): from the start, what the problem knows, or a search.

        Raises:
            ArgumentError: As :meth:`find_minimizer`.
        """
        if self.x_init is not None:
            point = self.geometry.limit_map(self.x_init)
        else:
            point = self.find_minimizer()
        return point / point.norm()

    def find_minimizer(self) -> Tensor:
        """The minimiser that the problem knows, or the lowest that gradient flow finds, (D,).

        It is followed from unit vectors, and keeps the norm where the loss is scale-invariant.

        Raises:
            ArgumentError: If it ends on a manifold from none of 64 random directions, or not from
                the one that is tried in large dimensions.
        """
        return find_minimizer(self.geometry, self.seed)

    def restarts(self, use: int, n: int) -> tuple[Tensor, Tensor]:
        """Random directions, and where gradient flow from them ends, NaN where it does not: (n, D).

        The ends have norm 1 where the flow keeps the norm, as it does for a scale-invariant loss.
        """
        directions = random_directions(self.problem.dim, n, self.seed, use)
        return directions, self.limits(directions)

    @shared_property
    def walks(self) -> Tensor:
        """Random walks over Gamma_1 from the start, (K, n, D), in long steps with the limit map.

        Where only products are at hand it is one walk of few steps, which Newton's method takes
        back to Gamma_1.
        """
        steps, length = _SHORT_WALK if self.by_products else _WALK
        y = self.start.expand(1 if self.by_products else 64, self.problem.dim).contiguous()
        noise = self.normals(2, steps, *y.shape)
        walked = sampling.random_walk(self.geometry, y, noise, length, far=not self.by_products)
        return torch.cat([y[None], walked])

    def hessian_range(self, y: Tensor) -> HessianRange:
        """The range of H at a point of Gamma_1 (D,), by products; that of the last one is kept."""
        kept: dict[str, tuple[Tensor, HessianRange]] = self.shared.setdefault("range", {})
        if "last" not in kept or not torch.equal(kept["last"][0], y):
            kept.clear()  # there is room for one
            kept["last"] = y, hessian_range(self.problem, y, self.generator(8))
        return kept["last"][1]

    @property
    def walked(self) -> Tensor:
        """What the random walks have reached after a third of their steps, (n, D)."""
        return self.walks[len(self.walks) // 3 :].flatten(0, 1)

    def manifold_points(self, n: int) -> Tensor:
        """Points of Gamma_1, (n, D): the start, and what the walks have reached, spread out."""
        if n == 1:
            return self.start[None]
        later = self.walked
        chosen = torch.randperm(len(later), generator=self.generator(3))[: max(n - 1, 0)]
        return torch.cat([self.start[None], later[chosen]])

    def far_apart(self, count: int) -> Tensor:
        """Points of Gamma_1 that are far from each other, (count, D), the first of them the start.

        The candidates are what random walks have reached, and restarts at equal loss, which lie on
        other components if there are any.
        """
        walked = self.manifold_points(_WALKED)
        directions, reached = self.restarts(140, _RESTARTS)
        reached = reached[torch.isfinite(reached).all(1)]
        if len(reached):
            losses = self.problem.loss(reached)
            typical = float(self.problem.loss(directions).mean())
            level = float(self.problem.loss(self.start[None])[0])
            same = (losses - level).abs() <= _SAME_LOSS * max(abs(typical - level), 1e-300)
            rank = int(self.geometry.rank(self.start))
            reached = sampling.of_rank(self.geometry, reached[same], rank)
        return sampling.farthest(torch.cat([walked, unit(reached)]), count)

    def cone_points(self, n: int) -> Tensor:
        """Points of R^D without 0, (n, D): random directions, norms from 1e-6 to 1e6."""
        return unit(self.normals(4, n, self.problem.dim)) * self.norms(n)

    def norms(self, n: int) -> Tensor:
        """Norms from 1e-6 to 1e6, spread evenly on the logarithmic scale: (n, 1)."""
        low, high = (math.log(norm) for norm in _NORMS)
        places = torch.rand(n, 1, dtype=torch.float64, generator=self.generator(5))
        return torch.exp(low + (high - low) * places)

    def attraction_points(self, n: int) -> Tensor:
        """Points of unit norm off the manifold that flow to it, (at most n, D)."""
        return self.once(("attracted", n), lambda: self._attraction_points(n))

    def _attraction_points(self, n: int) -> Tensor:
        y = self.manifold_points(n)
        away = self.normals(6, len(y), self.problem.dim)
        sizes = torch.rand(len(y), 1, dtype=torch.float64, generator=self.generator(7))
        x = unit(y + _AWAY * sizes * unit(away))
        return x[torch.isfinite(self.limits(x)).all(1)]


def _geometry(problem: Problem) -> Geometry:
    """The geometry of a problem; by products with blocks of half of what the Jacobian takes."""
    if problem.dim <= DENSE_LIMIT:
        return Geometry(problem, compile="auto")
    outputs = getattr(problem.pointwise, "n_residuals", problem.n_samples) or 1
    half = 4 * outputs * problem.dim
    return Geometry(problem, memory=min(max(half, _LEAST_MEMORY), DEFAULT_MEMORY))
