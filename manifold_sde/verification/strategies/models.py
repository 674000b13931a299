"""Random scale-invariant problems that print as the code that makes them.

Each is fixed by a few small parameters. ``repr`` of one is an expression that makes it again, after
``from manifold_sde import *`` and ``from manifold_sde.verification import strategies``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import sympy
import torch
from numpy.typing import NDArray
from torch import Tensor

from manifold_sde import LeastSquaresProblem, Problem, SamplingNoise, SphericalNoise
from manifold_sde.noise import Noise
from manifold_sde.problems import Facts
from manifold_sde.symbolic import expressed_loss

#: Part of the minimiser that the rows of a residual model see; the others leave it free.
_SEEN = 0.6
#: Teachers that are drawn for a network, of which the best conditioned one is taken.
_TEACHERS = 32


class _Printed:
    """Problems whose ``repr`` is the call that makes them."""

    noise: Noise
    parameters: dict[str, Any]

    def __repr__(self) -> str:
        given = {**self.parameters, "noise": self.noise}
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
        return f"strategies.{type(self).__name__}({shown})"


@dataclass(frozen=True)
class _Residuals:
    """The residuals <z_k, u> + a u^T A_k u / 2 - c_k of the direction u, zero at a minimiser.

    The rows z_k are orthonormal, and the minimiser has 0.6 of its norm in their span: at a = 0, J
    has the singular values 1 and 0.8.
    """

    dim: int
    rank: int
    seed: int
    curvature: float

    @cached_property
    def arrays(self) -> tuple[NDArray[np.float64], ...]:
        """Rows (M, D), bends (M, D, D), the minimiser (D,), and a tilt (M, D)."""
        rng = np.random.default_rng([self.dim, self.rank, self.seed])
        basis = np.linalg.qr(rng.standard_normal((self.dim, self.dim)))[0].T
        rows, free = basis[: self.rank], basis[self.rank :]
        seen, unseen = rng.standard_normal(self.rank), rng.standard_normal(len(free))
        seen *= _SEEN / np.linalg.norm(seen)
        unseen *= np.sqrt(1.0 - _SEEN**2) / np.linalg.norm(unseen)
        minimizer = seen @ rows + unseen @ free
        bends = rng.standard_normal((self.rank, self.dim, self.dim))
        bends = self.curvature / (2.0 * self.dim**0.5) * (bends + bends.transpose(0, 2, 1))
        return rows, bends, minimizer, rng.standard_normal((self.rank, self.dim))

    @property
    def minimizer(self) -> Tensor:
        return torch.from_numpy(self.arrays[2])

    def __call__(self, x: Tensor) -> Tensor:
        rows, bends, minimizer, _ = (torch.from_numpy(a).to(x) for a in self.arrays)

        def image(u: Tensor) -> Tensor:
            return rows @ u + 0.5 * (bends @ u) @ u

        return image(x / x.norm()) - image(minimizer)


def _facts(minimizer: Tensor, rank: int) -> Facts:
    dim = len(minimizer)
    return Facts(minimizer, rank, dim - rank - 1, "a minimiser is known")


class ResidualModel(_Printed, LeastSquaresProblem):
    """Least squares of M random residuals of the direction, which vanish at a minimiser.

    At curvature 0 it is the normalised linear model of section 6.1 with orthonormal inputs.

    Args:
        dim: Dimension D.
        rank: Number M of residuals, at most D - 2: the rank of the Hessian.
        seed: Seed of the residuals.
        curvature: Size of their quadratic part, at most about 0.5.
        noise: The gradient noise.

    Example:
        >>> from manifold_sde.verification import strategies
        >>> strategies.ResidualModel(dim=3)
        strategies.ResidualModel(dim=3, rank=1, seed=0, curvature=0.0,
        noise=SphericalNoise(scale=0.3))
    """

    def __init__(
        self,
        dim: int = 3,
        rank: int = 1,
        seed: int = 0,
        curvature: float = 0.0,
        noise: Noise | None = None,
    ) -> None:
        self.parameters = {"dim": dim, "rank": rank, "seed": seed, "curvature": curvature}
        residuals = _Residuals(dim, rank, seed, curvature)
        super().__init__(
            residuals, dim, noise or SphericalNoise(0.3), rank=rank, name="residual model"
        )
        self.facts = _facts(residuals.minimizer, rank)


@dataclass(frozen=True)
class _TiltedSamples:
    """Half the squared residuals, each twice: with a multiple of <w_k, u> added and subtracted."""

    residuals: _Residuals
    tilt: float

    def __call__(self, x: Tensor) -> Tensor:
        tilts = self.tilt * torch.from_numpy(self.residuals.arrays[3]).to(x) @ (x / x.norm())
        common = 0.5 * self.residuals(x) ** 2
        return torch.cat([common + tilts, common - tilts])


class TiltedModel(_Printed, Problem):
    """Samples that disagree on the manifold: sampling noise with tangent and normal parts.

    The 2 M sample losses are those of :class:`ResidualModel` with linear functions of the
    direction added and subtracted: their mean has the same minimisers, which no sample has.

    Args:
        dim, rank, seed, curvature: As of :class:`ResidualModel`.
        tilt: Size of what is added.
        noise: The gradient noise.
    """

    def __init__(
        self,
        dim: int = 3,
        rank: int = 1,
        seed: int = 0,
        curvature: float = 0.0,
        tilt: float = 0.3,
        noise: Noise | None = None,
    ) -> None:
        self.parameters = {
            "dim": dim,
            "rank": rank,
            "seed": seed,
            "curvature": curvature,
            "tilt": tilt,
        }
        residuals = _Residuals(dim, rank, seed, curvature)
        samples = _TiltedSamples(residuals, tilt)
        super().__init__(samples, dim, noise or SamplingNoise(), rank=rank, name="tilted model")
        self.facts = _facts(residuals.minimizer, rank)


@dataclass(frozen=True)
class _Network:
    """<a, tanh(h / rms(h))> with h = W z, of W as one vector, less the same of a teacher."""

    inputs: int
    width: int
    n_samples: int
    seed: int

    @cached_property
    def arrays(self) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs (n, inputs), head (width,), and the best conditioned of some teachers (D,)."""
        rng = np.random.default_rng([self.inputs, self.width, self.n_samples, self.seed])
        inputs = torch.from_numpy(rng.standard_normal((self.n_samples, self.inputs)))
        inputs = inputs / inputs.norm(dim=1, keepdim=True)
        head = torch.from_numpy(np.sign(rng.standard_normal(self.width)))
        teachers = torch.from_numpy(rng.standard_normal((_TEACHERS, self.inputs * self.width)))
        teachers = teachers / teachers.norm(dim=1, keepdim=True)
        jacobians = torch.func.vmap(
            torch.func.jacrev(lambda x: _outputs(x, inputs, head, self.width))
        )(teachers)
        values = torch.linalg.svdvals(jacobians)
        # Neither flat in some direction, nor close to where the normalisation is singular.
        best = (values[:, -1] / (1.0 + values[:, 0] ** 2)).argmax()
        return inputs, head, teachers[best]

    def __call__(self, x: Tensor) -> Tensor:
        inputs, head, teacher = (a.to(x) for a in self.arrays)
        wanted = _outputs(teacher, inputs, head, self.width)
        return _outputs(x, inputs, head, self.width) - wanted


