"""Gamma_1 as a manifold of geomstats, with its metric, means and plots."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manifold_sde.arguments import check_integer
from manifold_sde.errors import LimitMapError, MissingDependencyError
from manifold_sde.problem import Problem
from manifold_sde.verification.assumptions.survey import Survey
from manifold_sde.verification.effort import QUICK
from manifold_sde.verification.geodesics import (
    acceleration,
    follow_geodesic,
    geodesic_times,
    shoot_geodesic,
)
from manifold_sde.verification.subject import Subject


def _without_geomstats(error: Exception) -> MissingDependencyError:
    """Why there is no geomstats: it is not installed, or it is and cannot be imported."""
    installed = importlib.util.find_spec("geomstats") is not None
    words = str(error).partition(" (/")[0]  # without the path of a package
    return MissingDependencyError(
        "geomstats cannot be imported" if installed else "geomstats is not installed",
        received=words + f" (numpy {np.__version__})" * installed,
        expected="geomstats with its numpy backend, which needs numpy < 2.4",
        remedy='pip install "manifold_sde[geomstats]", with the numpy that it needs',
    )


try:
    import geomstats.backend as gs
    from geomstats.geometry.base import LevelSet
    from geomstats.geometry.euclidean import Euclidean
    from geomstats.geometry.riemannian_metric import RiemannianMetric
except Exception as error:
    # What it raises under a numpy that is too new for it depends on both versions.
    raise _without_geomstats(error) from error

Array = NDArray[np.float64]
#: Rounds of random directions of a random point.
_ROUNDS = 20
_MOST_POINTS = 1 << 20


class InducedMetric(RiemannianMetric):
    """The metric of R^D on Gamma_1: lengths of curves as they are in R^D.

    ``exp`` and ``log`` follow geodesics by collocation, to about 1e-10. ``log``, and what rests on
    it (``dist``, ``geodesic`` between two points, ``FrechetMean``), takes the geodesic that arises
    from the straight segment under Phi. That is the shortest one between points that are close; in
    general it need not be, and there is none from it where it would turn by half a circle or more,
    as between opposite points of a circle.

    Args:
        space: The manifold.
    """

    _space: MinimiserManifold

    def __init__(self, space: MinimiserManifold) -> None:
        super().__init__(space=space)

    def metric_matrix(self, base_point: Array | None = None) -> Array:
        """The identity, (..., D, D), in the coordinates of R^D."""
        identity = np.eye(self._space.shape[0])
        if base_point is None or np.ndim(base_point) == 1:
            return identity
        return np.broadcast_to(identity, (*np.shape(base_point), len(identity)))

    def inner_product(
        self, tangent_vec_a: Array, tangent_vec_b: Array, base_point: Array | None = None
    ) -> Array:
        """Inner product in R^D: (..., D), (..., D) -> (...)."""
        product: Array = np.sum(np.asarray(tangent_vec_a) * np.asarray(tangent_vec_b), axis=-1)
        if base_point is None:
            return product
        return np.broadcast_to(product, np.broadcast_shapes(product.shape, base_point.shape[:-1]))

    def exp(self, tangent_vec: Array, base_point: Array, **kwargs: Any) -> Array:
        """End of the geodesic with this velocity after time 1.

        Args:
            tangent_vec: Tangent vectors (..., D).
            base_point: Points of Gamma_1 (..., D).
            **kwargs: Not used.

        Returns:
            Points (..., D).

        Raises:
            ArgumentError: If the geodesic cannot be followed.
        """
        vector, point = _broadcast(tangent_vec, base_point)
        shape = point.shape
        end = follow_geodesic(self._space.problem, _flat(point), _flat(vector), self._space.rank)
        return self._space.retract(end.reshape(shape))

    def log(self, point: Array, base_point: Array, **kwargs: Any) -> Array:
        """Velocity at the base point of the geodesic that is at the point after time 1.

        Args:
            point: Points of Gamma_1 (..., D).
            base_point: Points of Gamma_1 (..., D).
            **kwargs: Not used.

        Returns:
            Tangent vectors (..., D).

        Raises:
            ArgumentError: If no geodesic is found.
            LimitMapError: If the segment does not flow to the manifold.
        """
        target, base = _broadcast(point, base_point)
        z, y = _flat(target), _flat(base)
        times = geodesic_times()[:, None]
        segments = y[:, None] + times * (z - y)[:, None]
        path = torch.from_numpy(self._space.projection(segments.numpy()))
        path[:, 0], path[:, -1] = y, z
        velocity = shoot_geodesic(self._space.problem, y, z, path, self._space.rank)
        return self._space.to_tangent(velocity.reshape(target.shape).numpy(), base.numpy())

    def curvature_vector(self, tangent_vec: Array, base_point: Array) -> Array:
        """Acceleration in R^D of the geodesic with this velocity: (..., D), (..., D) -> (..., D).

        It is the second fundamental form of Gamma_1 in R^D.
        """
        vector, point = _broadcast(tangent_vec, base_point)
        bend = acceleration(self._space.problem, _flat(point), _flat(vector), self._space.rank)
        result: Array = bend.reshape(point.shape).numpy()
        return result


class MinimiserManifold(LevelSet):
    r"""Gamma_1, the unit minimisers of a problem, for geomstats.

    Points and vectors are arrays (..., D) of R^D. Gamma_1 is the set of points that the map
    x -> x - Phi(x) / |Phi(x)| takes to zero, and that have the loss of the start; the derivative
    of this map on Gamma_1 is the projection on the normal space.

    Args:
        problem: The problem, or the system under test of a verification.
        x_init: A point that flows to the manifold that is meant (D,); by default a minimiser is
            taken that the problem knows, or looked for.
        seed: Seed of that search.
        equip: Whether to equip it with the metric of R^D.

    Attributes:
        problem, geometry: The problem and its geometry.
        start: A point of Gamma_1, (D,).
        rank: Rank M of H; the dimension is D - M - 1.

    Raises:
        MissingDependencyError: If geomstats is not installed; on import.

    Example:
        >>> import numpy as np
        >>> from manifold_sde import problems
        >>> space = MinimiserManifold(problems.great_circle())
        >>> space.dim, space.belongs(np.array([[0.6, 0.8, 0.0], [0.0, 0.6, 0.8]])).tolist()
        (1, [True, False])
        >>> round(float(space.metric.dist(np.eye(3)[0], np.eye(3)[1])), 9)
        1.570796327
    """

    def __init__(
        self,
        problem: Problem | Subject,
        x_init: Tensor | None = None,
        *,
        seed: int = 0,
        equip: bool = True,
    ) -> None:
        subject = Subject.of(problem, x_init=x_init, seed=seed)
        self.problem, self.geometry = subject.problem, subject.geometry
        self._survey = Survey.of(subject, QUICK)
        self.start: Array = subject.start.numpy()
        self.rank = int(self.geometry.rank(subject.start))
        super().__init__(dim=self.problem.dim - self.rank - 1, equip=equip)

    def __repr__(self) -> str:
        return f"MinimiserManifold({self.problem!r}, dim={self.dim})"

    @staticmethod
    def default_metric() -> type[InducedMetric]:
        """The metric of R^D."""
        return InducedMetric

    def _define_embedding_space(self) -> Euclidean:
        return Euclidean(self.problem.dim)

    def submersion(self, point: Array) -> Array:
        """How far points are from where they flow to: (..., D) -> (..., D).

        It is infinite where they do not flow to the manifold, or to one of another loss.
        """
        x = _flat(torch.as_tensor(point, dtype=torch.float64))
        length = x.norm(dim=1, keepdim=True)
        usable = (torch.isfinite(x).all(1) & (length[:, 0] > 0))[:, None]
        safe = torch.where(usable, x, torch.from_numpy(self.start))
        limits = self._survey.subject.limits(safe)
        limits = limits / limits.norm(dim=1, keepdim=True)
        there = self._survey.on_level(limits)[:, None] & usable
        result: Array = torch.where(there, x - limits, torch.inf).reshape(np.shape(point)).numpy()
        return result

    def tangent_submersion(self, vector: Array, point: Array) -> Array:
        """The part of vectors that is normal to Gamma_1: (..., D), (..., D) -> (..., D)."""
        return vector - self.to_tangent(vector, point)

    def projection(self, point: Array) -> Array:
        """Where gradient flow takes points, at norm 1: (..., D) -> (..., D).

        It is not the nearest point of Gamma_1, which is close to it only for points that are.

        Raises:
            LimitMapError: If a point does not flow to the manifold.
        """
        limits = self.geometry.limit_map(torch.as_tensor(point, dtype=torch.float64))
        result: Array = (limits / limits.norm(dim=-1, keepdim=True)).numpy()
        return result

    def retract(self, point: Array | Tensor) -> Array:
        """Points of Gamma_1 near points that are nearly on it: (..., D) -> (..., D).

        Raises:
            NotOnManifoldError: If they are too far.
        """
        y = self.geometry.retract(torch.as_tensor(point, dtype=torch.float64))
        result: Array = (y / y.norm(dim=-1, keepdim=True)).numpy()
        return result

    def to_tangent(self, vector: Array, base_point: Array) -> Array:
        """Orthogonal projection onto the tangent space: (..., D), (..., D) -> (..., D).

        Raises:
            NotOnManifoldError: If the base point is not on the manifold.
        """
        v, y = _broadcast(vector, base_point)
        along = self.geometry.tangent_projection(y, v)
        y = y / y.norm(dim=-1, keepdim=True)
        result: Array = (along - y * (along * y).sum(-1, keepdim=True)).numpy()
        return result

    def random_point(self, n_samples: int = 1, bound: float = 1.0) -> Array:
        """Where uniformly random directions flow to, of the loss of the start.

        Their law is the image of the uniform one under Phi, and not uniform on Gamma_1 in general.
        Random numbers are those of geomstats: ``gs.random.seed`` sets them.

        Args:
            n_samples: Number of points.
            bound: Not used: the points have norm 1.

        Returns:
            Points (n, D), or (D,) for one.

        Raises:
            ArgumentError: If n_samples is no positive number of points.
            LimitMapError: If hardly any direction flows there.
        """
        count = check_integer("n_samples", n_samples, 1, _MOST_POINTS)
        found: list[Array] = []
        for _ in range(_ROUNDS):
            x = torch.from_numpy(gs.random.normal(size=(max(count, 8), self.problem.dim)))
            limits = self._survey.subject.limits(x / x.norm(dim=1, keepdim=True))
            limits = limits / limits.norm(dim=1, keepdim=True)
            found += list(limits[self._survey.on_level(limits)].numpy())
            if len(found) >= count:
                points = np.stack(found[:count])
                return points[0] if count == 1 else points
        raise LimitMapError(
            "random directions do not flow to this manifold",
            received=f"{len(found)} of {_ROUNDS * max(count, 8)} do",
            expected=f"{count}",
            remedy="walk along the manifold from .start instead: Subject.of(problem).walks",
        )


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _broadcast(a: Array, b: Array) -> tuple[Tensor, Tensor]:
    x, y = (torch.as_tensor(np.array(p, dtype=np.float64)) for p in (a, b))
    x, y = torch.broadcast_tensors(x, y)
    return x.contiguous(), y.contiguous()
