"""What the stochastic differential equations of the theory share.

Each has the attributes and methods of a torchsde SDE (``sde_type``, ``noise_type``, ``f``,
``g_prod``, ``f_and_g_prod``, ``g``) on states (B, D), and the same coefficients for the schemes of
:mod:`manifold_sde.solvers`, which keep the state on the manifold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from manifold_sde.arguments import check_point, require_norms
from manifold_sde.errors import ArgumentError, DTypeError, NoiseError, ShapeError
from manifold_sde.field import Field
from manifold_sde.geometry import Geometry
from manifold_sde.geometry.dense import DenseGeometry
from manifold_sde.geometry.normal_space import NormalRoute
from manifold_sde.hessian_field import HessianField
from manifold_sde.interpolation import InterpolationField, interpolates
from manifold_sde.matrix_free_field import MatrixFreeField
from manifold_sde.noise import SphericalNoise
from manifold_sde.problem import LeastSquaresProblem, Problem, require_problem

#: Eigenvalues (D, n) and eigenvectors (D, D, n).
Spectra = tuple[Tensor, Tensor]

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
        self.calculus = calculus

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

    @abstractmethod
    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """Drift: (B, D) -> (B, D)."""

    @abstractmethod
    def g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Diffusion times v, by products: (B, D), (B, m) -> (B, D)."""

    @abstractmethod
    def g(self, t: Tensor, y: Tensor) -> Tensor:
        """Diffusion matrix: (B, D) -> (B, D, m)."""

    def f_and_g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Drift, and diffusion times v."""
        return self.f(t, y), self.g_prod(t, y, v)


class ManifoldEquation(StochasticEquation):
    """A diffusion on the manifold of minimisers.

    Its coefficients are evaluated at the direction of a state and extended by homogeneity; off the
    manifold the tangent space is the span of the D - M eigenvectors of H of smallest eigenvalue.
    """

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
        self._normal_route: NormalRoute | None = None
        self._dense = DenseGeometry(problem, rtol=1e-10, max_steps=2000, compiled=False)
        self._rank = problem.rank
        self._interpolating = False

    @property
    def rank(self) -> int:
        """Rank M of the Hessian on the manifold; known once a point of the manifold was seen."""
        if self._rank is None:
            raise _unknown_rank(self.problem)
        return self._rank

    def field(self, *, compiled: bool = False) -> Field:
        """The coefficients for batches with the points last."""
        problem, products = self.problem, self.geometry.products
        if products is not None:
            if self._normal_route is None:
                raise _unknown_rank(problem)
            return MatrixFreeField(problem, self._normal_route, products.start(self._normal_route))
        if self._interpolating and isinstance(problem, LeastSquaresProblem):
            needs_basis = self.calculus == "ito"
            return InterpolationField(problem, needs_basis=needs_basis, compiled=compiled)
        return self._hessian_field(compiled)

    def _hessian_field(self, compiled: bool = False) -> HessianField:
        return HessianField(self.problem, self.rank, compiled=compiled)

    def require_on_manifold(self, y: Tensor) -> None:
        """Check that states are on the manifold, where the noise does not vanish.

        Args:
            y: States (..., D).

        Raises:
            NotOnManifoldError, RankError: If a state is not on the manifold of minimisers.
            NoiseError: If the noise vanishes there (interpolation): nothing would move.
        """
        flat = check_point(y, self.dim, name="y0").reshape(-1, self.dim)
        products = self.geometry.products
        if products is not None:
            self._normal_route = products.route_at(flat)
            self._rank = self._normal_route.rank
        else:
            self._rank = self._dense.spectrum(flat).rank
            isotropic = isinstance(self.problem.noise, SphericalNoise)
            self._interpolating = isotropic and interpolates(self.problem, flat, self._rank)
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

    def _frame(self, y: Tensor) -> tuple[HessianField, Tensor, Tensor, Spectra]:
        """Field, norms (n,), unit vectors (D, n), and the spectra there."""
        if self._rank is None:
            self.require_on_manifold(y)
        field = self._hessian_field()
        columns = y.T.contiguous()
        norms = columns.norm(dim=0)
        unit = columns / norms
        return field, norms, unit, field.eigen(unit)

    def _by_products(self, y: Tensor) -> tuple[Field, Tensor, Tensor] | None:
        """Field, states as columns, and anchors there, where the geometry is matrix-free."""
        if self.geometry.products is None:
            return None
        if self._normal_route is None:
            self.require_on_manifold(y)
        field, columns = self.field(), y.T.contiguous()
        return field, columns, field.anchor(columns)

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """Drift: (B, D) -> (B, D)."""
        self.require_states(y)
        products = self._by_products(y)
        if products is not None:
            return self.drift(*products).T
        field, norms, unit, spectrum = self._frame(y)
        return self._drift(field, norms, unit, spectrum).T

    def g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """P sigma v: (B, D), (B, m) -> (B, D)."""
        self.require_states(y, v)
        products = self._by_products(y)
        if products is not None:
            return self.noise(*products, v.T.contiguous()).T
        field, norms, unit, spectrum = self._frame(y)
        return (field.spectral_noise(unit, spectrum[1], v.T) / norms).T

    def f_and_g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Drift, and P sigma v, with one eigendecomposition."""
        self.require_states(y, v)
        products = self._by_products(y)
        if products is not None:
            drift, noise = self.drift_and_noise(*products, v.T.contiguous())
            return drift.T, noise.T
        field, norms, unit, spectrum = self._frame(y)
        noise = field.spectral_noise(unit, spectrum[1], v.T) / norms
        return self._drift(field, norms, unit, spectrum).T, noise.T

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        """P sigma: (B, D) -> (B, D, m)."""
        self.require_states(y)
        if self.geometry.products is not None:
            raise ArgumentError(
                "the matrix-free route has no diffusion matrix",
                received=f"dimension {self.dim}, {self.n_noise} Brownian motions",
                expected="its products with vectors",
                remedy="sde.g_prod(t, y, v)",
            )
        field, norms, unit, spectrum = self._frame(y)
        return (field.spectral_factor(unit, spectrum[1]) / norms).movedim(-1, 0)

    @abstractmethod
    def _drift(self, field: HessianField, norms: Tensor, unit: Tensor, spectrum: Spectra) -> Tensor:
        """Drift from the spectra: (D, n)."""

    @abstractmethod
    def drift(self, field: Field, x: Tensor, anchor: Tensor) -> Tensor:
        """Drift for the schemes: (D, n), (D, d, n) -> (D, n)."""

    def noise(self, field: Field, x: Tensor, anchor: Tensor, w: Tensor) -> Tensor:
        """P sigma w for the schemes: (D, n), (D, d, n), (m, n) -> (D, n)."""
        return field.noise(x, anchor, w)

    @abstractmethod
    def drift_and_noise(
        self, field: Field, x: Tensor, anchor: Tensor, w: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Drift, and P sigma w, for less than one after the other: (D, n) each."""


def _unknown_rank(problem: Problem) -> ArgumentError:
    return ArgumentError(
        "the rank of the Hessian is not known yet",
        received=f"{problem!r}",
        expected="rank=M with the problem, or a first state on the manifold",
        remedy="sde.require_on_manifold(y0), or rank=M with the problem",
    )
