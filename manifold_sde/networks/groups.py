"""Groups of weights that a network's loss can be scaled by separately, and their norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_sde.networks.invariance_report import NetworkProblem, scale_invariance_report

_SHOWN = 6


@dataclass(frozen=True)
class WeightGroup:
    """Weights that are scale-invariant by themselves.

    Attributes:
        name: The parameter, the row of it, or the parameters.
        parts: Their coordinates in x, as slices.
    """

    name: str
    parts: tuple[slice, ...]

    def of(self, x: Tensor) -> Tensor:
        """The coordinates of the group: (..., D) -> (..., n)."""
        return torch.cat([x[..., part] for part in self.parts], dim=-1)


class InvariantGroups:
    r"""The groups of weights whose separate scaling leaves a network's loss alone.

    With more than one group the slice of the minimisers at norm 1 is not compact, since the norm
    of a group can go to 0: Assumption 5.1 fails, and Theorem 5.4 does not apply as stated. Noise
    from drawing samples has no part along the groups' norms, so that Assumption 5.2 fails too, and

    .. math::

        d\|Y_g\|^2 = (-2c \|Y_g\|^2 + \operatorname{tr} \Sigma_{gg})\,dt.

    Theorem 4.4, the law after finitely many steps, holds all the same. Near the ends of the slice
    the noise is large and steps have to be small: the norms are worth looking at on the way.

    Args:
        groups: The groups.

    Attributes:
        groups: As given.

    Source: Lemma 2.5 for each group.
    """

    def __init__(self, groups: tuple[WeightGroup, ...]) -> None:
        self.groups = groups

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the groups, in the order of their norms."""
        return tuple(group.name for group in self.groups)

    def __str__(self) -> str:
        if len(self) == 1:
            return f"all weights are one group ({self.names[0]})"
        shown = [f"- {name}" for name in self.names[:_SHOWN]]
        if len(self) > _SHOWN:
            shown.append(f"- and {len(self) - _SHOWN} more")
        return "\n".join(
            [
                f"{len(self)} groups of weights can be scaled separately:",
                *shown,
                "The minimisers of norm 1 are not compact: Assumption 5.1 fails, and with",
                "noise from drawing samples 5.2; Theorem 5.4 does not apply as stated.",
                "Theorem 4.4, the law after finitely many steps, does.",
            ]
        )

    def norms(self, x: Tensor) -> Tensor:
        """Norms of the groups over the norm of all: (..., D) -> (..., groups)."""
        own = torch.stack([group.of(x).norm(dim=-1) for group in self.groups], dim=-1)
        return own / x.norm(dim=-1, keepdim=True)

    def smallest_norm(self, x: Tensor) -> Tensor:
        """The smallest of these: (..., D) -> (...). Steps have to shrink where it is small."""
        return self.norms(x).min(dim=-1).values

    def radial_vectors(self, x: Tensor) -> Tensor:
        """Each group's part of x, of norm 1, zero elsewhere: (D,) -> (groups, D).

        On the manifold they are in the kernel of H.
        """
        vectors = x.new_zeros(len(self), len(x))
        for row, group in zip(vectors, self.groups, strict=True):
            for part in group.parts:
                row[part] = x[part]
        return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-300)


def invariant_groups(problem: NetworkProblem, x: Tensor | None = None) -> InvariantGroups:
    """The groups of a network's weights that are scale-invariant by themselves, by measurement.

    A row of a parameter is a group where every row is scale-invariant (each feeds a normalisation
    of its own); else the parameter, if it is; what is so only together is one group.

    Args:
        problem: A problem that was made from a module.
        x: Point (D,) near which to measure; by default the weights that the module had.

    Returns:
        The groups, which cover all coordinates.

    Raises:
        ArgumentError: If the problem was not made from a module.
        ScaleInvarianceError: If the weights are not scale-invariant together.

    Example:
        >>> import torch
        >>> from manifold_sde import Problem, SphericalNoise
        >>> from manifold_sde.networks import NormalizedMLP, invariant_groups
        >>> inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        >>> problem = Problem.from_module(
        ...     NormalizedMLP((3, 4, 6, 2)), torch.nn.MSELoss(), inputs, inputs[:, :2],
        ...     SphericalNoise(0.1),
        ... )
        >>> invariant_groups(problem).names
        ('hidden.0.weight', 'hidden.1.weight')
    """
    report = scale_invariance_report(problem, x)
    if not report.passed:
        problem.require_scale_invariance(x)
    layers = problem.require_network().weights.parameters
    groups: list[WeightGroup] = []
    together: list[str] = []
    for measured in report.parameters:
        block = layers[measured.name]
        rows = len(measured.row_violations)
        if rows > 1 and measured.invariant_rows == rows:
            size = (block.stop - block.start) // rows
            groups += [
                WeightGroup(
                    f"{measured.name}[{i}]",
                    (slice(block.start + i * size, block.start + (i + 1) * size),),
                )
                for i in range(rows)
            ]
        elif measured.verdict == "with others":
            together.append(measured.name)
        else:
            groups.append(WeightGroup(measured.name, (block.index,)))
    if together:
        parts = tuple(layers[name].index for name in together)
        groups.append(WeightGroup(", ".join(together), parts))
    return InvariantGroups(tuple(groups))
