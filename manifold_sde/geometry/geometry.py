"""Phi and its derivatives, by the route that fits the problem."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from manifold_sde.arguments import bytes_of, check_integer, check_point, is_known_false
from manifold_sde.compile import choose_mode
from manifold_sde.errors import (
    ArgumentError,
    DTypeError,
    NonFiniteError,
    PartialError,
    ShapeError,
)
from manifold_sde.geometry.closed_form import ClosedFormGeometry
from manifold_sde.geometry.dense import DENSE_LIMIT
from manifold_sde.geometry.dense_route import DenseRoute
from manifold_sde.geometry.log_determinant import LogPseudoDeterminant
from manifold_sde.geometry.matrix_free_route import DEFAULT_MEMORY, MatrixFreeRoute
from manifold_sde.geometry.rank import find_rank, gap_ratios
from manifold_sde.noise import SphericalNoise
from manifold_sde.paper import implements
from manifold_sde.points import point_of
from manifold_sde.problem import Problem, require_problem
from manifold_sde.threads import one_thread

_METHODS = ("auto", "dense", "matrix_free", "symbolic")


class Geometry:
    r"""The limiting map Phi of gradient flow, and the manifold Gamma of minimisers.

    Args:
        problem: The problem.
        method: "dense" (eigendecomposition of the Hessian), "matrix_free" (products with the
            Jacobian of interpolating least squares, or with the Hessian), "symbolic" (a closed form
            of Phi given to ``Problem.from_sympy``), or "auto": symbolic where there is a closed
            form, dense up to dimension 1000, matrix-free beyond.
        rtol: Accuracy of the limit map, relative to the norm.
        max_steps: Steps of the gradient flow after which a point counts as failed.
        compile: Whether Hessians and third derivatives of large batches are compiled. "auto" takes
            what a C compiler does in seconds, in up to 32 dimensions.
        memory: Bytes, or a string such as ``"2 GiB"``, that the matrix-free route may take for a
            block of vectors (rows of the Jacobian, third derivatives) with what is computed from
            them; half a GiB by default.
        drift_columns: Number of random columns of sigma from which the scheme "walk" estimates its
            drift, without bias, where the matrix-free route would sum over all M normal directions;
            ``None`` for the sum. Each costs two third derivatives in place of M. What error that
            makes is in the ``stats`` of a solution.

    Raises:
        ArgumentError: If the method is unknown or does not fit the problem, or another argument is
            out of range.
        DTypeError: If the problem is not a problem.

    Example:
        >>> import torch
        >>> from manifold_sde import Geometry, problems
        >>> geometry = Geometry(problems.great_circle(noise_scale=0.3))
        >>> x = torch.tensor([3.0, 4.0, 12.0], dtype=torch.float64)
        >>> geometry.limit_map(x).round(decimals=12)
        tensor([ 7.8000, 10.4000,  0.0000], dtype=torch.float64)

    Source: Definition 2.6, Lemmas 2.7 and 2.8.
    """

    def __init__(
        self,
        problem: Problem,
        method: str = "auto",
        *,
        rtol: float = 1e-10,
        max_steps: int = 2000,
        compile: bool | str = False,
        memory: int | str = DEFAULT_MEMORY,
        drift_columns: int | None = None,
    ) -> None:
        require_problem(problem)
        if method not in _METHODS:
            raise ArgumentError(
                "the method is not a route to the geometry",
                received=repr(method),
                expected=", ".join(repr(m) for m in _METHODS),
                remedy='leave it at "auto"',
            )
        if not isinstance(rtol, (int, float)) or not 1e-13 <= rtol <= 1e-2:
            raise ArgumentError(
                "rtol is not an accuracy of the limit map",
                received=repr(rtol),
                expected="a number between 1e-13 and 1e-2",
                remedy="1e-10 is the default; float32 input is held to 1e-5",
            )
        if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
            raise ArgumentError(
                "max_steps is not a number of steps",
                received=repr(max_steps),
                expected="a positive integer",
                remedy="leave it at 2000; most flows settle within 50",
            )
        if not isinstance(compile, bool) and compile != "auto":
            raise ArgumentError(
                "compile is not a switch",
                received=repr(compile),
                expected='True, False or "auto"',
                remedy="compile=True pays off for large batches, again and again",
            )
        closed_form = getattr(problem, "closed_form", None)
        if method == "symbolic" and closed_form is None:
            raise ArgumentError(
                "the symbolic route needs a closed form of Phi",
                received=f"{problem!r} without one",
                expected="Problem.from_sympy(..., limit_map=[...])",
                remedy='supply limit_map, or use method="dense", which uses exact derivatives '
                "of symbolic problems all the same",
            )
        if method == "auto":
            small = "dense" if problem.dim <= DENSE_LIMIT else "matrix_free"
            method = small if closed_form is None else "symbolic"
        if method == "dense" and problem.dim > DENSE_LIMIT:
            raise ArgumentError(
                "the problem is too large for the dense route",
                received=f"dimension {problem.dim}",
                expected=f"at most {DENSE_LIMIT}: H has {problem.dim**2:.1e} entries",
                remedy='method="matrix_free", or "auto"',
            )
        memory = bytes_of(memory)
        columns = _check_columns(drift_columns, problem, method)
        self.problem = problem
        self.method = method
        mode = choose_mode(compile, problem.dim, worth=False)
        self._dense = DenseRoute(problem, rtol=rtol, max_steps=max_steps, compiled=mode)
        self._closed = (
            ClosedFormGeometry(closed_form, self._dense) if method == "symbolic" else None
        )
        #: The matrix-free route, where it is the one that is taken.
        self.products = (
            MatrixFreeRoute(
                problem, rtol=rtol, max_steps=max_steps, memory=memory, drift_columns=columns
            )
            if method == "matrix_free"
            else None
        )
        self._log_pseudo_determinant = LogPseudoDeterminant(self._dense)

    def __repr__(self) -> str:
        return f"Geometry({self.problem!r}, method={self.method!r})"

    def _flat(self, points: Tensor) -> Tensor:
        return points.reshape(-1, self.problem.dim)

    @implements("Definition 2.6", "Lemma 2.7")
    def limit_map(self, x: Tensor) -> Tensor:
        r"""Phi(x), the limit of gradient flow from x.

        It is 1-homogeneous and keeps the norm of x where the loss is scale-invariant, and it is
        differentiable in forward and in reverse mode, on the manifold and off it. It is not the
        nearest point of the manifold: the two differ at second order. It is computed on one
        thread, so that its bits do not depend on how many there are.

        The derivative off Gamma is the limit of that of the flow, which solves the variational
        equation S' = -H(x(t)) S, and not the projection at Phi(x), which it is on Gamma alone. It
        is that of the numerical flow, step by step: by matrices, or, without them, by products
        with H and some 5 vectors a step in memory.

        Args:
            x: Points of the attraction set, (..., D).

        Returns:
            Tensor (..., D) on Gamma.

        Raises:
            LimitMapError: If the flow does not settle on the manifold, with the gradient norm
                and the time reached; its ``partial`` holds the points of the batch that arrived.

        Source: Definition 2.6, Lemma 2.7.
        """
        x = point_of(self.problem, x)
        if x.is_meta:
            return torch.empty_like(x)
        with one_thread():
            return self._route.limit_map(x)

    @implements("Lemma 2.8")
    def tangent_projection(self, y: Tensor, v: Tensor) -> Tensor:
        """The derivative of Phi at y on Gamma applied to v: projection onto T_y(Gamma).

        Args:
            y: Points of Gamma, (..., D).
            v: Vectors (..., D).

        Returns:
            Tensor (..., D), P v.

        Raises:
            NotOnManifoldError: If y is not on the manifold.
            RankError: If the rank of the Hessian is ambiguous or not the declared one.

        Source: Lemma 2.8.
        """
        v = check_point(v, self.problem.dim, name="v", allow_zero=True)
        y = point_of(self.problem, y, name="y")
        _check_same_kind(y, v, "v")
        batch = _common_batch(y.shape[:-1], v.shape[:-1], "v")
        y, v = (a.expand(*batch, self.problem.dim) for a in (y, v))
        if y.is_meta:
            return torch.empty_like(v)
        flat_y, flat_v = self._flat(y), self._flat(v)
        return self._route.project(flat_y, flat_v).reshape(v.shape)

    @implements("Equation (5)")
    def second_derivative(
        self, y: Tensor, covariance: Tensor | None = None, *, factor: Tensor | None = None
    ) -> Tensor:
        r"""The second derivative of Phi at y on Gamma, contracted with Sigma.

        It is the drift (up to the factor one half) that the noise causes along Gamma and, by its
        normal part, what keeps the diffusion on it. Always <y, d^2 Phi[Sigma]> = tr(N Sigma N).

        Args:
            y: Points of Gamma, (..., D).
            covariance: Symmetric Sigma, (..., D, D).
            factor: Or a factor (..., D, m) of it. With neither, the noise of the problem.

        Returns:
            Tensor (..., D).

        Raises:
            ArgumentError: If covariance and factor are both given, or Sigma is not symmetric.
            ShapeError, DTypeError, NonFiniteError: If what is given cannot be used.
            NotOnManifoldError: If y is not on the manifold.
            RankError: If the rank of the Hessian is ambiguous or not the declared one.

        Source: the drift of equations (5), (8) and (13).
        """
        y = point_of(self.problem, y, name="y")
        dim = self.problem.dim
        given, batch = self._given(y, covariance, factor), y.shape[:-1]
        if given is not None:
            batch = _common_batch(batch, given.shape[:-2], "Sigma")
            given = given.expand(*batch, *given.shape[-2:]).reshape(-1, *given.shape[-2:])
        if y.is_meta:
            return y.new_empty(*batch, dim)
        flat = y.expand(*batch, dim).reshape(-1, dim)
        name = "covariance" if factor is None else "factor"
        return self._route.second_derivative(flat, **{name: given}).reshape(*batch, dim)

    def _given(self, y: Tensor, covariance: Tensor | None, factor: Tensor | None) -> Tensor | None:
        """The covariance, made symmetric, or the factor, or ``None``; checked."""
        dim = self.problem.dim
        if covariance is not None and factor is not None:
            raise ArgumentError(
                "the covariance is given twice",
                received="covariance and factor",
                expected="one of them, or neither for the noise of the problem",
                remedy="drop one",
            )
        given, name = (covariance, "covariance") if factor is None else (factor, "factor")
        if given is None:
            return None
        _check_same_kind(y, given, name)
        wanted = (dim, dim) if factor is None else (dim,)
        shape = given.shape[-2:] if factor is None else given.shape[-2:-1]
        if given.dim() < 2 or tuple(shape) != wanted:
            raise ShapeError(
                f"the {name} has the wrong shape",
                received=str(tuple(given.shape)),
                expected=f"(..., {dim}, {dim if factor is None else 'm'})",
                remedy="put the batch in front",
            )
        if is_known_false(torch.isfinite(given.sum())) and not bool(torch.isfinite(given).all()):
            raise NonFiniteError(
                f"the {name} holds NaN or infinity",
                received=f"{int((~torch.isfinite(given)).sum())} entries not finite",
                expected="finite entries",
                remedy="find where they arose",
            )
        if factor is not None:
            return given
        if is_known_false((given != given.mT).any()):
            return given
        skew = (given - given.mT).abs()
        size = given.abs().amax(dim=(-2, -1), keepdim=True)
        if is_known_false((skew <= 1e-6 * size).all()):
            raise ArgumentError(
                "the covariance is not symmetric",
                received=f"an asymmetry of {float(skew.max()):.3g}",
                expected="Sigma = Sigma^T",
                remedy="0.5 * (A + A.mT) contracts the same",
            )
        return 0.5 * (given + given.mT)

    def projector(self, y: Tensor) -> Callable[[Tensor], Tensor]:
        """The projection onto the tangent space at ONE point, set up once for many vectors.

        Args:
            y: Point of Gamma, (D,).

        Returns:
            A function of vectors (..., D), at rounding level that of :meth:`tangent_projection`.

        Raises:
            ShapeError: If y is not one point.
            NotOnManifoldError, RankError: As :meth:`tangent_projection`.
        """
        y = point_of(self.problem, y, name="y")
        if y.dim() != 1:
            raise ShapeError(
                "a projector belongs to one point",
                received=str(tuple(y.shape)),
                expected=f"({self.problem.dim},)",
                remedy="geometry.tangent_projection(y, v) takes a batch of both",
            )
        return self.route.projector(y)

    def residuals(self, y: Tensor) -> dict[str, Tensor]:
        """How accurate the matrix-free route is at points of Gamma.

        Args:
            y: Points of Gamma, (..., D).

        Returns:
            Relative errors (...) by name: "orthogonality" of the basis of range H, "eigenvectors"
            (size of H q - lambda q), "projection" (P P v - P v), each measured on one fixed vector,
            and "constraint", the distance from Gamma.

        Raises:
            ArgumentError: If the route is another one.
            NotOnManifoldError, RankError: As :meth:`tangent_projection`.
        """
        if self.products is None:
            raise ArgumentError(
                "residuals are those of the matrix-free route",
                received=f"method={self.method!r}",
                expected='method="matrix_free"',
                remedy='Geometry(problem, method="matrix_free").residuals(y)',
            )
        y = point_of(self.problem, y, name="y")
        found = self.products.residuals(self._flat(y))
        return {name: value.reshape(y.shape[:-1]) for name, value in found.items()}

    @property
    def _route(self) -> ClosedFormGeometry | MatrixFreeRoute | DenseRoute:
        return self._closed or self.products or self._dense

    @property
    def route(self) -> MatrixFreeRoute | DenseRoute:
        """The route on the manifold."""
        return self.products or self._dense

    def rank(self, y: Tensor) -> Tensor:
        """Rank M of the Hessian at points of Gamma, by the spectral gap.

        Args:
            y: Points of Gamma, (..., D).

        Returns:
            Tensor (...), int64.

        Raises:
            RankError: If the gap is ambiguous (with the eigenvalues), or the declared rank is not
                confirmed.
        """
        y = point_of(self.problem, y, name="y", values=True)
        values = self.route.eigenvalues(self._flat(y))
        return find_rank(values, self.problem.rank).reshape(y.shape[:-1])

    def spectral_gap(self, y: Tensor) -> Tensor:
        """Ratio of the smallest nonzero eigenvalue of H to the largest of the kernel's.

        Args:
            y: Points of Gamma, (..., D).

        Returns:
            Tensor (...): dimensionless; the kernel's eigenvalues count as at least rounding level.

        Raises:
            RankError: As :meth:`rank`.
        """
        y = point_of(self.problem, y, name="y", values=True)
        values = self.route.eigenvalues(self._flat(y))
        ranks = find_rank(values, self.problem.rank)
        ratios = gap_ratios(values)
        gaps = ratios.gather(-1, (ranks - 1).clamp(min=0)[:, None])[:, 0]
        return torch.where(ranks > 0, gaps, torch.full_like(gaps, torch.inf)).reshape(y.shape[:-1])

    def retract(self, x: Tensor) -> Tensor:
        """A point of Gamma near x, by Newton's method at constant norm.

        It agrees with Phi to first order in the distance only: it may take away the rounding of a
        step that was tangent, and never stands in for :meth:`limit_map`.

        Args:
            x: Points near Gamma, (..., D).

        Returns:
            Tensor (..., D) on Gamma, at rounding level.

        Raises:
            NotOnManifoldError, RankError: If Newton's method does not arrive, or not where the
                rank is clear; the other points are in ``partial``.
        """
        x = point_of(self.problem, x)
        if x.is_meta:
            return torch.empty_like(x)
        flat = self._flat(x)
        try:
            return self.route.retract(flat).reshape(x.shape)
        except PartialError as error:
            if error.partial is not None:
                error.failed = error.failed.reshape(x.shape[:-1])
                error.partial = error.partial.reshape(x.shape)
            raise

    def log_pseudo_determinant(self, y: Tensor) -> Tensor:
        """Logarithm of the product of the nonzero eigenvalues of H at points of Gamma.

        Least squares whose residuals vanish at y have H = J^T J / Xi: there the singular values of
        the Jacobian J are used, which keep the digits that the eigenvalues of H lose. It is
        differentiable along Gamma, once: the derivative in directions normal to Gamma is zero.

        Args:
            y: Points of Gamma, (..., D).

        Returns:
            Tensor (...).

        Raises:
            NotOnManifoldError, RankError: As :meth:`tangent_projection`.
        """
        y = point_of(self.problem, y, name="y")
        flat = self._flat(y)
        if y.is_meta:
            return y.new_empty(y.shape[:-1])
        if self.products is not None:
            return self.products.log_pseudo_determinant(flat).reshape(y.shape[:-1])
        return self._log_pseudo_determinant(flat).reshape(y.shape[:-1])


def _check_columns(columns: int | None, problem: Problem, method: str) -> int:
    """The number of random columns of the noise, 0 for none."""
    if columns is None:
        return 0
    without = "leave drift_columns out: the drift is then exact"
    count = check_integer("drift_columns", columns, 1, 2**16, without)
    if method != "matrix_free" or isinstance(problem.noise, SphericalNoise):
        exact = method != "matrix_free"
        raise ArgumentError(
            "the drift has no sum over columns of sigma here that could be estimated",
            received=f"drift_columns={count}, "
            + (f"method={method!r}" if exact else repr(problem.noise)),
            expected='method="matrix_free", and another noise than SphericalNoise',
            remedy=without,
        )
    return count


def _check_same_kind(y: Tensor, given: object, name: str) -> None:
    """Refuse what is not a tensor of the dtype and device of the points."""
    if not isinstance(given, Tensor) or (given.dtype, given.device) != (y.dtype, y.device):
        received = (
            f"{given.dtype} on {given.device}"
            if isinstance(given, Tensor)
            else type(given).__name__
        )
        raise DTypeError(
            f"{name} is not of the kind of the points",
            received=received,
            expected=f"a tensor of {y.dtype} on {y.device}, as y",
            remedy=f"torch.as_tensor({name}).to(y)",
        )


def _common_batch(points: torch.Size, others: torch.Size, name: str) -> torch.Size:
    """Common batch shape of points and what goes with them."""
    try:
        return torch.Size(np.broadcast_shapes(points, others))
    except ValueError as error:
        raise ShapeError(
            f"the batches of y and {name} do not fit together",
            received=f"{tuple(points)} and {tuple(others)}",
            expected="batch shapes that broadcast against each other",
            remedy="insert dimensions of size 1 with unsqueeze",
        ) from error
