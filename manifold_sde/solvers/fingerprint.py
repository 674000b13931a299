"""What tells one run from another: what can be said of it, and values of its functions.

Functions have no name that could be trusted. Loss, gradient and noise are evaluated at fixed points
near the start and all over the cone, and what was found is stored. It is compared with a tolerance,
not by its bits, so that another machine may go on with a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manifold_sde.equations import ManifoldEquation, StochasticEquation
from manifold_sde.errors import CheckpointError
from manifold_sde.geometry.dense import DENSE_LIMIT
from manifold_sde.loss_checks import fixed_directions
from manifold_sde.problem import Problem
from manifold_sde.schedules import Schedule
from manifold_sde.solvers.archive import complete, versions

#: Number of what checkpoints hold; another one is not read.
_FORMAT = 2
#: Largest difference, relative to the largest value, that counts as that of two machines.
_SAME = {torch.float64: 1e-9, torch.float32: 1e-4}
#: The same for sums over a schedule, where a change of one entry is to be seen.
_SAME_RATES = 1e-13
#: Points at which functions are compared; fewer where each takes long.
_POINTS, _FEW_POINTS = 128, 8
#: Entries of a schedule that are summed up together.
_BLOCK = 1024

#: Names under which a solution keeps what it was made from.
PROBES = ("probe", "probe_loss", "probe_gradient", "probe_noise", "probe_sgd_noise")

Array = NDArray[Any]


@dataclass(frozen=True)
class Fingerprint:
    """What a checkpoint has to agree in with the run that goes on from it.

    Attributes:
        said: What can be written down, by name.
        seen: Values that are compared with a tolerance, by name.
        tolerance: The tolerance, relative to the largest of the values.
    """

    said: Mapping[str, Any]
    seen: Mapping[str, Array]
    tolerance: float

    @classmethod
    def of(
        cls, problem: Problem, point: Tensor, said: Mapping[str, Any], seen: Mapping[str, Array]
    ) -> Fingerprint:
        """The fingerprint of a run of a problem from a point (D,)."""
        about = {
            "format": _FORMAT,
            "manifold_sde": versions()["manifold_sde"],
            "torch": versions()["torch"],
            **said,
            "dtype": str(point.dtype),
            "device": point.device.type,
        }
        values = {k: v.cpu().numpy() for k, v in values_near(problem, point).items()}
        return cls(about, {**seen, **values}, _SAME.get(point.dtype, 1e-4))

    def with_parts(self, said: Mapping[str, Any], seen: Mapping[str, Array]) -> Fingerprint:
        """The same with more parts."""
        return Fingerprint({**self.said, **said}, {**seen, **self.seen}, self.tolerance)

    def stored(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """What a checkpoint's header and arrays hold of it."""
        return {"run": dict(self.said)}, {f"run {k}": v for k, v in self.seen.items()}

    def require(
        self, where: object, header: Mapping[str, Any], arrays: Mapping[str, Array]
    ) -> None:
        """Check that a checkpoint belongs to this run.

        Args:
            where: The checkpoint, for the error.
            header: Its header.
            arrays: Its arrays.

        Raises:
            CheckpointError: If it does not; it names what differs.
        """
        with complete(where, "a run of this version of the toolkit", "delete it to start anew"):
            different = self._different(header["run"], arrays)
        if different:
            raise CheckpointError(
                "the checkpoint belongs to another run",
                received=f"{where}: {'; '.join(different[:3])}",
                expected="the same problem, start, times, rates, method, seed and versions",
                remedy="delete it to start anew, or name another checkpoint",
            )

    def _different(self, theirs: Mapping[str, Any], arrays: Mapping[str, Array]) -> list[str]:
        """What differs, in words."""
        different = [
            f"{name}: {theirs.get(name)} there, {mine} here"
            for name, mine in self.said.items()
            if not _same(mine, theirs.get(name))
        ]
        for name, mine in self.seen.items():
            if different and f"run {name}" not in arrays:
                continue
            stored = arrays[f"run {name}"]
            if name in ("lr", "weight_decay"):
                apart = _apart_from(mine, stored)
            else:
                apart = _apart(mine, stored, self.tolerance)
            different += [f"{name}: {apart}"] * bool(apart)
            if apart and name == "start":
                break  # the points at which functions are compared are then others
        return different


