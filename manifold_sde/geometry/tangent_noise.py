"""Where the noise does not reach: no diffusion, some directions only, several groups of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_sde.columns import column_norms
from manifold_sde.errors import RankError
from manifold_sde.geometry import drift
from manifold_sde.geometry.geometry import Geometry
from manifold_sde.geometry.matrix_free import MatrixFreeSpace
from manifold_sde.geometry.normal_space import NormalSpace
from manifold_sde.geometry.retraction import retract
from manifold_sde.loss_checks import fixed_directions
from manifold_sde.noise import SphericalNoise
from manifold_sde.problem import Problem
from manifold_sde.scale_invariance import SOLVED_DIM, scaling_groups

#: Part of tr Sigma up to which a variance counts as none.
NO_PART = 1e-10
#: The same in single precision, where the tangent space is known to a part in 10^6.
_NO_PART_SINGLE = 1e-8
#: Entries of the factors that are in memory at once.
_ENTRIES = 2**24
#: Points at which the noise along the manifold is measured, and numbers of their Hessians.
_POINTS, _NUMBERS = 8, 2**21
#: Vectors that stand for the noise where there is no matrix of it.
_PROBES = 16
#: Lengths of the moves from the starts to other points of the manifold.
_MOVES = (0.1, 0.5, -0.3)
#: Drift along the manifold, in units of tr Sigma, up to which it counts as none.
_STILL = 1e-9
#: Variance that stands for 0 in a denominator.
_TINY = 1e-30


@dataclass(frozen=True)
class Degeneracy:
    r"""How many directions of the manifold the noise moves along, at a point.

    Attributes:
        manifold_dim: Dimension of Gamma_1.
        noise_rank: Rank of P Sigma P. Where it is 0 there is no diffusion, as for label noise.
            Where it is below the dimension of Gamma_1, Assumption 5.2 fails at this point.
        groups: The groups of coordinates that the loss can be scaled by separately. If there are
            several, Gamma_1 is not compact and Assumption 5.1 fails.
    """

    manifold_dim: int
    noise_rank: int
    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, problem: Problem, y: Tensor) -> Degeneracy:
        """At a point of the manifold.

        Args:
            problem: The problem. The groups are looked for in at most 512 dimensions; in more it
                counts as one.
            y: Point of the manifold (D,).

        Raises:
            NotOnManifoldError, RankError: If it is not on the manifold.
        """
        rank = int(Geometry(problem).rank(y))
        if rank == problem.dim:
            raise RankError(
                "the minimiser is isolated",
                received=f"a Hessian of rank {rank} in dimension {problem.dim}",
                expected="a manifold of minimisers, which has the ray through each of them",
                remedy="a scale-invariant loss",
            )
        unit = y / y.norm()
        along = tangent_noise(problem, unit[None], rank, (range(problem.dim),))[0][0]
        noise_rank = int((along**2 > NO_PART * problem.noise_trace(unit)).sum())
        groups: tuple[tuple[int, ...], ...] = (tuple(range(problem.dim)),)
        if problem.dim <= SOLVED_DIM:
            groups = scaling_groups(problem.pointwise, unit[None])
        return cls(problem.dim - rank - 1, noise_rank, groups)

    @property
    def statement(self) -> str | None:
        """What is to be said of it; ``None`` where there is nothing."""
        if self.noise_rank == 0:
            return (
                "The noise has no part along the manifold: this is a deterministic flow and no "
                "diffusion. Assumption 5.2 fails, and there need not be one equilibrium."
            )
        if len(self.groups) > 1:
            reached = self.noise_rank == self.manifold_dim
            failing = "Assumption 5.1 fails" if reached else "Assumptions 5.1 and 5.2 fail"
            return (
                f"The loss can be scaled by {len(self.groups)} groups of weights separately. The "
                f"law at these steps holds (Theorem 4.4), but {failing}, and Theorem 5.4 on the "
                "equilibrium does not apply as stated."
            )
        if self.noise_rank < self.manifold_dim:
            return (
                f"The noise moves along {self.noise_rank} of the {self.manifold_dim} dimensions "
                "of the manifold at the start. The law at these steps holds (Theorem 4.4), but "
                "Assumption 5.2 fails there, and the equilibrium of Theorem 5.4 need not be "
                "unique."
            )
        return None


def noise_along(problem: Problem, y: Tensor, rank: int) -> Tensor:
    """The part of the noise along Gamma, tr P Sigma P / tr Sigma; 0 where there is no noise.

    Args:
        problem: The problem.
        y: Points of Gamma_1 (n, D).
        rank: Rank M of H.

    Returns:
        Tensor (n,), between 0 and 1; 0 where Gamma_1 is a point there.
    """
    if problem.dim - rank <= 1:
        return y.new_zeros(len(y))
    values = tangent_noise(problem, y, rank, (range(problem.dim),))[0]
    return values.square().sum(1) / problem.noise_trace(y).clamp(min=_TINY)


def measure_diffusion(
    geometry: Geometry, space: NormalSpace, start: Tensor
) -> tuple[float, str | None]:
    """The part of the noise along Gamma, and a sentence where it is nothing.

    It is measured at some of the starts, and where it is nothing there, around them.

    Args:
        geometry: The geometry.
        space: Its normal space at the starts.
        start: Points of the manifold (n, D).

    Returns:
        Mean of tr P Sigma P / tr Sigma over the starts, and a sentence, or ``None`` where there is
        a diffusion.
    """
    dim, most = start.shape[1], 1
    if not isinstance(space, MatrixFreeSpace):
        most = max(1, min(_POINTS, _NUMBERS // dim**2))
    few = start[:: -(-len(start) // most)]
    few = few / few.norm(dim=1, keepdim=True)
    none = NO_PART if start.dtype == torch.float64 else _NO_PART_SINGLE
    shares = _shares(geometry, space, few)
    share = float(shares.mean())
    if float(shares.max()) > none:
        return share, None
    around = torch.cat([few, *(_moved(geometry, space, few, length) for length in _MOVES)])
    if float(_shares(geometry, space, around).max()) > none:
        return share, (
            "the noise has no part along the manifold at the start, though it has one around it: "
            "a path leaves such a point by its drift alone, and stays where there is none"
        )
    columns = around.T.contiguous()
    basis = space.over_points(space.reference_basis, columns)
    sizes = column_norms(drift.direction_drift(space, columns, basis, "tangent"))
    speed = float((sizes / space.problem.noise_trace(around)).max())
    moves = f"a flow of speed up to {speed:.2g} tr Sigma in the clock u, the same for all paths"
    return share, (
        "the noise has no part along the manifold: P sigma = 0. This is no diffusion, but "
        + (moves if speed > _STILL else "a standstill: there is no drift along it either")
    )


def _shares(geometry: Geometry, space: NormalSpace, y: Tensor) -> Tensor:
    """The part of the noise along Gamma at unit vectors of it: (n, D) -> (n,)."""
    problem = space.problem
    if isinstance(problem.noise, SphericalNoise):
        along = max(0, problem.dim - space.rank - 1) / max(1, problem.dim - 1)
        return torch.full_like(y[:, 0], along)
    if not isinstance(space, MatrixFreeSpace):
        return noise_along(problem, y, space.rank)
    # Without a matrix of the noise, its products with some vectors stand for it.
    exact = problem.n_noise <= _PROBES
    probes = torch.eye(problem.n_noise) if exact else fixed_directions(problem.n_noise, _PROBES)
    moves = problem.noise_product(y[:, None].expand(-1, len(probes), -1), probes.to(y))
    inside = torch.stack([geometry.projector(z)(own) for z, own in zip(y, moves, strict=True)])
    return inside.square().sum((1, 2)) / moves.square().sum((1, 2)).clamp(min=_TINY)


def _moved(geometry: Geometry, space: NormalSpace, y: Tensor, length: float) -> Tensor:
    """Points of the manifold some way from unit vectors of it: (n, D) -> (at most n, D)."""
    columns = y.T.contiguous()
    way = fixed_directions(y.shape[1], 1).to(y) * torch.ones_like(y)
    way = geometry.tangent_projection(y, way)
    way = way / way.norm(dim=1, keepdim=True)
    basis = space.over_points(space.reference_basis, columns)
    found = retract(space, columns + length * way.T, basis)[0].T
    found = found / found.norm(dim=1, keepdim=True)
    return found[torch.isfinite(found).all(1)]


def radial_vectors(y: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Unit vectors along the parts of points in groups of coordinates: (n, D) -> (n, D, G)."""
    parts = y.new_zeros(*y.shape, len(groups))
    for number, group in enumerate(groups):
        part = y[:, list(group)]
        size = part.norm(dim=1, keepdim=True).clamp(min=1e-300)
        parts[:, list(group), number] = part / size
    return parts


