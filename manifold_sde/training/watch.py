"""Norms and inner products of groups of weights, on their device, without waiting for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from manifold_sde.training.groups import ScaleGroup


class Watch:
    """The weights of some groups, of which norms are taken side by side.

    Args:
        groups: The groups.
        tensors: The module's parameters, by name.
    """

    def __init__(self, groups: Sequence[ScaleGroup], tensors: Mapping[str, Tensor]) -> None:
        self.groups = list(groups)
        names = dict.fromkeys(name for group in groups for name in group.parameters)
        self.tensors = {name: tensors[name] for name in names}
        self.parts = [group.parts for group in groups]

    def squares(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Squared norms of all parts: (parts of all groups,)."""
        whole = [n for g in self.groups if not g.size for n in g.parameters]
        norms = dict(
            zip(whole, torch._foreach_norm([tensors[n] for n in whole]), strict=True)
            if whole
            else ()
        )
        found = []
        for group in self.groups:
            if not group.size:
                each = [norms[n].square() for n in group.parameters]
                found.append(sum(each[1:], each[0]).reshape(1))
                continue
            cuts = [
                torch.linalg.vector_norm(group.cut(tensors[n]), dim=1) for n in group.parameters
            ]
            squares = [cut.square() for cut in cuts]
            found.append(sum(squares[1:], squares[0]))
        return torch.cat([z.float() if z.dtype.itemsize < 4 else z for z in found])

    def products(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
        """Inner products of all parts, summed in double precision: (parts of all groups,)."""
        found = []
        for group in self.groups:
            sums = [
                (group.cut(first[n]) * group.cut(second[n])).sum(1, dtype=torch.float64)
                for n in group.parameters
            ]
            found.append(sum(sums[1:], sums[0]))
        return torch.cat(found)

    def weights(self) -> Tensor:
        """Number of weights of each part."""
        ones = [group.weights / group.parts for group in self.groups]
        return torch.repeat_interleave(
            torch.tensor(ones, dtype=torch.float64), torch.tensor(self.parts)
        )

    def values(self) -> dict[str, Tensor]:
        """The weights now, without graph."""
        return {name: tensor.detach() for name, tensor in self.tensors.items()}

    def gradient_products(
        self, values: Mapping[str, Tensor], scale: Tensor | None = None
    ) -> list[Tensor]:
        """|g|^2 and <x, g> of all parts, with g = 0 where there is no gradient.

        Args:
            values: The weights x.
            scale: What the gradients are multiplied by, if anything.
        """
        gradients = {
            name: torch.zeros_like(tensor) if (gradient := dense(tensor.grad)) is None else gradient
            for name, tensor in self.tensors.items()
        }
        found = [self.products(gradients, gradients), self.products(values, gradients)]
        return found if scale is None else [found[0] / scale**2, found[1] / scale]

    def active(self) -> tuple[bool, ...]:
        """Which groups have a gradient in all of their tensors."""
        return tuple(
            all(self.tensors[n].grad is not None for n in group.parameters) for group in self.groups
        )


def dense(gradient: Tensor | None) -> Tensor | None:
    """A gradient without graph, of all entries where it is sparse."""
    if gradient is None:
        return None
    return gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
