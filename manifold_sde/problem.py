"""What is minimised, and with which noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manifold_sde import philox
from manifold_sde.derivatives import batched, check_point
from manifold_sde.errors import (
    ArgumentError,
    DifferentiationError,
    DTypeError,
    NoiseError,
    NonFiniteError,
    ScaleInvarianceError,
    ShapeError,
)
from manifold_sde.noise import Noise
from manifold_sde.paper import implements
from manifold_sde.pointwise import Pointwise

if TYPE_CHECKING:
    import sympy

#: Largest violation of scale invariance that counts as rounding, by dtype of the point.
INVARIANCE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@implements("Assumption 2.1")
class Problem:
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
        dim, noise, rank, name: As given.
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
        dim = check_dim(dim)
        if not callable(loss):
            raise DTypeError(
                "the loss is not a function",
                received=type(loss).__name__,
                expected="a function of one vector (D,) in plain torch",
                remedy="for SymPy expressions use Problem.from_sympy",
            )
        value = try_function(loss, dim, "loss")
        if value.dim() > 1:
            raise ShapeError(
                "the loss of one vector has the wrong shape",
                received=f"{tuple(value.shape)} for x of shape ({dim},)",
                expected="() for a scalar loss, or (Xi,) for the sample losses",
                remedy="write the loss for ONE vector; batches are made by the toolkit",
            )
        pointwise = Pointwise(loss, dim, value.shape[0] if value.dim() else None)
        self._setup(pointwise, noise, rank, name or getattr(loss, "__name__", "loss"))

    def _setup(
        self, pointwise: Pointwise, noise: Noise, rank: int | None, name: str | None
    ) -> None:
        if not isinstance(noise, Noise):
            raise NoiseError(
                "the noise is not a noise model",
                received=type(noise).__name__,
                expected="SphericalNoise, SamplingNoise, LabelNoise or CustomNoise",
                remedy="SphericalNoise(0.3), or CustomNoise(factor) for a sigma of your own",
            )
        dim = pointwise.dim
        if rank is not None and (
            isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < dim
        ):
            raise ArgumentError(
                "rank is not the rank of a Hessian with a kernel",
                received=repr(rank),
                expected=f"an integer M in [0, {dim - 1}] (Assumption 2.1)",
                remedy="leave rank out: it is then found by the spectral gap",
            )
        noise.bind(pointwise)
        self.pointwise = pointwise
        self.dim = dim
        self.n_samples = pointwise.n_samples
        self.noise = noise
        self.rank = rank
        self.name = name
        self.facts: Any = None
        #: Compiled kernels of this problem, by what they compute and for which shapes.
        self.kernels: dict[Any, Any] = {}

    def __repr__(self) -> str:
        samples = "" if self.n_samples is None else f", n_samples={self.n_samples}"
        rank = "" if self.rank is None else f", rank={self.rank}"
        return f"{type(self).__name__}({self.name!r}, dim={self.dim}{samples}, {self.noise}{rank})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"kernels": {}}

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
            return function(*arguments)
        return batched(function, *arguments, event_dims=dims)

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
        try:
            return self._apply(self.pointwise.third_derivative, *points, dims=(1, 1, 1))
        except (RuntimeError, NotImplementedError) as error:
            raise DifferentiationError(
                f"the loss of {self.name!r} cannot be differentiated three times",
                received=f"{type(error).__name__}: {str(error).splitlines()[0]}",
                expected="a loss in plain torch, without in-place writes, custom kernels or "
                "detached values",
                remedy="write the offending layer with elementary operations, for example "
                "x / (x * x).sum().sqrt() for a normalisation",
            ) from error

    # The noise, batched.

    def noise_factor(self, x: Tensor) -> Tensor:
        """sigma(x): (..., D) -> (..., D, m)."""
        return batched(lambda z: self.noise.factor(self.pointwise, z), check_point(x, self.dim))

    def noise_product(self, x: Tensor, w: Tensor) -> Tensor:
        """sigma(x) w without the matrix: (..., D), (..., m) -> (..., D)."""
        check_point(x, self.dim)
        check_point(w, self.n_noise, name="w", allow_zero=True)
        return batched(
            lambda z, v: self.noise.product(self.pointwise, z, v), x, w, event_dims=(1, 1)
        )

    def noise_covariance(self, x: Tensor) -> Tensor:
        """Sigma(x) = sigma sigma^T: (..., D) -> (..., D, D)."""
        return batched(lambda z: self.noise.covariance(self.pointwise, z), check_point(x, self.dim))

    def noise_trace(self, x: Tensor) -> Tensor:
        """V = tr Sigma(x): (..., D) -> (...)."""
        return batched(lambda z: self.noise.trace(self.pointwise, z), check_point(x, self.dim))

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
        return batched(
            lambda z, p: self.noise.correction(self.pointwise, z, p),
            x,
            projection,
            event_dims=(1, 2),
        )

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
        paths = torch.arange(flat.shape[0], device=x.device)
        when = torch.tensor(step, device=x.device)
        n_normals, n_uniforms = self.noise.draw_counts(self.pointwise)
        key = philox.seed_key(seed)
        normals = philox.normals(key, philox.STREAM_SGD_NORMAL, paths, when, n_normals, x.dtype)
        uniforms = philox.uniforms(key, philox.STREAM_SGD_UNIFORM, paths, when, n_uniforms, x.dtype)

        def noise(z: Tensor, n: Tensor, u: Tensor) -> Tensor:
            total = self.noise.stochastic_gradient(self.pointwise, z, n, u)
            return total - self.pointwise.gradient(z)

        return torch.vmap(noise)(flat, normals.T, uniforms.T).reshape(x.shape)

    @property
    def n_noise(self) -> int:
        """Number m of Brownian motions: the columns of sigma."""
        return self.noise.n_components(self.pointwise)

    # The properties that the theory asks for.

    @implements("Lemma 2.5")
    def scale_invariance_violation(self, x: Tensor | None = None) -> Tensor:
        """How far the losses are from scale invariance, by Euler's theorem.

        It is the largest ``|<x, grad L_xi(x)>| / (|x| max |grad L_xi|)`` over the samples, with
        the maximum of the gradient's norm over all points and samples: rounding level if and only
        if each loss is constant along the rays through the points.

        Args:
            x: Points (..., D); by default 16 fixed random directions.

        Returns:
            Tensor (): zero up to rounding for a scale-invariant loss.

        Source: Lemma 2.5 (Euler's theorem) with k = 0.
        """
        return self._euler_defects(x)[0].abs().max()

    def _euler_defects(self, x: Tensor | None) -> tuple[Tensor, Tensor]:
        """Relative Euler defects (n, Xi or 1) and the points (n, D) that they belong to."""
        points = _test_directions(self.dim) if x is None else check_point(x, self.dim)
        points = points.reshape(-1, self.dim)

        def defect(z: Tensor) -> tuple[Tensor, Tensor]:
            if self.n_samples is None:
                gradients = self.pointwise.gradient(z)[None]
            else:
                gradients = self.pointwise.sample_gradients(z)
            norm = z.norm()
            return gradients @ z, norm * gradients.norm(dim=-1)

        along, size = torch.vmap(defect)(points)
        largest = size.max()
        return along / torch.where(largest > 0, largest, torch.ones_like(largest)), points

    def require_scale_invariance(
        self, x: Tensor | None = None, *, tolerance: float | None = None
    ) -> None:
        """Refuse the problem if its losses are not scale-invariant.

        Args:
            x: Points (..., D) to measure at; by default fixed random directions.
            tolerance: Largest violation allowed; by default rounding level of the dtype.

        Raises:
            ScaleInvarianceError: With the violation measured and the coordinates that cause it.
        """
        defects, points = self._euler_defects(x)
        violation = float(defects.abs().max())
        if tolerance is None:
            tolerance = INVARIANCE_TOLERANCE.get(points.dtype, 1e-2)
        if violation <= tolerance:
            return
        coordinates = self._guilty_coordinates(points)
        raise ScaleInvarianceError(
            f"the loss of {self.name!r} is not scale-invariant (Definition 2.2)",
            violation=violation,
            coordinates=coordinates,
            received=f"|<x, grad L>| / (|x| |grad L|) = {violation:.3g}, caused by "
            + _describe_coordinates(coordinates, self.dim),
            expected=f"at most {tolerance:.1g}: each sample loss is constant along rays",
            remedy="normalise what these coordinates feed (no bias, no affine parameters, no eps "
            "in the normalisation, a frozen last layer), or take them out of x",
        )

    def _guilty_coordinates(self, points: Tensor) -> tuple[int, ...]:
        """Coordinates on which <x, grad L(x)> depends most, by |x_i d_i <x, grad L>|."""

        def dependence(z: Tensor) -> Tensor:
            gradient = self.pointwise.gradient(z) + self.pointwise.hessian_product(z, z)
            return (z * gradient).abs()

        size = torch.vmap(dependence)(points).max(0).values
        return tuple(int(i) for i in torch.nonzero(size > 0.1 * size.max())[:, 0])

    def noise_violations(self, x: Tensor | None = None) -> dict[str, float]:
        """How far sigma is from the two properties that the theory asks of it.

        Args:
            x: Points (..., D); by default 16 fixed random directions.

        Returns:
            ``{"degree": ..., "radial": ...}``: the largest relative ``|a sigma(a x) - sigma(x)|``
            over a = 1/2 and 2, and the largest ``|sigma(x)^T x| / (|x| |sigma(x)|)``.
        """
        points = _test_directions(self.dim) if x is None else check_point(x, self.dim)
        points = points.reshape(-1, self.dim)
        factor = self.noise_factor(points)
        size = factor.flatten(1).norm(dim=1)
        size = torch.where(size > 0, size, torch.ones_like(size))
        degree = max(
            float(
                ((a * self.noise_factor(a * points) - factor).flatten(1).norm(dim=1) / size).max()
            )
            for a in (0.5, 2.0)
        )
        radial = torch.einsum("bdm,bd->bm", factor, points).norm(dim=1)
        return {"degree": degree, "radial": float((radial / (size * points.norm(dim=1))).max())}

    @classmethod
    def from_sympy(
        cls,
        losses: sympy.Expr | Sequence[sympy.Expr],
        symbols: Sequence[sympy.Symbol],
        noise: Noise,
        *,
        limit_map: Sequence[sympy.Expr] | None = None,
        rank: int | None = None,
        name: str | None = None,
    ) -> Problem:
        """Problem from SymPy expressions, with exact derivatives and a proof of scale invariance.

        Args:
            losses: One expression, or the Xi sample losses.
            symbols: The coordinates x_1, ..., x_D, in order.
            noise: The gradient noise.
            limit_map: Closed form of Phi, D expressions, where one is known.
            rank: Rank M of the Hessian on the manifold of minimisers, where it is known.
            name: Name used in messages and figures.

        Returns:
            A :class:`~manifold_sde.symbolic.SymbolicProblem`.

        Raises:
            SymbolicError: If the expressions are malformed.
            ScaleInvarianceError: If SymPy refutes that a loss is 0-homogeneous.
        """
        from manifold_sde.symbolic import SymbolicProblem

        return SymbolicProblem(losses, symbols, noise, limit_map=limit_map, rank=rank, name=name)


def check_dim(dim: object) -> int:
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 2:
        raise ArgumentError(
            "dim is not the dimension of a space with directions",
            received=repr(dim),
            expected="an integer D of at least 2",
            remedy="pass the length of the vector x that the loss takes",
        )
    return dim


def _test_directions(dim: int, count: int = 16) -> Tensor:
    """Fixed random directions (count, D), from the counter-based generator."""
    paths = torch.arange(count)
    points = philox.normals((0x5EED, 0), 0, paths, torch.tensor(0), dim, torch.float64).T
    return points / points.norm(dim=1, keepdim=True)


def try_function(function: Callable[[Tensor], Tensor], dim: int, what: str) -> Tensor:
    """Value of a user's function at one test point, with named errors for what cannot be used."""
    point = _test_directions(dim, 1)[0]
    try:
        value = function(point)
    except Exception as error:
        raise ShapeError(
            f"the {what} raised at a test point",
            received=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            expected=f"a function of one float64 vector of shape ({dim},)",
            remedy="check dim, write the function for ONE vector, and give its constants the "
            "dtype of x (torch.float64)",
        ) from error
    if not isinstance(value, Tensor) or not value.is_floating_point():
        received = f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise DTypeError(
            f"the {what} does not return a floating tensor",
            received=received,
            expected="a tensor of the dtype of x",
            remedy="use torch operations from x to the result; no float(...), no numpy",
        )
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError(
            f"the {what} is not finite at a test point",
            received=f"{value.flatten()[:4].tolist()} at a random unit vector",
            expected="a finite value at every x other than 0",
            remedy="check logarithms, divisions and square roots",
        )
    return value


def _describe_coordinates(coordinates: tuple[int, ...], dim: int) -> str:
    if len(coordinates) == dim:
        return f"all {dim} coordinates"
    shown = ", ".join(str(i) for i in coordinates[:8])
    more = "" if len(coordinates) <= 8 else f", ... ({len(coordinates)} of {dim})"
    return f"coordinates {shown}{more}"