def values_near(problem: Problem, point: Tensor) -> dict[str, Tensor]:
    """Loss, gradient and noise of a problem at fixed points, half of them near one of its points.

    The others are directions all over the cone at norms from a quarter to four times that of the
    point (D,). Of gradient, noise in SGD and sigma w, with a fixed w, the norm is taken and the
    product with a fixed vector.
    """
    large = problem.dim > DENSE_LIMIT or problem.network is not None
    count = _FEW_POINTS if large else _POINTS
    directions = point.norm() * fixed_directions(problem.dim, count).to(point)
    number = torch.arange(count).to(point)[:, None]
    far = directions * 2.0 ** (number % 5 - 2)
    near = point + directions * 8.0 ** -(number % 3 + 0.5)
    points = torch.where(number % 2 == 0, far, near)
    weights = fixed_directions(problem.n_noise, 1)[0].to(point)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "loss": problem.loss,
        "gradient": problem.gradient,
        "noise": lambda x: problem.noise_product(x, weights.expand(len(x), -1)),
        "sgd_noise": problem.sgd_noise,
    }
    size = 1 if large else count
    return {
        name: torch.cat([summary(function(x.contiguous())) for x in points.split(size)])
        for name, function in functions.items()
    }


def probe(problem: Problem, ys: Tensor) -> dict[str, Tensor]:
    """What tells the problem of a solution apart: a point near its first state, values there."""
    states = ys[0].reshape(-1, ys.shape[-1])
    if not len(states):
        return dict.fromkeys(PROBES, ys.new_zeros(ys.shape[-1]))
    point = states[0] + 0.125
    found = values_near(problem, point)
    return {"probe": point, **{f"probe_{name}": value for name, value in found.items()}}


def summary(values: Tensor) -> Tensor:
    """Norm of each of some values, and its product with a fixed vector: (n, ...) -> (n, 2)."""
    flat = values.detach().reshape(len(values), -1)
    flat = flat if flat.is_floating_point() else flat.to(torch.float64)
    return torch.stack([flat.norm(dim=1), flat @ fixed_directions(flat.shape[1], 1)[0].to(flat)], 1)


def route(equation: StochasticEquation) -> str:
    """How the coefficients of an equation are computed."""
    if not isinstance(equation, ManifoldEquation):
        return "none"
    columns, sizes = equation.drift_columns, "+".join(map(str, equation.group_sizes))
    more = f", drift by {columns} random columns" if columns else ""
    more += f", clock of groups of {sizes}" * bool(sizes)
    return f"{equation.geometry.method}, {equation.space.label} of rank {equation.rank}{more}"


def rates(schedule: Schedule, steps: int) -> tuple[dict[str, Any], dict[str, Array]]:
    """What can be said of a schedule, and sums over all of its entries up to a step.

    The weights of the sums differ from entry to entry: each of them counts.

    Raises:
        TimeScaleError: If a value of a callable cannot be used.
    """
    if schedule.constant is not None:
        return {schedule.name: schedule.constant}, {}
    return {schedule.name: "a schedule"}, {schedule.name: np.array(list(_sums(schedule, steps)))}


def _sums(schedule: Schedule, steps: int) -> Iterator[float]:
    weights = 1.0 + (np.arange(_BLOCK) * ((math.sqrt(5.0) - 1.0) / 2.0)) % 1.0
    for start in range(0, steps, _BLOCK):
        values, fault = schedule.read(start, min(start + _BLOCK, steps))
        if fault is not None:
            raise fault
        yield math.fsum(values * weights[: len(values)])


def _same(mine: Any, theirs: Any) -> bool:
    """Whether two things that JSON holds are the same, numbers but for rounding."""
    if isinstance(mine, dict):
        return (
            isinstance(theirs, dict)
            and mine.keys() == theirs.keys()
            and all(_same(value, theirs[name]) for name, value in mine.items())
        )
    if isinstance(mine, float) and isinstance(theirs, float):
        return math.isclose(mine, theirs, rel_tol=_SAME[torch.float64])
    return bool(mine == theirs)


def _apart(mine: Array, theirs: Array, tolerance: float) -> str:
    """How far two arrays are apart, in words; empty where they agree but for rounding."""
    if mine.shape != theirs.shape:
        return f"of shape {theirs.shape} there, {mine.shape} here"
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(mine.astype(float) - theirs.astype(float))
    largest = np.abs(theirs, where=np.isfinite(theirs), out=np.zeros(theirs.shape)).max(initial=0.0)
    same = (difference <= tolerance * largest) | (mine == theirs)
    same |= np.isnan(mine) & np.isnan(theirs)
    if same.all():
        return ""
    return f"{(~same).sum()} of {same.size} values differ, the first by {difference[~same][0]:.2g}"


def _apart_from(mine: Array, theirs: Array) -> str:
    """Where the sums over two schedules differ first, in words; empty where they do not."""
    for number, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        if not math.isclose(one, other, rel_tol=_SAME_RATES):
            return f"another in steps {number * _BLOCK} to {(number + 1) * _BLOCK - 1}"
    return ""


def close(mine: Tensor, stored: Tensor) -> bool:
    """Whether two tensors agree to rounding, which differs from machine to machine."""
    tolerance = _SAME.get(mine.dtype, 1e-4)
    return not _apart(mine.cpu().numpy(), stored.cpu().numpy(), tolerance)
