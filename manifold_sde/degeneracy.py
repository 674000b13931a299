"""Where the noise does not reach: no diffusion, some directions only, several groups of weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_sde import invariance
from manifold_sde.errors import RankError
from manifold_sde.geometry import Geometry
from manifold_sde.problem import Problem

#: Part of tr Sigma up to which a variance counts as none.
_NONE = 1e-10


@dataclass(frozen=True)
class Degeneracy:
    r"""How many directions of the manifold the noise moves along, at a point.

    Attributes:
        manifold_dim: Dimension of Gamma_1.
        noise_rank: Rank of P Sigma P. Where it is 0 there is no diffusion, as for label noise.
            Where it is below the dimension of Gamma_1, Assumption 5.2 fails at this point.
        groups: The groups of coordinates that the loss can be scaled by separately. If there are
            several, Gamma_1 is not compact and Assumptions 5.1 and 5.2 fail.
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
        basis = torch.linalg.eigh(problem.hessian(unit))[1][:, : problem.dim - rank]
        covariance = problem.noise_covariance(unit)
        along = torch.linalg.eigvalsh(basis.mT @ covariance @ basis)
        noise_rank = int((along > _NONE * covariance.trace()).sum())
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
            return (
                f"The loss can be scaled by {len(self.groups)} groups of weights separately. The "
                "law at these steps holds (Theorem 4.4), but Assumptions 5.1 and 5.2 fail, and "
                "Theorem 5.4 on the equilibrium does not apply as stated."
            )
        if self.noise_rank < self.manifold_dim:
            return (
                f"The noise moves along {self.noise_rank} of the {self.manifold_dim} dimensions "
                "of the manifold at the start. The law at these steps holds (Theorem 4.4), but "
                "Assumption 5.2 fails there, and the equilibrium of Theorem 5.4 need not be "
                "unique."
            )
        return None
