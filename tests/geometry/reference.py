"""Random losses in NumPy and in torch, and gradient flow by SciPy: what the geometry is held to.

The residuals r_k(u) = <z_k, u> + u^T A_k u / 2 - c_k of the direction u = x/|x| vanish at a random
unit vector u*. The loss is the mean of rho(r_k), or a weighted sum of squares that has no samples.
NumPy's gradient and Hessian are by hand, so that nothing of the toolkit is in the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from manifold_sde import LeastSquaresProblem, Problem, SphericalNoise
from manifold_sde.noise import Noise

Array = np.ndarray

#: Values in torch, first and second derivatives in NumPy, of what is done to a residual.
RHO = {
    "square": (lambda r: 0.5 * r * r, lambda r: r, np.ones_like),
    "linex": (lambda r: torch.exp(r) - r - 1.0, np.expm1, np.exp),
    "cauchy": (
        lambda r: 0.5 * torch.log1p(r * r),
        lambda r: r / (1 + r * r),
        lambda r: (1 - r * r) / (1 + r * r) ** 2,
    ),
}


@dataclass(frozen=True)
class Case:
    """What a random loss is like."""

    dim: int = 6
    rank: int = 3
    kind: str = "square"
    curvature: float = 1.0
    condition: float = 1.0
    seed: int = 1

    def __str__(self) -> str:
        stiff = f"-cond{self.condition:.0e}" if self.condition > 1 else ""
        return f"{self.kind}-D{self.dim}-M{self.rank}{stiff}-{self.seed}"


class RandomLoss:
    """A random scale-invariant loss with known minimisers, in NumPy and in torch."""

    def __init__(self, case: Case) -> None:
        self.case = case
        rng = np.random.default_rng(case.seed)
        dim, rank = case.dim, case.rank
        bend = rng.standard_normal((rank, dim, dim)) * (case.curvature / dim)
        rows = rng.standard_normal((rank, dim))
        if case.condition > 1:
            left, _, right = np.linalg.svd(rows, full_matrices=False)
            rows = left @ np.diag(2.0 * np.geomspace(1.0, case.condition**-0.5, rank)) @ right
            bend *= 0.3 * case.condition**-0.5
        self.rows, self.bend = rows, bend + bend.transpose(0, 2, 1)
        minimizer = rng.standard_normal(dim)
        self.minimizer = minimizer / np.linalg.norm(minimizer)
        self.tilt = rng.standard_normal(dim)
        self._cast: dict[torch.dtype, tuple[Tensor, ...]] = {}
        self.offset = np.zeros(rank)
        self.offset = self.residuals(self.minimizer)
        for dtype in (
            torch.float64,
            torch.float32,
        ):  # tensors made inside a trace do not outlive it
            self._tensors(torch.empty(0, dtype=dtype))

    # In NumPy, at one point.

    def residuals(self, x: Array) -> Array:
        u = x / np.linalg.norm(x)
        return self.rows @ u + 0.5 * np.einsum("kij,i,j->k", self.bend, u, u) - self.offset

    def _direction_slope(self, u: Array, du: Array | None) -> tuple[Array, Array | None]:
        """Gradient of the loss as a function of the direction, and its derivative along du."""
        bent = self.bend @ u
        r, jacobian = self.rows @ u + 0.5 * bent @ u - self.offset, self.rows + bent
        count = self.case.rank
        turn = None if du is None else jacobian @ du
        if self.case.kind == "weighted":
            weight, square = np.exp(self.tilt @ u) / count, r @ r
            slope = weight * (jacobian.T @ r + 0.5 * square * self.tilt)
            if du is None or turn is None:
                return slope, None
            change = weight * (
                np.einsum("kij,k->ij", self.bend, r) @ du
                + jacobian.T @ turn
                + np.outer(self.tilt, r @ turn)
            )
            return slope, change + np.outer(slope, self.tilt @ du)
        _, first, second = RHO[self.case.kind]
        slope = jacobian.T @ first(r) / count
        if du is None or turn is None:
            return slope, None
        change = np.einsum("kij,k->ij", self.bend, first(r)) @ du
        return slope, (change + jacobian.T @ (second(r)[:, None] * turn)) / count

    def force(self, x: Array) -> Array:
        """Minus the gradient of the loss."""
        norm = np.linalg.norm(x)
        u = x / norm
        slope, _ = self._direction_slope(u, None)
        return -(slope - u * (u @ slope)) / norm

    def hessian(self, x: Array) -> Array:
        """The Hessian of the loss."""
        norm, dim = np.linalg.norm(x), len(x)
        u = x / norm
        du = (np.eye(dim) - np.outer(u, u)) / norm
        slope, change = self._direction_slope(u, du)
        assert change is not None
        tangent = slope - u * (u @ slope)
        inner = change - du * (u @ slope) - np.outer(u, slope @ du + u @ change)
        return (inner - np.outer(tangent, u) / norm) / norm

    def _time(self) -> float:
        values = np.linalg.eigvalsh(self.hessian(self.minimizer))
        return 80.0 / values[-self.case.rank]

    def limit_map(self, x: Array, method: str = "LSODA", rtol: float = 1e-13) -> Array:
        """Phi(x), by SciPy."""
        norm = np.linalg.norm(x)
        end = solve_ivp(
            lambda _, z: self.force(z),
            (0.0, self._time()),
            x / norm,
            method=method,
            rtol=rtol,
            atol=1e-14,
        ).y[:, -1]
        return norm * end / np.linalg.norm(end)

    def limit_map_jacobian(self, x: Array) -> Array:
        """The derivative of Phi at x, by SciPy: S' = -H(x(t)) S along the flow."""
        norm, dim = np.linalg.norm(x), len(x)

        def rate(_: float, state: Array) -> Array:
            z, s = state[:dim], state[dim:].reshape(dim, dim)
            return np.concatenate([self.force(z), -(self.hessian(z) @ s).ravel()])

        start = np.concatenate([x / norm, np.eye(dim).ravel()])
        end = solve_ivp(rate, (0.0, self._time()), start, method="LSODA", rtol=1e-12, atol=1e-14)
        return end.y[dim:, -1].reshape(dim, dim)

    def second_derivative(self, y: Array, factor: Array, h: float = 1e-2) -> Array:
        """Differences of order six of SciPy's Phi: the sum of d^2 Phi(y)[f, f] over the columns."""
        total = np.zeros(len(y))
        for column in factor.T:
            size = np.linalg.norm(column)
            step = h * column / size
            sides = [self.limit_map(y + k * step) + self.limit_map(y - k * step) for k in (1, 2, 3)]
            second = 270 * sides[0] - 27 * sides[1] + 2 * sides[2] - 490 * y
            total += second / (180 * h**2) * size**2
        return total

    def nearest(self, x: Array) -> Array:
        """The nearest point of the cone of minimisers, by Lagrange-Newton iterations."""
        z = x.copy()
        for _ in range(200):
            norm = np.linalg.norm(z)
            u = z / norm
            jacobian = (self.rows + self.bend @ u) @ (np.eye(len(x)) - np.outer(u, u)) / norm
            rest = self.residuals(z) + jacobian @ (x - z)
            new = x - jacobian.T @ np.linalg.solve(jacobian @ jacobian.T, rest)
            done = np.linalg.norm(new - z) < 1e-15
            z = new
            if done:
                break
        return z

    # In torch.

    def torch_residuals(self, x: Tensor) -> Tensor:
        rows, bend, offset, _ = self._tensors(x)
        u = x / x.norm()
        return rows @ u + 0.5 * (bend @ u) @ u - offset

    def _tensors(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.dtype not in self._cast:
            arrays = (self.rows, self.bend, self.offset, self.tilt)
            self._cast[x.dtype] = tuple(torch.tensor(a, dtype=x.dtype) for a in arrays)
        return self._cast[x.dtype]

    def torch_loss(self, x: Tensor) -> Tensor:
        r = self.torch_residuals(x)
        if self.case.kind == "weighted":
            tilt = self._tensors(x)[3]
            return 0.5 * torch.exp(tilt @ x / x.norm()) * (r * r).mean()
        return RHO[self.case.kind][0](r)

    def problem(self, noise: Noise | None = None, *, declare: bool = True) -> Problem:
        """The loss as a problem; least squares by its residuals."""
        noise, rank = noise or SphericalNoise(0.3), self.case.rank if declare else None
        if self.case.kind == "square":
            return LeastSquaresProblem(self.torch_residuals, self.case.dim, noise, rank=rank)
        return Problem(self.torch_loss, self.case.dim, noise, rank=rank)

    def starts(self, count: int, distance: float = 0.3, seed: int = 7) -> Tensor:
        """Points around the minimiser, of norms around 1."""
        rng = np.random.default_rng([self.case.seed, seed])
        noise = rng.standard_normal((count, self.case.dim)) / self.case.dim**0.5
        return torch.from_numpy(self.minimizer + distance * noise)


def relative(actual: Tensor | Array, expected: Tensor | Array) -> float:
    """|actual - expected| / |expected|, the largest over a leading batch."""
    a, b = (np.atleast_2d(np.asarray(t)) for t in (actual, expected))
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    return float((np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)).max())
