"""Parts that are off by a departure of a given size, for the model of the calibration.

Each takes a subject that a check has been made of and the size that the check declares, and returns
the subject with a part that is wrong by so much. What of the runs is not wrong is taken over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy import optimize

from manifold_sde import SphericalNoise, problems
from manifold_sde.problem import Problem
from manifold_sde.solvers import run_sgd, solve
from manifold_sde.verification import Effort, Subject
from manifold_sde.verification.exact import AngleLaw
from manifold_sde.verification.laws.known_laws import clocks
from manifold_sde.verification.laws.long_runs import LongRuns
from manifold_sde.verification.laws.short_runs import ShortRuns

NOISE_SCALE = 0.3
_SHARED = ("degeneracy", "around", "regime", "pilot", "functionals")

Key = tuple[Any, ...]


def problem(noise_scale: float = NOISE_SCALE) -> Problem:
    """The well-conditioned design, whose limit SGD reaches at the step sizes here; D = 4."""
    noise = SphericalNoise(noise_scale)
    return problems.normalized_linear(4, 2, design="orthogonal", noise=noise)


def _louder(size: float) -> Problem:
    return problem(NOISE_SCALE * math.sqrt(1.0 + size))


def louder_solver(size: float, chosen: Callable[[Any], bool]) -> Callable[..., Any]:
    """A solver whose noise has 1 + size times the variance, for the equations chosen."""
    other = _louder(size)

    def wrong(sde: Any, *args: Any, **options: Any) -> Any:
        if chosen(sde):
            same = {"ratio": sde.ratio} if type(sde).__name__ == "FixedRatioDiffusion" else {}
            sde = type(sde)(other, calculus=sde.calculus, **same)
        return solve(sde, *args, **options)

    return wrong


def louder_sgd(
    size: float, chosen: Callable[[float, float], bool] = lambda *_: True
) -> Callable[..., Any]:
    """SGD whose noise has 1 + size times the variance, at the rates chosen."""
    other = _louder(size)

    def wrong(made: Problem, x0: Any, lr: float, decay: float, *args: Any, **options: Any) -> Any:
        return run_sgd(other if chosen(lr, decay) else made, x0, lr, decay, *args, **options)

    return wrong


class Limits:
    """Broken parts of the limit theorems, at an effort."""

    def __init__(self, effort: Effort) -> None:
        self.effort = effort

    def _taking_over(
        self, subject: Subject, broken: Subject, stale: Callable[[Key], bool]
    ) -> Subject:
        source, made = (ShortRuns.of(s, self.effort) for s in (subject, broken))
        for part in _SHARED:
            made.__dict__[part] = getattr(source, part)
        for (effort, *key), run in subject.shared.items():
            if effort == self.effort and not stale(tuple(key)):
                broken.shared[effort, *key] = run
        return broken

    def _noise_for_clock(self, subject: Subject, size: float) -> float:
        """By how much more noise takes the clock of the directions off by a size.

        With V = tr Sigma and t_0 without noise in it, the clock times V is ln(1 + 2 V t_0) / 2 at
        the end, exactly: the norm grows with the noise, so that it takes more than the size.
        """
        elapsed = ShortRuns.of(subject, self.effort).regime.elapsed[-1]
        grown = 2.0 * float(subject.problem.noise_trace(subject.start)) * elapsed
        return math.expm1((1.0 + size) * math.log1p(grown)) / grown - 1.0

    def sgd(self, subject: Subject, size: float) -> Subject:
        """All runs of SGD."""
        noise = self._noise_for_clock(subject, size)
        broken = replace(subject, run_sgd=louder_sgd(noise))
        return self._taking_over(subject, broken, lambda key: key[0] in ("sgd", "limit of sgd"))

    def norms(self, subject: Subject, size: float) -> Subject:
        """SGD whose noise has another variance, where norms are looked at."""
        broken = replace(subject, run_sgd=louder_sgd(size))
        return self._taking_over(subject, broken, lambda key: key[0] in ("sgd", "limit of sgd"))

    def steps(self, subject: Subject, size: float) -> Subject:
        """SGD whose steps are looked at one by one."""
        return replace(subject, run_sgd=louder_sgd(size))

    def _sgd_at(
        self, subject: Subject, size: float, chosen: Callable[[float, float], bool]
    ) -> Subject:
        def stale(key: Key) -> bool:
            return key[0] in ("sgd", "limit of sgd") and chosen(key[1].lr, key[1].weight_decay)

        noise = self._noise_for_clock(subject, size)
        broken = replace(subject, run_sgd=louder_sgd(noise, chosen))
        return self._taking_over(subject, broken, stale)

    def sgd_without_decay(self, subject: Subject, size: float) -> Subject:
        """SGD where there is no weight decay."""
        return self._sgd_at(subject, size, lambda _, decay: decay == 0.0)

    def sgd_at_the_second_rates(self, subject: Subject, size: float) -> Subject:
        """SGD at the second of two ratios."""
        ratio = ShortRuns.of(subject, self.effort).regime.runs[1].ratio
        return self._sgd_at(subject, size, lambda lr, decay: abs(decay / lr - ratio) < 1e-6 * ratio)

    def limiting(self, subject: Subject, size: float) -> Subject:
        """The solver of (13)."""
        name = "LimitingDiffusion"
        noise = self._noise_for_clock(subject, size)
        solver = louder_solver(noise, lambda sde: type(sde).__name__ == name)
        broken = replace(subject, solve=solver)
        return self._taking_over(subject, broken, lambda key: key[0] == name)

    def decaying(self, subject: Subject, size: float) -> Subject:
        """The solver of (8) where there is weight decay."""
        noise = self._noise_for_clock(subject, size)
        solver = louder_solver(noise, lambda sde: getattr(sde, "ratio", 0.0) > 0.0)
        broken = replace(subject, solve=solver)
        return self._taking_over(
            subject, broken, lambda key: key[0] == "FixedRatioDiffusion" and key[1] > 0.0
        )


def cosine_deviation(variance: float) -> float:
    """Standard deviation of the cosine of a centred normal angle."""
    return math.sqrt(0.5 * (1.0 + math.exp(-2.0 * variance)) - math.exp(-variance))


def noise_for_shift(effect: float, variances: Sequence[float]) -> float:
    """By how much more noise takes the mean cosine off by so many deviations, where most.

    E cos = e^{-v/2} for a normal angle of variance v about its start, exactly.

    Args:
        effect: The shift in standard deviations of the cosine.
        variances: Variances v of the angle at the clocks that are looked at.

    Returns:
        x, where the noise has 1 + x times the variance.
    """

    def beyond(x: float) -> float:
        shifts = [
            (math.exp(-0.5 * v) - math.exp(-0.5 * v * (1.0 + x))) / cosine_deviation(v)
            for v in variances
        ]
        return max(shifts) - effect

    return float(optimize.brentq(beyond, 0.0, 1e3))


def spread_for_shift(effect: float) -> float:
    """Variance of a normal angle whose mean cosine is so many deviations of a uniform one's."""
    return -2.0 * math.log(effect / math.sqrt(2.0))