def _outputs(x: Tensor, inputs: Tensor, head: Tensor, width: int) -> Tensor:
    hidden = inputs @ x.reshape(width, -1).T
    normalised = hidden / hidden.square().mean(-1, keepdim=True).sqrt()
    return torch.tanh(normalised) @ head / width**0.5


class NormalizedNetwork(_Printed, LeastSquaresProblem):
    """A small network, normalised and without bias or affine parameters, that fits a teacher.

    Its output is the sum of +-tanh(h_i / rms(h)) with h = W z; W is all that is trained.

    Args:
        inputs: Dimension of the inputs z.
        width: Number of hidden units; D = inputs times width.
        n_samples: Number of inputs, at most D - 2: the rank of the Hessian.
        seed: Seed of the inputs, the head and the teacher.
        noise: The gradient noise.
    """

    def __init__(
        self,
        inputs: int = 2,
        width: int = 2,
        n_samples: int = 1,
        seed: int = 0,
        noise: Noise | None = None,
    ) -> None:
        self.parameters = {"inputs": inputs, "width": width, "n_samples": n_samples, "seed": seed}
        network = _Network(inputs, width, n_samples, seed)
        dim = inputs * width
        noise = noise or SphericalNoise(0.3)
        super().__init__(network, dim, noise, rank=n_samples, name="normalised network")
        self.facts = _facts(network.arrays[2], n_samples)


