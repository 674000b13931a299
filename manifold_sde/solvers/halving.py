"""Steps that a path does not survive, by their halves on the same Brownian path.

A retraction comes back from near the manifold. Where a step of some path ends too far away, that
path alone takes the two halves of the step, and so on: what it does depends on the path, the time
and the seed, and not on who is stepped beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_sde.arguments import is_known_false
from manifold_sde.solvers.brownian import BrownianPath
from manifold_sde.solvers.brownian_nodes import DEEPEST
from manifold_sde.solvers.clock import RunningIntegrals
from manifold_sde.solvers.schemes import StepNoise

#: How often a step is halved before its path counts as lost, as far as the Brownian tree goes. A
#: path that comes within epsilon of where the manifold ends needs steps of epsilon^2, and few.
MOST_HALVINGS = 36


@dataclass
class Step:
    """A step that is to be taken, and its end.

    Attributes:
        x: States (D, n).
        basis: Reference bases there (D, d, n); ``None`` where they are still to be computed.
        h: Length, () or (n,).
        noise: The random numbers.
        rated: Whether the rate at the end is needed.
        end: States at the end (D, n).
        end_basis: Reference bases there.
        rate: Rate of the running integrals there (n,).
    """

    x: Tensor
    basis: Tensor | None
    h: Tensor
    noise: StepNoise
    rated: bool = True

    def __post_init__(self) -> None:
        self.end: Tensor
        self.end_basis: Tensor
        self.rate: Tensor


@dataclass
class PathStates:
    """States of some paths between two steps, paths last.

    Attributes:
        x: States (D, p).
        basis: Reference bases there (D, d, p).
        rate: Rate of the running integrals there (p,).
        sums: Running integrals (k, p).
    """

    x: Tensor
    basis: Tensor
    rate: Tensor
    sums: Tensor

    def at(self, places: Tensor) -> PathStates:
        """The states of some of the paths."""
        return PathStates(*(part[..., places] for part in self.tensors()))

    def with_some(self, places: Tensor, part: PathStates) -> PathStates:
        """The same, but for some of the paths."""
        wholes = [whole.clone() for whole in self.tensors()]
        for whole, some in zip(wholes, part.tensors(), strict=True):
            whole[..., places] = some
        return PathStates(*wholes)

    def where(self, these: Tensor, others: PathStates) -> PathStates:
        """These states for some of the paths (p,), and others for the others."""
        pairs = zip(self.tensors(), others.tensors(), strict=True)
        return PathStates(*(torch.where(these, own, other) for own, other in pairs))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The states, bases, rates and integrals."""
        return self.x, self.basis, self.rate, self.sums

    def alive(self) -> Tensor:
        """Which paths are not lost (p,)."""
        return torch.isfinite(self.x).all(0)


def step_noise(path: BrownianPath, dw: Tensor, level: int, position: int | Tensor) -> StepNoise:
    """The random numbers of steps of a level, with their increments given."""
    return StepNoise(dw, lambda count=dw.shape[0]: path.auxiliary(level, position, count))


class Halving:
    """Takes steps of some paths, by their halves where it has to be.

    Args:
        brownian: Brownian paths of any set of path indices.
        integrals: What is integrated on the way.
        cell: Length of the steps of level 0.

    Attributes:
        count: Number of steps that were halved.
    """

    def __init__(
        self,
        brownian: Callable[[Tensor], BrownianPath],
        integrals: RunningIntegrals,
        cell: float,
    ) -> None:
        self.brownian, self.integrals, self.cell = brownian, integrals, cell
        self.count = 0

    def advance(
        self, paths: Tensor, states: PathStates, level: int, position: Tensor, halved: int = 0
    ) -> Generator[Step, None, PathStates]:
        """Propose the steps from one dyadic time of each path to the next of the same level.

        Args:
            paths: Path indices (p,).
            states: Their states.
            level: Level of the step.
            position: Its position for each path (p,).
            halved: How often it was halved already.

        Returns:
            The states at the end; NaN where a path is lost.
        """
        path = self.brownian(paths)
        dw = path.dyadic(level, position)
        h = states.x.new_tensor(self.cell * 2.0**-level)
        step = Step(states.x, states.basis, h, step_noise(path, dw, level, position))
        yield step
        sums = self.integrals.advance(states.sums, h, states.rate, step.rate)
        after = PathStates(step.end, step.end_basis, step.rate, sums)
        return (yield from self.mended(paths, states, after, level, position, halved))

    def mended(
        self,
        paths: Tensor,
        before: PathStates,
        after: PathStates,
        level: int,
        position: Tensor,
        halved: int = 0,
    ) -> Generator[Step, None, PathStates]:
        """Propose the halves of the steps of those paths that were lost in them.

        Args:
            paths: Path indices (p,).
            before: States before the step.
            after: States after it.
            level: Level of the step.
            position: Its position for each path (p,).
            halved: How often it was halved already.

        Returns:
            The states after the step.
        """
        lost = before.alive() & ~after.alive()
        floor = halved >= MOST_HALVINGS or level >= DEEPEST
        if floor or not is_known_false(~lost.any()):
            return after
        places = torch.nonzero(lost)[:, 0]
        self.count += len(places)
        part, own = before.at(places), paths[places]
        for half in (2 * position[places], 2 * position[places] + 1):
            part = yield from self.advance(own, part, level + 1, half, halved + 1)
        return after.with_some(places, part)

    def partial(
        self, paths: Tensor, states: PathStates, level: int, position: Tensor, length: Tensor
    ) -> Generator[Step, None, PathStates]:
        """Propose what leads paths into a step that they do not survive whole.

        Args:
            paths: Path indices (p,).
            states: States at the beginning of the step.
            level: Level of the step.
            position: Its position for each path (p,).
            length: How far into the step each is to go (p,), in time.

        Returns:
            The states there; NaN where a path is lost.
        """
        found = PathStates(*(torch.full_like(part, torch.nan) for part in states.tensors()))
        left = torch.arange(len(paths), device=paths.device)
        for depth in range(level + 1, min(level + MOST_HALVINGS, DEEPEST) + 1):
            self.count += len(left)
            half = self.cell * 2.0**-depth
            position = 2 * position
            far = torch.nonzero(length >= half)[:, 0]
            if len(far):
                part = yield from self.advance(
                    paths[far], states.at(far), depth, position[far], depth - level
                )
                states = states.with_some(far, part)
                position, length = position.clone(), length.clone()
                position[far] += 1
                length[far] -= half
            path = self.brownian(paths)
            dw = path.beginning(depth, position, length.double() / half)
            step = Step(states.x, states.basis, length, step_noise(path, dw, depth, position))
            yield step
            sums = self.integrals.advance(states.sums, length, states.rate, step.rate)
            # Those that have nowhere to go are there.
            there = length <= 0
            after = PathStates(step.end, step.end_basis, step.rate, sums)
            ends = states.where(there, after)
            found = found.with_some(left, ends)
            lost = torch.nonzero(states.alive() & ~ends.alive())[:, 0]
            if not len(lost):
                break
            paths, states, position = paths[lost], states.at(lost), position[lost]
            length, left = length[lost], left[lost]
        return found