class Equilibria:
    """Broken parts of the checks of ergodicity, at an effort."""

    def __init__(self, effort: Effort) -> None:
        self.effort = effort

    def direction(self, subject: Subject, effect: float) -> Subject:
        """A solver with so much more noise that the mean cosine is off by the effect at a clock."""
        law = AngleLaw.of(subject.problem, subject.start)
        times = clocks(LongRuns.of(subject, self.effort))
        size = noise_for_shift(effect, [law.at_clock(u).variance for u in times])
        return replace(subject, solve=louder_solver(size, lambda _: True))

    def _ending(
        self, subject: Subject, angles_of: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    ) -> Subject:
        """With other angles, from the widest direction, at the end of the runs."""
        runs = LongRuns.of(subject, self.effort)
        ends = runs.ends
        circle = subject.problem.facts.circle
        assert circle is not None
        axis = torch.from_numpy(runs.functionals.axes[0])
        zero = circle.angle(circle.center + circle.radius * axis)
        angles = (circle.angle(ends.ys[-1]) - zero).numpy()
        rng = np.random.default_rng(subject.seed)
        points = circle.point(torch.from_numpy(angles_of(angles, rng)) + zero)
        ys = ends.ys.clone()
        ys[-1] = points * ends.ys[-1].norm(dim=1, keepdim=True)
        return replace(subject, solve=lambda *_, **__: replace(ends, ys=ys))

    def one_start(self, subject: Subject, effect: float) -> Subject:
        """Runs from the first start that end about one point: a mean is off by the effect."""
        n = LongRuns.of(subject, self.effort).runs_per_start

        def angles(right: np.ndarray, rng: np.random.Generator) -> np.ndarray:
            wrong = right.copy()
            wrong[:n] = rng.normal(0.0, math.sqrt(spread_for_shift(effect)), n)
            return wrong

        return self._ending(subject, angles)

    def all_starts(self, subject: Subject, effect: float) -> Subject:
        """All runs end about one point: a mean is off by the effect."""

        def angles(right: np.ndarray, rng: np.random.Generator) -> np.ndarray:
            return rng.normal(0.0, math.sqrt(spread_for_shift(effect)), len(right))

        return self._ending(subject, angles)

    def dependent(self, subject: Subject, correlation: float) -> Subject:
        """Each run knows of the one that is three quarters of all runs before it."""

        def angles(right: np.ndarray, rng: np.random.Generator) -> np.ndarray:
            wrong, few = right.copy(), len(right) // 4
            noise = rng.normal(0.0, math.sqrt(-2.0 * math.log(correlation)), few)
            wrong[-few:] = right[:few] + noise
            return wrong

        return self._ending(subject, angles)
