"""What the stochastic differential equations of the theory share.

Each has its coefficients on states with the points last, (D, n), for the schemes of
:mod:`manifold_sde.solvers`; and the attributes and methods of a torchsde SDE (``sde_type``,
``noise_type``, ``f``, ``g_prod``, ``f_and_g_prod``, ``g``), which are the same on states (B, D).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from manifold_sde.arguments import check_point, kind_of, require_norms
from manifold_sde.columns import column_norms
from manifold_sde.errors import ArgumentError, DTypeError, NoiseError, ShapeError
from manifold_sde.geometry import Geometry, drift, sketched_drift
from manifold_sde.geometry.dense import DenseSpace
from manifold_sde.geometry.kernels import Kernels
from manifold_sde.geometry.least_squares import LeastSquaresSpace, has_zero_residuals
from manifold_sde.geometry.matrix_free import MatrixFreeSpace
from manifold_sde.geometry.normal_space import NormalSpace
from manifold_sde.geometry.retraction import retract
from manifold_sde.noise import SphericalNoise
from manifold_sde.noise.base import require_independent_steps
from manifold_sde.points import point_of
from manifold_sde.problem import LeastSquaresProblem, Problem, require_problem

_CALCULI = ("ito", "stratonovich")
#: Largest relative violation of the two properties of sigma that counts as rounding.
_NOISE_TOLERANCE = 1e-6
#: Smallest part of the noise's size elsewhere that counts as noise on the manifold.
_NO_NOISE = 1e-12
_PROPERTY = {"degree": "sigma(a x) = sigma(x) / a", "radial": "sigma(x)^T x = 0"}


class StochasticEquation(ABC):
    """What all equations share.

    Args:
        problem: The problem, with its noise.
        calculus: "ito" or "stratonovich": the form whose drift ``f`` is.
    """

    #: What a unit of the equation's time is.
    time_unit: str
    #: torchsde's word for a diffusion matrix that depends on the state in any way.
    noise_type = "general"

    def __init__(self, problem: Problem, calculus: str = "ito") -> None:
        if calculus not in _CALCULI:
            raise ArgumentError(
                "calculus is not a form of a stochastic differential equation",
                received=repr(calculus),
                expected='"ito" or "stratonovich"',
                remedy='"ito" is the form that the paper prints',
            )
        self.problem = require_problem(problem)
        require_independent_steps(problem.noise, problem.pointwise, type(self).__name__)
        self.calculus = calculus
        self.kernels = Kernels(problem, False)

    @property
    def sde_type(self) -> str:
        """The calculus, as torchsde names it."""
        return self.calculus

    @property
    def dim(self) -> int:
        """Dimension D of the state."""
        return self.problem.dim

    @property
    def n_noise(self) -> int:
        """Number m of Brownian motions."""
        return self.problem.n_noise

    def require_states(self, y: Tensor, *vectors: Tensor) -> None:
        """Check what f, g and g_prod are given; NaN passes, the state of a path that was lost.

        Args:
            y: States (B, D).
            *vectors: Vectors (B, m) that the diffusion is applied to, if any.

        Raises:
            DTypeError, ShapeError, ZeroVectorError, ArgumentError: If they cannot be used.
        """
        for name, value in (("y", y), *(("v", v) for v in vectors)):
            if not isinstance(value, Tensor):
                raise DTypeError(
                    f"{name} is not a torch tensor",
                    received=kind_of(value),
                    expected="the tensors that torchsde gives",
                    remedy=f"torch.as_tensor({name}, dtype=torch.float64)",
                )
        check_point(y, self.dim, name="y", allow_nan=True)
        require_norms(y, name="y")
        for v in vectors:
            check_point(v, self.n_noise, name="v", allow_zero=True, allow_nan=True)
            if (v.dtype, v.device) != (y.dtype, y.device):
                raise DTypeError(
                    "y and v differ in dtype or device",
                    received=f"{y.dtype} on {y.device} and {v.dtype} on {v.device}",
                    expected="one dtype and one device",
                    remedy="v.to(y)",
                )
        if y.dim() != 2 or any(v.shape[:-1] != y.shape[:-1] for v in vectors):
            raise ShapeError(
                "the coefficients are those of a batch of states",
                received=" and ".join(str(tuple(value.shape)) for value in (y, *vectors)),
                expected=f"states (B, {self.dim}) and vectors (B, {self.n_noise})",
                remedy="y[None], v[None] for one state",
            )

    @abstractmethod
    def with_calculus(self, calculus: str) -> StochasticEquation:
        """The same process in the other form."""

    # The coefficients, points last.

    def prepare(self, *, compiled: bool | str = False) -> Self:
        """The equation with kernels that are compiled, or are not.

        Args:
            compiled: As for :class:`~manifold_sde.geometry.kernels.Kernels`.

        Raises:
            ArgumentError: If the rank of the Hessian is not known yet.
        """
        other = copy.copy(self)
        other.kernels = Kernels(self.problem, compiled)
        return other

    @abstractmethod
    def reference_basis(self, x: Tensor) -> Tensor:
        """What the coefficients near states are made from: (D, n) -> (D, d, n), d may be 0."""

    @abstractmethod
    def drift(self, x: Tensor, basis: Tensor) -> Tensor:
        """Drift: (D, n), (D, d, n) -> (D, n)."""

    @abstractmethod
    def noise(self, x: Tensor, basis: Tensor, w: Tensor) -> Tensor:
        """Diffusion times w: (D, n), (D, d, n), (m, n) -> (D, n)."""

    def drift_and_noise(self, x: Tensor, basis: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Both, for less than one after the other: (D, n) each."""
        return self.drift(x, basis), self.noise(x, basis, w)

    def moved_by_noise(self, x: Tensor, moved: Tensor) -> Tensor:
        """States that a flow of the noise led to, with what it keeps as it was: (D, n) -> (D, n).

        Args:
            x: States before.
            moved: States after, up to the truncation error of a scheme.
        """
        return moved

    def walked(self, x: Tensor, h: Tensor, end: Tensor) -> Tensor:
        """The end of a walk of length h from states, with what has an equation of its own."""
        return end

    def increment(self, x: Tensor, basis: Tensor, h: Tensor, w: Tensor) -> Tensor:
        """Drift times h and diffusion times w: (D, n), (D, d, n), () or (n,), (m, n) -> (D, n)."""
        drift, noise = self.drift_and_noise(x, basis, w)
        return h * drift + noise

    @abstractmethod
    def factor(self, x: Tensor, basis: Tensor) -> Tensor:
        """Diffusion matrix: (D, n), (D, d, n) -> (D, m, n)."""

    @abstractmethod
    def retract(self, x: Tensor, basis: Tensor, fresh_steps: int = 2) -> tuple[Tensor, Tensor]:
        """The state that belongs to x, and the reference basis there; NaN where a path is lost."""

    def ambient_noise(self, x: Tensor, w: Tensor) -> Tensor:
        """The product sigma w, not projected: (D, n), (m, n) -> (D, n)."""
        r = column_norms(x)
        return self.kernels.noise_product(x / r, w) / r

    def noise_trace(self, x: Tensor) -> Tensor:
        """V = tr Sigma at the directions: (D, n) -> (n,)."""
        return self.kernels.noise_trace(x)

    # What the norm is, and how fast it grows, in the clock that is integrated.

    def gauge(self, y: Tensor) -> Tensor:
        """The norm that goes with the clock, over |y|: (..., D) -> (...)."""
        return y.new_ones(y.shape[:-1])

    def start_trace(self, y: Tensor) -> Tensor:
        """Half the rate of log |y|^4 in the clock, by which steps are chosen: (n, D) -> (n,)."""
        return self.problem.noise_trace(y)

    # The same as torchsde asks for it, points first.

    def _columns(self, y: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
        """States, reference bases there, and vectors, points last."""
        self.require_states(y, *vectors)
        self._look_at(y)
        x = y.T.contiguous()
        return x, self.reference_basis(x), *(v.T.contiguous() for v in vectors)

    def _look_at(self, y: Tensor) -> None:  # noqa: B027  (most need not)
        """See states (B, D) before their coefficients are computed."""

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """Drift: (B, D) -> (B, D)."""
        return self.drift(*self._columns(y)).T

    def g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Diffusion times v, by products: (B, D), (B, m) -> (B, D)."""
        return self.noise(*self._columns(y, v)).T

    def f_and_g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Drift, and diffusion times v."""
        drift, noise = self.drift_and_noise(*self._columns(y, v))
        return drift.T, noise.T

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        """Diffusion matrix: (B, D) -> (B, D, m)."""
        return self.factor(*self._columns(y)).movedim(-1, 0)


class ManifoldEquation(StochasticEquation):
    """A diffusion on the manifold of minimisers.

    Its coefficients are evaluated at the direction of a state and extended by homogeneity: with
    r = |x|, the noise has degree -1 and the drift of (8) without its -c y has degree -3. Off the
    manifold the tangent space is the span of the D - M eigenvectors of H of smallest eigenvalue, or
    the kernel of the Jacobian where all residuals vanish on the manifold.
    """

    #: Sizes of the groups of weights in whose clock it is; none in its own.
    group_sizes: tuple[int, ...] = ()

    def __init__(
        self, problem: Problem, calculus: str = "ito", *, geometry: Geometry | None = None
    ) -> None:
        super().__init__(problem, calculus)
        if geometry is not None and getattr(geometry, "problem", None) is not problem:
            raise ArgumentError(
                "the geometry is not that of the problem",
                received=repr(geometry),
                expected="a Geometry of the same problem",
                remedy="geometry=Geometry(problem, ...), or leave it out",
            )
        problem.require_scale_invariance()
        violations = problem.noise_violations()
        wrong = {name: size for name, size in violations.items() if size > _NOISE_TOLERANCE}
        if wrong:
            raise NoiseError(
                f"the noise does not have the properties that {type(self).__name__} needs",
                received=", ".join(f"{_PROPERTY[k]} fails by {v:.2g}" for k, v in wrong.items()),
                expected="sigma(a x) = sigma(x) / a and sigma(x)^T x = 0, which the noise of SGD "
                "on a scale-invariant loss has",
                remedy="divide the factor by |x| and take the part along x away from its columns",
            )
        self.geometry = geometry or Geometry(problem)
        self._space: NormalSpace | None = None

    @property
    def rank(self) -> int:
        """Rank M of the Hessian on the manifold; known once a point of the manifold was seen."""
        if self._space is not None:
            return self._space.rank
        if self.problem.rank is None:
            raise _unknown_rank(self.problem)
        return self.problem.rank

    @property
    def space(self) -> NormalSpace:
        """The normal space that the coefficients are computed with."""
        if self._space is not None:
            return self._space
        if self.geometry.products is not None:
            raise _unknown_rank(self.problem)
        return DenseSpace(self.problem, self.rank)

    def _space_at(self, y: Tensor) -> NormalSpace:
        """The normal space for a rank that is known, by points (n, D) near the manifold."""
        problem, rank = self.problem, self.rank
        if (
            isinstance(problem, LeastSquaresProblem)
            and isinstance(problem.noise, SphericalNoise)
            and has_zero_residuals(problem, y, rank)
        ):
            return LeastSquaresSpace(problem, needs_basis=self.calculus == "ito")
        return DenseSpace(problem, rank)

    def prepare(self, *, compiled: bool | str = False) -> Self:
        """The equation with kernels that are compiled, or are not."""
        other = super().prepare(compiled=compiled)
        other._space = self.space.with_kernels(other.kernels)
        return other

    def require_on_manifold(self, y: Tensor) -> None:
        """Check that states are on the manifold, where the noise does not vanish.

        Args:
            y: States (..., D).

        Raises:
            NotOnManifoldError, RankError: If a state is not on the manifold of minimisers.
            NoiseError: If the noise vanishes there (interpolation): nothing would move.
        """
        flat = point_of(self.problem, y, name="y0").reshape(-1, self.dim)
        self._space = self.geometry.route.frames_at(flat)[0]
        if self.geometry.products is None:
            self._space = self._space_at(flat)
        directions = flat / flat.norm(dim=1, keepdim=True)
        here = float(self.problem.noise_trace(directions).max())
        elsewhere = self.problem.noise_trace(directions + 0.5 * directions.roll(1, dims=1))
        if here <= _NO_NOISE * float(elsewhere.max()):
            raise NoiseError(
                "the noise vanishes on the manifold: nothing would ever move",
                received=f"tr Sigma = {here:.2g} at the start, {float(elsewhere.max()):.2g} off it",
                expected="noise on the manifold",
                remedy="every sample is fitted there (interpolation): SGD stands still. Use "
                + "LabelNoise or " * isinstance(self.problem, LeastSquaresProblem)
                + "SphericalNoise, or a loss that its samples disagree on",
            )

    def _look_at(self, y: Tensor) -> None:
        """Choose the normal space at the first states."""
        if self._space is not None:
            return
        if self.problem.rank is None or self.geometry.products is not None:
            self.require_on_manifold(y)
        else:
            self._space = self._space_at(y[torch.isfinite(y).all(1)])

    def reference_basis(self, x: Tensor) -> Tensor:
        """Reference bases at states, of NaN where a state is: (D, n) -> (D, d, n)."""
        lost = ~torch.isfinite(x).all(dim=0)
        safe = torch.where(lost, torch.ones_like(x), x)
        found = self.space.over_points(self.space.reference_basis, safe / column_norms(safe))
        return torch.where(lost, torch.nan, found)

    @property
    def drift_columns(self) -> int:
        """Random columns of the noise by which the walk takes its drift; 0 where it is exact."""
        products = self.geometry.products
        return 0 if products is None else products.drift_columns

    def tangent_increment(
        self, x: Tensor, basis: Tensor, h: Tensor, w: Tensor, draw: Callable[[int], Tensor]
    ) -> Tensor:
        """Tangent part of the direction's Ito drift times h, and P sigma w: -> (D, n).

        Args:
            x: States (D, n).
            basis: Reference bases there (D, d, n).
            h: Steps, () or (n,).
            w: Increments (m, n).
            draw: What returns so many standard normals a path, for a drift by random columns.
        """
        space, y = self.space, x / column_norms(x)
        if not self.drift_columns:
            return drift.tangent_increment(space, y, basis, h, w)
        assert isinstance(space, MatrixFreeSpace)
        normals = draw(sketched_drift.numbers(space, self.drift_columns))
        return sketched_drift.increment(space, y, basis, h, w, normals)

    def noise(self, x: Tensor, basis: Tensor, w: Tensor) -> Tensor:
        """P sigma w: (D, n), (D, d, n), (m, n) -> (D, n)."""
        r = column_norms(x)
        return drift.tangent_noise(self.space, x / r, basis, w) / r

    def factor(self, x: Tensor, basis: Tensor) -> Tensor:
        """P sigma: (D, n), (D, d, n) -> (D, m, n).

        Raises:
            ArgumentError: If the geometry is matrix-free.
        """
        if self.geometry.products is not None:
            raise ArgumentError(
                "the matrix-free route has no diffusion matrix",
                received=f"dimension {self.dim}, {self.n_noise} Brownian motions",
                expected="its products with vectors",
                remedy="sde.g_prod(t, y, v)",
            )
        r = column_norms(x)
        return self.space.tangent_factor(x / r, basis) / r

    def retract(self, x: Tensor, basis: Tensor, fresh_steps: int = 2) -> tuple[Tensor, Tensor]:
        """The retraction of x, and reference bases there; NaN where a path is lost."""
        return retract(self.space, x, basis, fresh_steps)[:2]


def _unknown_rank(problem: Problem) -> ArgumentError:
    return ArgumentError(
        "the rank of the Hessian is not known yet",
        received=f"{problem!r}",
        expected="rank=M with the problem, or a first state on the manifold",
        remedy="sde.require_on_manifold(y0), or rank=M with the problem",
    )