def tangent_noise(
    problem: Problem, y: Tensor, rank: int, groups: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """The noise along Gamma_1, orthogonal to the groups' radial vectors, by its singular values.

    Args:
        problem: The problem.
        y: Points of Gamma_1 (n, D).
        rank: Rank M of H.
        groups: Groups of coordinates; one of all of them for Assumption 5.2 itself.

    Returns:
        Singular values of T^T sigma, descending (n, d); and of the smallest one the left vector
        in R^D, (n, D), and the right one, (n, m). T is an orthonormal basis of the tangent space.
    """
    size = max(1, _ENTRIES // (problem.dim * max(problem.n_noise, problem.dim)))
    pieces = [_tangent_noise(problem, part, rank, groups) for part in y.split(size)]
    values, left, right = (torch.cat(part) for part in zip(*pieces, strict=True))
    return values, left, right


def _tangent_noise(
    problem: Problem, y: Tensor, rank: int, groups: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    dim = problem.dim
    kernel = torch.linalg.eigh(problem.hessian(y))[1][..., : dim - rank]
    radial = kernel.mT @ radial_vectors(y, groups)
    rest = torch.linalg.svd(radial, full_matrices=True)[0][..., len(groups) :]
    tangent = kernel @ rest
    noise = tangent.mT @ problem.noise_factor(y)
    missing = noise.shape[-2] - noise.shape[-1]
    if missing > 0:
        noise = torch.cat([noise, noise.new_zeros(*noise.shape[:-1], missing)], dim=-1)
    left, values, right = torch.linalg.svd(noise, full_matrices=False)
    least = (tangent @ left[..., -1:])[..., 0]
    return values, least, right[:, -1, : problem.n_noise]
