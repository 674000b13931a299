"""What is minimised, and with which noise."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from manifold_sde import loss_checks
from manifold_sde.arguments import check_integer, check_point, check_projection, kind_of
from manifold_sde.derivatives import batched
from manifold_sde.errors import ArgumentError, DTypeError, NoiseError, printable
from manifold_sde.loss import LeastSquaresLoss, Loss
from manifold_sde.networks.function import NetworkFunction
from manifold_sde.networks.invariance_report import breaking_parameters
from manifold_sde.networks.module import network_loss
from manifold_sde.networks.random_batches import RandomBatches
from manifold_sde.networks.weights import ParameterBlock
from manifold_sde.noise.base import Noise, check_noise
from manifold_sde.paper import implements
from manifold_sde.remedies import torch_errors_of
from manifold_sde.scale_invariance import (
    noise_violations,
    offending_coordinates,
    points_to_measure,
    relative_defects,
    require_constant_along_rays,
)


@implements("Assumption 2.1")
class Problem:
    r"""A loss on R^D without the origin, with the gradient noise that SGD has on it.

    Args:
        loss: Function of ONE vector x (D,), in plain torch, that returns () or the Xi sample
            losses (Xi,); four times differentiable. The loss L is their mean. A
            :class:`~manifold_sde.loss.Loss` is taken as it is.
        dim: Ambient dimension D.
        noise: The gradient noise.
        rank: Rank M of the Hessian on the manifold of minimisers, where it is known; it is
            checked wherever it is used, and found by the spectral gap where it is not given.
        name: Name used in messages and figures.

    Attributes:
        n_samples: Number Xi of sample losses, or ``None`` for a loss that returns one number.
        pointwise: The loss as a function of one vector, with its derivatives.
        network: The network on its data, or ``None`` where the problem was not made from a module.
        closed_form: Closed form of the limit map Phi of a symbolic loss, or ``None``.
        scale_invariance, analyticity: Proofs of these for each symbolic loss, or ``None``.
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

    network: NetworkFunction | None = None
    #: What :meth:`describe` calls: :func:`manifold_sde.description.describe`, which stands above.
    describer: ClassVar[Callable[[Problem, int], Any]]

    def __init__(
        self,
        loss: Callable[[Tensor], Tensor] | Loss,
        dim: int,
        noise: Noise,
        *,
        rank: int | None = None,
        name: str | None = None,
    ) -> None:
        made = loss_checks.checked_loss(loss, dim)
        self._setup(made, noise, rank, name or getattr(loss, "__name__", "loss"))

    @classmethod
    def from_sympy(
        cls,
        losses: Any,
        symbols: Sequence[Any],
        noise: Noise,
        *,
        limit_map: Sequence[Any] | None = None,
        rank: int | None = None,
        name: str | None = None,
    ) -> Problem:
        """Problem from SymPy expressions, with exact derivatives and a proof of scale invariance.

        Args:
            losses: One expression, or the Xi sample losses.
            symbols: The coordinates x_1, ..., x_D, in order.
            noise: The gradient noise.
            limit_map: Closed form of Phi, D expressions, where one is known.
            rank: Rank M of the Hessian, where it is known.
            name: Name used in messages and figures.

        Returns:
            A problem with ``scale_invariance``, ``analyticity`` and ``closed_form``.

        Raises:
            SymbolicError: If the expressions are malformed, cannot be written in torch, or
                ``limit_map`` is not the limit map.
            ScaleInvarianceError: If SymPy refutes that a loss is 0-homogeneous.
        """
        from manifold_sde.symbolic.expressed import expressed_loss  # SymPy takes a second to load

        loss = expressed_loss(losses, symbols, limit_map)
        return Problem(loss, loss.dim, noise, rank=rank, name=name or "symbolic loss")

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        criterion: nn.Module | Callable[[Tensor, Tensor], Tensor],
        inputs: Tensor | tuple[Tensor, ...] | Dataset[Any] | DataLoader[Any],
        targets: Tensor | None,
        noise: Noise,
        *,
        rank: int | None = None,
        name: str | None = None,
        frozen: str | Iterable[str] = (),
        ghost_size: int | None = None,
        batches: RandomBatches | None = None,
        memory: int | str | None = None,
        progress: bool | str = False,
    ) -> Problem:
        """Problem from a module, a criterion and data: x is the vector of trained parameters.

        The module is copied, and never changed. Buffers and frozen parameters are constants; a
        parameter of several names appears once. Everything follows the dtype and device of x. A
        loss that is not scale-invariant is taken too: the equations refuse it, and name the layers.

        Args:
            module: The network, in the mode (``train`` or ``eval``) in which it is meant.
            criterion: A criterion of ``torch.nn`` whose value is a mean over the samples of every
                batch, or a function of outputs and targets that returns (Xi,) or (Xi, K), whose
                mean over a sample's entries is its loss. L is the mean over the samples: its value.
                ``nn.MSELoss`` makes a :class:`~manifold_sde.LeastSquaresProblem`.
            inputs: What the module is called with, (N, ...), a tuple for several arguments; or a
                ``Dataset`` or ``DataLoader`` of samples (input, target), with targets ``None``.
            targets: Targets (N, ...).
            noise: The gradient noise.
            rank: Rank M of the Hessian, where it is known.
            name: Name for messages and figures; by default that of the module's class.
            frozen: Names of parameters or submodules that are constants, as those without gradient.
            ghost_size: Number B of samples, one after the other, that form a ghost batch, where a
                module couples them (as ``GhostBatchNorm``, which is found by itself). The mean loss
                of a ghost batch is then one sample loss, and Xi = N / B.
            batches: Random batches, for batch normalisation in training mode: the mean loss of
                each, by its own statistics, is then one sample loss.
            memory: Bytes that one pass may take, or ``"2 GiB"``; larger data stand in a file.
            progress: Whether to show progress bars, or their label.

        Returns:
            A problem with ``vector``, ``load_into``, ``layers`` and ``part``; without sample losses
            where the outputs of a sample depend on others outside of its ghost batch.

        Raises:
            ArgumentError, ShapeError, DTypeError, NonFiniteError, DifferentiationError: If module,
                criterion and data do not make a fixed function of the weights with a loss for each
                sample, the same in every batch, that torch differentiates three times.
            NoiseError: If the noise needs samples that the network couples.
        """
        data = module, criterion, inputs, targets
        network, made = network_loss(*data, noise, frozen, ghost_size, batches, memory, progress)
        kind: Any = LeastSquaresProblem if isinstance(made, LeastSquaresLoss) else Problem
        problem: Problem = kind(made, made.dim, noise, rank=rank, name=name or network.__name__)
        problem.network = network
        return problem

    def _setup(self, pointwise: Loss, noise: Noise, rank: int | None, name: str | None) -> None:
        check_noise(noise)
        if rank is not None:
            found = "leave rank out: it is then found by the spectral gap (Assumption 2.1)"
            rank = check_integer("rank", rank, 1, pointwise.dim - 1, found)
        noise.validate(pointwise)
        self.pointwise = pointwise
        self.dim = pointwise.dim
        self.n_samples = pointwise.n_samples
        self.noise = noise
        self.rank = rank
        self.name = name
        self.closed_form = pointwise.closed_form
        self.scale_invariance = pointwise.scale_invariance
        self.analyticity = pointwise.analyticity
        self.facts: Any = None
        #: Compiled kernels of this problem, by what they compute and for which shapes.
        self.kernels: dict[Any, Any] = {}
        #: Part of the noise along the manifold, tr P Sigma P / tr Sigma, once it was measured.
        self.noise_along: float | None = None

    def __repr__(self) -> str:
        samples = "" if self.n_samples is None else f", n_samples={self.n_samples}"
        rank = "" if self.rank is None else f", rank={self.rank}"
        weights = "" if self.network is None else f"; {self.network.weights}"
        text = f"{self.name!r}, dim={self.dim}{samples}, {self.noise}{rank}{weights}"
        return printable(f"{type(self).__name__}({text})")

    def __str__(self) -> str:
        if self.noise_along is None:
            return repr(self)
        return f"{self!r}\n  noise along the manifold: {100 * self.noise_along:.3g} % of tr Sigma"

    def describe(self, seed: int = 0) -> Any:
        """What it is, measured: a :class:`~manifold_sde.description.Description` to print."""
        return type(self).describer(self, seed)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"kernels": {}}

    def with_noise(self, noise: Noise) -> Self:
        """The same loss with another noise, such as that of another batch size."""
        other = copy.copy(self)
        other._setup(self.pointwise, noise, self.rank, self.name)
        other.facts = self.facts
        return other

    @property
    def minimizer(self) -> Tensor:
        """A point on the manifold of minimisers, where the problem knows one: (D,)."""
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
        with torch_errors_of(self.name):
            if self.pointwise.batches:
                return function(*arguments)
            at_once = self.pointwise.at_once
            return batched(function, *arguments, event_dims=dims, at_once=at_once)

    def loss(self, x: Tensor) -> Tensor:
        """L(x): (..., D) -> (...)."""
        return self._apply(self.pointwise.loss, check_point(x, self.dim))

    def sample_losses(self, x: Tensor) -> Tensor:
        """The sample losses: (..., D) -> (..., Xi)."""
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
        """Second derivative of the gradient along a and b: (..., D) each -> (..., D)."""
        points = [
            check_point(v, self.dim, name=n, allow_zero=n != "x")
            for v, n in ((x, "x"), (a, "a"), (b, "b"))
        ]
        return self._apply(self.pointwise.third_derivative, *points, dims=(1, 1, 1))

    def derivative_errors(self, x: Tensor | None = None) -> dict[str, float]:
        """How far the derivatives are from difference quotients, at one point.

        Problems are refused where they are wrong at a fixed point; this looks at any other.

        Args:
            x: Point (D,); by default a fixed random direction.

        Returns:
            For "gradient", "hessian" and "third" the smallest relative difference over the steps.
        """
        point = loss_checks.fixed_directions(self.dim, 1)[0] if x is None else x
        point = check_point(point, self.dim, values=True)
        errors = loss_checks.derivative_errors(self.pointwise, point)
        return {name: error for name, (error, _) in errors.items()}

    # The noise, batched.

    def _noise(
        self, function: Callable[..., Tensor], *arguments: Tensor, dims: tuple[int, ...] = (1,)
    ) -> Tensor:
        with torch_errors_of(self.name):
            return batched(partial(function, self.pointwise), *arguments, event_dims=dims)

    def noise_factor(self, x: Tensor) -> Tensor:
        """sigma(x): (..., D) -> (..., D, m)."""
        return self._noise(self.noise.factor, check_point(x, self.dim))

    def noise_product(self, x: Tensor, w: Tensor) -> Tensor:
        """sigma(x) w without the matrix: (..., D), (..., m) -> (..., D)."""
        x = check_point(x, self.dim)
        w = check_point(w, self.n_noise, name="w", allow_zero=True)
        return self._noise(self.noise.product, x, w, dims=(1, 1))

    def noise_covariance(self, x: Tensor) -> Tensor:
        """Sigma(x) = sigma sigma^T: (..., D) -> (..., D, D)."""
        return self._noise(self.noise.covariance, check_point(x, self.dim))

    def noise_trace(self, x: Tensor) -> Tensor:
        """V = tr Sigma(x): (..., D) -> (...)."""
        return self._noise(self.noise.trace, check_point(x, self.dim))

    def noise_correction(self, x: Tensor, projection: Tensor) -> Tensor:
        """Sum over j of the derivative of sigma_j along P sigma_j, at fixed P: -> (..., D).

        Args:
            x: Points (..., D).
            projection: Symmetric matrices P (..., D, D), the projection onto the tangent space
                where the term of the Stratonovich drift is meant.
        """
        x = check_point(x, self.dim)
        check_projection(projection, self.dim)
        return self._noise(self.noise.correction, x, projection, dims=(1, 2))

    def sgd_noise(self, x: Tensor, *, seed: int = 0, step: int = 0) -> Tensor:
        """Noise that one step of SGD adds to the gradient, of mean 0 and covariance Sigma(x).

        Args:
            x: Points (..., D); the i-th of the flattened batch draws as path i.
            seed: Seed, as in ``run_sgd``.
            step: Number of the step, as in ``run_sgd``.
        """
        flat = (x := check_point(x, self.dim)).reshape(-1, self.dim)
        with torch_errors_of(self.name):
            return self.noise.draw(self.pointwise, flat, seed, step).reshape(x.shape)

    @property
    def n_noise(self) -> int:
        """Number m of Brownian motions: the columns of sigma."""
        return self.noise.n_components(self.pointwise)

    # The properties that the theory asks for.

    @implements("Lemma 2.5")
    def scale_invariance_violation(self, x: Tensor | None = None) -> Tensor:
        """How far the losses are from scale invariance, by Euler's theorem: a number ().

        It is the largest ``|<x, grad L_xi(x)>|`` over points and samples, divided by the largest
        ``|x| |grad L_xi(x)|`` over these and 16 fixed directions: rounding level if and only if
        each loss is constant along the rays through the points.

        Args:
            x: Points (..., D); by default 16 fixed random directions.

        Source: Lemma 2.5 (Euler's theorem) with k = 0.
        """
        points = points_to_measure(x, self.dim)
        return relative_defects(self.pointwise, points).abs().max()

    def require_scale_invariance(
        self, x: Tensor | None = None, *, tolerance: float | None = None
    ) -> None:
        """Refuse the problem if its losses are not scale-invariant.

        Args:
            x: Points (..., D) to measure at; by default fixed random directions.
            tolerance: Largest violation allowed; by default rounding level of the dtype.
        """
        points = points_to_measure(x, self.dim)
        require_constant_along_rays(
            self.pointwise, points, tolerance, str(self.name), self.offending_coordinates
        )

    def offending_coordinates(self, points: Tensor) -> tuple[tuple[int, ...], str, str]:
        """Coordinates that break scale invariance at points (n, D), in words, and the way out."""
        found = breaking_parameters(self, points[0]) if self.network is not None else None
        return found or offending_coordinates(self.pointwise, points)

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
        if x is None and "noise" in self.kernels:  # every equation asks
            return dict(self.kernels["noise"])
        points = points_to_measure(x, self.dim)
        found = noise_violations(self.noise_factor, self.noise_product, self.n_noise, points)
        return found if x is not None else dict(self.kernels.setdefault("noise", found))

    # Problems of networks.

    def require_network(self) -> NetworkFunction:
        """The network on its data."""
        if self.network is not None:
            return self.network
        raise ArgumentError(
            "the problem has no module",
            received=repr(self),
            expected="a problem that was made from a module",
            remedy="Problem.from_module(module, criterion, inputs, targets, noise)",
        )

    @property
    def layers(self) -> Mapping[str, ParameterBlock]:
        """The trained parameters of the module, each with its shape and place in x, by name."""
        return self.require_network().weights.parameters

    def vector(self, module: nn.Module | None = None) -> Tensor:
        """The trained parameters of a module as x (D,), in the module's dtype.

        Args:
            module: A module like the one that the problem was made from; by default that one, with
                the weights that it had then.
        """
        network = self.require_network()
        return network.start.clone() if module is None else network.weights.vector(module)

    def load_into(self, module: nn.Module, x: Tensor) -> None:
        """Write x (D,) into the trained parameters of a module with the same frozen ones."""
        network = self.require_network()
        network.weights.load(module, x, network.constants)

    def part(self, x: Tensor, name: str) -> Tensor:
        """The coordinates of a parameter, or of all of a submodule: (..., D) -> (..., n)."""
        weights = self.require_network().weights
        return weights.part(check_point(x, weights.dim, allow_zero=True, allow_nan=True), name)

    def outputs(self, x: Tensor, *inputs: Tensor) -> Tensor:
        """Outputs (..., n, ...) of the module at x (..., D), on its data or on other inputs."""
        return self.require_network().outputs_at(x, *inputs)


