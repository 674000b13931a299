r"""Averages under the equilibrium in time.

Kept moments of a path in the time t count alike. Those of the direction diffusion are moments of
the clock u, and :math:`dt = \|Y\|^4 du`: each is weighted by :math:`\|Y\|^4`, which at every ratio
C > 0 is proportional to :math:`e^{a} / E` once (direction, norm) is in its joint equilibrium
(:mod:`manifold_sde.solvers.bookkeeping`; the initial norm is forgotten at the rate 2 V).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manifold_sde.errors import ArgumentError, NotMixedWarning
from manifold_sde.solvers.moments import Observable, evaluate

if TYPE_CHECKING:
    from manifold_sde.solvers.solution import Solution

#: Independent parts from which a standard error is taken: paths, or else batches in time.
_FEWEST = 20
#: Consecutive moments of a batch in time, at least.
_SHORTEST_BATCH = 10
#: Standard errors by which two halves of a run in equilibrium are never apart (6e-7).
_DRIFT = 5.0


@dataclass(frozen=True)
class EquilibriumAverage:
    """An average under the equilibrium pi, in time.

    Attributes:
        mean: The average (...).
        standard_error: Its standard error (...).
        effective_sample_size: Number of independent draws from pi that would be as good (...).
        burn_in: Time from which on states were counted.
        paths: Number of paths that were counted; lost ones are not.
    """

    mean: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor
    burn_in: float
    paths: int


def average(
    solution: Solution, function: Observable, weights: Tensor | None, burn_in: float | None
) -> EquilibriumAverage:
    """Average of a function over the kept states of a solution.

    The average is a ratio of sums, and its error is that of the ratio, linearised: from the paths
    (or antithetic pairs) if there are 20 or more, and from batches of consecutive times of each
    path otherwise. Batches that are shorter than the correlation time give too small an error.

    Args:
        solution: The solution.
        function: Function of states (n, D) with a value for each, (n, ...).
        weights: Weights of the kept states, (K,) or (K, n), not negative; ``None`` for equal ones.
        burn_in: Time from which on states count; by default half of the time of the run.
    """
    begin = _burn_in(solution.ts, burn_in)
    late = solution.ts >= begin
    single = solution.ys.dim() == 2
    states = (solution.ys[:, None] if single else solution.ys)[late.to(solution.ys.device)]
    if weights is None:
        weights = states.new_ones(states.shape[:2])
    else:
        weights = (weights[:, None] if single else weights)[late.to(weights.device)]
    alive = torch.isfinite(states).all(-1).all(0)
    pairs = bool(solution.config.get("antithetic", False)) and not single
    if pairs:
        alive = alive.reshape(-1, 2).all(1).repeat_interleave(2)
    states, weights = states[:, alive], weights[:, alive]
    moments, paths = states.shape[:2]
    units = paths // 2 if pairs else paths
    batches = 1 if units >= _FEWEST else -(-_FEWEST // max(1, units))
    shortest = 1 if batches == 1 else _SHORTEST_BATCH
    if not units or batches * shortest > moments:
        raise ArgumentError(
            "there are too few states for an average with a standard error",
            received=f"{paths} paths that were not lost, {moments} kept times from {begin:g} on",
            expected=f"{_FEWEST} paths or more (pairs, if antithetic), or paths times kept times "
            f"of {_FEWEST * _SHORTEST_BATCH} or more",
            remedy="n_paths=100, or ts=torch.linspace(0, T, 1000); observables keep no paths",
        )
    values = torch.stack([evaluate("f", function, y)[0] for y in states])
    w = weights.to(torch.float64)
    w = (w / w.mean()).reshape(moments, paths, *(1,) * (values.dim() - 2))
    mean = (w * values).sum((0, 1)) / w.sum()
    parts = _parts(w, values, batches, units)
    error = _error(parts.flatten(0, 1))
    _warn_of_drift(w, values, batches, units)
    spread = (w * (values - mean).square()).sum((0, 1)) / w.sum()
    size = torch.where(error > 0, spread / error.square(), math.inf).clamp(max=moments * paths)
    like = solution.ys.dtype
    return EquilibriumAverage(mean.to(like), error.to(like), size.to(like), begin, paths)


def _parts(w: Tensor, values: Tensor, batches: int, units: int) -> Tensor:
    """What batches in time of independent units add to the error of a weighted mean.

    Args:
        w: Weights (K, n, ...).
        values: Values (K, n, ...).
        batches: Number of batches.
        units: Number of units: paths, or pairs of consecutive ones.

    Returns:
        Tensor (batches, units, ...), whose sum is 0.
    """
    mean = (w * values).sum((0, 1)) / w.sum()
    residual = w * (values - mean) / w.sum()
    parts = torch.stack([part.sum(0) for part in residual.tensor_split(batches)])
    return parts.reshape(batches, units, -1, *parts.shape[2:]).sum(2)


def _error(parts: Tensor) -> Tensor:
    """Standard error of a mean from its independent parts (n, ...)."""
    n = len(parts)
    return (parts.square().sum(0) * (n / (n - 1.0))).sqrt()


def _warn_of_drift(w: Tensor, values: Tensor, batches: int, units: int) -> None:
    """Warn if the two halves of what is counted do not have the same mean."""
    half, each = len(w) // 2, max(1, batches // 2)
    if half < each:
        return
    sides = [(w[:half], values[:half]), (w[half:], values[half:])]
    first, last = (((a * v).sum((0, 1)) / a.sum()) for a, v in sides)
    before, after = (_parts(a, v, each, units) for a, v in sides)
    if batches == 1:
        error = _error((after - before)[0])
    else:
        error = (
            _error(before.flatten(0, 1)).square() + _error(after.flatten(0, 1)).square()
        ).sqrt()
    apart = (last - first).abs()
    if not bool((apart > _DRIFT * error).any()):
        return
    worst = int((apart / error.clamp(min=1e-300)).argmax())
    a, b, e = (float(v.reshape(-1)[worst]) for v in (first, last, error))
    warnings.warn(
        f"the run has not reached its equilibrium: an average of {a:.4g} in the first half of what "
        f"is counted, {b:.4g} in the second, apart by {abs(b - a) / max(e, 1e-300):.0f} standard "
        "errors. Run longer, or begin later (burn_in)",
        NotMixedWarning,
        stacklevel=4,
    )


def _burn_in(ts: Tensor, burn_in: float | None) -> float:
    """The time from which on states count."""
    first, last = float(ts[0]), float(ts[-1])
    if burn_in is None:
        return 0.5 * (first + last)
    number = isinstance(burn_in, (int, float)) and not isinstance(burn_in, bool)
    if not number or not burn_in <= last:
        raise ArgumentError(
            "burn_in is not a time of the run",
            received=repr(burn_in),
            expected=f"a number up to {last:g}, in the time of the solution",
            remedy="leave it out for half of the run",
        )
    return float(burn_in)
