"""Brownian paths of two steps that belong together, and what they make of variances."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from manifold_sde import DirectionDiffusion, problems
from manifold_sde.solvers.brownian import BrownianPath
from manifold_sde.solvers.coupled_path import CoupledPath, Coupling
from manifold_sde.solvers.coupling import coupled, coupled_values

LEVEL = 2
#: Deviations in standard errors: false alarm 6e-5 for a two-sided test.
LIMIT = 4.0


def path(mirrored: bool, n: int = 4, **options: object) -> CoupledPath:
    return CoupledPath(Coupling(LEVEL, mirrored), 3, 2, n, cell=2.0, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("compiled", [False, True])
def test_halves_change_places(compiled: bool) -> None:
    """The mirrored path is the other with intervals exchanged, to the last level."""
    plain, mirror = (path(m, compiled=compiled) for m in (False, True))
    for level in (0, 1, LEVEL):
        assert torch.equal(mirror.increments(level, 0, 4), plain.increments(level, 0, 4))
        # Numbers of the larger step change sign; smaller steps have those of the other half.
        for position in (0, 3):
            torch.testing.assert_close(
                mirror.auxiliary(level, position, 2), -plain.auxiliary(level, position, 2)
            )
    for level in (LEVEL + 1, LEVEL + 3):
        half = 1 << (level - LEVEL - 1)
        order = torch.arange(4 * half) ^ half
        theirs = plain.increments(level, 0, 4 * half)
        torch.testing.assert_close(mirror.increments(level, 0, 4 * half), theirs[order])
        got = mirror.dyadic(level, torch.full((4,), half))
        torch.testing.assert_close(got, theirs[0])
        for k in range(4 * half):
            assert torch.equal(
                mirror.auxiliary(level, k, 2), -plain.auxiliary(level, int(order[k]), 2)
            )


def test_the_numbers_of_the_larger_step_are_normal_and_independent_of_its_increment() -> None:
    """Covariance of increment, number and those of the halves: 100,000 paths, each entry."""
    n = 100_000
    one = path(False, n)
    names = [
        one.increments(LEVEL, 1, 1)[0, 0] / 0.5**0.5,
        one.auxiliary(LEVEL, 1, 2)[0],
        one.auxiliary(LEVEL, 1, 2)[1],
        one.auxiliary(LEVEL, 2, 2)[0],
        one.auxiliary(LEVEL + 1, 2, 2)[0],
        one.auxiliary(LEVEL + 1, 3, 2)[0],
    ]
    want = torch.eye(6, dtype=torch.float64)
    want[1, 4:] = want[4:, 1] = 3.0**-0.5
    found = torch.stack(names)
    off = (found @ found.T / n - want).abs()
    # Products of two normals have a variance of 1 + rho^2, at most 2.
    assert float(off.max()) < LIMIT * (2.0 / n) ** 0.5
    fourth = found[1].pow(4).mean()
    assert abs(float(fourth) - 3.0) < LIMIT * (96.0 / n) ** 0.5


def differences(kind: str) -> list[float]:
    """Median of what a fine and a coarse value differ by, at three steps, noise on the 2-sphere.

    The variance has tails (a kurtosis of up to 400); the median has an error of 4 %.
    """
    problem = problems.great_sphere(4, noise_scale=0.6)
    found = []
    for k in range(3):
        simulation = coupled(
            DirectionDiffusion(problem, "stratonovich"),
            problem.minimizer,
            [0.0, 1.0],
            n_paths=2000,
            dt=0.5 * 4.0**-k,
            method="weak2",
            seed=k,
        )
        values = coupled_values(
            simulation,
            lambda y: (y[:, 0] + 0.5 * y[:, 1]).square(),
            (0, 1),
            mirrored=kind == "mirrored",
        )
        ((coarse, fine), valid) = next(values)
        assert bool(valid.all())
        found.append(float((fine - coarse)[-1].abs().median()))
    return found


def test_mirrored_paths_are_of_strong_order_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fourth of the step: a fourth of the difference, where single paths have a half.

    The second broken twin has numbers of its own at the larger step.
    """
    mirrored, single = (differences(kind) for kind in ("mirrored", "single"))
    for larger, smaller in pairwise(mirrored):
        assert smaller < larger / 3.2
    for larger, smaller in pairwise(single):
        assert smaller > larger / 2.4
    monkeypatch.setattr(CoupledPath, "auxiliary", BrownianPath.auxiliary)
    for joined, apart in zip(mirrored, differences("mirrored"), strict=True):
        assert apart > 1.5 * joined
