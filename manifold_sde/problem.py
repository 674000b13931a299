"""What is minimised, and with which noise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from manifold_sde import invariance, loss_checks, philox
from manifold_sde.arguments import integer, kind_of
from manifold_sde.derivatives import batched, check_point, is_known_false
from manifold_sde.elementary import ElementaryFunction, elementary
from manifold_sde.errors import (
    ArgumentError,
    DifferentiationError,
    DTypeError,
    ManifoldSDEError,
    NoiseError,
    ScaleInvarianceError,
    ShapeError,
    printable,
)
from manifold_sde.noise.base import Noise, check_noise
from manifold_sde.paper import implements
from manifold_sde.pointwise import Pointwise
from manifold_sde.sources import Sources

#: Largest violation of scale invariance that counts as rounding, by dtype of the point.
INVARIANCE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
#: Entries of sigma from which on its products with a few vectors are looked at instead.
_MOST_NUMBERS = 1 << 20
_PROBES = 8


@implements("Assumption 2.1")
class Problem(Sources):
    r"""A loss on R^D without the origin, with the gradient noise that SGD has on it.

    Args:
        loss: Function of ONE vector x (D,), in plain torch, that returns () or the Xi sample
            losses (Xi,); four times differentiable. The loss L is their mean.
        dim: Ambient dimension D.
        noise: The gradient noise.
        rank: Rank M of the Hessian on the manifold of minimisers, where it is known; it is
            checked wherever it is used, and found by the spectral gap where it is not given.
        name: Name used in messages and figures.

    Attributes:
        dim: As given.
        noise: As given.
        rank: As given.
        name: As given.
        n_samples: Number Xi of sample losses, or ``None`` for a loss that returns one number.
        facts: What is known of the problem in closed form, or ``None``.

    Raises:
        ShapeError, DTypeError, NonFiniteError, DifferentiationError: If the loss cannot be used.
        NoiseError: If the noise does not fit the loss.

    Example:
        >>> import torch
        >>> from manifold_sde import Problem, SphericalNoise
        >>> problem = Problem(lambda x: 0.5 * (x[2] / x.norm()) ** 2, 3, SphericalNoise(0.3))
        >>> problem.gradient(torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
        tensor([-0.2500,  0.0000,  0.2500], dtype=torch.float64)

    Source: section 2, Assumptions 2.1 and 2.3.
    """

    def __init__(
        self,
        loss: Callable[[Tensor], Tensor],
        dim: int,
        noise: Noise,
        *,
        rank: int | None = None,
        name: str | None = None,
    ) -> None:
        dim = loss_checks.check_dim(dim)
        if not callable(loss):
            raise DTypeError(
                "the loss is not a function",
                received=type(loss).__name__,
                expected="a function of one vector (D,) in plain torch",
                remedy="for SymPy expressions use Problem.from_sympy",
            )
        value = loss_checks.try_function(ElementaryFunction(loss), dim, "loss")
        if value.dim() > 1:
            raise ShapeError(
                "the loss of one vector has the wrong shape",
                received=f"{tuple(value.shape)} for x of shape ({dim},)",
                expected="() for a scalar loss, or (Xi,) for the sample losses",
                remedy="write the loss for ONE vector; batches are made by the toolkit",
            )
        if value.numel() == 0:
            raise ShapeError(
                "the loss has no samples",
                received=f"{tuple(value.shape)} for x of shape ({dim},)",
                expected="() for a scalar loss, or (Xi,) with Xi at least 1",
                remedy="check the data that the loss was made with",
            )
        function = elementary(loss, loss_checks.fixed_directions(dim, 1)[0])
        pointwise = Pointwise(function, dim, value.shape[0] if value.dim() else None)
        loss_checks.require_derivatives(pointwise, function, "loss")
        self._setup(pointwise, noise, rank, name or getattr(loss, "__name__", "loss"))

    def _setup(
        self, pointwise: Pointwise, noise: Noise, rank: int | None, name: str | None
    ) -> None:
        check_noise(noise)
        dim = pointwise.dim
        declared = integer(rank)
        if rank is not None and (declared is None or not 0 < declared < dim):
            raise ArgumentError(
                "rank is not the rank of a Hessian with a kernel",
                received=repr(rank),
                expected=f"an integer M in [1, {dim - 1}] (Assumption 2.1)",
                remedy="leave rank out: it is then found by the spectral gap",
            )
        noise.validate(pointwise)
        self.pointwise = pointwise
        self.dim = dim
        self.n_samples = pointwise.n_samples
        self.noise = noise
        self.rank = declared
        self.name = name
        self.facts: Any = None
        #: Compiled kernels of this problem, by what they compute and for which shapes.
        self.kernels: dict[Any, Any] = {}
        self._gradient_size: float | None = None
        #: Part of the noise along the manifold, tr P Sigma P / tr Sigma, once it was measured.
        self.noise_along: float | None = None

    def __repr__(self) -> str:
        samples = "" if self.n_samples is None else f", n_samples={self.n_samples}"
        rank = "" if self.rank is None else f", rank={self.rank}"
        weights = "" if self.network is None else f"; {self.network.weights}"
        return printable(
            f"{type(self).__name__}({self.name!r}, dim={self.dim}{samples}, {self.noise}{rank}"
            f"{weights})"
        )

    def __str__(self) -> str:
        if self.noise_along is None:
            return repr(self)
        return f"{self!r}\n  noise along the manifold: {100 * self.noise_along:.3g} % of tr Sigma"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"kernels": {}}

    def with_noise(self, noise: Noise) -> Self:
        """The same loss with another noise, such as that of another batch size.

        Raises:
            NoiseError: If it is no noise, or does not fit the loss.
        """
        other = copy.copy(self)
        other._setup(self.pointwise, noise, self.rank, self.name)
        other.facts = self.facts
        return other

    @property
    def minimizer(self) -> Tensor:
        """A point on the manifold of minimisers, where the problem knows one: (D,).

        Raises:
            ArgumentError: If it knows none.
        """
        if self.facts is None:
            raise ArgumentError(
                f"the problem {self.name!r} does not know a minimiser",
                received="a problem given by a loss alone",
                expected="one of manifold_sde.problems, which state what is known of them",
                remedy="Geometry(problem).limit_map(x) finds one from any x that flows to it",
            )
        return self.facts.minimizer

    # The loss and its derivatives, batched.

    def _apply(
        self, function: Callable[..., Tensor], *arguments: Tensor, dims: tuple[int, ...] = (1,)
    ) -> Tensor:
        if self.pointwise.batches:
            return self._guarded(lambda: function(*arguments))
        at_once = self.pointwise.at_once
        return self._guarded(
            lambda: batched(function, *arguments, event_dims=dims, at_once=at_once)
        )

    def _guarded(self, compute: Callable[[], Tensor]) -> Tensor:
        try:
            return compute()
        except ManifoldSDEError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise DifferentiationError(
                f"torch cannot evaluate or differentiate the loss or the noise of {self.name!r}",
                received=loss_checks.first_line(error),
                expected="functions in plain torch that follow the dtype and device of x",
                remedy=loss_checks.remedy(str(error)),
            ) from error

    def loss(self, x: Tensor) -> Tensor:
        """L(x): (..., D) -> (...)."""
        return self._apply(self.pointwise.loss, check_point(x, self.dim))

    def sample_losses(self, x: Tensor) -> Tensor:
        """The sample losses: (..., D) -> (..., Xi).

        Raises:
            NoiseError: If the loss returns one number.
        """
        if self.n_samples is None:
            raise NoiseError(
                "the loss has no sample losses",
                received="a loss that returns one number",
                expected="a loss that returns the sample losses, shape (Xi,)",
                remedy="return the losses before the mean",
            )
        return self._apply(self.pointwise.sample_losses, check_point(x, self.dim))

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient of L: (..., D) -> (..., D)."""
        return self._apply(self.pointwise.gradient, check_point(x, self.dim))

    def hessian(self, x: Tensor) -> Tensor:
        """The Hessian of L: (..., D) -> (..., D, D)."""
        return self._apply(self.pointwise.hessian, check_point(x, self.dim))

    def third_derivative(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Second directional derivative of the gradient along a and b: (..., D) each -> (..., D).

        Raises:
            DifferentiationError: If torch cannot differentiate the loss so often.
        """
        points = [
            check_point(v, self.dim, name=n, allow_zero=n != "x")
            for v, n in ((x, "x"), (a, "a"), (b, "b"))
        ]
        return self._apply(self.pointwise.third_derivative, *points, dims=(1, 1, 1))

    def derivative_errors(self, x: Tensor | None = None) -> dict[str, float]:
        """How far the derivatives are from difference quotients, at one point.

        A loss whose derivatives are wrong at a fixed point is refused when the problem is made;
        this measures them anywhere else.

        Args:
            x: Point (D,); by default a fixed random direction.

        Returns:
            For "gradient", "hessian" and "third" the smallest relative difference over two steps.

        Raises:
            DifferentiationError: If torch cannot differentiate the loss so often.
            NonFiniteError: If a derivative is not finite.
        """
        point = loss_checks.fixed_directions(self.dim, 1)[0] if x is None else x
        if check_point(point, self.dim, values=True).dim() != 1:
            raise ShapeError(
                "derivatives are compared at one point",
                received=str(tuple(point.shape)),
                expected=f"({self.dim},)",
                remedy="call it for each point",
            )
        errors = loss_checks.derivative_errors(self.pointwise, point)
        return {name: error for name, (error, _) in errors.items()}

    # The noise, batched.

    def _noise(
        self, function: Callable[..., Tensor], *arguments: Tensor, dims: tuple[int, ...] = (1,)
    ) -> Tensor:
        def at_one_point(*z: Tensor) -> Tensor:
            return function(self.pointwise, *z)

        return self._guarded(lambda: batched(at_one_point, *arguments, event_dims=dims))

    def noise_factor(self, x: Tensor) -> Tensor:
        """sigma(x): (..., D) -> (..., D, m)."""
        return self._noise(self.noise.factor, check_point(x, self.dim))

    def noise_product(self, x: Tensor, w: Tensor) -> Tensor:
        """sigma(x) w without the matrix: (..., D), (..., m) -> (..., D)."""
        check_point(x, self.dim)
        check_point(w, self.n_noise, name="w", allow_zero=True)
        return self._noise(self.noise.product, x, w, dims=(1, 1))

    def noise_covariance(self, x: Tensor) -> Tensor:
        """Sigma(x) = sigma sigma^T: (..., D) -> (..., D, D)."""
        return self._noise(self.noise.covariance, check_point(x, self.dim))

    def noise_trace(self, x: Tensor) -> Tensor:
        """V = tr Sigma(x): (..., D) -> (...)."""
        return self._noise(self.noise.trace, check_point(x, self.dim))

    def noise_correction(self, x: Tensor, projection: Tensor) -> Tensor:
        """Sum over j of the derivative of sigma_j along P sigma_j, at fixed P.

        Args:
            x: Points (..., D).
            projection: Symmetric matrices P (..., D, D), the projection onto the tangent space
                where the term of the Stratonovich drift is meant.

        Returns:
            Tensor (..., D).
        """
        check_point(x, self.dim)
        if not isinstance(projection, Tensor) or projection.shape[-2:] != (self.dim, self.dim):
            raise ShapeError(
                "the projection has the wrong shape",
                received=str(tuple(getattr(projection, "shape", ()))),
                expected=f"(..., {self.dim}, {self.dim})",
                remedy="geometry.tangent_projection(y, torch.eye(D)) gives its columns",
            )
        if is_known_false((projection - projection.mT).norm() <= 1e-6 * projection.norm()):
            raise ArgumentError(
                "the projection is not symmetric",
                received="a matrix with NaN, or one that differs from its transpose",
                expected="P = P^T",
                remedy="0.5 * (A + A.mT); a projection on a tangent space is symmetric",
            )
        return self._noise(self.noise.correction, x, projection, dims=(1, 2))

    def sgd_noise(self, x: Tensor, *, seed: int = 0, step: int = 0) -> Tensor:
        """Noise that one step of SGD adds to the gradient, a draw of its own for each point.

        Args:
            x: Points (..., D); the i-th of the flattened batch draws as path i.
            seed: Seed, as in ``run_sgd``.
            step: Number of the step, as in ``run_sgd``.

        Returns:
            Tensor (..., D), of mean zero and covariance Sigma(x).
        """
        flat = check_point(x, self.dim).reshape(-1, self.dim)
        number = integer(step)
        if number is None or not 0 <= number < philox.STEPS:
            raise ArgumentError(
                "step is not the number of a step",
                received=repr(step),
                expected=f"an integer in [0, {philox.STEPS})",
                remedy="count the steps from 0, as run_sgd does",
            )
        paths = torch.arange(flat.shape[0], device=x.device)
        when = torch.tensor(number, device=x.device)
        n_normals, n_uniforms = self.noise.draw_counts(self.pointwise)
        key = philox.seed_key(seed)
        normals = philox.normals(key, philox.STREAM_SGD_NORMAL, paths, when, n_normals, x.dtype)
        uniforms = philox.uniforms(key, philox.STREAM_SGD_UNIFORM, paths, when, n_uniforms, x.dtype)

        def noise(z: Tensor, n: Tensor, u: Tensor) -> Tensor:
            total = self.noise.stochastic_gradient(self.pointwise, z, n, u)
            return total - self.pointwise.gradient(z)

        if len(flat) == 0:
            return torch.zeros_like(x)
        return self._guarded(
            lambda: torch.vmap(noise)(flat, normals.T, uniforms.T).reshape(x.shape)
        )

    @property
    def n_noise(self) -> int:
        """Number m of Brownian motions: the columns of sigma."""
        return self.noise.n_components(self.pointwise)

    # The properties that the theory asks for.

    @implements("Lemma 2.5")
    def scale_invariance_violation(self, x: Tensor | None = None) -> Tensor:
        """How far the losses are from scale invariance, by Euler's theorem.

        It is the largest ``|<x, grad L_xi(x)>|`` over points and samples, divided by the largest
        ``|x| |grad L_xi(x)|`` over these and 16 fixed directions: rounding level if and only if
        each loss is constant along the rays through the points.

        Args:
            x: Points (..., D); by default 16 fixed random directions.

        Returns:
            Tensor (): zero up to rounding for a scale-invariant loss.

        Source: Lemma 2.5 (Euler's theorem) with k = 0.
        """
        return self._euler_defects(x)[0].abs().max()

    def _euler_defects(self, x: Tensor | None) -> tuple[Tensor, Tensor]:
        """Relative Euler defects (n, Xi or 1) and the points (n, D) that they belong to."""
        points = self._points(x)
        sums, size = invariance.euler_defects(self.pointwise, points)
        if self._gradient_size is None:
            # At points of Gamma alone there would be nothing but rounding to compare with.
            fixed = loss_checks.fixed_directions(self.dim)
            self._gradient_size = float(invariance.euler_defects(self.pointwise, fixed)[1])
        largest = size.clamp(min=self._gradient_size)
        return sums / torch.where(largest > 0, largest, 1.0), points

    def _points(self, x: Tensor | None) -> Tensor:
        """The points (n, D) to measure at: those given, or fixed random directions."""
        fixed = loss_checks.fixed_directions(self.dim)
        points = fixed if x is None else check_point(x, self.dim, values=True)
        if points.numel() == 0:
            raise ShapeError(
                "there is no point to measure at",
                received=str(tuple(points.shape)),
                expected=f"at least one point, (..., {self.dim})",
                remedy="leave x out for fixed random directions",
            )
        return points.reshape(-1, self.dim)

    def require_scale_invariance(
        self, x: Tensor | None = None, *, tolerance: float | None = None
    ) -> None:
        """Refuse the problem if its losses are not scale-invariant.

        Args:
            x: Points (..., D) to measure at; by default fixed random directions.
            tolerance: Largest violation allowed; by default rounding level of the dtype.

        Raises:
            ScaleInvarianceError: With the violation measured and the coordinates that cause it.
            DifferentiationError: If it is the gradient that is wrong, and not the loss.
        """
        defects, points = self._euler_defects(x)
        violation = float(defects.abs().max())
        if tolerance is None:
            tolerance = INVARIANCE_TOLERANCE.get(points.dtype, 1e-2)
        if violation <= tolerance:
            return
        worst = points[int(defects.abs().amax(1).argmax())]
        invariance.require_true_derivatives(self.pointwise, worst, repr(self.name))
        coordinates, description = self.guilty_coordinates(points)
        raise ScaleInvarianceError(
            f"the loss of {self.name!r} is not scale-invariant (Definition 2.2)",
            violation=violation,
            coordinates=coordinates,
            received=f"|<x, grad L>| / (|x| |grad L|) = {violation:.3g}, caused by " + description,
            expected=f"at most {tolerance:.1g}: each sample loss is constant along rays",
            remedy="normalise what these coordinates feed (no bias, no affine parameters, no eps "
            "in the normalisation, a frozen last layer), or take them out of x",
        )

    def guilty_coordinates(self, points: Tensor) -> tuple[tuple[int, ...], str]:
        """Coordinates that break scale invariance, and what they are in words.

        Args:
            points: Points (n, D) at which it was seen to be broken.
        """
        found = self.breaking_parameters(points[0]) if self.network is not None else None
        if found is not None:
            return found
        coordinates = invariance.guilty_coordinates(self.pointwise, points)
        return coordinates, invariance.describe_coordinates(coordinates, self.dim)

    def noise_violations(self, x: Tensor | None = None) -> dict[str, float]:
        """How far sigma is from the two properties that the theory asks of it.

        Args:
            x: Points (..., D); by default 16 fixed random directions.

        Returns:
            ``{"degree": ..., "radial": ...}``: the largest relative ``|a sigma(a x) - sigma(x)|``
            over a = 1/2 and 2, and the largest ``|sigma(x)^T x| / (|x| |sigma(x)|)``. Where
            sigma nearly vanishes, both are relative to a thousandth of its size elsewhere; where
            it has more than a million entries, they are those of its products with eight vectors.
        """
        return invariance.noise_violations(self._noise_columns, self._points(x))

    def _noise_columns(self, x: Tensor) -> Tensor:
        """sigma(x), or its products with a few fixed vectors where it is large: (n, D, k)."""
        if self.dim * self.n_noise <= _MOST_NUMBERS:
            return self.noise_factor(x)
        probes = loss_checks.fixed_directions(self.n_noise, _PROBES).to(x)
        columns = [self.noise_product(x, probe.expand(len(x), -1)) for probe in probes]
        return torch.stack(columns, dim=-1)


def require_problem(problem: object) -> Problem:
    """Check that something is a problem.

    Raises:
        DTypeError: If it is none.
    """
    if isinstance(problem, Problem):
        return problem
    raise DTypeError(
        "the problem is not a Problem",
        received=kind_of(problem),
        expected="a Problem, which has a loss and a noise",
        remedy="Problem(loss, dim, SphericalNoise(0.3))",
    )
