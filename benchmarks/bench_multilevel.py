"""An expectation to a root mean square error of 1e-3: mirrored paths against single ones.

The peer is the textbook's multilevel estimator: Heun's scheme at two steps on one Brownian path,
half of the squared error for the bias, and as many paths of a level as its variance is worth
(Giles, Operations Research 56, 2008). Both are compiled, begin with the same largest step, and have
to give the value of the exact law.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from benchmarks.rows import Row, in_turns, one_thread
from manifold_sde import DirectionDiffusion, problems
from manifold_sde.problem import Problem
from manifold_sde.solvers import multilevel
from manifold_sde.solvers.coupling import coupled, coupled_values, moments_at
from manifold_sde.solvers.moments import Moments
from manifold_sde.verification.exact import CircleDiffusion, SphereLaw

TITLE = "An expectation to an error of 1e-3, by several steps"
PEERS: tuple[str, ...] = ()
TOLERANCE, QUICK_TOLERANCE = 1e-3, 3e-2
TARGET = 0.2
_PILOT, _FIRST, _LEVELS = 256, 3, 12
_SEEDS = itertools.count()


@dataclass(frozen=True)
class Case:
    """An expectation that is known: of a function, at a value of the clock, from a largest step."""

    problem: Problem
    function: Callable[[Tensor], Tensor]
    clock: float
    dt: float
    exact: float


def cases() -> dict[str, Case]:
    """Noise that does not commute: a 2-sphere, and a circle whose curvature varies."""
    sphere = problems.great_sphere(4, noise_scale=0.6)
    square = 1.0 / 3.0 + 2.0 / 3.0 * math.exp(-2.0 * SphereLaw.of(sphere).rate(2))
    circle = problems.varying_circle(noise_scale=0.6)
    cosine = float(CircleDiffusion.reversible(circle).expectation(np.cos, 3.0))
    return {
        "2-sphere": Case(
            sphere,
            lambda y: (y[:, 0] + 0.5 * y[:, 1]).square(),
            2.0,
            1.0,
            square + 0.125 * (1.0 - square),
        ),
        "varying circle": Case(circle, lambda y: y[:, 0], 3.0, 1.0, cosine),
    }


def single_paths(case: Case, tolerance: float) -> float:
    """The textbook's estimator."""
    sde = DirectionDiffusion(case.problem, "stratonovich")
    levels: list[Moments] = []
    while True:
        for level in range(len(levels), max(_FIRST, len(levels) + 1)):
            levels.append(_level(sde, case, level, _PILOT))
        while True:  # until no level lacks more than one path in a hundred
            costs = [2.0**k * (1.5 if k else 1.0) for k in range(len(levels))]
            variances = [float(m.variance[0]) for m in levels]
            total = sum(math.sqrt(v * c) for v, c in zip(variances, costs, strict=True))
            more = [
                math.ceil(2.0 / tolerance**2 * math.sqrt(v / c) * total) - int(m.count[0])
                for v, c, m in zip(variances, costs, levels, strict=True)
            ]
            if all(n <= 0.01 * float(m.count[0]) for n, m in zip(more, levels, strict=True)):
                break
            for k, count in enumerate(more):
                if count > 0:
                    have = int(levels[k].count[0])
                    levels[k] = levels[k].merge(_level(sde, case, k, min(count, 7 * have)))
        last = max(abs(float(levels[-1].mean[0])), abs(float(levels[-2].mean[0])) / 2.0)
        if last <= tolerance / math.sqrt(2.0) or len(levels) == _LEVELS:
            return sum(float(m.mean[0]) for m in levels)


def _level(sde: DirectionDiffusion, case: Case, level: int, count: int) -> Moments:
    largest = coupled(
        sde,
        case.problem.minimizer,
        [0.0, case.clock],
        n_paths=max(2, count),
        dt=case.dt * 2.0 ** -max(0, level - 1),
        method="heun",
        seed=next(_SEEDS),
        compile=True,
    )
    total: Moments | None = None
    for values, valid in coupled_values(largest, case.function, (0, 1) if level else (0,)):
        new = moments_at((values[1] - values[0] if level else values[0])[-1:], valid[-1:])
        total = new if total is None else total.merge(new)
    assert total is not None
    return total


def rows(*, quick: bool = False) -> list[Row]:
    """The rows: processor time for one expectation."""
    tolerance = QUICK_TOLERANCE if quick else TOLERANCE
    found = []
    with one_thread():
        for name, case in cases().items():
            values: dict[str, list[float]] = {"ours": [], "peer": []}

            def ours(case: Case = case, into: list[float] = values["ours"]) -> None:
                estimate = multilevel(
                    DirectionDiffusion(case.problem),
                    case.problem.minimizer,
                    case.clock,
                    case.function,
                    tolerance=tolerance,
                    dt=case.dt,
                    compile=True,
                    seed=len(into),
                )
                into.append(float(estimate.mean))

            def peer(case: Case = case, into: list[float] = values["peer"]) -> None:
                into.append(single_paths(case, tolerance))

            timing = in_turns(ours, peer, 1 if quick else 3)
            off = {who: max(abs(v - case.exact) for v in them) for who, them in values.items()}
            assert max(off.values()) < 4.0 * tolerance, (name, off)
            note = f"off by at most {off['ours']:.1g}, and the peer by {off['peer']:.1g}"
            row = timing.row(name, "single, Heun", unit="ms", target=TARGET, note=note)
            found.append(row)
    return found
