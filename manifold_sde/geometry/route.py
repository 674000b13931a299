"""What :class:`~manifold_sde.geometry.geometry.Geometry` computes on the manifold, by any route."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from manifold_sde.errors import NotOnManifoldError, RankError
from manifold_sde.geometry import drift
from manifold_sde.geometry.limit_map import is_scale_invariant
from manifold_sde.geometry.normal_space import Frame, NormalSpace
from manifold_sde.problem import Problem

#: Largest Newton displacement, relative to the norm, of a point that counts as on the manifold.
ON_MANIFOLD = {torch.float64: 1e-6, torch.float32: 1e-3}
#: Newton steps of a retraction, and the displacement at which it is content.
NEWTON_STEPS = 8
NEWTON_TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6}


class Route(ABC):
    """Computes at points (n, D) of one problem; frames have the points last.

    Args:
        problem: The problem.
        rtol: Accuracy of the limit map relative to the norm.
        max_steps: Steps of the gradient flow after which it counts as failed.
    """

    def __init__(self, problem: Problem, *, rtol: float, max_steps: int) -> None:
        self.problem = problem
        self.rtol = rtol
        self.max_steps = max_steps

    @abstractmethod
    def eigenvalues(self, y: Tensor) -> Tensor:
        """Leading eigenvalues of H, ascending, with one or more that count as zero: -> (n, k)."""

    @abstractmethod
    def frames_at(self, y: Tensor) -> tuple[NormalSpace, Frame, Tensor]:
        """The normal space at points that are checked to lie on the manifold.

        Args:
            y: Points (n, D).

        Returns:
            The space, the points' frames, and the nonzero eigenvalues of H, ascending, (n, M).

        Raises:
            NotOnManifoldError: If a point is not on the manifold.
            RankError: If the rank is ambiguous, not the declared one, or not constant.
            NonFiniteError: If the derivatives are not finite.
        """

    @abstractmethod
    def limit_map(self, x: Tensor) -> Tensor:
        """Phi(x): (..., D) -> (..., D).

        Raises:
            LimitMapError: If some of the flows fail; the others are in its ``partial``.
        """

    @abstractmethod
    def normal_variances(self, y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Nonzero eigenvalues of H, and q^T Sigma q of their vectors: (n, D) -> (n, M) twice."""

    @abstractmethod
    def newton(
        self, point: Tensor, invariant: bool
    ) -> tuple[Tensor, Tensor, Tensor, RankError | None]:
        """Newton steps in the normal directions, at most :data:`NEWTON_STEPS`.

        Args:
            point: Points (n, D).
            invariant: Whether they are kept at norm 1.

        Returns:
            The points, lengths of the last steps (n,), where it is not clear which directions are
            normal (n,), and what is wrong with the rank at the points, if anything.
        """

    def project(self, y: Tensor, v: Tensor) -> Tensor:
        """P v: (n, D), (n, D) -> (n, D)."""
        space, frame, _ = self.frames_at(y)
        result: Tensor = space.over_points(
            lambda z, u, *f: space.project(z, f, u), y.T, v.T, *frame
        )
        return result.T

    def projector(self, y: Tensor) -> Callable[[Tensor], Tensor]:
        """P at ONE point (D,) as a function of vectors (..., D), after one set-up."""
        space, frame, _ = self.frames_at(y[None])

        def project(v: Tensor) -> Tensor:
            columns = v.reshape(-1, len(y)).T
            found: Tensor = space.over_points(
                lambda u: space.project(y[:, None], frame, u), columns
            )
            return found.T.reshape(v.shape)

        return project

    def second_derivative(
        self, y: Tensor, covariance: Tensor | None = None, factor: Tensor | None = None
    ) -> Tensor:
        """d^2 Phi(y)[Sigma]; Sigma is (n, D, D), has a factor (n, D, m), or is the problem's."""
        space, frame, _ = self.frames_at(y)
        both = {"covariance": covariance, "factor": factor}
        given = {name: value.movedim(0, -1) for name, value in both.items() if value is not None}
        count = len(frame)

        def at(z: Tensor, *rest: Tensor) -> Tensor:
            own = dict(zip(given, rest[count:], strict=True))
            return drift.second_derivative(space, z, rest[:count], **own)

        found: Tensor = space.over_points(at, y.T, *frame, *given.values())
        return found.T

    def log_pseudo_determinant(self, y: Tensor) -> Tensor:
        """Log pdet H: (n, D) -> (n,)."""
        return self.frames_at(y)[2].log().sum(-1)

    def retract(self, x: Tensor) -> Tensor:
        """Newton's method to the manifold, at constant norm where the loss is scale-invariant.

        Raises:
            NotOnManifoldError: If it does not arrive.
            RankError: If it arrives where the rank is ambiguous or not the declared one.
        """
        norms = x.norm(dim=-1, keepdim=True)
        invariant = is_scale_invariant(self.problem, x)
        scale = norms if invariant else torch.ones_like(norms)
        point, steps, unclear, ambiguous = self.newton(x / scale, invariant)
        left = steps / point.norm(dim=-1)
        arrived = torch.isfinite(point).all(-1) & ~unclear
        arrived &= left <= ON_MANIFOLD.get(x.dtype, 1e-2)
        failed = ~arrived if ambiguous is None else ~arrived | ambiguous.failed
        partial = torch.where(failed[:, None], torch.nan, point * scale)
        if not bool(arrived.all()):
            worst = int(torch.nonzero(~arrived)[0])
            raise NotOnManifoldError(
                "the retraction did not arrive on the manifold of minimisers",
                received=f"{int((~arrived).sum())} of {len(x)} points; point {worst} still moved "
                f"by {float(left[worst]):.3g} of its norm at the last Newton step",
                expected="points close enough to Gamma for Newton's method, and to tell flat "
                "normal directions from tangent ones",
                remedy="geometry.limit_map(x), which follows gradient flow from any distance; "
                "declare rank=M with the problem if you know it",
                failed=failed,
                partial=partial,
            )
        if ambiguous is not None:
            ambiguous.partial = partial
            raise ambiguous
        return partial


def refuse_off_manifold(
    distance: Tensor, gradient: Callable[[int], Tensor], dtype: torch.dtype
) -> None:
    """Refuse points whose Newton displacement over the norm is too large.

    Args:
        distance: Newton displacement over the norm (n,).
        gradient: The gradient (D,) at the point of a number.
        dtype: Of the points.

    Raises:
        NotOnManifoldError: If one is.
    """
    tolerance = ON_MANIFOLD.get(dtype, 1e-2)
    if bool((distance <= tolerance).all()):
        return
    worst = int(distance.argmax())
    raise NotOnManifoldError(
        "a point is not on the manifold of minimisers",
        received=f"{int((distance > tolerance).sum())} of {len(distance)} points; at worst "
        f"gradient norm {float(gradient(worst).norm()):.3g}, distance estimate "
        f"{float(distance[worst]):.3g}",
        expected=f"a distance of at most {tolerance:.0e} of the norm",
        remedy="Geometry(problem).limit_map(x), the end of gradient flow from there"
        + "; x.double(), as single precision seldom tells" * (dtype == torch.float32),
    )
