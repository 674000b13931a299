"""Where the noise does not reach: no diffusion, some directions only, several groups of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_sde import invariance
from manifold_sde.errors import RankError
from manifold_sde.geometry import Geometry
from manifold_sde.problem import Problem

#: Part of tr Sigma up to which a variance counts as none.
_NONE = 1e-10
#: Entries of the factors that are in memory at once.
_ENTRIES = 2**24


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
        noise_rank = int((along**2 > _NONE * problem.noise_trace(unit)).sum())
        groups: tuple[tuple[int, ...], ...] = (tuple(range(problem.dim)),)
        if problem.dim <= invariance.SOLVED_DIM:
            groups = invariance.scaling_groups(problem.pointwise, unit[None])
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