class LeastSquaresProblem(Problem):
    r"""Half the mean over samples of squared residuals, L = |r(x)|^2 / (2 Xi).

    Where the residuals vanish, H = J^T J / Xi, and the pseudo-determinant of H comes from the
    singular values of the Jacobian J, which keep the digits that H loses.

    Args:
        residuals: Function of ONE vector x (D,) that returns the residuals (Xi,), or (Xi, K) for
            K outputs a sample; or a :class:`~manifold_sde.loss.LeastSquaresLoss`.
        dim, noise, rank, name: As of :class:`Problem`.
    """

    pointwise: LeastSquaresLoss

    def __init__(
        self,
        residuals: Callable[[Tensor], Tensor] | LeastSquaresLoss,
        dim: int,
        noise: Noise,
        *,
        rank: int | None = None,
        name: str | None = None,
    ) -> None:
        made = loss_checks.checked_residuals(residuals, dim)
        self._setup(made, noise, rank, name or getattr(residuals, "__name__", "residuals"))

    def residuals(self, x: Tensor) -> Tensor:
        """The residuals r, a sample's K side by side: (..., D) -> (..., Xi K)."""
        return self._apply(self.pointwise.residuals, check_point(x, self.dim))

    def jacobian(self, x: Tensor) -> Tensor:
        """Jacobian of the residuals: (..., D) -> (..., Xi K, D)."""
        return self._apply(self.pointwise.jacobian, check_point(x, self.dim))


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