class SymbolicModel(_Printed, Problem):
    r"""L = ((1 + w u_1)(<c, u> - h))^2 / 2 of the direction u, as a SymPy expression.

    Args:
        coefficients: The integers c, one for each coordinate, of which c_1 is 0.
        weight: The number w; the curvature varies along the manifold where it is not 0.
        height: The number h, with |h| < |c|.
        noise: The gradient noise.

    Example:
        >>> from manifold_sde.verification import strategies
        >>> problem = strategies.SymbolicModel((0, 0, 1), weight=0.5)
        >>> print(problem.scale_invariance)
        proved (degrees of homogeneity): every sub-expression is homogeneous, the whole of degree 0
    """

    def __init__(
        self,
        coefficients: tuple[int, ...] = (0, 0, 1),
        weight: float = 0.0,
        height: float = 0.0,
        noise: Noise | None = None,
    ) -> None:
        self.parameters = {"coefficients": coefficients, "weight": weight, "height": height}
        symbols = sympy.symbols(f"x1:{len(coefficients) + 1}", real=True)
        norm = sympy.sqrt(sum(s**2 for s in symbols))
        along = sum(c * s for c, s in zip(coefficients, symbols, strict=True)) / norm
        factor = 1 + sympy.Rational(str(weight)) * symbols[0] / norm
        loss = (factor * (along - sympy.Rational(str(height)))) ** 2 / 2
        made = expressed_loss(loss, symbols)
        noise = noise or SphericalNoise(0.3)
        super().__init__(made, made.dim, noise, rank=1, name="symbolic model")
        c = torch.tensor(coefficients, dtype=torch.float64)
        size = float(c.norm())
        first = torch.zeros_like(c)
        first[0] = 1.0
        inside = height / size
        self.facts = _facts(inside * c / size + (1.0 - inside**2) ** 0.5 * first, 1)


@dataclass(frozen=True)
class TangentColumns:
    """A factor sigma(x) for ``CustomNoise``: fixed columns, made orthogonal to x, over the norm.

    Args:
        dim: Dimension D.
        columns: Number m of columns.
        scale: Size of the columns.
        seed: Seed of them.

    Example:
        >>> from manifold_sde import CustomNoise
        >>> from manifold_sde.verification import strategies
        >>> CustomNoise(strategies.TangentColumns(dim=3, columns=2, scale=0.3, seed=0))
        CustomNoise(strategies.TangentColumns(dim=3, columns=2, scale=0.3, seed=0))
    """

    dim: int = 3
    columns: int = 1
    scale: float = 0.3
    seed: int = 0

    @property
    def __name__(self) -> str:
        return f"strategies.{self!r}"

    @cached_property
    def matrix(self) -> Tensor:
        """The columns (D, m)."""
        rng = np.random.default_rng([self.dim, self.columns, self.seed])
        return torch.from_numpy(self.scale * rng.standard_normal((self.dim, self.columns)))

    def __call__(self, x: Tensor) -> Tensor:
        """sigma(x): (D,) -> (D, m)."""
        matrix, square = self.matrix.to(x), (x * x).sum()
        return (matrix - x[:, None] * (x @ matrix)[None] / square) / square.sqrt()


@lru_cache(maxsize=512)
def _made(kind: Callable[..., Problem], parameters: tuple[tuple[str, Any], ...]) -> Problem:
    return kind(**dict(parameters))


def make(kind: Callable[..., Problem], noise: Noise, **parameters: Any) -> Problem:
    """A problem with this noise; the checks that each problem undergoes are made once for each."""
    return _made(kind, tuple(parameters.items())).with_noise(noise)
