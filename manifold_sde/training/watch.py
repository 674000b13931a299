"""Norms and inner products of groups of weights, on their device, without waiting for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manifold_sde.training.rules import Options
from manifold_sde.training.scale_group import ScaleGroup


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

    def squares(self, tensors: Mapping[str, Tensor | None]) -> Tensor:
        """Squared norms of all parts, 0 where a tensor is missing: (parts of all groups,)."""
        whole = {
            n: tensor
            for g in self.groups
            if not g.size
            for n in g.parameters
            if (tensor := tensors[n]) is not None
        }
        norms = dict(zip(whole, _norms(list(whole.values())), strict=True))
        found = []
        for group in self.groups:
            own = [tensor for n in group.parameters if (tensor := tensors[n]) is not None]
            if len(own) < len(group.parameters):
                device = self.tensors[group.parameters[0]].device
                found.append(torch.zeros(group.parts, device=device))
                continue
            if not group.size:
                each = [norms[n].square() for n in group.parameters]
                found.append(sum(each[1:], each[0]).reshape(1))
                continue
            cuts = [
                torch.linalg.vector_norm(group.cut(t), dim=1, dtype=_wide(t)).square() for t in own
            ]
            found.append(sum(cuts[1:], cuts[0]))
        return torch.cat(found)

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

    def gradient_squares(self, scale: Tensor | None = None) -> Tensor:
        """|g|^2 of all parts, 0 where a group has no gradient: (parts of all groups,).

        Args:
            scale: What the gradients are multiplied by, if anything.
        """
        found = self.squares({name: dense(tensor.grad) for name, tensor in self.tensors.items()})
        return found if scale is None else found / scale**2

    def buffers(
        self, values: Mapping[str, Tensor], state: Mapping[Tensor, Mapping[str, Any]]
    ) -> list[Tensor]:
        """<x, m> and |m|^2 of all parts with the optimizer's buffer m, NaN where it has none.

        Args:
            values: The weights x.
            state: The optimizer's.
        """
        held = {n: dense(state.get(p, {}).get("momentum_buffer")) for n, p in self.tensors.items()}
        if all(m is None for m in held.values()):
            return []
        buffers = {n: torch.zeros_like(values[n]) if m is None else m for n, m in held.items()}
        known = [
            any(held[n] is not None for n in group.parameters)
            for group in self.groups
            for _ in range(group.parts)
        ]
        found = [self.products(values, buffers), self.products(buffers, buffers)]
        there = torch.tensor(known, device=found[0].device)
        return [torch.where(there, part, torch.nan) for part in found]

    def second_moments(
        self, state: Mapping[Tensor, Mapping[str, Any]], now: Options, scale: Tensor | None = None
    ) -> list[Tensor]:
        """Adam's steps and mean v of all parts, and the size of its noise in three ways.

        The third is the mean of v / (sqrt v + eps)^2, relative to the same of the mean of v: 1 if
        all coordinates are alike; the share of those that ever had a gradient, if eps is not seen.
        The last two are the mean of g^2 / (sqrt v + eps)^2 with the v of each coordinate, and what
        it is where the gradients of all are as even as Gaussian ones.

        Args:
            state: The optimizer's. Groups that it holds no second moments of give NaN, and no
                noise.
            now: The options in the last step.
            scale: What the gradients are multiplied by, if anything.
        """
        found: list[list[Tensor]] = [[], [], [], [], []]
        for group in self.groups:
            entries = [state.get(self.tensors[n], {}) for n in group.parameters]
            device = self.tensors[group.parameters[0]].device
            none = torch.zeros(group.parts, dtype=torch.float64, device=device)
            if not all("exp_avg_sq" in entry and "step" in entry for entry in entries):
                for rows, value in zip(found, (torch.nan, torch.nan, 1.0, 0.0, 0.0), strict=True):
                    rows.append(none + value)
                continue
            mean: Any = none
            shares: Any = none
            squares: Any = none
            applied: Any = none
            for name, entry in zip(group.parameters, entries, strict=True):
                second = group.cut(entry["exp_avg_sq"])
                second = second.to(_wide(second)) / (1.0 - now.betas[1] ** entry["step"])
                mean = mean + second.sum(1, dtype=torch.float64)
                shares = shares + _damped(second, now.eps).sum(1, dtype=torch.float64)
                gradient = dense(self.tensors[name].grad)
                if gradient is None:
                    continue
                square = group.cut(gradient).to(second.dtype).square()
                square = square if scale is None else square / scale**2
                squares = squares + square.sum(1, dtype=torch.float64)
                noise = (square / (second.sqrt() + now.eps).square()).nan_to_num(0.0)
                applied = applied + noise.sum(1, dtype=torch.float64)
            size = group.weights / group.parts
            mean = mean / size
            age = none + entries[0]["step"]
            live = (shares / size / _damped(mean, now.eps)).nan_to_num(1.0, 1.0, 1.0)
            alike = (squares / size / (mean.sqrt() + now.eps).square()).nan_to_num(0.0) * live
            # A square is in its own v, by the newest of the weights; that v varies too.
            kept = now.betas[1] ** age
            newest = (1.0 - now.betas[1]) / (1.0 - kept)
            even = alike * (1.0 - 2.0 * newest * (1.0 - (1.0 + kept) / (1.0 + now.betas[1])))
            values = (age, mean, live, applied / size, even)
            for rows, row in zip(found, values, strict=True):
                rows.append(row)
        return [torch.cat(rows) for rows in found]

    def active(self) -> tuple[bool, ...]:
        """Which groups have a gradient in all of their tensors."""
        return tuple(
            all(self.tensors[n].grad is not None for n in group.parameters) for group in self.groups
        )


def dense(gradient: Tensor | None) -> Tensor | None:
    """A gradient, or a sum of them, without graph, of all entries where it is sparse."""
    if gradient is None:
        return None
    return gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()


def are_finite(tensors: list[Tensor]) -> bool:
    """Whether all entries are finite: one number is read of all tensors."""
    norms = _norms(tensors)
    return not norms or bool(
        torch.stack([n.double().to(norms[0].device) for n in norms]).isfinite().all()
    )


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """Norms, of half precision in single: a step changes them by less than half can hold."""
    if any(_wide(t) != t.dtype for t in tensors):
        return [torch.linalg.vector_norm(t, dtype=_wide(t)) for t in tensors]
    return list(torch._foreach_norm(tensors)) if tensors else []


def _damped(second: Tensor, eps: Any) -> Tensor:
    """By v: v / (sqrt v + eps)^2, and 0 where v = 0."""
    root = second.sqrt()
    return (root / (root + eps)).nan_to_num(0.0).square()
