r"""The step of "weak2" that a problem asks for, found by trying.

A step is halved until what the scheme leaves of a flow of the noise is small. That is looked at
where paths of a short run go: the flow of an increment is taken in one step and in two, for
increments of either sign, whose odd errors cancel. Their mean, times the number of flows of a run,
is what the mean of the direction would be off by. It is added up over the clock 1.5 / V, and its
root mean square over the points counts; the errors in exact laws at T = 1 are of that size
(tests/solvers/test_step_choice.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_sde.sdes import DirectionDiffusion
from manifold_sde.solvers.schemes import StepNoise
from manifold_sde.solvers.schemes.weak2 import Weak2

#: Steps that are tried, times the trace V of the covariance: 1/4, 1/8, and so on.
_LARGEST, _TRIED = 0.25, 11
#: Paths of the short run, its longest clock times V, and its most steps.
_PATHS, _SPAN, _STEPS = 48, 1.0, 128
#: Points at which flows are compared, and pairs of increments at each.
_POINTS, _PAIRS = 48, 32
#: Clock, times V, over which errors add up: what is made long before is forgotten.
_MEMORY = 1.5
#: Weak error that is asked for where nothing is said.
ACCURACY = 1e-3


@dataclass(frozen=True)
class StepChoice:
    """A step, and what is expected of it.

    Attributes:
        h: Step of the clock u.
        error: Error of the mean of the direction that it is expected to make.
    """

    h: float
    error: float


def choose_step(
    equation: DirectionDiffusion, directions: Tensor, trace: float, accuracy: float
) -> StepChoice:
    """The largest step whose error is at most so large.

    It depends on the problem and the starts alone.

    Args:
        equation: The equation in its Stratonovich form, which has seen the starts.
        directions: Unit vectors (n, D) on the manifold, where paths start.
        trace: Largest V at the starts.
        accuracy: Largest error of the mean of the direction.

    Returns:
        The step, or the smallest one that is tried.
    """
    sde = equation.prepare(compiled="c")
    few = directions[torch.arange(_PATHS, device=directions.device) * len(directions) // _PATHS]
    generator = torch.Generator().manual_seed(0x5EED)

    def normals(count: int) -> Tensor:
        numbers = torch.randn(sde.n_noise, count, generator=generator, dtype=torch.float64)
        return numbers.to(directions)

    choice = StepChoice(_LARGEST / trace, math.inf)
    with torch.no_grad():
        for tried in range(_TRIED):
            h = _LARGEST * 2.0**-tried / trace
            points, lost = _run(sde, few.T.contiguous(), h, _SPAN / trace, normals)
            error = math.inf
            if not lost:
                flows = 2.0 * _MEMORY / (trace * h)
                error = flows * _flow_error(sde, points, h, normals)
            choice = StepChoice(h, error)
            if error <= accuracy:
                break
    return choice


def _run(
    sde: DirectionDiffusion, x: Tensor, h: float, span: float, normals: Callable[[int], Tensor]
) -> tuple[Tensor, bool]:
    """Points that a short run from states (D, n) passes, (D, k), and whether it lost a path."""
    size, scheme, basis = x.new_tensor(h), Weak2(), sde.reference_basis(x)
    seen, n = [x], x.shape[1]
    for _ in range(min(_STEPS, max(1, math.ceil(span / h)))):
        noise = StepNoise(math.sqrt(h) * normals(n), lambda: normals(n))
        x, basis = scheme.step(sde, x, basis, size, noise)
        if not bool(torch.isfinite(x).all()):
            return x, True
        seen.append(x)
    # Some points of each time, of other paths each time.
    every = torch.stack(seen)
    count = torch.arange(_POINTS, device=x.device)
    times = count * len(seen) // _POINTS
    return every[times, :, count * 7 % n].T.contiguous(), False


def _flow_error(
    sde: DirectionDiffusion, points: Tensor, h: float, normals: Callable[[int], Tensor]
) -> float:
    """Mean error of a flow of the noise over points (D, k), root mean square; else infinite."""
    half = math.sqrt(0.75 * h) * normals(points.shape[1] * _PAIRS)
    w = torch.stack([half, -half], -1).flatten(1)
    x = points.repeat_interleave(2 * _PAIRS, 1)
    basis = sde.reference_basis(points).repeat_interleave(2 * _PAIRS, -1)
    whole = Weak2.noise_flow(sde, x, basis, w)
    middle = Weak2.noise_flow(sde, x, basis, 0.5 * w)
    halves = Weak2.noise_flow(sde, middle, basis, 0.5 * w)
    ends = [sde.retract(z, basis, fresh_steps=1)[0] for z in (whole, halves)]
    mean = (ends[0] - ends[1]).unflatten(1, (points.shape[1], -1)).mean(-1)
    found = float(mean.square().sum(0).mean().sqrt())
    return found if math.isfinite(found) else math.inf
